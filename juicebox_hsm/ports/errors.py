"""How ports fail.

Every method of a port may raise `StoreUnavailable` (nothing was applied, or the call is idempotent: try again).
`LogStore.append` may also raise `StoreAmbiguous` once its own attempts to find out are exhausted."""

from __future__ import annotations

from juicebox_hsm.errors import RealmError
from juicebox_hsm.merkle.walk import MissingNode

__all__ = ["HsmGone", "MissingNode", "StoreAmbiguous", "StoreInvalid", "StoreUnavailable"]


class StoreUnavailable(RealmError):
    """The store did not answer or refused for a passing reason; nothing is known to be applied."""

    retryable = True


class StoreAmbiguous(RealmError):
    """A write may or may not have happened and the store could not be asked; the log tail is unknown."""


class StoreInvalid(RealmError):
    """The store's content or version is not ours: the message says what and where."""


class HsmGone(RealmError):
    """The HSM is lost or poisoned. The agent that fronts it must end (exit 75)."""
