"""Append to groups' logs and resolve what a lost answer leaves open (storage.md 4.1, 4.5; decision record 0003).

An append is: the new tree nodes, then one conditional write of the log row, which exists or not. Two batches that
begin at the same index collide on the row's key; two that begin at different indexes and overlap cannot both begin
right after the last entry of the last row. Compacted rows leave tombstones for a week, so the collision outlives them.

The conditional write is never repeated blindly: its own success would look like a conflict. After an unknown outcome
the last row is read and says whether the batch is there, may be tried again, or lost against another leader.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import trio

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import DeleteFamily, DeleteRow, KeyRange, RowExists, Selection, SetCell
from juicebox_hsm.adapters.bigtable.deletion import DeferredDeletion
from juicebox_hsm.adapters.bigtable.log_reads import LogReads
from juicebox_hsm.adapters.bigtable.log_rows import TOMBSTONE_CELL, entry_cells, is_tombstone
from juicebox_hsm.adapters.bigtable.nodes import TreeNodes
from juicebox_hsm.adapters.bigtable.table import Table
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.observation.retry_metrics import Family
from juicebox_hsm.consensus.codec import decode_certificate, encode_certificate
from juicebox_hsm.consensus.types import Certificate, LogEntry
from juicebox_hsm.errors import DecodingError
from juicebox_hsm.host.log import AppendOutcome, Compacted, Intent, LogRow, check_batch
from juicebox_hsm.ids import ID_BYTES, GroupId, RealmId
from juicebox_hsm.merkle.kernel import delta_rows
from juicebox_hsm.ports.errors import StoreAmbiguous, StoreDamaged, StoreInvalid, StoreUnavailable
from juicebox_hsm.wire.rpc import DamageKind

WINDOW_ROWS: Final = 100
"""Rows listed or replaced at a time. The window in which gaps, tombstones and entries may mix: never change it on
live data (storage.md 2.1)."""
INDEX_MAX: Final = 2**63 - 1
FRESH_S: Final = 60.0
"""Age of an append's nodes above which they are written again before its row is; `store gc` leaves five minutes."""

_NAMES: Final = Selection(cells_per_row=1, strip_values=True)
_NEWEST: Final = Selection(cells_per_row=1)


class _FreshNodes:
    """The nodes of one append, written again when they are no longer young as its row is about to be written.

    Whoever removes unneeded nodes takes young ones for those of appends under way (`garbage`); a process that slept
    between the two writes, suspended with its machine for example, must not find its nodes gone (own).
    """

    def __init__(self, nodes: TreeNodes, realm: RealmId, adds: Sequence[tuple[bytes, bytes]]) -> None:
        self._nodes = nodes
        self._realm = realm
        self._adds = adds
        self._written_s = 0.0
        self.stored: dict[bytes, tuple[bytes, bytes]] = {}

    async def write(self) -> None:
        """Write the nodes."""
        self._written_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        if self._adds:
            self.stored = await self._nodes.write(self._realm, self._adds)

    async def keep(self) -> None:
        """Write them again if that was too long ago, by a clock that goes on while the machine sleeps."""
        if time.clock_gettime(time.CLOCK_BOOTTIME) - self._written_s > FRESH_S:
            await self.write()


class BigtableLog:
    """`ports.LogStore` on one instance."""

    def __init__(self, reads: LogReads, nodes: TreeNodes, deletion: DeferredDeletion, metrics: Metrics) -> None:
        self._reads = reads
        self._nodes = nodes
        self._deletion = deletion
        self._inner = Family(metrics, "store_client.append_inner")
        self._row = Family(metrics, "store_client.log_append")
        self._tails: dict[tuple[RealmId, GroupId], tuple[int, bytes]] = {}

    def _table(self, realm: RealmId) -> Table:
        return self._reads.table(realm)

    # --- appending -------------------------------------------------------------------------------

    async def append(
        self,
        realm: RealmId,
        group: GroupId,
        entries: Sequence[LogEntry],
        intents: Sequence[Intent | None],
        delta: bytes,
    ) -> AppendOutcome:
        """Append a batch with its intents, its nodes before it; CONFLICT unless it follows the log's last entry.

        Not cancelled half-way: one retry budget for all its calls, and their deadlines, bound it. One caller at a time
        per group.
        """
        check_batch(entries, intents, INDEX_MAX)
        changes = delta_rows(delta)
        tail = (realm, group)
        with trio.CancelScope(shield=True), self._table(realm).budget():
            if not await self._follows(realm, group, entries[0]):
                return AppendOutcome.CONFLICT
            with self._inner.measured():
                removals = await self._nodes.instances(realm, changes.removes)
                fresh = _FreshNodes(self._nodes, realm, changes.adds)
                await fresh.write()
                self._tails.pop(tail, None)
                with self._row.measured():
                    outcome = await self._write_row(realm, group, entries, entry_cells(entries, intents), fresh)
        if outcome is AppendOutcome.APPENDED:
            self._tails[tail] = (entries[-1].index, entries[-1].entry_mac)
            self._nodes.remember(fresh.stored)
            self._deletion.schedule(realm, removals)
        return outcome

    async def _follows(self, realm: RealmId, group: GroupId, first: LogEntry) -> bool:
        """Tell whether the batch follows the last entry of the last row, from memory if our own write is the last."""
        known = self._tails.get((realm, group))
        if known is not None and known[0] == first.index - 1:
            return known[1] == first.prev_mac
        last = await self.read_last(realm, group)
        if last is None:
            return first.index == 1
        return (last.index, last.entry_mac) == (first.index - 1, first.prev_mac)

    async def _write_row(
        self,
        realm: RealmId,
        group: GroupId,
        entries: Sequence[LogEntry],
        cells: Sequence[SetCell],
        fresh: _FreshNodes,
    ) -> AppendOutcome:
        """Write the row if it is absent; raises `StoreAmbiguous` when not even reading can tell what happened."""
        key = keys.log_key(group, entries[0].index)
        attempts = self._table(realm).attempts("append")
        in_doubt = False
        while True:
            try:
                await fresh.keep()
                if not await self._table(realm).check_and_mutate(key, RowExists(), if_not=cells):
                    return AppendOutcome.APPENDED
                if not in_doubt:
                    return AppendOutcome.CONFLICT
                # an earlier attempt of ours may be what is there
                resolved = await self._resolve(realm, group, entries)
                return AppendOutcome.CONFLICT if resolved is None else resolved
            except StoreAmbiguous as error:
                in_doubt = True
                resolved = await self._resolve(realm, group, entries)
                if resolved is not None:
                    return resolved
                if attempts.exhausted():
                    # absent now, but the request may still be on its way
                    raise StoreAmbiguous(f"append not seen to happen: {error}") from None
                await attempts.pause()
            except StoreUnavailable:
                if in_doubt:
                    raise StoreAmbiguous("append refused while an earlier attempt is in doubt") from None
                raise

    async def _resolve(self, realm: RealmId, group: GroupId, entries: Sequence[LogEntry]) -> AppendOutcome | None:
        """Read the last row after an unknown outcome; None means that the batch is not there and may be tried again."""
        try:
            last = await self._reads.last_row(realm, group)
        except (StoreUnavailable, StoreInvalid) as error:
            raise StoreAmbiguous(f"append of unknown outcome, and the log cannot be read: {error}") from None
        if last is None:
            return None if entries[0].index == 1 else AppendOutcome.CONFLICT
        start, entry = last
        if entry.index + 1 == entries[0].index and entry.entry_mac == entries[0].prev_mac:
            return None
        own = entries[-1]
        if start == entries[0].index and (entry.index, entry.entry_mac) == (own.index, own.entry_mac):
            return AppendOutcome.APPENDED
        # Also when our row landed and another leader's is on top of it: stepping down is right then, too.
        return AppendOutcome.CONFLICT

    # --- reading ---------------------------------------------------------------------------------

    async def read_last(self, realm: RealmId, group: GroupId) -> LogEntry | None:
        """Return the last entry, None for an empty log."""
        last = await self._reads.last_row(realm, group)
        return None if last is None else last[1]

    async def read_from(
        self, realm: RealmId, group: GroupId, index: int, entries_max: int
    ) -> list[LogEntry] | Compacted:
        """Return consecutive entries from `index`, up to 99 more than `entries_max`; [] at the end of the log."""
        return await self._reads.read_from(realm, group, index, entries_max)

    async def read_intents(
        self, realm: RealmId, group: GroupId, first: int, last: int
    ) -> list[tuple[LogEntry, Intent]]:
        """Return the entries first..last that have an intent and are still there."""
        return await self._reads.read_intents(realm, group, first, last)

    # --- compaction ------------------------------------------------------------------------------

    async def list_rows(self, realm: RealmId, group: GroupId, below: int) -> list[LogRow]:
        """Return the rows that start below `below`, oldest first, tombstones at the oldest end stripped.

        Pages of 100 rows backwards from `below`, until one is short or holds nothing but tombstones: nothing older
        than 100 tombstones in a row matters (storage.md 2.1).
        """
        rows: list[LogRow] = []
        left: KeyRange | None = keys.log_range(group, below, 1, newest_open=True)
        if below <= 1:
            return []
        while left is not None:
            page = await self._reads.page(realm, left, WINDOW_ROWS, _NAMES)
            rows += [LogRow(keys.log_index(row.key), is_tombstone(row)) for row in page]
            if len(page) < WINDOW_ROWS or all(is_tombstone(row) for row in page):
                break
            left = left.after(page[-1].key)
        while rows and rows[-1].is_tombstone:
            rows.pop()
        rows.reverse()
        return rows

    async def compact(self, realm: RealmId, group: GroupId, rows: Sequence[LogRow]) -> None:
        """Replace rows by tombstones, 100 rows at a time with existing tombstones counted; idempotent.

        An existing tombstone is not written again, which would renew its week. The newest row stays whatever is
        asked: it is what appends are compared with.
        """
        newest = await self._reads.newest_row(realm, group, _NAMES)
        if newest is None:
            return
        newest_index = keys.log_index(newest.key)
        for at in range(0, len(rows), WINDOW_ROWS):
            chunk = [
                (keys.log_key(group, row.first_index), (DeleteRow(), TOMBSTONE_CELL))
                for row in rows[at : at + WINDOW_ROWS]
                if not row.is_tombstone and row.first_index < newest_index
            ]
            await self._table(realm).mutate_rows(chunk)

    # --- certificates and groups -----------------------------------------------------------------

    async def write_certificate(self, realm: RealmId, group: GroupId, certificate: Certificate) -> None:
        """Store the certificate in a row of its index, then delete the rows of smaller indexes."""
        table = self._table(realm)
        value = SetCell("f", b"c", encode_certificate(certificate))
        await table.mutate_row(keys.certificate_key(group, certificate.index), (DeleteFamily("f"), value))
        older = await self._reads.page(realm, keys.certificate_range(group, certificate.index), 0, _NAMES)
        await table.mutate_rows([(row.key, (DeleteRow(),)) for row in older])

    async def read_certificate(self, realm: RealmId, group: GroupId) -> Certificate | None:
        """Return the certificate of the highest index."""
        row = await self._table(realm).first(keys.certificate_range(group), _NEWEST)
        if row is None:
            return None
        try:
            return decode_certificate(row.cells[0].value, realm, group)
        except DecodingError as error:
            raise StoreDamaged(
                DamageKind.CERTIFICATE, f"at index {keys.upward(row.key[-8:])}", group=group, why=str(error)
            ) from None

    async def list_groups(self, realm: RealmId) -> list[GroupId]:
        """Return the groups that have a log, sorted; one read per group."""
        found: list[GroupId] = []
        start = bytes(1)
        while True:
            left = KeyRange(start, b"\xff" * (ID_BYTES + 17))
            row = await self._table(realm).first(left, _NAMES)
            if row is None:
                return found
            group = GroupId(row.key[:ID_BYTES])
            if len(row.key) == keys.LOG_KEY_BYTES:
                found.append(group)
            start = group + b"\xff" * 17  # behind the last certificate
