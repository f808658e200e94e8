"""How ports fail.

Every method of a port may raise `StoreUnavailable` (nothing was applied, or the call is idempotent: try again).
`LogStore.append` may also raise `StoreAmbiguous` once its own attempts to find out are exhausted."""

from __future__ import annotations

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.codes import Code
from juicebox_hsm.merkle.walk import MissingNode
from juicebox_hsm.wire.rpc import DamageKind, StoreDamage

__all__ = [
    "HsmGone",
    "MissingNode",
    "StoreAmbiguous",
    "StoreDamaged",
    "StoreInvalid",
    "StoreReplaced",
    "StoreUnavailable",
    "store_code",
]


class StoreUnavailable(RealmError):
    """The store did not answer or refused for a passing reason; nothing is known to be applied."""

    retryable = True


class StoreReplaced(StoreUnavailable):
    """What was opened as the store has no name any more, or another thing has its name. A person must put it right."""


def store_code(error: RealmError) -> Code:
    """Return the code of a reason that the store gave."""
    return Code.STORE_REPLACED if isinstance(error, StoreReplaced) else Code.STORE


class StoreAmbiguous(RealmError):
    """A write may or may not have happened and the store could not be asked; the log tail is unknown."""


class StoreInvalid(RealmError):
    """The store's content or version is not ours: the message says what and where."""


class StoreDamaged(StoreInvalid):
    """Something stored is not what was written: trying again does not help, `store check` tells how much there is."""

    def __init__(self, kind: DamageKind, place: str, *, group: bytes = b"", why: str = "") -> None:
        self.damage = StoreDamage(kind, place, group)
        of = f" of group {group.hex()}" if group else ""
        super().__init__(f"the {kind.value} {place}{of} is damaged{f' ({why})' if why else ''}; run `store check`")


class HsmGone(RealmError):
    """The HSM is lost or poisoned. The agent that fronts it must end (exit 75)."""
