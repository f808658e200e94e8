"""Keep tenants' events between commit and publication (agent.md 11; storage.md 2.7; decision record 0009).

Each (realm, tenant) has a row with the tail and the published position of its sequence, so a sequence stays dense
whatever was removed, and the backlog is a subtraction. `record` and `advance` are one transaction each: several
leaders and dispatchers share them without any lock of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import apsw

from juicebox_hsm.adapters.sqlite.reads import Reads, fetch, fetch_one, make_group_number, realm_number
from juicebox_hsm.adapters.sqlite.rows import checksum, encode_event, read_event
from juicebox_hsm.adapters.sqlite.writer import Writer
from juicebox_hsm.errors import check
from juicebox_hsm.host.events import EVENT_KEPT_MS, Backlog, EventKind, NewEvent, OutboxEvent, TenantCursor
from juicebox_hsm.ids import GroupId, RealmId

_TENANT: Final = "SELECT number, tail FROM outbox_tenants WHERE realm = ? AND tenant = ?"
_BACKLOG: Final = """SELECT coalesce(sum(t.tail - t.published), 0), min(o.when_ms)
  FROM outbox_tenants t LEFT JOIN outbox o ON o.tenant = t.number AND o.seq = t.published + 1
  WHERE t.realm = ? AND t.tail > t.published"""
_OLDEST: Final = """SELECT o.seq, o.when_ms, o.idx <= coalesce(s.idx, 0) FROM outbox o
  LEFT JOIN settled s ON s.grp = o.grp WHERE o.tenant = ? AND o.seq <= ? ORDER BY o.seq LIMIT ?"""
_BARE: Final = """SELECT o.seq FROM outbox o INDEXED BY outbox_bare JOIN settled s ON s.grp = o.grp
  WHERE o.bare = 1 AND o.tenant = ? AND o.seq <= ? AND o.idx <= s.idx ORDER BY o.seq LIMIT ?"""


class SqliteOutbox:
    """`ports.EventOutbox` on one file."""

    def __init__(self, writer: Writer, reads: Reads) -> None:
        self._writer = writer
        self._reads = reads

    async def record(
        self, realm: RealmId, events: Sequence[NewEvent], settled: Mapping[GroupId, int]
    ) -> dict[str, int]:
        """Append events to their tenants' sequences and raise settled indexes, in one transaction."""
        blobs = [encode_event(event) for event in events]
        settled = dict(settled)

        def write(db: apsw.Connection) -> dict[str, int]:
            number = realm_number(db, realm)
            groups = {
                group: make_group_number(db, realm, group)
                for group in {event.group for event in events} | settled.keys()
            }
            tails: dict[str, tuple[int, int]] = {}
            rows = []
            for event, blob in zip(events, blobs, strict=True):
                tenant, tail = tails.get(event.tenant) or _tenant_row(db, number, event.tenant)
                tails[event.tenant] = (tenant, tail + 1)
                bare = event.event is None
                rows.append(
                    (tenant, tail + 1, groups[event.group], event.index, event.when_ms, bare, blob, checksum(blob))
                )
            db.executemany("INSERT INTO outbox VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0)", rows)
            db.executemany("UPDATE outbox_tenants SET tail = ?2 WHERE number = ?1", list(tails.values()))
            db.executemany(
                "INSERT INTO settled VALUES (?, ?) ON CONFLICT DO UPDATE SET idx = max(idx, excluded.idx)",
                [(groups[group], index) for group, index in settled.items()],
            )
            return {tenant: tail for tenant, (_, tail) in tails.items()}

        return await self._writer.run(write)

    async def settled(self, realm: RealmId, group: GroupId) -> int:
        """Return the group's settled index, 0 when never written."""
        number = self._reads.group(realm, group)
        found = self._reads.inline(lambda db: fetch_one(db, "SELECT idx FROM settled WHERE grp = ?", (number,)))
        return found or 0

    async def read(self, realm: RealmId, tenant: str, after_seq: int, limit: int) -> list[OutboxEvent]:
        """Return up to `limit` events with seq > after_seq in order; a row costs about 3 us."""
        number = self._reads.realm(realm)
        rows = self._reads.inline(
            lambda db: fetch(
                db,
                "SELECT o.seq, o.data, o.sum, g.grp, o.idx, o.when_ms FROM outbox o JOIN groups g ON g.number = o.grp"
                " WHERE o.tenant = (SELECT number FROM outbox_tenants WHERE realm = ? AND tenant = ?) AND o.seq > ?"
                " ORDER BY o.seq LIMIT ?",
                (number, tenant, after_seq, limit),
            )
        )
        return [
            read_event(seq, data, total, tenant, GroupId(group), index, when_ms)
            for seq, data, total, group, index, when_ms in rows
        ]

    async def cursors(self, realm: RealmId) -> list[TenantCursor]:
        """Return every tenant that ever had an event, by name."""
        number = self._reads.realm(realm)
        rows = self._reads.inline(
            lambda db: fetch(
                db, "SELECT tenant, published, tail FROM outbox_tenants WHERE realm = ? ORDER BY tenant", (number,)
            )
        )
        return [TenantCursor(tenant, published, tail) for tenant, published, tail in rows]

    async def advance(
        self,
        realm: RealmId,
        tenant: str,
        from_seq: int,
        to_seq: int,
        day: str,
        counts: Mapping[EventKind, int],
    ) -> bool:
        """Move the cursor and add to the day's counters, unless another dispatcher moved the cursor first."""
        check(from_seq <= to_seq, "a cursor only moves forward")
        added = [(day, kind.value, count) for kind, count in counts.items() if count]

        def write(db: apsw.Connection) -> bool:
            number: int | None = fetch_one(
                db,
                "UPDATE outbox_tenants SET published = ?4 WHERE realm = ?1 AND tenant = ?2 AND published = ?3"
                " AND tail >= ?4 RETURNING number",
                (realm_number(db, realm), tenant, from_seq, to_seq),
            )
            if number is None:
                return False
            db.executemany(
                "INSERT INTO counters VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count",
                [(number, *row) for row in added],
            )
            return True

        return await self._writer.run(write)

    async def remove_published(self, realm: RealmId, now_ms: int, limit: int, *, kept_ms: int = EVENT_KEPT_MS) -> int:
        """Remove up to `limit` published and settled rows, those with an event `kept_ms` after it."""
        number = self._reads.realm(realm)

        def write(db: apsw.Connection) -> int:
            removed = 0
            for tenant, published in fetch(
                db, "SELECT number, published FROM outbox_tenants WHERE realm = ? AND published > 0", (number,)
            ):
                removed += _remove(db, tenant, published, now_ms - kept_ms, limit - removed)
                if removed >= limit:
                    break
            return removed

        return await self._writer.run(write)

    async def backlog(self, realm: RealmId) -> Backlog:
        """Return the unpublished rows and the age of the oldest; costs one row per tenant that has some."""
        number = self._reads.realm(realm)
        rows, oldest_ms = self._reads.inline(lambda db: fetch_one(db, _BACKLOG, (number,)))
        return Backlog(rows, oldest_ms)

    async def counters(self, realm: RealmId, tenant: str) -> dict[str, dict[EventKind, int]]:
        """Return day -> kind -> count."""
        number = self._reads.realm(realm)
        rows = self._reads.inline(
            lambda db: fetch(
                db,
                "SELECT day, kind, count FROM counters WHERE tenant ="
                " (SELECT number FROM outbox_tenants WHERE realm = ? AND tenant = ?) ORDER BY day, kind",
                (number, tenant),
            )
        )
        days: dict[str, dict[EventKind, int]] = {}
        for day, kind, count in rows:
            days.setdefault(day, {})[EventKind(kind)] = count
        return days


def _tenant_row(db: apsw.Connection, realm: int, tenant: str) -> tuple[int, int]:
    """Return (number, tail) of a tenant, making its row at its first event."""
    found: tuple[int, int] | None = fetch_one(db, _TENANT, (realm, tenant))
    if found is not None:
        return found
    db.execute("INSERT INTO outbox_tenants (realm, tenant, tail, published) VALUES (?, ?, 0, 0)", (realm, tenant))
    return db.last_insert_rowid(), 0


def _remove(db: apsw.Connection, tenant: int, published: int, event_before_ms: int, limit: int) -> int:
    """Remove one tenant's removable rows: those without an event by their index, those with one from the oldest on.

    The second scan stops at the first event that is too young, so kept rows are not read again every time.
    """
    gone = {seq for (seq,) in fetch(db, _BARE, (tenant, published, limit))}
    if len(gone) < limit:
        cursor = db.execute(_OLDEST, (tenant, published, limit))
        for seq, when_ms, is_settled in cursor:
            if len(gone) >= limit:
                break
            if seq in gone:
                continue
            if when_ms > event_before_ms:
                break
            if is_settled:
                gone.add(seq)
        cursor.close()
    db.executemany("DELETE FROM outbox WHERE tenant = ? AND seq = ?", [(tenant, seq) for seq in sorted(gone)])
    db.execute("UPDATE outbox_tenants SET removed = removed + ? WHERE number = ?", (len(gone), tenant))
    return len(gone)
