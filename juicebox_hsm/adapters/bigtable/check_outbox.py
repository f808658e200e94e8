"""Check tenants' outboxes: no waiting event lost, every event readable, counters equal to the cursor (agent.md 11)."""

from __future__ import annotations

from typing import Final

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import Selection
from juicebox_hsm.adapters.bigtable.outbox_rows import EVENTS, Cursor, decode_cursor, decode_event
from juicebox_hsm.adapters.bigtable.table import Endpoint, Table
from juicebox_hsm.adapters.stores.check import Progress, Report
from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.errors import StoreInvalid

_NEWEST_OF_EACH: Final = Selection(cells_per_column=1)


class OutboxCheck:
    """The outboxes of one realm."""

    def __init__(self, endpoint: Endpoint, realm: RealmId) -> None:
        self._table = Table(endpoint, keys.realm_tables(realm)[3])
        self._realm = realm

    async def check(self, tenants: list[str], report: Report, progress: Progress) -> None:
        """Check the given tenants."""
        for tenant in tenants:
            progress(f"events of {tenant}", 0, 0)
            await self._check_tenant(tenant, report)

    async def _cursor(self, tenant: str) -> Cursor:
        return decode_cursor(await self._table.read_row(keys.cursor_key(tenant.encode()), _NEWEST_OF_EACH))

    async def _check_tenant(self, tenant: str, report: Report) -> None:
        where = f"realm {self._realm.hex()}, tenant {tenant}"
        try:
            cursor = await self._cursor(tenant)
        except StoreInvalid as error:
            report.add(where, str(error))
            return
        counted = sum(sum(counts.values()) for counts in cursor.counters.values())
        if counted != cursor.published:
            report.add(where, f"the counters tell {counted} requests, the cursor {cursor.published}")
        tail, waiting, gaps = await self._walk(tenant, where, cursor.published, report)
        if tail < cursor.published:
            report.add(where, f"the outbox cursor is at {cursor.published}, the sequence ends at {tail}")
        if waiting > cursor.published + 1 or gaps:
            moved = (await self._cursor(tenant)).published
            for first, last in [*gaps, *([(cursor.published + 1, waiting - 1)] if waiting else [])]:
                if last > moved and first <= last:
                    report.add(where, f"events {max(first, moved + 1)} to {last} are missing from the outbox")

    async def _walk(
        self, tenant: str, where: str, published: int, report: Report
    ) -> tuple[int, int, list[tuple[int, int]]]:
        """Return (newest, oldest above the cursor or 0, gaps above the cursor); rows come newest first."""
        tail = waiting = 0
        gaps: list[tuple[int, int]] = []
        scan = self._table.scan(keys.event_range(tenant.encode(), keys.TOP, 0), Selection(family=EVENTS))
        async for page in scan:
            for row in page:
                for cell in row.cells:
                    try:
                        event = decode_event(tenant, cell)
                    except StoreInvalid as error:
                        report.add(where, str(error))
                        seq = keys.upward(cell.qualifier)
                    else:
                        report.events += 1
                        seq = event.seq
                    tail = tail or seq
                    if seq <= published:
                        continue
                    if waiting and seq != waiting - 1:
                        gaps.append((seq + 1, waiting - 1))
                    waiting = seq
        return tail, waiting, gaps
