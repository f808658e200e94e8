"""Try again, within one budget of time however deep the tries are nested (storage.md 6, own).

An operation of the agent is tried again when a store fails it; a store's operation consists of calls that are tried
again themselves. If each level had its own 30 s, an append would take minutes to fail. So the outermost level owns the
time: `budget` opens it, and whatever is tried again within it, in this task, ends with it. A budget says when another
attempt may *begin*; a call under way is bounded by its own deadline and never cut short, since a write that is cut
short has an unknown outcome.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, TypeVar

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.retry import STORE_RETRY, RetryProfile

T = TypeVar("T")

_ENDS_AT: Final[ContextVar[float]] = ContextVar("retry budget ends at", default=math.inf)


@contextmanager
def budget(total_s: float) -> Iterator[None]:
    """Let no attempt within the block begin later than `total_s` from now, or than an outer budget allows."""
    token = _ENDS_AT.set(min(_ENDS_AT.get(), trio.current_time() + total_s))
    try:
        yield
    finally:
        _ENDS_AT.reset(token)


class Attempts:
    """The attempts of one operation, counted against its profile and the budget it is in."""

    __slots__ = ("_began", "_ends_at", "_made", "_profile")

    def __init__(self, profile: RetryProfile = STORE_RETRY) -> None:
        self._profile = profile
        self._made = 0
        self._began = trio.current_time()
        self._ends_at = _ENDS_AT.get()

    def exhausted(self) -> bool:
        """Count one more failed attempt and tell whether it was the last."""
        self._made += 1
        now = trio.current_time()
        return now >= self._ends_at or self._profile.exhausted(self._made, now - self._began)

    async def pause(self) -> None:
        """Sleep as long as the number of failed attempts says."""
        await trio.sleep(self._profile.delay_s(self._made, random.random()))  # noqa: S311 - spreads load, no secret


async def retrying(
    operation: Callable[[], Awaitable[T]],
    profile: RetryProfile = STORE_RETRY,
    on_retry: Callable[[RealmError], None] | None = None,
) -> T:
    """Run `operation` until it succeeds; raises its last `RealmError` when not retryable or exhausted."""
    with budget(profile.total_s):
        attempts = Attempts(profile)
        while True:
            try:
                return await operation()
            except RealmError as error:
                if not error.retryable or attempts.exhausted():
                    raise
                if on_retry is not None:
                    on_retry(error)
            await attempts.pause()
