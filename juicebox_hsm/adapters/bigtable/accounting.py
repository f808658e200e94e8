"""Keep which records existed when: one row per record, one cell per UTC day with an event (storage.md 2.3, 4.6)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import Mutation, Selection, SetCell
from juicebox_hsm.adapters.bigtable.table import Endpoint, Table
from juicebox_hsm.errors import LocalError
from juicebox_hsm.ids import RealmId, RecordId

DAY_MS: Final = 86_400_000
COLUMN: Final = b"e"
REGISTERED: Final = b"\x01"
DELETED: Final = b"\x00"


def day_micros(when_ms: int) -> int:
    """Return midnight UTC of the day of a time, in microseconds."""
    return when_ms // DAY_MS * DAY_MS * 1000


class BigtableAccounting:
    """`ports.Accounting` on one instance."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def _table(self, realm: RealmId) -> Table:
        return Table(self._endpoint, keys.realm_tables(realm)[2])

    async def write(self, realm: RealmId, events: Sequence[tuple[str, RecordId, int, bool]]) -> None:
        """Write (tenant, record, when_ms, registered); of a day the last event counts, so repeats change nothing.

        The cell's time is the day: events of one day overwrite each other in the order in which they are written.
        """
        last: dict[tuple[bytes, int], bool] = {}
        for tenant, record, when_ms, registered in sorted(events, key=lambda event: event[2]):
            last[keys.user_key(tenant, record), day_micros(when_ms)] = registered
        rows: dict[bytes, list[Mutation]] = defaultdict(list)
        for (key, micros), registered in last.items():
            rows[key].append(SetCell("f", COLUMN, REGISTERED if registered else DELETED, micros))
        await self._table(realm).mutate_rows(list(rows.items()))

    async def count_users(self, realm: RealmId, start_ms: int, end_ms: int) -> dict[str, int]:
        """Return tenant -> users with a secret at any time in [start, end), whole UTC days; reads the whole table.

        A record counts if its newest event before the end says registered, or is a deletion within the period.
        Raises `LocalError` for a period that is not whole days.
        """
        if start_ms % DAY_MS or end_ms % DAY_MS or not 0 <= start_ms < end_ms:
            raise LocalError(f"the period {start_ms}..{end_ms} ms is not one or more whole UTC days")
        selection = Selection(family="f", qualifier=COLUMN, before=end_ms * 1000, cells_per_column=1)
        counts: dict[str, int] = {}
        async for page in self._table(realm).scan(keys.whole_table(), selection):
            for row in page:
                newest = row.cells[0]
                if newest.value == REGISTERED or newest.timestamp >= start_ms * 1000:
                    tenant = keys.user_tenant(row.key)
                    counts[tenant] = counts.get(tenant, 0) + 1
        return dict(sorted(counts.items()))
