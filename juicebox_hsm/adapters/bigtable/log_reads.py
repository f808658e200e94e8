"""Read groups' logs: the last entry, ranges of entries, pages of rows (storage.md 4.2).

Rows are found by the index of their first entry. A reader that has reached the end of a row continues at a *row
boundary*, where one scan gives exactly what follows; one that comes with any other index first looks for the row that
contains it. Where the newest such boundary of a group is, is remembered, because followers ask there again and again.
"""

from __future__ import annotations

from typing import Final

import trio

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import EVERYTHING, KeyRange, Row, RowSet, Selection
from juicebox_hsm.adapters.bigtable.log_rows import decode_cell, decode_entries, decode_with_intents, is_tombstone
from juicebox_hsm.adapters.bigtable.table import Endpoint, Table
from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.host.log import Compacted, Intent
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.ports.errors import StoreUnavailable

BATCH_ROWS_BEFORE: Final = 99
"""A row of up to 100 entries that contains an index starts at most so far before it."""
BOUNDARY_S: Final = 3_600.0
"""How long a remembered row boundary is believed when nothing is found there; tombstones last a week."""
INTENT_ROWS: Final = 500
"""Rows per request when intents are collected."""

_NEWEST_CELL: Final = Selection(cells_per_row=1)


class LogReads:
    """Everything that reads the log tables."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._tables: dict[RealmId, Table] = {}
        self._boundaries: dict[tuple[RealmId, GroupId], tuple[int, float]] = {}

    def table(self, realm: RealmId) -> Table:
        """Return the realm's log table."""
        table = self._tables.get(realm)
        if table is None:
            table = self._tables[realm] = Table(self._endpoint, keys.realm_tables(realm)[0])
        return table

    def note_boundary(self, realm: RealmId, group: GroupId, index: int) -> None:
        """Remember that a row begins, or will begin, at `index`."""
        self._boundaries[realm, group] = (index, trio.current_time())

    def _at_boundary(self, realm: RealmId, group: GroupId, index: int) -> bool:
        known = self._boundaries.get((realm, group))
        return known is not None and known[0] == index and trio.current_time() - known[1] < BOUNDARY_S

    async def page(self, realm: RealmId, wanted: KeyRange, limit: int, selection: Selection) -> list[Row]:
        """Return up to `limit` rows of a range, 0 for all."""
        return await self.table(realm).read_rows(RowSet(ranges=(wanted,)), limit=limit, selection=selection)

    async def newest_row(self, realm: RealmId, group: GroupId, selection: Selection) -> Row | None:
        """Return the newest row of the log (operation 2)."""
        return await self.table(realm).first(keys.log_range(group, keys.TOP, 1), selection)

    async def last_row(self, realm: RealmId, group: GroupId) -> tuple[int, LogEntry] | None:
        """Return (start of the last row, last entry), None for an empty log.

        The newest row is never a tombstone, but a scan can choose a row that is replaced before it is read, when a
        newer one was appended meanwhile: then it is read again.
        """
        attempts = self.table(realm).attempts("read the end of the log")
        while True:
            row = await self.newest_row(realm, group, _NEWEST_CELL)
            if row is None:
                return None
            if not is_tombstone(row):
                return keys.log_index(row.key), decode_cell(row.key, row.cells[0])[0]
            if attempts.exhausted():
                raise StoreUnavailable("the newest row of the log is a tombstone")
            await attempts.pause()

    async def read_from(
        self, realm: RealmId, group: GroupId, index: int, entries_max: int
    ) -> list[LogEntry] | Compacted:
        """Return consecutive entries from `index`; [] at the end of the log."""
        if self._at_boundary(realm, group, index):
            return await self._continue(realm, group, index, [], entries_max)
        return await self._position(realm, group, index, entries_max)

    async def _position(
        self, realm: RealmId, group: GroupId, index: int, entries_max: int
    ) -> list[LogEntry] | Compacted:
        """Read from an index that may be anywhere in a row (operation 3), then on."""
        for is_second_look in (False, True):
            row = await self.table(realm).first(keys.log_range(group, index, 1))
            if row is not None and is_tombstone(row):
                return Compacted(index)
            found = [] if row is None else [entry for entry in decode_entries(row) if entry.index >= index]
            if found:
                if found[0].index != index:
                    return Compacted(index)
                return await self._continue(realm, group, index, found, entries_max)
            last = await self.last_row(realm, group)
            if last is None:
                return []
            if last[1].index < index:
                if last[1].index == index - 1:
                    self.note_boundary(realm, group, index)
                return []
            if is_second_look:
                break
        return Compacted(index)

    async def _continue(
        self, realm: RealmId, group: GroupId, index: int, found: list[LogEntry], entries_max: int
    ) -> list[LogEntry] | Compacted:
        """Add the rows that follow (operation 4) to what was found, as far as they are consecutive."""
        expected = found[-1].index + 1 if found else index
        left = entries_max - len(found)
        if left > 0:
            rows = await self.page(realm, keys.log_range(group, expected + left - 1, expected), 0, EVERYTHING)
            for row in reversed(rows):
                if is_tombstone(row) or keys.log_index(row.key) != expected:
                    return found or Compacted(expected)
                found.extend(decode_entries(row))
                expected = found[-1].index + 1
        if found:
            self.note_boundary(realm, group, expected)
        return found

    async def read_intents(
        self, realm: RealmId, group: GroupId, first: int, last: int
    ) -> list[tuple[LogEntry, Intent]]:
        """Return the entries first..last that have an intent and are still there, oldest first."""
        if first > last:
            return []
        oldest = max(1, first - BATCH_ROWS_BEFORE)
        scan = self.table(realm).scan(keys.log_range(group, last, oldest), page_rows=INTENT_ROWS)
        rows = [row async for page in scan for row in page if not is_tombstone(row)]
        return [
            (entry, intent)
            for row in reversed(rows)
            for entry, intent in decode_with_intents(row)
            if first <= entry.index <= last
        ]
