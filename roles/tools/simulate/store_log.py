"""Logs and trees of the simulated store: `ports.LogStore` and `ports.NodeStore`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from juicebox_hsm.consensus.types import Certificate, LogEntry, Partition
from juicebox_hsm.host.log import AppendOutcome, Compacted, Intent, LogRow, check_batch
from juicebox_hsm.ids import LOG_INDEX_MAX, GroupId, RealmId, RecordId
from juicebox_hsm.merkle.walk import EdgeWalk, Lost, PathWalk, Side, outcome
from juicebox_hsm.ports.errors import MissingNode, StoreAmbiguous
from roles.tools.simulate.store_data import GroupLog, RealmData
from roles.tools.simulate.store_gate import Gate

NO_LOG: Final = GroupLog()


class SimulatedLog:
    """`ports.LogStore` for one process."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def _log(self, realm: RealmId, group: GroupId) -> GroupLog:
        return self._gate.data.realm(realm).groups.get(group, NO_LOG)

    async def append(
        self,
        realm: RealmId,
        group: GroupId,
        entries: Sequence[LogEntry],
        intents: Sequence[Intent | None],
        delta: bytes,
    ) -> AppendOutcome:
        """Append a batch of 1..100 chained entries with its tree delta; CONFLICT unless it follows the tail."""
        check_batch(entries, intents, LOG_INDEX_MAX)
        data, entries, intents = self._gate.data, tuple(entries), tuple(intents)
        outcome = await self._gate.write(
            "append", lambda: data.append(realm, group, entries, intents, delta), unseen=StoreAmbiguous
        )
        data.counts[f"append.{outcome.value.lower()}"] += 1
        return outcome

    async def read_last(self, realm: RealmId, group: GroupId) -> LogEntry | None:
        """Return the last entry, None for an empty log."""
        return await self._gate.read("read_last", lambda: self._log(realm, group).last)

    async def read_from(
        self, realm: RealmId, group: GroupId, index: int, entries_max: int
    ) -> list[LogEntry] | Compacted:
        """Return consecutive entries from `index`, at most a row more than `entries_max`; [] at the end."""
        return await self._gate.read("read_from", lambda: _read_from(self._log(realm, group), index, entries_max))

    async def read_intents(
        self, realm: RealmId, group: GroupId, first: int, last: int
    ) -> list[tuple[LogEntry, Intent]]:
        """Return the entries first..last that have an intent and are still there."""

        def read() -> list[tuple[LogEntry, Intent]]:
            log = self._log(realm, group)
            return [
                (entry, intent)
                for row in log.rows[log.position(first) :]
                for entry, intent in zip(row.entries, row.intents, strict=True)
                if intent is not None and first <= entry.index <= last
            ]

        return await self._gate.read("read_intents", read)

    async def list_rows(self, realm: RealmId, group: GroupId, below: int) -> list[LogRow]:
        """Return the rows that start below `below`, oldest first, without leading tombstones."""

        def read() -> list[LogRow]:
            rows = [LogRow(row.first, not row.entries) for row in self._log(realm, group).rows if row.first < below]
            while rows and rows[0].is_tombstone:
                del rows[0]
            return rows

        return await self._gate.read("list_rows", read)

    async def compact(self, realm: RealmId, group: GroupId, rows: Sequence[LogRow]) -> None:
        """Replace rows by tombstones, or remove them; the newest row of the log stays whatever is asked."""
        data = self._gate.data
        firsts = [row.first_index for row in rows if not row.is_tombstone]
        await self._gate.write(
            "compact",
            lambda: self._log(realm, group).compact(firsts, keeps_tombstones=data.keeps_tombstones),
        )

    async def write_certificate(self, realm: RealmId, group: GroupId, certificate: Certificate) -> None:
        """Store the certificate and drop those of a smaller index."""
        data = self._gate.data

        def write() -> None:
            kept = data.realm(realm).group(group).certificates
            left = {index: found for index, found in kept.now.items() if index >= certificate.index}
            kept.replace(data.now(), left | {certificate.index: certificate})

        await self._gate.write("write_certificate", write)

    async def read_certificate(self, realm: RealmId, group: GroupId) -> Certificate | None:
        """Return the certificate of the highest index."""
        kept = await self._gate.read_past("read_certificate", lambda: self._log(realm, group).certificates)
        return kept[max(kept)] if kept else None

    async def list_groups(self, realm: RealmId) -> list[GroupId]:
        """Return the groups that have a log, sorted."""

        def read() -> list[GroupId]:
            return sorted(group for group, log in self._gate.data.realm(realm).groups.items() if log.rows)

        return await self._gate.read("list_groups", read)


def _read_from(log: GroupLog, index: int, entries_max: int) -> list[LogEntry] | Compacted:
    last = log.last
    if last is None or index > last.index:
        return []
    found: list[LogEntry] = []
    expected = index
    for row in log.rows[log.position(index) :]:
        if not row.entries or row.first > expected:
            return found or Compacted(expected)
        found += row.entries[max(0, expected - row.first) :]
        if found:
            expected = found[-1].index + 1
        if len(found) >= entries_max:
            break
    return found


class SimulatedNodes:
    """`ports.NodeStore` for one process. One snapshot for each call."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def read_proofs(
        self, realm: RealmId, partition: Partition, records: Sequence[RecordId]
    ) -> list[bytes | Lost]:
        """Return a proof for each record, or the node that is gone where the root is no longer current."""

        def read() -> list[bytes | Lost]:
            data = self._gate.data.realm(realm)
            return [_finish(data, PathWalk(record, partition.range, partition.root_hash)) for record in records]

        return await self._gate.read("read_proofs", read)

    async def read_edge_proof(self, realm: RealmId, partition: Partition, side: Side) -> bytes:
        """Return the proof of the partition's outermost record on `side`; raises `MissingNode`."""

        def read() -> bytes | Lost:
            return _finish(self._gate.data.realm(realm), EdgeWalk(side, partition.range, partition.root_hash))

        proof = await self._gate.read("read_edge_proof", read)
        if isinstance(proof, Lost):
            raise MissingNode("the tree's root is no longer current")
        return proof


def _finish(data: RealmData, walk: PathWalk | EdgeWalk) -> bytes | Lost:
    while walk.wanted is not None and (found := data.nodes.get(walk.wanted)) is not None:
        walk.feed(found[0])
    return outcome(walk)
