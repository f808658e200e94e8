"""Retry profiles and the one retry loop of the agent (agent.md 15, storage.md 6)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import trio

from juicebox_hsm.errors import RealmError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryProfile:
    """Exponential backoff; `attempts_max` None means no bound on the number, `total_s` bounds the time."""

    first_s: float
    cap_s: float
    attempts_max: int | None
    total_s: float

    def delay_s(self, attempt: int) -> float:
        """Return the pause after failed attempt number `attempt` (from 1)."""
        return min(self.cap_s, self.first_s * float(2 ** min(attempt - 1, 30)))

    def exhausted(self, attempt: int, elapsed_s: float) -> bool:
        """Tell whether failed attempt number `attempt` was the last one allowed."""
        return (self.attempts_max is not None and attempt >= self.attempts_max) or elapsed_s >= self.total_s


STORE_RETRY: Final = RetryProfile(first_s=0.01, cap_s=2.0, attempts_max=50, total_s=30.0)
HSM_RETRY: Final = RetryProfile(first_s=0.001, cap_s=1.0, attempts_max=None, total_s=60.0)


async def retrying(
    operation: Callable[[], Awaitable[T]],
    profile: RetryProfile = STORE_RETRY,
    on_retry: Callable[[RealmError], None] | None = None,
) -> T:
    """Run `operation` until it succeeds; raises its last `RealmError` when not retryable or exhausted."""
    attempt = 0
    began = trio.current_time()
    while True:
        try:
            return await operation()
        except RealmError as error:
            attempt += 1
            if not error.retryable or profile.exhausted(attempt, trio.current_time() - began):
                raise
            if on_retry is not None:
                on_retry(error)
        await trio.sleep(profile.delay_s(attempt))
