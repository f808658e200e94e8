"""How long a management lease may be relied on (manager.md 1.2).

A lease only saves duplicated work. Its holder measures with the monotonic clock and considers it lost 500 ms before
the store would. It counts from the moment at which the request was *sent*: the store may have written the expiry any
time after that, and an answer that takes long must not lengthen what it grants.

Whether a lease that stands has run out is not read from its expiry, which is its holder's wall clock and long: whoever
wants it watches it for as long as a lease lasts, on a monotonic clock, and takes it if nobody renewed it meanwhile
(decision record 0031).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from juicebox_hsm.host.cluster.view import GroupKey
from juicebox_hsm.host.services import Lease
from juicebox_hsm.ids import RealmId

LEASE_MS: Final = 3000
RENEW_EVERY_S: Final = 1.0
RENEW_AGAIN_S: Final = 0.1
"""Pause after a renewal that failed: the deadline comes nearer meanwhile."""
LOST_BEFORE_EXPIRY_S: Final = 0.5


def usable_until_s(sent_s: float) -> float:
    """Return when the holder must stop, for a lease that a request sent at `sent_s` obtained or extended."""
    return sent_s + LEASE_MS / 1000 - LOST_BEFORE_EXPIRY_S


class StandingLeases:
    """Who still renews what, as one process sees it. Times are in s on one monotonic clock."""

    def __init__(self) -> None:
        self._since: dict[str, tuple[Lease, float]] = {}

    def look(self, found: Iterable[Lease], now_s: float) -> None:
        """Take all leases that stand at `now_s`."""
        before = self._since
        self._since = {}
        for lease in found:
            seen = before.get(lease.name)
            self._since[lease.name] = seen if seen is not None and seen[0] == lease else (lease, now_s)

    def obtain_ms(self, name: str, now_ms: int, now_s: float) -> int | None:
        """Return the time (Unix ms) at which to obtain a lease, None while its holder has to be taken for alive.

        It is our own wall clock, `now_ms`, or just after the expiry of a lease that was not renewed: a holder that
        renews it after our look keeps it.
        """
        if name not in self._since:
            return now_ms
        lease, since_s = self._since[name]
        if now_s - since_s < LEASE_MS / 1000:
            return None
        return max(now_ms, lease.expires_ms + 1)


def group_lease(key: GroupKey) -> str:
    """Name the lease that protects leadership changes of one group."""
    return f"{key[0].hex()}-{key[1].hex()}"


def ownership_lease(realm: RealmId) -> str:
    """Name the lease that protects range transfers of one realm."""
    return f"{realm.hex()}-ownership"
