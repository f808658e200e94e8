"""What stands between a process and the simulated store: time, refusals, lost answers, and the process's own end.

Every call has one moment of effect between its start and its answer. What a caller did not see acknowledged may have
happened, may never happen, or happens later; what it saw acknowledged has happened. All chance is drawn from one
generator in the order of calls, so a schedule draws the same every time.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar, cast

import trio

from juicebox_hsm.ports.errors import StoreAmbiguous, StoreUnavailable
from roles.tools.simulate.store_data import Past, StoreData

CUT_OFF_S: Final = 0.5
"""How long a call waits before a store that is cut off counts as unavailable."""
SETTLED_LATE_S: Final = 0.25
"""How much later settled indexes follow their rows where a back end writes them lazily (storage.md 2.7)."""

EITHER_END: Final = 4.0
"""How much likelier than in between a call takes effect just when it begins, and as likely just when it ends."""

UNSEEN: Final = "the write was not seen to happen"

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]


@dataclass(slots=True)
class StoreFaults:
    """Knobs that the world turns while processes run. Probabilities are per call, times in seconds (lowest, highest).

    `half`: a write of unknown outcome, which was done, is done up to `late_s` later, or never. `stale`: a read of
    small shared facts shows a state up to `stale_s` old. Logs, trees, outbox rows and cursors are always read fresh.
    """

    latency_s: tuple[float, float] = (0.0, 0.0)
    refuse: float = 0.0
    half: float = 0.0
    late_s: tuple[float, float] = (0.0, 2.0)
    stale: float = 0.0
    stale_s: float = 2.0
    cut_off: bool = False


class _Gone(Exception):
    """The process that made the call is dead."""


class _Call:
    """A write under way, until its effect: what it does, and what it came to if that happened without its caller."""

    __slots__ = ("effect", "is_done", "late", "name", "result")

    def __init__(self, name: str, effect: Callable[[], object], late: Callable[[], object]) -> None:
        self.name = name
        self.effect = effect
        self.late = late
        self.is_done = False
        self.result: object = None


class Gate:
    """One process's way to the store; `crash` closes it for good."""

    def __init__(
        self,
        data: StoreData,
        chance: random.Random,
        faults: StoreFaults,
        *,
        lazy_settled: bool,
        sleep: Sleep | None = None,
    ) -> None:
        """`sleep` takes the place of waits that end with the process, where dead processes are never scheduled."""
        self.data = data
        self._sleep = sleep
        self.lazy_settled = lazy_settled
        self._chance = chance
        self._faults = faults
        self._ended = trio.Event()
        self._under_way: dict[int, _Call] = {}  # in the order of calls
        self._calls = 0

    def crash(self) -> None:
        """End the process: what is under way is answered at once, what was not applied may still be."""
        calls, self._under_way = self._under_way, {}
        for call in calls.values():
            if not call.is_done:
                self._leave_behind(call)
        self._ended.set()

    def freeze(self) -> None:
        """Let some of what is under way happen now: the process stands still, its requests are on the wire."""
        self.data.settle()
        for call in self._under_way.values():
            if not call.is_done and self._chance.random() < 0.5:
                self.data.counts[f"{call.name}.frozen"] += 1
                call.result = call.effect()
                call.is_done = True

    @property
    def is_closed(self) -> bool:
        """Tell whether the process is dead."""
        return self._ended.is_set()

    def token(self, bits: int) -> int:
        """Draw a number, for ids that the store itself makes."""
        return self._chance.getrandbits(bits)

    async def read(self, name: str, effect: Callable[[], T]) -> T:
        """Read at one moment of the call."""
        before_s, after_s = await self._enter(name)
        try:
            await self._pause(before_s)
            self.data.settle()
            found = effect()
            await self._pause(after_s)
        except _Gone:
            raise StoreUnavailable("the store is cut off") from None
        self.data.counts[f"{name}.ok"] += 1
        return found

    async def read_past(self, name: str, past: Callable[[], Past[T]]) -> T:
        """Read a value that may be some seconds old."""
        stale = self._faults.stale
        if not stale or self._chance.random() >= stale:
            return await self.read(name, lambda: past().now)
        when_s = self.data.now() - self._chance.uniform(0.0, self._faults.stale_s)
        self.data.counts[f"{name}.stale"] += 1
        return await self.read(name, lambda: past().at(when_s))

    async def write(
        self,
        name: str,
        effect: Callable[[], T],
        *,
        unseen: type[StoreAmbiguous | StoreUnavailable] = StoreUnavailable,
        late: Callable[[], object] | None = None,
    ) -> T:
        """Write at one moment of the call.

        `unseen` is what a caller gets whose write has an unknown outcome; `late` is the effect when it happens after
        the answer (default: the same).
        """
        before_s, after_s = await self._enter(name)
        faults = self._faults
        fate = ""
        if faults.half and self._chance.random() < faults.half:
            fate = self._chance.choice(("done", "late", "never"))
        call = _Call(name, effect, effect if late is None else late)
        await self._reach(call, before_s, unseen)
        self.data.settle()
        result: T
        if call.is_done:
            result = cast("T", call.result)
        elif fate in {"", "done"}:
            result = effect()
        elif fate == "late":
            self.data.later(self._chance.uniform(*faults.late_s), call.late)
        try:
            await self._pause(after_s)
        except _Gone:
            raise unseen(UNSEEN) from None
        if fate:
            self.data.counts[f"{name}.half_{fate}"] += 1
            raise unseen(UNSEEN)
        self.data.counts[f"{name}.ok"] += 1
        return result

    async def _reach(self, call: _Call, before_s: float, unseen: type[StoreAmbiguous | StoreUnavailable]) -> None:
        """Wait for the moment of effect. A caller that goes away meanwhile leaves the write behind."""
        self._calls += 1
        number = self._calls
        self._under_way[number] = call
        try:
            await self._pause(before_s)
        except _Gone:
            raise unseen(UNSEEN) from None
        except trio.Cancelled:
            if number in self._under_way and not call.is_done:
                self._leave_behind(call)
            raise
        finally:
            self._under_way.pop(number, None)

    def _leave_behind(self, call: _Call) -> None:
        """Decide what becomes of a write whose caller went away before it took effect."""
        if self._chance.random() < 0.5:
            self.data.counts[f"{call.name}.left"] += 1
            self.data.later(self._chance.uniform(*self._faults.late_s), call.late)

    async def _enter(self, name: str) -> tuple[float, float]:
        """Let the call in or refuse it; return how long it waits before and after its effect."""
        faults = self._faults
        try:
            if faults.cut_off or self.is_closed:
                await self._pause(CUT_OFF_S)
                raise _Gone
        except _Gone:
            self.data.counts[f"{name}.cut_off"] += 1
            raise StoreUnavailable("the store is cut off") from None
        low_s, high_s = faults.latency_s
        latency_s = self._chance.uniform(low_s, high_s) if high_s else 0.0
        if faults.refuse and self._chance.random() < faults.refuse:
            try:
                await self._pause(latency_s)
            except _Gone:
                raise StoreUnavailable("the store is cut off") from None
            self.data.counts[f"{name}.refused"] += 1
            raise StoreUnavailable("the store refuses for a moment")
        if not latency_s:
            await trio.lowlevel.checkpoint()
            return 0.0, 0.0
        # the moment of effect: mostly one of the two ends, for each pause costs a turn of the scheduler
        before_s = latency_s * min(1.0, max(0.0, self._chance.uniform(-EITHER_END, 1 + EITHER_END)))
        return before_s, latency_s - before_s

    async def _pause(self, delay_s: float) -> None:
        """Wait, at most until the process ends; raises `_Gone` then."""
        if delay_s > 0 and self._sleep is not None:
            await self._sleep(delay_s)
        elif delay_s > 0 and not self._ended.is_set():
            with trio.move_on_after(delay_s):
                await self._ended.wait()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        if self._ended.is_set():
            raise _Gone
