"""A virtual clock for tests whose realm works in threads, too: SQLite's writer, the HSM's NVRAM, PIN stretching.

Trio's `MockClock` jumps to the next deadline as soon as every task waits. A task that waits for a thread waits for
work, not for time, so the clock is held while there is one: however slow the machine is, a thread's work takes no
virtual time, and no time-out passes because of it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import trio
import trio.testing

from juicebox_hsm.adapters.sqlite.writer import Writer

UNIX_MS = 1_700_000_000_000
"""What wall clocks say at virtual time 0."""


class Hold:
    """Virtual time that jumps whenever all tasks wait for time, and stands still while a thread is at work."""

    def __init__(self) -> None:
        self.clock = trio.testing.MockClock(autojump_threshold=0.0)
        self._holders = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let no time pass within the block."""
        self._holders += 1
        self.clock.autojump_threshold = math.inf
        try:
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                self.clock.autojump_threshold = 0.0

    def holding(self, wait: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """Return `wait`, which waits for a thread, with the clock held."""

        async def waiting(*args: Any, **kwargs: Any) -> Any:
            with self.held():
                return await wait(*args, **kwargs)

        return waiting


def now_ms() -> int:
    """Return the wall clock in virtual time, Unix milliseconds."""
    return UNIX_MS + int(trio.current_time() * 1000)


def run(main: Callable[[], Awaitable[Any]], *, clock: object, instruments: Any) -> Any:
    """Run a test as `trio.run` does, in virtual time; the test asked for no clock of its own."""
    hold = Hold()
    writes = hold.holding(Writer.run)

    async def write(self: Writer, operation: Any) -> Any:
        return await writes(self, operation)

    with (
        mock.patch.object(trio.to_thread, "run_sync", hold.holding(trio.to_thread.run_sync)),
        mock.patch.object(Writer, "run", write),
    ):
        return trio.run(main, clock=hold.clock, instruments=instruments)
