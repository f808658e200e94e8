"""Read the events of an outbox: the tail of a sequence and windows of it (storage.md 2.7)."""

from __future__ import annotations

from typing import Final

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import KeyRange, RowSet, Selection
from juicebox_hsm.adapters.bigtable.outbox_rows import EVENTS, decode_event
from juicebox_hsm.adapters.bigtable.table import Endpoint, Table
from juicebox_hsm.host.events import OutboxEvent
from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.errors import StoreUnavailable

ROW_EVENTS_BEFORE: Final = 99
"""A row of up to 100 events that contains a sequence number starts at most so far before it."""

_NEWEST: Final = Selection(family=EVENTS, cells_per_row=1, strip_values=True)
_EVENTS: Final = Selection(family=EVENTS)


class OutboxTable:
    """The outbox tables of an instance."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._tables: dict[RealmId, Table] = {}
        self._boundaries: dict[tuple[RealmId, str], int] = {}

    def of(self, realm: RealmId) -> Table:
        """Return the realm's outbox table."""
        table = self._tables.get(realm)
        if table is None:
            table = self._tables[realm] = Table(self._endpoint, keys.realm_tables(realm)[3])
        return table

    async def read_tail(self, realm: RealmId, tenant: bytes) -> int:
        """Return the sequence number of the tenant's newest event, 0 for none.

        The newest event is never removed, but a scan can see the one before it being removed and the next not yet:
        then it finds only the cursor row, or nothing, and looks again.
        """
        attempts = self.of(realm).attempts("read the end of the outbox")
        wanted = KeyRange(keys.event_key(tenant, keys.TOP), keys.cursor_key(tenant))
        while True:
            row = await self.of(realm).first(wanted, _NEWEST)
            if row is None:
                return 0
            if row.key != wanted.end:
                return keys.upward(row.cells[0].qualifier)
            if attempts.exhausted():
                raise StoreUnavailable("the outbox has a cursor without events")
            await attempts.pause()

    async def read_events(self, realm: RealmId, tenant: str, oldest: int, newest: int) -> list[OutboxEvent]:
        """Return the events oldest..newest that are there, in order."""
        return [event for event, _ in await self.read_stored(realm, tenant, oldest, newest)]

    async def read_stored(
        self, realm: RealmId, tenant: str, oldest: int, newest: int
    ) -> list[tuple[OutboxEvent, bytes]]:
        """Return the events oldest..newest that are there, in order, each with the key of its row.

        The row with the oldest may begin before it, unless the last read ended right there.
        """
        name, place = keys.check_tenant(tenant), (realm, tenant)
        is_boundary = self._boundaries.get(place) == oldest
        wanted = keys.event_range(name, newest, oldest if is_boundary else max(1, oldest - ROW_EVENTS_BEFORE))
        rows = await self.of(realm).read_rows(RowSet(ranges=(wanted,)), selection=_EVENTS)
        if rows and (last := keys.upward(rows[0].cells[0].qualifier)) <= newest:
            self._boundaries[place] = last + 1
        low, high = keys.downward(newest), keys.downward(oldest)
        return [
            (decode_event(tenant, cell), row.key)
            for row in reversed(rows)
            for cell in reversed(row.cells)
            if low <= cell.qualifier <= high
        ]
