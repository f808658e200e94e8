"""Blocking work in other threads, also on a system that has no room for another thread at the moment.

Python says so with a bare `RuntimeError`. Let through, it would end a service for something that passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar, TypeVarTuple

import trio

from juicebox_hsm.errors import RealmError

_SAID: Final = "can't start new thread"
"""What the interpreter's `RuntimeError` says; `tests/unit/adapters/test_threads.py` asks a real one."""

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


class NoThread(RealmError):
    """The system has no room for another thread; nothing was done."""

    retryable = True


@contextmanager
def thread_needed() -> Iterator[None]:
    """Raise `NoThread` when the block cannot start a thread that it needs, be it one of Trio's or of a library's."""
    try:
        yield
    except RuntimeError as error:
        if str(error) != _SAID:
            raise
        raise NoThread(
            "the system has no room for another thread; look at its limits on processes and memory"
        ) from None


async def in_thread(
    work: Callable[[*Arguments], T],
    *arguments: *Arguments,
    limiter: trio.CapacityLimiter | None = None,
    abandon_on_cancel: bool = False,
) -> T:
    """Run blocking `work` in a worker thread. Raises `NoThread` when there is none to be had."""
    with thread_needed():
        return await trio.to_thread.run_sync(work, *arguments, limiter=limiter, abandon_on_cancel=abandon_on_cancel)


async def in_thread_or_here(
    work: Callable[[*Arguments], T], *arguments: *Arguments, limiter: trio.CapacityLimiter | None = None
) -> T:
    """Run `work` of a few milliseconds in a worker thread, or in this one when there is no other to be had."""
    try:
        return await in_thread(work, *arguments, limiter=limiter)
    except NoThread:
        return work(*arguments)
