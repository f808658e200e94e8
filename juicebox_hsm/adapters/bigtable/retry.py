"""Decide what a failed call means and whether to try again (storage.md 6)."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from juicebox_hsm.adapters.bigtable.driver import CallFailed
from juicebox_hsm.adapters.clock.retrying import Attempts
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.retry import STORE_RETRY, RetryProfile
from juicebox_hsm.ports.errors import StoreInvalid, StoreUnavailable

RETRYABLE: Final = frozenset(
    ("ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNKNOWN")
)
"""CANCELLED is a connection reset here: our own cancellations never come back as a failure."""
REFUSED: Final = frozenset(("PERMISSION_DENIED", "UNAUTHENTICATED"))
"""Answers that an operator or a fresh token may change; nothing was applied."""


class NoSuchTable(StoreInvalid):
    """A table is missing: the realm was never created here, or `store init` never ran."""


BIGTABLE_RETRY: Final = replace(STORE_RETRY, spread=0.2)
"""Many processes share an instance: their attempts are kept from coming in step."""


def translate(failure: CallFailed, what: str) -> RealmError:
    """Return the port's error for a failed call whose effect, if any, is harmless to repeat."""
    message = f"{what}: {failure.code}: {failure.details}"
    if failure.code in RETRYABLE or failure.code in REFUSED:
        return StoreUnavailable(message)
    if failure.code == "NOT_FOUND":
        return NoSuchTable(message)
    return StoreInvalid(message)


class CallAttempts(Attempts):
    """The attempts of one call that may be repeated; `what` names it in errors."""

    __slots__ = ("_what",)

    def __init__(self, what: str, profile: RetryProfile = BIGTABLE_RETRY) -> None:
        super().__init__(profile)
        self._what = what

    async def after(self, failure: CallFailed) -> None:
        """Wait for the next attempt; raises the port's error if there is none or trying again cannot help."""
        if failure.code not in RETRYABLE or self.exhausted():
            raise translate(failure, self._what) from None
        await self.pause()
