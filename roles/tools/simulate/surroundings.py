"""What everything in a simulated run stands in: clock, chance, network, store, keys, trace, judge.

The parts of a run ask it for what is theirs and tell it what happened; who else there is, `world` knows.
"""

from __future__ import annotations

import random
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.history import Call
from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.hsm.messages import Request, Response, Status
from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.errors import HsmGone
from juicebox_hsm.wire.rpc import AppOk
from roles.agent.outside import Timings
from roles.tools.simulate.judge import Judge, Violation
from roles.tools.simulate.keyring import Keyring
from roles.tools.simulate.network import Network
from roles.tools.simulate.notes import Notes
from roles.tools.simulate.profiles import Profile
from roles.tools.simulate.scheduling import VirtualClock
from roles.tools.simulate.shape import Shape
from roles.tools.simulate.store import SimulatedStore, StoreView
from roles.tools.simulate.store_gate import StoreFaults

EPOCH_MS: Final = 1_800_000_000_000
"""Unix time at which every simulated realm begins."""
QUICK_STORE_S: Final = (0.0005, 0.005)
TIMINGS: Final = Timings(
    heartbeat_s=0.5,
    silence_s=2.0,
    replicate_timeout_s=1.0,
    leader_look_s=0.5,
    leader_hint_first_s=0.5,
    leader_hint_again_s=2.0,
    watch_idle_first_s=0.05,
    watch_idle_max_s=2.0,
    discovery_poll_s=2.0,
    compact_pause_s=2.0,
    watchdog_s=5.0,
    gossip_s=3.0,
    gossip_idle_s=8.0,
    dispatch_s=1.0,
)
"""Slower than shipped where a realm with nothing to do looks, asks and calls again: that was two thirds of a run."""


class Startable(Protocol):
    """A process, as its supervisor sees it."""

    name: str

    @property
    def is_up(self) -> bool:
        """Tell whether it runs."""
        ...

    def start(self) -> None:
        """Begin a life."""
        ...


@dataclass(frozen=True, slots=True)
class Failure:
    """A broken rule, at a virtual time."""

    rule: str
    detail: str
    at_s: float


class Surroundings:
    """Everything that parts of a run share."""

    def __init__(self, seed: int, profile: Profile, *, keeps_trace: bool = False) -> None:
        clock = VirtualClock()
        self.seed = seed
        self.profile = profile
        self.clock = clock
        self.notes = Notes(lambda: clock.now, keeps_all=keeps_trace)
        self.chance = self.split("world")
        self.timings = TIMINGS
        self.network = Network(clock, self.split("network"), self.notes)
        shape = self.shape = Shape.draw(self.split("shape"), profile.groups)
        self.store = SimulatedStore(
            self.split("store"),
            keeps_tombstones=shape.keeps_tombstones,
            removal_s=shape.removal_s,
            lazy_settled=shape.lazy_settled,
            sleep=clock.sleep,
        )
        self.keyring = Keyring(self.split)
        self.judge = Judge(
            self.store, self.keyring.records.expose(), self.keyring.macs, lambda: clock.now, self._violated
        )
        for what, secret in self.keyring.secrets():
            self.judge.secret(what, secret)
        self.realm = RealmId(b"")
        self.faults: dict[str, StoreFaults] = {}
        self.is_troubled = False
        self.closing = trio.Event()
        """Set when users shall come to an end."""
        self.is_over = False
        self.deaths: list[str] = []
        self.failure: Failure | None = None
        self.when_broken = trio.Event()
        self.calls_made = 0
        self.ended_at_s = 0.0
        self.nursery: trio.Nursery

    # --- what parts ask ------------------------------------------------------------------------------

    def split(self, name: str) -> random.Random:
        """Return the generator of one part: what others draw does not change what it draws."""
        return random.Random(f"{self.seed}:{name}")  # noqa: S311 - the whole point is that it can be repeated

    def now_ms(self) -> int:
        """Return the true Unix time in ms."""
        return EPOCH_MS + int(self.clock.now * 1000)

    def store_faults(self, process: str) -> StoreFaults:
        """Return the knobs of one process' way to the store; they outlive it."""
        faults = self.faults.get(process)
        if faults is None:
            faults = self.faults[process] = StoreFaults(latency_s=QUICK_STORE_S)
        return faults

    def store_view(self, process: str) -> StoreView:
        """Return the store as one life of a process sees it."""
        return self.store.view(process, self.store_faults(process))

    @property
    def counts(self) -> Counter[str]:
        """Return everything that was counted."""
        counts = self.notes.counts.copy()
        for name, count in self.store.counts.items():
            counts[f"store.{name}"] += count
        return counts

    # --- what parts tell -----------------------------------------------------------------------------

    def broken(self, rule: str, detail: str) -> None:
        """Note that a rule is broken and end the run."""
        if self.failure is None and not self.is_over:
            self.failure = Failure(rule, detail, self.clock.now)
            self.notes.tell(f"BROKEN {rule}: {detail}")
            self.when_broken.set()

    def _violated(self, violation: Violation) -> None:
        self.broken(violation.rule, violation.detail)

    def hsm_handle(self, process: str, hsm: Hsm, request: Request) -> Response:
        """Run one request of an HSM under the judge's eyes."""
        if type(request) is Status:
            return hsm.handle(request)  # two thirds of all requests, which change nothing
        reply = self.judge.hsm_handle(process, hsm, request)
        outcome = reply.name if hasattr(reply, "name") else type(reply).__name__
        self.notes.count(f"hsm.{type(request).__name__}.{outcome}")
        return reply

    def hsm_started(self, process: str, hsm: Hsm) -> None:
        """Note a new life of an HSM."""
        self.judge.hsm_started(process, hsm)

    def hsm_wrote(self, process: str, content: bytes) -> None:
        """Note what became durable."""
        self.judge.hsm_wrote(process, content)

    def hsm_crashed(self, process: str) -> None:
        """Note that an HSM's volatile state is gone."""
        self.judge.hsm_crashed(process)

    def called(self, call: Call) -> None:
        """Note a user's call."""
        self.calls_made += 1
        self.judge.call(call)

    def barrier(self) -> None:
        """Note that every process is dead at this moment."""
        self.notes.tell("everything is dead")
        self.judge.barrier()

    def client_failed(self, user: str, detail: str) -> None:
        """Note what an honest client must never see."""
        self.broken("client", f"{user}: {detail}")

    def logged(self, process: str, level: str, event: str, fields: Mapping[str, object]) -> None:
        """Note a log line."""
        told = " ".join(f"{name}={value}" for name, value in fields.items())
        self.notes.tell(f"log {process} {level} {event} {told}")
        self.judge.logged(f"{process} {level} {event} {told}")

    def died(self, process: Startable, error: BaseException) -> None:
        """Note that an error ended a process; what its supervisor would restart is started again."""
        leaves = list(_leaves(error))
        expected = all(isinstance(leaf, HsmGone | RealmError) for leaf in leaves)
        self.notes.tell(f"died {process.name}: {', '.join(type(leaf).__name__ for leaf in leaves)}")
        self.notes.count("process.died")
        if not expected:
            self.broken("process", "".join(traceback.format_exception(error)))
        if not self.is_troubled:
            self.deaths.append(f"{process.name}: {', '.join(map(repr, leaves))}")
        self.restart_after(process, self.chance.uniform(0.05, 1.0))

    def guarded(self, process: str, handlers: Mapping[str, Callable[..., Awaitable[Any]]]) -> dict[str, Any]:
        """Return handlers whose unforeseen errors break a rule; the RPC server alone would only log them."""

        def guard(name: str, handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
            async def guarded(body: Any, caller: Any) -> Any:
                try:
                    reply = await handler(body, caller)
                except RealmError:
                    raise
                except Exception as error:
                    self.broken("handler", f"{process} {name}: {''.join(traceback.format_exception(error))}")
                    raise
                if isinstance(reply, AppOk) and not body.handshake_only:
                    self.judge.answered(reply.noise)
                return reply

            return guarded

        return {name: guard(name, handler) for name, handler in handlers.items()}

    def restart_after(self, process: Startable, delay_s: float) -> None:
        """Start a process again after a while, unless somebody has."""
        self.clock.after(delay_s, self.restart, process)

    def restart(self, process: Startable) -> None:
        """Start a process unless it runs."""
        if not process.is_up and not self.is_over:
            self.notes.tell(f"start {process.name}")
            process.start()


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
