"""Time and order of a simulated run: a virtual clock, a seeded scheduler, and processes that stop in mid-step.

Trio runs all that is due, in an order that it shuffles for each batch. Here the shuffle is drawn from the run's seed,
and the clock jumps to the next deadline as soon as nothing can run. Trio has no public way to seed its scheduler; the
private switch is the one that its own support of Hypothesis uses.

A process of the world is a `Life`: a context variable that its tasks inherit. `freeze` keeps them from ever being
scheduled, which is what SIGSTOP does, or SIGKILL if nobody calls `thaw`: no `Cancelled`, no `finally`, no last word.
"""

from __future__ import annotations

import contextvars
import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import trio
from trio._core import _run as trio_run  # see the module's docstring

from juicebox_hsm.errors import check

TICK_S: Final = 0.006
"""Acts are put off to a multiple of this: what is due together runs in one batch, in a random order."""
IDLE_S: Final = 1.0
IDLE_MAX: Final = 10
IO_TURNS: Final = 256
"""Turns of the scheduler between two looks at sockets: some hundredths of a second."""


def _tick(when_s: float) -> float:
    """Return the first tick at or after a time."""
    return when_s if math.isinf(when_s) else -int(-when_s // TICK_S) * TICK_S


class VirtualClock(trio.abc.Clock):
    """A clock that stands while anything can run, and then jumps to the next deadline.

    It also calls the world's acts when their time has come (`at`): a message that arrives needs no task that waits.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._acts: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._idle = 0

    def at(self, when_s: float, act: Callable[..., object], *arguments: Any) -> None:
        """Call `act(*arguments)` outside of any task at the first tick at or after `when_s`. It must not raise."""
        heapq.heappush(self._acts, (_tick(when_s), next(self._numbers), act, arguments))

    def after(self, delay_s: float, act: Callable[..., object], *arguments: Any) -> None:
        """Call `act(*arguments)` in `delay_s` seconds."""
        self.at(self.now + delay_s, act, *arguments)

    async def sleep(self, delay_s: float) -> None:
        """Do what `trio.sleep` does, without its scope and the `Cancelled` that ends it: half of its cost."""
        if math.isinf(delay_s):
            await trio.sleep_forever()
        waiting = [trio.lowlevel.current_task()]

        def wake() -> None:
            if waiting:
                trio.lowlevel.reschedule(waiting.pop())

        def abort(_raise_cancel: Callable[[], None]) -> trio.lowlevel.Abort:
            waiting.clear()
            return trio.lowlevel.Abort.SUCCEEDED

        self.after(delay_s, wake)
        await trio.lowlevel.wait_task_rescheduled(abort)

    def start_clock(self) -> None:
        """Do nothing: time begins at 0."""

    def current_time(self) -> float:
        """Return virtual seconds."""
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Jump to `deadline`, or to the first act before it that wakes a task.

        Trio asks this when no task can run, before it would wait.
        """
        runner = trio_run.GLOBAL_RUN_CONTEXT.runner
        acts, queue = self._acts, runner.runq
        while acts and acts[0][0] <= _tick(deadline):
            self.now = max(self.now, acts[0][0])
            while acts and acts[0][0] <= self.now:
                _, _, act, arguments = heapq.heappop(acts)
                act(*arguments)
            if queue:
                return 0.0
            deadline = runner.deadlines.next_deadline()
        if math.isinf(deadline):
            # Trio's own end waits for a word from its own socket; a world always has something due
            self._idle += 1
            check(self._idle <= IDLE_MAX, "a simulated world never waits for ever")
            return IDLE_S
        self.now = max(self.now, _tick(deadline))
        return 0.0


class Life:
    """One life of a process, from start to exit or kill."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.frozen = False
        self.held: list[Any] = []
        _lives.append(self)
        self.context: Final = contextvars.Context()
        self.context.run(LIFE.set, self)

    def freeze(self) -> None:
        """Let none of this process' tasks run any more; those of the batch under way still finish their step."""
        if not self.frozen:
            self.frozen = True
            queue = trio_run.GLOBAL_RUN_CONTEXT.runner.runq
            waiting = list(queue)
            queue.clear()
            for task in waiting:
                queue.append(task)

    def thaw(self) -> None:
        """Let its tasks run again; whatever fell due meanwhile is due now."""
        if self.frozen:
            self.frozen = False
            held, self.held = self.held, []
            trio_run.GLOBAL_RUN_CONTEXT.runner.runq.extend(held)


_lives: Final[list[Life]] = []
"""All lives of the run under way, so that a run can end."""

LIFE: Final = contextvars.ContextVar[Life | None]("life", default=None)


class _RunQueue(deque[Any]):
    """Trio's queue of runnable tasks, without those of frozen processes."""

    def append(self, task: Any, /) -> None:
        """Queue a task, or hold it back."""
        life = task.context.get(LIFE)
        if life is not None and life.frozen:
            life.held.append(task)
        else:
            super().append(task)


_SWITCHES: Final = ("_ALLOW_DETERMINISTIC_SCHEDULING", "_r")
"""Trio's private switch, and the generator its scheduler draws from."""


@contextmanager
def seeded_scheduler(seed: int) -> Iterator[None]:
    """Draw the order of every batch of tasks from `seed`, for runs within the block."""
    before = {name: getattr(trio_run, name) for name in _SWITCHES}
    vars(trio_run).update(zip(_SWITCHES, (True, random.Random(seed)), strict=True))  # noqa: S311 - to be repeated
    try:
        yield
    finally:
        vars(trio_run).update(before)


_acquire: Final = trio.Lock.acquire


async def _acquire_lightly(lock: trio.Lock) -> None:
    """Do what `trio.Lock.acquire` does, without the turn of the scheduler that it costs where nobody holds the lock."""
    if lock.locked():
        await _acquire(lock)
    else:
        await trio.lowlevel.checkpoint_if_cancelled()
        lock.acquire_nowait()


@contextmanager
def light_waits(clock: VirtualClock) -> Iterator[None]:
    """Let whoever calls `trio.sleep` within the block sleep by this clock, and take free locks at once."""
    before = trio.sleep
    vars(trio)["sleep"] = clock.sleep
    type.__setattr__(trio.Lock, "acquire", _acquire_lightly)
    try:
        yield
    finally:
        vars(trio)["sleep"] = before
        type.__delattr__(trio.Lock, "acquire")


class LifeOfParents(trio.abc.Instrument):
    """Makes every task belong to the process of the task whose nursery it runs in, whoever started it."""

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        """Give the task its parent's life."""
        nursery = task.parent_nursery
        life = None if nursery is None else nursery.parent_task.context.get(LIFE)
        if life is not None and task.context.get(LIFE) is not life:
            task.context.run(LIFE.set, life)


class _Instruments(dict[str, dict[trio.abc.Instrument, None]]):
    """Trio's table of instruments as a plain dictionary: it is asked five times for each step of a task."""

    def call(self, hook: str, *arguments: object) -> None:
        """Call a hook of each instrument that has it."""
        for instrument in self[hook]:
            getattr(instrument, hook)(*arguments)


class _SeldomIo:
    """Trio's I/O manager, asked every now and then: a world has no sockets, only Ctrl-C comes this way."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._turns = 0

    def get_events(self, timeout: float) -> Any:
        """Return what happened."""
        self._turns += 1
        return self._manager.get_events(timeout) if timeout > 0 or self._turns % IO_TURNS == 0 else []

    def __getattr__(self, name: str) -> Any:
        """Return everything else."""
        return getattr(self._manager, name)


def prepare_runner() -> None:
    """Make the running scheduler respect `Life.freeze` and spare what a world does not need; once in `trio.run`."""
    runner = trio_run.GLOBAL_RUN_CONTEXT.runner
    runner.io_manager = _SeldomIo(runner.io_manager)  # type: ignore[assignment]
    runner.runq = _RunQueue(runner.runq)
    runner.instruments = _Instruments(runner.instruments)  # type: ignore[assignment]  # what the runner uses of it


def thaw_all() -> None:
    """Let the tasks of all processes run, dead ones too, so that they can be cancelled when a run is over."""
    for life in _lives:
        life.thaw()
    _lives.clear()
