"""Published events with their acknowledgements, for the embedded bus (operator-tools.md 6.2; storage.md 2.7).

An acknowledgement is a cell in a row of its block of 1,024 sequence numbers, so that a window of events and what is
acknowledged of it are one scan and one row each. Up to where nothing is left is remembered, and kept with the cursor;
blocks below that are deleted. Of two processes that clean up at the same time one may deliver an event once more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import DeleteColumn, DeleteRow, Mutation, RowSet, Selection, SetCell
from juicebox_hsm.adapters.bigtable.outbox_rows import ACKNOWLEDGED, EVENTS, Cursor, decode_cursor
from juicebox_hsm.adapters.bigtable.outbox_table import OutboxTable
from juicebox_hsm.adapters.bigtable.table import ROW_MUTATIONS_MAX, Endpoint
from juicebox_hsm.host.events import OutboxEvent
from juicebox_hsm.ids import RealmId

BLOCK: Final = 1_024
HINT_EVERY: Final = 1_024
"""Sequence numbers after which the place below which nothing is left is written again."""

_BELOW: Final = Selection(family=EVENTS, cells_per_column=1)
_NAMES: Final = Selection(cells_per_row=1, strip_values=True)


class BigtablePublished:
    """`event_bus.PublishedEvents` on one instance."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._table = OutboxTable(endpoint)
        self._done: dict[tuple[RealmId, str], int] = {}
        self._written: dict[tuple[RealmId, str], int] = {}

    async def _cursor(self, realm: RealmId, tenant: str) -> Cursor:
        """Return the tenant's cursor, and learn how far others found nothing left."""
        row = await self._table.of(realm).read_row(keys.cursor_key(keys.check_tenant(tenant)), _BELOW)
        cursor = decode_cursor(row)
        place = (realm, tenant)
        self._written[place] = max(cursor.acknowledged_below, self._written.get(place, 0))
        self._done[place] = max(cursor.acknowledged_below, cursor.removed_below, self._done.get(place, 0))
        return cursor

    async def unacknowledged(self, realm: RealmId, tenant: str, after_seq: int, limit: int) -> list[OutboxEvent]:
        """Return published rows with an event that nobody acknowledged: three reads per 1,024 sequence numbers."""
        cursor, place = await self._cursor(realm, tenant), (realm, tenant)
        found: list[OutboxEvent] = []
        at = max(after_seq, self._done[place]) + 1
        while at <= cursor.published and len(found) < limit:
            newest = min(cursor.published, (at // BLOCK + 1) * BLOCK - 1)
            left = await self._left(realm, tenant, at, newest)
            if self._done[place] == at - 1 and not found:
                self._done[place] = left[0].seq - 1 if left else newest
            found += left
            at = newest + 1
        await self._write_hint(realm, tenant)
        return found[:limit]

    async def _left(self, realm: RealmId, tenant: str, oldest: int, newest: int) -> list[OutboxEvent]:
        """Return the unacknowledged events of a part of one block."""
        events = [
            event
            for event in await self._table.read_events(realm, tenant, oldest, newest)
            if event.new.event is not None
        ]
        if not events:
            return []
        key = keys.acknowledged_key(keys.check_tenant(tenant), oldest // BLOCK)
        row = await self._table.of(realm).read_row(key)
        acknowledged = set() if row is None else {cell.qualifier for cell in row.cells}
        return [event for event in events if keys.downward(event.seq) not in acknowledged]

    async def mark_acknowledged(self, realm: RealmId, tenant: str, seqs: Sequence[int]) -> None:
        """Mark published rows, each block atomically."""
        cursor = await self._cursor(realm, tenant)
        name, done = keys.check_tenant(tenant), self._done[realm, tenant]
        blocks: dict[int, list[Mutation]] = defaultdict(list)
        for seq in sorted(set(seqs)):
            if done < seq <= cursor.published:
                blocks[seq // BLOCK].append(SetCell(EVENTS, keys.downward(seq), b"", 0))
        await self._table.of(realm).mutate_rows(
            [
                (keys.acknowledged_key(name, block), cells[at : at + ROW_MUTATIONS_MAX])
                for block, cells in blocks.items()
                for at in range(0, len(cells), ROW_MUTATIONS_MAX)
            ]
        )

    async def _write_hint(self, realm: RealmId, tenant: str) -> None:
        """Keep the place for other processes, then delete the blocks below it. The hint's time makes it only rise."""
        place = (realm, tenant)
        done = self._done[place]
        if done < self._written[place] + HINT_EVERY:
            return
        table, name = self._table.of(realm), keys.check_tenant(tenant)
        raised = SetCell(EVENTS, ACKNOWLEDGED, done.to_bytes(8, "big"), done * 1000)
        older = DeleteColumn(EVENTS, ACKNOWLEDGED, before=done * 1000)
        await table.mutate_row(keys.cursor_key(name), (older, raised))
        self._written[place] = done
        wanted = keys.acknowledged_range(name, (done + 1) // BLOCK)
        if not wanted.is_empty:
            rows = await table.read_rows(RowSet(ranges=(wanted,)), selection=_NAMES)
            await table.mutate_rows([(row.key, (DeleteRow(),)) for row in rows])
