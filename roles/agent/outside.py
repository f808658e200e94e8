"""What every part of an agent works with: settings, ports, clock, and the trouble that it tells of.

Parts that own something of their own (`peers`, `watch`, `driver`) know no more of the agent than this, and what they
are handed besides.
"""

from __future__ import annotations

import datetime as dt
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

import trio

from juicebox_hsm.adapters.observation.tracing import Traces
from juicebox_hsm.adapters.stores.damage import telling
from juicebox_hsm.adapters.tls.certificate_end import no_certificate
from juicebox_hsm.consensus.types import RoleStatus
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.damage import Damages
from juicebox_hsm.host.events import EVENT_KEPT_MS
from juicebox_hsm.host.group import GroupState
from juicebox_hsm.host.readiness import OtherStore, Trouble, Troubles
from juicebox_hsm.hsm.messages import StepDownOk
from juicebox_hsm.ids import GroupId, HsmId
from juicebox_hsm.ports.hsm_transport import HsmTransport
from juicebox_hsm.ports.observation import EventMeter, Log
from juicebox_hsm.ports.rpc import RpcCaller
from juicebox_hsm.ports.store import Store
from juicebox_hsm.wire.rpc import StoreDamage
from roles.clock import OwnClock
from roles.words import own_sentence, store_damaged


@dataclass(frozen=True, slots=True)
class Timings:
    """Periods and deadlines of the agent in seconds (agent.md 15); tests shorten them."""

    heartbeat_s: float = 0.25
    silence_s: float = 1.0
    replicate_timeout_s: float = 0.5
    leader_look_s: float = 0.1
    leader_hint_first_s: float = 0.25
    leader_hint_again_s: float = 1.0
    watch_idle_first_s: float = 0.025
    watch_idle_max_s: float = 1.0
    catch_up_unready_s: float = 30.0
    become_leader_s: float = 5.0
    peer_refresh_s: float = 10.0
    peer_status_s: float = 2.0
    discovery_poll_s: float = 1.0
    register_s: float = 60.0
    register_retry_s: float = 10.0
    witness_grace_s: float = 60.0
    witness_poll_s: float = 0.5
    compact_pause_s: float = 1.0
    hole_s: float = 5.0
    commit_wait_s: float = 60.0
    watchdog_s: float = 1.0
    gossip_s: float = 0.1
    gossip_idle_s: float = 0.5
    tenants_refresh_s: float = 5.0
    dispatch_s: float = 0.5
    dispatch_idle_s: float = 2.0
    backlog_s: float = 5.0
    shutdown_s: float = 20.0


def wall_clock_ms() -> int:
    """Return Unix milliseconds."""
    return time.time_ns() // 1_000_000


INSTANCE_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """Settings of one agent. `url` is the address others reach it at; `default_rate` is in requests per second.

    `certificate_end` tells when the cluster certificate in service ends (UTC), None without TLS. `instance` tells this
    process from one that runs a copy of its HSM.
    """

    name: str
    url: str
    build: str
    default_rate: int = 10
    event_kept_ms: int = EVENT_KEPT_MS
    timings: Timings = field(default_factory=Timings)
    now_ms: Callable[[], int] = wall_clock_ms
    certificate_end: Callable[[], dt.datetime | None] = no_certificate
    instance: bytes = field(default_factory=partial(os.urandom, INSTANCE_BYTES))


class Outside:
    """Settings, ports and clock of one agent; `hsm_id` is None until the HSM has answered. Create it inside Trio."""

    def __init__(
        self,
        config: AgentConfig,
        hsm: HsmTransport,
        store: Store,
        rpc: RpcCaller,
        metrics: EventMeter,
        log: Log,
        nursery: trio.Nursery,
        traces: Traces | None = None,
    ) -> None:
        self.config = config
        self.now_ms = config.now_ms
        """Returns Unix milliseconds."""
        self.hsm = hsm
        self.damages = Damages()
        self.store = telling(store, self.note_damage)
        self.rpc = rpc
        self.metrics = metrics
        self.log = log
        self.traces = traces
        self.nursery = nursery
        """For tasks that may last as long as the agent; what one of them raises ends it."""
        self.started_at = trio.current_time()
        self.clock = OwnClock(config.now_ms, metrics, log)
        self.hsm_id: HsmId | None = None
        self.troubles = Troubles()
        """What is being tried again, and keeps us from being ready."""

    @property
    def timings(self) -> Timings:
        """The periods and deadlines in force."""
        return self.config.timings

    def note_trouble(self, code: Code, error: RealmError, group: GroupId | None = None) -> None:
        """Log trouble that is being retried and report not ready until `clear_trouble`."""
        self.note(Trouble(code, str(error) or type(error).__name__, group))

    def note(self, trouble: Trouble | OtherStore) -> None:
        """Do the same with trouble whose facts are known."""
        if self.troubles.note(trouble):
            self.log.warning("trouble, retrying", code=trouble.code.word, reason=own_sentence(trouble))
        self.metrics.count("agent.trouble", what=trouble.code.word)

    def note_damage(self, damage: StoreDamage) -> None:
        """Tell of something damaged in the store, in the log once in a while; it is shown until it is long not met."""
        self.metrics.count("agent.store.damaged", kind=damage.kind.name.lower())
        if self.damages.met(damage, trio.current_time()):
            self.log.error("the store is damaged", reason=store_damaged(damage))

    def clear_trouble(self, code: Code, group: GroupId | None = None) -> None:
        """Forget trouble."""
        if self.troubles.clear(code, group):
            about = {} if group is None else {"group": group.hex()}
            self.log.info("trouble over", code=code.word, **about)


class Roles(Protocol):
    """Who takes on the roles that the HSM reports, and has it leave them."""

    def adopt(self, group: GroupState, status: RoleStatus) -> None:
        """Apply a role the HSM reported."""
        ...

    async def step_down(self, group: GroupState, *, force: bool, why: str) -> StepDownOk | None:
        """Ask the HSM to leave leadership of `group`; None when it does not lead."""
        ...
