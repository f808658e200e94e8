"""Decide what a failed call means and whether to try again (storage.md 6)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

import trio

from juicebox_hsm.adapters.bigtable.driver import CallFailed
from juicebox_hsm.errors import RealmError
from juicebox_hsm.ports.errors import StoreInvalid, StoreUnavailable

RETRYABLE: Final = frozenset(
    ("ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNKNOWN")
)
"""CANCELLED is a connection reset here: our own cancellations never come back as a failure."""
REFUSED: Final = frozenset(("PERMISSION_DENIED", "UNAUTHENTICATED"))
"""Answers that an operator or a fresh token may change; nothing was applied."""


class NoSuchTable(StoreInvalid):
    """A table is missing: the realm was never created here, or `store init` never ran."""


@dataclass(frozen=True, slots=True)
class RetryProfile:
    """How often and how long to try: delays double from `first_s` to `most_s`."""

    first_s: float = 0.01
    most_s: float = 2.0
    attempts_max: int = 50
    total_s: float = 30.0


STORE_RETRY: Final = RetryProfile()


def translate(failure: CallFailed, what: str) -> RealmError:
    """Return the port's error for a failed call whose effect, if any, is harmless to repeat."""
    message = f"{what}: {failure.code}: {failure.details}"
    if failure.code in RETRYABLE or failure.code in REFUSED:
        return StoreUnavailable(message)
    if failure.code == "NOT_FOUND":
        return NoSuchTable(message)
    return StoreInvalid(message)


class Attempts:
    """The attempts of one idempotent operation, counted against a profile."""

    __slots__ = ("_began", "_made", "_profile", "_what")

    def __init__(self, what: str, profile: RetryProfile = STORE_RETRY) -> None:
        self._what = what
        self._profile = profile
        self._made = 0
        self._began = trio.current_time()

    def exhausted(self) -> bool:
        """Count one more failed attempt and tell whether it was the last."""
        self._made += 1
        profile = self._profile
        return self._made >= profile.attempts_max or trio.current_time() - self._began >= profile.total_s

    async def pause(self) -> None:
        """Sleep as long as the number of failed attempts says, a little varied."""
        delay_s = min(self._profile.most_s, self._profile.first_s * 2.0 ** max(0, self._made - 1))
        await trio.sleep(delay_s * random.uniform(0.8, 1.2))  # noqa: S311 - spreads load, no secret

    async def after(self, failure: CallFailed) -> None:
        """Wait for the next attempt; raises the port's error if there is none or trying again cannot help."""
        if failure.code not in RETRYABLE or self.exhausted():
            raise translate(failure, self._what) from None
        await self.pause()
