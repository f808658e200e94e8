"""Keep the audit trail: rows that the file itself refuses to change or delete (record 0035)."""

from __future__ import annotations

from juicebox_hsm.adapters.sqlite.reads import Reads, fetch
from juicebox_hsm.adapters.sqlite.writer import Writer
from juicebox_hsm.host.audit import AuditEntry, decode, encode


class SqliteAudit:
    """`ports.AuditTrail` on one file."""

    def __init__(self, writer: Writer, reads: Reads) -> None:
        self._writer = writer
        self._reads = reads

    async def add(self, entry: AuditEntry) -> None:
        """Add an entry; of one change and phase the first one stands."""
        row = (entry.change, entry.phase.value, entry.when_ms, encode(entry))
        await self._writer.run(
            lambda db: db.execute("INSERT OR IGNORE INTO audit (change, phase, when_ms, data) VALUES (?, ?, ?, ?)", row)
        )

    async def read(self, since_ms: int, entries_max: int) -> list[AuditEntry]:
        """Return the newest entries since then, oldest first. Reads in a worker thread: they may be many."""
        statement = (
            "SELECT change, phase, when_ms, data FROM audit WHERE when_ms >= ? ORDER BY when_ms DESC, id DESC LIMIT ?"
        )
        rows = await self._reads.scan(lambda db: fetch(db, statement, (since_ms, entries_max)))
        return [decode(*row) for row in reversed(rows)]
