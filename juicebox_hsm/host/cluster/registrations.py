"""Which registrations are dead: those that somebody watched for long without seeing a renewal (decision record 0031).

No two clocks are compared. A registration carries its service's own time, which only has to differ from one renewal to
the next; how long it stayed the same is measured by the watcher's monotonic clock, and only while it really looked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from juicebox_hsm.host.services import ServiceAddress

DEAD_S: Final = 1260.0
"""Own: 21 renewals of ours and two of services of older versions, which renew every 600 s."""
BLIND_S: Final = 60.0
"""Own: after so long without a look the watch begins anew. Services may not have reached the store either."""


class Registrations:
    """Watches discovery. Times are in s on one monotonic clock."""

    def __init__(self) -> None:
        self._since: dict[ServiceAddress, float] = {}
        self._looked = 0.0

    def look(self, found: Iterable[ServiceAddress], now_s: float) -> list[ServiceAddress]:
        """Take what discovery holds at `now_s`; return the registrations that may be forgotten."""
        before = self._since if now_s - self._looked <= BLIND_S else {}
        self._looked = now_s
        self._since = {address: before.get(address, now_s) for address in found}
        return [address for address, since in self._since.items() if now_s - since > DEAD_S]
