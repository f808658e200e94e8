"""How long a management lease may be relied on (manager.md 1.2).

A lease only saves duplicated work. Its holder measures with the monotonic clock and considers it lost 500 ms before
the store would. It counts from the moment at which the request was *sent*: the store may have written the expiry any
time after that, and an answer that takes long must not lengthen what it grants.
"""

from __future__ import annotations

from typing import Final

from juicebox_hsm.host.cluster.view import GroupKey
from juicebox_hsm.ids import RealmId

LEASE_MS: Final = 3000
RENEW_EVERY_S: Final = 1.0
RENEW_AGAIN_S: Final = 0.1
"""Pause after a renewal that failed: the deadline comes nearer meanwhile."""
LOST_BEFORE_EXPIRY_S: Final = 0.5


def usable_until_s(sent_s: float) -> float:
    """Return when the holder must stop, for a lease that a request sent at `sent_s` obtained or extended."""
    return sent_s + LEASE_MS / 1000 - LOST_BEFORE_EXPIRY_S


def group_lease(key: GroupKey) -> str:
    """Name the lease that protects leadership changes of one group."""
    return f"{key[0].hex()}-{key[1].hex()}"


def ownership_lease(realm: RealmId) -> str:
    """Name the lease that protects range transfers of one realm."""
    return f"{realm.hex()}-ownership"
