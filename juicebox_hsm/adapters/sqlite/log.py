"""Keep groups' logs, one row per appended batch (storage.md 4.1, 4.2, 4.5; decision record 0003).

The append is one transaction: it compares the last row with what the batch names, then writes the row and the tree.
Compacted rows are simply removed; the newest row of a log never is, so the condition always has something to compare
with. No tombstones: an old leader's append fails on the tail, whatever rows are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import apsw

from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.observation.retry_metrics import Family
from juicebox_hsm.adapters.sqlite.nodes import TreeNodes
from juicebox_hsm.adapters.sqlite.reads import Reads, fetch, fetch_one, group_number, make_group_number
from juicebox_hsm.adapters.sqlite.rows import (
    checksum,
    decode_certificate,
    decode_intents,
    encode_certificate,
    encode_entries,
    encode_intents,
    read_row,
)
from juicebox_hsm.adapters.sqlite.schema import INDEX_BITS, INDEX_MAX
from juicebox_hsm.adapters.sqlite.writer import Writer
from juicebox_hsm.consensus.types import Certificate, LogEntry
from juicebox_hsm.host.log import AppendOutcome, Compacted, Intent, LogRow, check_batch
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.ports.errors import StoreDamaged, StoreInvalid
from juicebox_hsm.wire.rpc import DamageKind

COMPACT_ROWS: Final = 200
"""Rows removed per transaction, so that other writers get their turn."""
INLINE_ENTRIES: Final = 256
"""Entries read in the Trio thread; more go to a worker thread."""

_TAIL: Final = "SELECT last, mac FROM log WHERE id BETWEEN ? AND ? ORDER BY id DESC LIMIT 1"
_LAST: Final = "SELECT id, last, mac, entries, intents, sum FROM log WHERE id BETWEEN ? AND ? ORDER BY id DESC LIMIT 1"
_FROM: Final = """SELECT id, last, mac, entries, intents, sum FROM log WHERE id BETWEEN
  coalesce((SELECT id FROM log WHERE id BETWEEN ?1 AND ?2 ORDER BY id DESC LIMIT 1), ?2) AND ?3 ORDER BY id"""
_INTENTS: Final = """SELECT id, last, mac, entries, intents, sum FROM log
  WHERE id BETWEEN ? AND ? AND last >= ? AND intents NOT NULL ORDER BY id"""


def _bounds(number: int) -> tuple[int, int]:
    """Return the smallest and the largest row id of a group."""
    return number << INDEX_BITS, (number << INDEX_BITS) + INDEX_MAX


class SqliteLog:
    """`ports.LogStore` on one file."""

    def __init__(self, writer: Writer, reads: Reads, nodes: TreeNodes, metrics: Metrics) -> None:
        self._writer = writer
        self._reads = reads
        self._nodes = nodes
        self._inner = Family(metrics, "store_client.append_inner")

    async def append(
        self,
        realm: RealmId,
        group: GroupId,
        entries: Sequence[LogEntry],
        intents: Sequence[Intent | None],
        delta: bytes,
    ) -> AppendOutcome:
        """Append a batch, its intents and its tree delta in one transaction; CONFLICT unless it follows the tail."""
        check_batch(entries, intents, INDEX_MAX)
        first, last = entries[0], entries[-1]
        known = self._reads.group(realm, group)
        changes = self._nodes.plan(realm, delta)
        packed, packed_intents = encode_entries(entries), encode_intents(intents)
        total = checksum(packed, packed_intents)
        apply = self._nodes.apply

        def write(connection: apsw.Connection) -> AppendOutcome:
            number = known if known is not None else group_number(connection, realm, group)
            tail = None if number is None else fetch_one(connection, _TAIL, _bounds(number))
            if tail != (None if first.index == 1 else (first.index - 1, first.prev_mac)):
                if number is not None:
                    _last_entry(connection, number, group)  # a damaged row is nobody's, and no conflict
                return AppendOutcome.CONFLICT
            if number is None:
                number = make_group_number(connection, realm, group)
            connection.execute(
                "INSERT INTO log VALUES (?, ?, ?, ?, ?, ?)",
                (number << INDEX_BITS | first.index, last.index, last.entry_mac, packed, packed_intents, total),
            )
            apply(connection, changes)
            return AppendOutcome.APPENDED

        with self._inner.measured():
            outcome = await self._writer.run(write)
        if outcome is AppendOutcome.APPENDED:
            self._nodes.remember(changes)
        return outcome

    async def read_last(self, realm: RealmId, group: GroupId) -> LogEntry | None:
        """Return the last entry, None for an empty log."""
        number = self._reads.group(realm, group)
        if number is None:
            return None
        return self._reads.inline(lambda connection: _last_entry(connection, number, group))

    async def read_from(
        self, realm: RealmId, group: GroupId, index: int, entries_max: int
    ) -> list[LogEntry] | Compacted:
        """Return consecutive entries from `index`, at most a row more than `entries_max`; [] at the end."""
        number = self._reads.group(realm, group)
        if number is None or index > INDEX_MAX:
            return []

        def read(connection: apsw.Connection) -> list[LogEntry] | Compacted:
            return _read_from(connection, number, group, index, entries_max)

        return self._reads.inline(read) if entries_max <= INLINE_ENTRIES else await self._reads.scan(read)

    async def read_intents(
        self, realm: RealmId, group: GroupId, first: int, last: int
    ) -> list[tuple[LogEntry, Intent]]:
        """Return the entries first..last that have an intent and are still there."""
        number = self._reads.group(realm, group)
        if number is None or first > min(last, INDEX_MAX):
            return []
        low, high = _bounds(number)

        def read(connection: apsw.Connection) -> list[tuple[LogEntry, Intent]]:
            found = []
            for row in fetch(connection, _INTENTS, (low, min(high, low + last), first)):
                entries, intents = read_row(row, low, group)
                for entry, intent in zip(entries, decode_intents(intents or b""), strict=True):
                    if intent is not None and first <= entry.index <= last:
                        found.append((entry, intent))
            return found

        return await self._reads.scan(read)

    async def list_rows(self, realm: RealmId, group: GroupId, below: int) -> list[LogRow]:
        """Return the rows that start below `below`, oldest first."""
        number = self._reads.group(realm, group)
        if number is None:
            return []
        low, high = _bounds(number)
        top = min(high, low + below - 1)

        def read(connection: apsw.Connection) -> list[LogRow]:
            rows = connection.execute("SELECT id FROM log WHERE id BETWEEN ? AND ? ORDER BY id", (low, top))
            return [LogRow(row - low, is_tombstone=False) for (row,) in rows]

        return await self._reads.scan(read)

    async def compact(self, realm: RealmId, group: GroupId, rows: Sequence[LogRow]) -> None:
        """Remove rows, in slices; the newest row of the log stays whatever is asked."""
        number = self._reads.group(realm, group)
        if number is None:
            return
        low, high = _bounds(number)
        for at in range(0, len(rows), COMPACT_ROWS):
            ids = [(low + row.first_index,) for row in rows[at : at + COMPACT_ROWS] if not row.is_tombstone]

            def remove(connection: apsw.Connection, ids: list[tuple[int]] = ids) -> None:
                newest = fetch_one(connection, "SELECT max(id) FROM log WHERE id BETWEEN ? AND ?", (low, high))
                connection.executemany("DELETE FROM log WHERE id = ?", [row for row in ids if row[0] != newest])

            await self._writer.run(remove)

    async def write_certificate(self, realm: RealmId, group: GroupId, certificate: Certificate) -> None:
        """Store the certificate and drop those of a smaller index."""
        packed = encode_certificate(certificate)

        def write(connection: apsw.Connection) -> None:
            number = make_group_number(connection, realm, group)
            connection.execute(
                "INSERT OR REPLACE INTO certificates VALUES (?, ?, ?)", (number, certificate.index, packed)
            )
            connection.execute("DELETE FROM certificates WHERE grp = ? AND idx < ?", (number, certificate.index))

        await self._writer.run(write)

    async def read_certificate(self, realm: RealmId, group: GroupId) -> Certificate | None:
        """Return the certificate of the highest index."""
        number = self._reads.group(realm, group)
        if number is None:
            return None
        found = self._reads.inline(
            lambda connection: fetch_one(
                connection, "SELECT data, idx FROM certificates WHERE grp = ? ORDER BY idx DESC LIMIT 1", (number,)
            )
        )
        if found is None:
            return None
        try:
            return decode_certificate(found[0], found[1], realm, group)
        except StoreInvalid as error:
            raise StoreDamaged(DamageKind.CERTIFICATE, f"at index {found[1]}", group=group, why=str(error)) from None

    async def list_groups(self, realm: RealmId) -> list[GroupId]:
        """Return the groups that have a log, sorted."""
        number = self._reads.realm(realm)
        rows = self._reads.inline(
            lambda connection: fetch(
                connection,
                "SELECT grp FROM groups g WHERE realm = ? AND EXISTS (SELECT 1 FROM log WHERE id BETWEEN"
                " g.number << ? AND ((g.number + 1) << ?) - 1) ORDER BY grp",
                (number, INDEX_BITS, INDEX_BITS),
            )
        )
        return [GroupId(group) for (group,) in rows]


def _last_entry(connection: apsw.Connection, number: int, group: GroupId) -> LogEntry | None:
    """Return the last entry, None for an empty log. Raises `StoreDamaged`."""
    low, high = _bounds(number)
    row = fetch_one(connection, _LAST, (low, high))
    return None if row is None else read_row(row, low, group)[0][-1]


def _read_from(
    connection: apsw.Connection, number: int, group: GroupId, index: int, entries_max: int
) -> list[LogEntry] | Compacted:
    """Read rows from the one that holds `index` on, in one statement."""
    low, high = _bounds(number)
    found: list[LogEntry] = []
    expected = index
    gap = False
    cursor = connection.execute(_FROM, (low, low + index, high))
    try:
        for row in cursor:
            entries, _ = read_row(row, low, group)
            if entries[-1].index < expected:
                continue
            gap = entries[0].index > expected
            if gap:
                break
            found.extend(entries[expected - entries[0].index :])
            expected = entries[-1].index + 1
            if len(found) >= entries_max:
                break
    finally:
        cursor.close()  # ends the statement, whose snapshot would keep the write-ahead log from being truncated
    return Compacted(index) if gap and not found else found
