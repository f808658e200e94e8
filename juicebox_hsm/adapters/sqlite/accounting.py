"""Keep which records existed when, one row per record and UTC day with an event (storage.md 2.3, 4.6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from juicebox_hsm.adapters.sqlite.reads import Reads, fetch
from juicebox_hsm.adapters.sqlite.writer import Writer
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.clocks import DAY_MS
from juicebox_hsm.host.events import AccountingEvent
from juicebox_hsm.ids import RealmId

_COUNT: Final = """SELECT tenant, sum(registered OR day >= ?3) AS users FROM
  (SELECT tenant, registered, max(day) AS day FROM users WHERE realm = ?1 AND day < ?2 GROUP BY tenant, record)
  GROUP BY tenant HAVING users > 0 ORDER BY tenant"""


class SqliteAccounting:
    """`ports.Accounting` on one file."""

    def __init__(self, writer: Writer, reads: Reads) -> None:
        self._writer = writer
        self._reads = reads

    async def write(self, realm: RealmId, events: Sequence[AccountingEvent]) -> None:
        """Write events; of one record and day the one with the highest `seq` counts, so repeats change nothing."""
        if not events:
            return
        number = self._reads.realm(realm)
        rows = [
            (number, event.tenant, event.record, event.when_ms // DAY_MS, event.seq, event.registered)
            for event in events
        ]
        await self._writer.run(
            lambda db: db.executemany(
                "INSERT INTO users VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET seq = excluded.seq,"
                " registered = excluded.registered WHERE excluded.seq >= users.seq",
                rows,
            )
        )

    async def count_users(self, realm: RealmId, start_ms: int, end_ms: int) -> dict[str, int]:
        """Return tenant -> users with a secret at any time in [start, end), whole UTC days.

        A record counts if its newest event before the end says registered, or is a deletion within the period.
        Reads every row of the realm, in a worker thread. Raises `LocalError` for a period that is not whole days.
        """
        if start_ms % DAY_MS or end_ms % DAY_MS or not 0 <= start_ms < end_ms:
            raise LocalError(f"the period {start_ms}..{end_ms} ms is not one or more whole UTC days")
        number = self._reads.realm(realm)
        arguments = (number, end_ms // DAY_MS, start_ms // DAY_MS)
        return dict(await self._reads.scan(lambda db: fetch(db, _COUNT, arguments)))
