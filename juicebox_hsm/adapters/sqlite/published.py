"""Published events with their acknowledgements, for the embedded bus (operator-tools.md 6.2; storage.md 2.7).

An acknowledgement is a mark on the outbox row, and an index holds only rows without one: however many events lie
behind one that nobody acknowledges, finding what is left costs the same. Marks go with their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import apsw

from juicebox_hsm.adapters.sqlite.reads import Reads, fetch, fetch_one
from juicebox_hsm.adapters.sqlite.rows import read_event
from juicebox_hsm.adapters.sqlite.schema import SEQ_MAX
from juicebox_hsm.adapters.sqlite.writer import Writer
from juicebox_hsm.host.events import OutboxEvent
from juicebox_hsm.ids import GroupId, RealmId

_TENANT: Final = "SELECT number, published FROM outbox_tenants WHERE realm = ? AND tenant = ?"
_LEFT: Final = """SELECT o.seq, o.data, o.sum, g.grp, o.idx, o.when_ms FROM outbox o INDEXED BY outbox_left
  JOIN groups g ON g.number = o.grp
  WHERE o.bare = 0 AND o.acked = 0 AND o.tenant = ? AND o.seq > ? AND o.seq <= ? ORDER BY o.seq LIMIT ?"""
_MARK: Final = "UPDATE outbox SET acked = 1 WHERE tenant = ? AND seq = ? AND bare = 0 AND acked = 0"


class SqlitePublished:
    """`event_bus.PublishedEvents` on one file."""

    def __init__(self, writer: Writer, reads: Reads) -> None:
        self._writer = writer
        self._reads = reads

    async def unacknowledged(self, realm: RealmId, tenant: str, after_seq: int, limit: int) -> list[OutboxEvent]:
        """Return published rows with an event that nobody acknowledged; a row costs about 5 us."""
        number = self._reads.realm(realm)

        def read(db: apsw.Connection) -> list[OutboxEvent]:
            found = fetch_one(db, _TENANT, (number, tenant))
            if found is None or after_seq >= found[1]:
                return []
            return [
                read_event(seq, data, total, tenant, GroupId(group), index, when_ms)
                for seq, data, total, group, index, when_ms in fetch(db, _LEFT, (found[0], after_seq, found[1], limit))
            ]

        return self._reads.inline(read)

    async def mark_acknowledged(self, realm: RealmId, tenant: str, seqs: Sequence[int]) -> None:
        """Mark rows in one transaction."""
        number = self._reads.realm(realm)

        def write(db: apsw.Connection) -> None:
            found = fetch_one(db, _TENANT, (number, tenant))
            if found is not None:
                db.executemany(_MARK, [(found[0], seq) for seq in seqs if seq <= min(found[1], SEQ_MAX)])

        await self._writer.run(write)
