"""Keep which records existed when: one row per record, one cell per UTC day with an event (storage.md 2.3, 4.6)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import Cell, DeleteColumn, Mutation, Selection, SetCell
from juicebox_hsm.adapters.bigtable.table import Endpoint, Table
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.clocks import DAY_MS
from juicebox_hsm.host.events import AccountingEvent
from juicebox_hsm.ids import RealmId

COLUMN: Final = b"e"
REGISTERED: Final = b"\x01"
DELETED: Final = b"\x00"


def day_micros(when_ms: int) -> int:
    """Return midnight UTC of the day of a time, in microseconds."""
    return when_ms // DAY_MS * DAY_MS * 1000


def cell_place(midnight: int, seq: int) -> tuple[bytes, int]:
    """Return (column, time) of an event's cell: time within its day counts the tenant's events, not milliseconds.

    So the later event of a day is the newer cell, whichever is written last. A day has 86.4 million milliseconds, the
    unit of the service; the events after so many go to another column, and so on.
    """
    turn, place = divmod(seq, DAY_MS)
    return COLUMN + (turn.to_bytes(4, "big") if turn else b""), midnight + place * 1000


def _order(cell: Cell) -> tuple[int, bytes, int]:
    """Return what a row's cells are ordered by: day, turn, place."""
    return cell.timestamp // (DAY_MS * 1000), cell.qualifier, cell.timestamp


class BigtableAccounting:
    """`ports.Accounting` on one instance."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def _table(self, realm: RealmId) -> Table:
        return Table(self._endpoint, keys.realm_tables(realm)[2])

    async def write(self, realm: RealmId, events: Sequence[AccountingEvent]) -> None:
        """Write events; of one record and day the one with the highest `seq` counts, so repeats change nothing.

        A write removes only the day's cells that are older than its own: one that comes too late stays below.
        """
        newest: dict[tuple[bytes, int], AccountingEvent] = {}
        for event in sorted(events, key=lambda event: event.seq):
            newest[keys.user_key(event.tenant, event.record), day_micros(event.when_ms)] = event
        rows: dict[bytes, list[Mutation]] = defaultdict(list)
        for (key, midnight), event in newest.items():
            column, micros = cell_place(midnight, event.seq)
            if micros > midnight:
                rows[key].append(DeleteColumn("f", column, before=micros, since=midnight))
            rows[key].append(SetCell("f", column, REGISTERED if event.registered else DELETED, micros))
        await self._table(realm).mutate_rows(list(rows.items()))

    async def count_users(self, realm: RealmId, start_ms: int, end_ms: int) -> dict[str, int]:
        """Return tenant -> users with a secret at any time in [start, end), whole UTC days; reads the whole table.

        A record counts if its newest event before the end says registered, or is a deletion within the period.
        Raises `LocalError` for a period that is not whole days.
        """
        if start_ms % DAY_MS or end_ms % DAY_MS or not 0 <= start_ms < end_ms:
            raise LocalError(f"the period {start_ms}..{end_ms} ms is not one or more whole UTC days")
        selection = Selection(family="f", before=end_ms * 1000, cells_per_column=1)
        counts: dict[str, int] = {}
        async for page in self._table(realm).scan(keys.whole_table(), selection):
            for row in page:
                newest = max(row.cells, key=_order)
                if newest.value == REGISTERED or newest.timestamp >= start_ms * 1000:
                    tenant = keys.user_tenant(row.key)
                    counts[tenant] = counts.get(tenant, 0) + 1
        return dict(sorted(counts.items()))
