"""Two light wake-up primitives for the agent's hot paths (own: an Event and a task per request cost more).

Both are used from one Trio thread only, so "no checkpoint between reading and writing" is all the locking there is.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import trio

from juicebox_hsm.errors import check

T = TypeVar("T")


class Signal:
    """An auto-reset wake-up with at most one waiter; settings while nobody waits collapse into one."""

    __slots__ = ("_set", "_task")

    def __init__(self) -> None:
        self._set = False
        self._task: trio.lowlevel.Task | None = None

    @property
    def is_set(self) -> bool:
        """Tell whether the next `wait` returns at once."""
        return self._set

    def set(self) -> None:
        """Wake the waiter, or let the next `wait` return at once."""
        task = self._task
        if task is None:
            self._set = True
        else:
            self._task = None
            trio.lowlevel.reschedule(task)

    async def wait(self) -> None:
        """Return once `set` was called since the last return. Cancellation loses no setting."""
        if self._set:
            await trio.lowlevel.checkpoint()
            self._set = False
            return
        check(self._task is None, "a signal has one waiter")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort)

    async def wait_at_most(self, seconds: float) -> bool:
        """Wait up to `seconds`; tell whether the signal came."""
        if self._set:
            await self.wait()
            return True
        with trio.move_on_after(seconds):
            await self.wait()
            return True
        return False

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED


class Slot(Generic[T]):
    """A value that arrives once, for at most one waiting task; the waiter going away disturbs nobody."""

    __slots__ = ("_task", "_value", "gone")

    def __init__(self) -> None:
        self._value: T | None = None
        self._task: trio.lowlevel.Task | None = None
        self.gone = False

    @property
    def filled(self) -> bool:
        """Tell whether the value is there."""
        return self._value is not None

    def fill(self, value: T) -> None:
        """Deliver `value` (not None) unless one was delivered before."""
        if self._value is not None:
            return
        self._value = value
        task = self._task
        if task is not None:
            self._task = None
            trio.lowlevel.reschedule(task)

    async def wait(self) -> T:
        """Return the value. A cancelled wait marks the slot `gone`: work for it that has not begun may be skipped."""
        if self._value is None:
            self._task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)
        else:
            await trio.lowlevel.checkpoint()
        value = self._value
        check(value is not None, "a slot wakes its waiter with a value")
        return value  # type: ignore[return-value]  # checked above; check() does not narrow

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._task = None
        self.gone = True
        return trio.lowlevel.Abort.SUCCEEDED
