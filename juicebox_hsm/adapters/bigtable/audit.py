"""Keep the audit trail: a row an entry, newest first, written only where there is none yet (record 0035)."""

from __future__ import annotations

from typing import Final

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import Row, RowExists, RowSet, Selection, SetCell
from juicebox_hsm.adapters.bigtable.retry import NoSuchTable
from juicebox_hsm.adapters.bigtable.table import Endpoint, Table
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.audit import CHANGE_BYTES, AuditEntry, decode, encode
from juicebox_hsm.ports.errors import StoreAmbiguous, StoreUnavailable

AUDIT: Final = "audit"
_NEWEST: Final = Selection(cells_per_column=1)


class BigtableAudit:
    """`ports.AuditTrail` on one instance."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._table = Table(endpoint, AUDIT)

    async def add(self, entry: AuditEntry) -> None:
        """Add an entry; of one change and phase the first one stands."""
        key = keys.audit_key(entry.when_ms, entry.change, entry.phase.value)
        attempts = self._table.attempts("add to the audit trail")
        while True:
            try:
                await self._table.check_and_mutate(key, RowExists(), if_not=(SetCell("f", b"e", encode(entry)),))
                return
            except NoSuchTable:
                raise LocalError(
                    "the store has no audit table yet, and nothing is changed without a record; a manager or load "
                    "balancer of this version makes the table when it starts, and so does `store init`"
                ) from None
            except StoreAmbiguous as error:  # repeating is harmless: the row is only ever ours
                if attempts.exhausted():
                    raise StoreUnavailable(f"not seen to happen: {error}") from None
                await attempts.pause()

    async def read(self, since_ms: int, entries_max: int) -> list[AuditEntry]:
        """Return the newest entries since then, oldest first; none before the table was made."""
        try:
            rows = await self._table.read_rows(
                RowSet(ranges=(keys.audit_range(since_ms),)), limit=entries_max, selection=_NEWEST
            )
        except NoSuchTable:
            return []
        return [_entry(row) for row in reversed(rows)]


def _entry(row: Row) -> AuditEntry:
    when_ms = keys.upward(row.key[:8])
    change, phase = row.key[8 : 8 + CHANGE_BYTES], row.key[8 + CHANGE_BYTES :]
    return decode(change, phase.decode(errors="replace"), when_ms, row.cells[0].value)
