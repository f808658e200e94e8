"""The port to the accounting of records (storage.md 2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from juicebox_hsm.host.events import AccountingEvent
from juicebox_hsm.ids import RealmId


class Accounting(Protocol):
    """Which records existed when, per tenant and day (storage.md 2.3)."""

    async def write(self, realm: RealmId, events: Sequence[AccountingEvent]) -> None:
        """Write events; of one record and UTC day the one with the highest `seq` counts, in whatever order they come.

        So an event that is written again, or late by a dispatcher that was overtaken, changes nothing.
        """
        ...

    async def count_users(self, realm: RealmId, start_ms: int, end_ms: int) -> dict[str, int]:
        """Return tenant -> users with a secret at any time in [start, end) (storage.md 4.6)."""
        ...
