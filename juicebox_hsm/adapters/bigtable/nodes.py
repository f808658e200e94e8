"""Read paths through trees whose nodes are rows, and write what appends change (merkle.md 9; storage.md 2.2, 4.4).

A row is never overwritten: its key contains the node's hash. Readers start from a published root, and a node that
an append removed stays for 5 s more (`deletion`), so a reader sees its whole tree without any transaction.

All nodes that a path may still need are read in one request: the versions of the node at every remaining depth. Near
the root there are too many versions for that: every append makes one, and what waited for deletion when a process was
killed stays as garbage. There nodes are read one after the other by their exact keys (own; measured: with ranges from
the root on, each kill under load made the next leader's first read 0.25 s slower).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final, Protocol

import trio

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import KeyRange, Row, RowSet, Selection, SetCell
from juicebox_hsm.adapters.bigtable.table import Endpoint, Table
from juicebox_hsm.adapters.stores.damage import damaged_node
from juicebox_hsm.adapters.stores.node_cache import NodeCache
from juicebox_hsm.adapters.stores.node_tuning import DEFAULT_NODE_TUNING, NodeTuning
from juicebox_hsm.consensus.types import Partition
from juicebox_hsm.errors import DecodingError
from juicebox_hsm.ids import RealmId, RecordId
from juicebox_hsm.merkle.kernel import EdgeWalk, PathWalk, Side, Walk, path_scan_starts, scan_end
from juicebox_hsm.merkle.stored import is_wanted
from juicebox_hsm.merkle.walk import Lost, outcome
from juicebox_hsm.ports.errors import MissingNode, StoreInvalid, StoreUnavailable

LARGE_READ_WAIT_S: Final = 3.0
UPPER_BITS: Final = 6
"""Depth from which on all versions are read; garbage of n appends is about n/32 nodes of a path there."""
PATHS_PER_READ: Final = 8
"""Paths read in one request: at most 2,056 ranges of about 80 bytes each, well below the service's 500 KB."""
INSTANCE_KEYS: Final = 1_024

_FIRST_CELL: Final = Selection(cells_per_row=1)
_FIRST_NAME: Final = Selection(cells_per_row=1, strip_values=True)

Stored = tuple[bytes, bytes]  # node encoding, instance id


class Deletion(Protocol):
    """What removes nodes later (`deletion`), as far as those see it who watch a store."""

    waiting: int
    leaked: int


class TreeNodes:
    """`ports.NodeStore` on one instance, and the node half of an append."""

    def __init__(self, endpoint: Endpoint, tuning: NodeTuning = DEFAULT_NODE_TUNING) -> None:
        self._endpoint = endpoint
        self._tuning = tuning
        self._tables: dict[RealmId, Table] = {}
        self.cache: NodeCache[Stored] = NodeCache(tuning.cache_nodes)
        self._writer = os.urandom(16)
        self._written = 0
        self._large_reads = trio.CapacityLimiter(tuning.large_read_permits)
        self.deletion: Deletion | None = None
        """What removes nodes of this store, for those who watch it."""
        self.extraneous_nodes = 0
        """Nodes that were read and not needed: other versions of the same places."""

    def table(self, realm: RealmId) -> Table:
        """Return the realm's table of nodes."""
        table = self._tables.get(realm)
        if table is None:
            table = self._tables[realm] = Table(self._endpoint, keys.realm_tables(realm)[1])
        return table

    # --- writing ---------------------------------------------------------------------------------

    async def write(self, realm: RealmId, adds: Sequence[tuple[bytes, bytes]]) -> dict[bytes, Stored]:
        """Write nodes durably, each under a fresh instance id; return row key -> what was stored."""
        stored: dict[bytes, Stored] = {}
        for key, node in adds:
            self._written += 1
            stored[key] = (node, self._writer + self._written.to_bytes(8, "big"))
        await self.table(realm).mutate_rows(
            [(key, (SetCell("f", instance, node),)) for key, (node, instance) in stored.items()]
        )
        return stored

    def remember(self, stored: dict[bytes, Stored]) -> None:
        """Take the nodes of an acknowledged append into the cache."""
        self.cache.put_all(stored)

    def forget(self, key: bytes, instance: bytes) -> None:
        """Take a deleted write out of the cache, unless the node was written again since."""
        self.cache.purge(key, lambda stored: stored[1] == instance)

    async def instances(self, realm: RealmId, wanted: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
        """Return (row key, instance id) of the current writes of nodes; those that are gone already are left out.

        MUST be called before the append that removes the nodes is acknowledged: a write after it has another id.
        """
        found: list[tuple[bytes, bytes]] = []
        unknown: list[bytes] = []
        for key in wanted:
            stored = self.cache.get(key)
            if stored is None:
                unknown.append(key)
            else:
                found.append((key, stored[1]))
        table = self.table(realm)
        for at in range(0, len(unknown), INSTANCE_KEYS):
            rows = RowSet(keys=unknown[at : at + INSTANCE_KEYS])
            found += [(row.key, row.cells[0].qualifier) for row in await table.read_rows(rows, selection=_FIRST_NAME)]
        return found

    # --- reading ---------------------------------------------------------------------------------

    async def read_proofs(
        self, realm: RealmId, partition: Partition, records: Sequence[RecordId]
    ) -> list[bytes | Lost]:
        """Return a read proof per record, or the node that is gone: the root is no longer current, or it is damaged.

        No I/O if all nodes are remembered, else one request per 8 records, and up to 6 before if even the top of the
        tree is unknown. Raises `StoreUnavailable` when all permits for large reads are taken for 3 s.
        """
        walks = [PathWalk(record, partition.range, partition.root_hash) for record in records]
        for walk in walks:
            self._follow(walk, {})
        await self._read_upper(realm, [walk for walk in walks if walk.wanted is not None])
        missing = [
            (walk, record)
            for walk, record in zip(walks, records, strict=True)
            if walk.wanted is not None and walk.depth >= UPPER_BITS
        ]
        chunks = [missing[at : at + PATHS_PER_READ] for at in range(0, len(missing), PATHS_PER_READ)]
        if len(chunks) == 1:
            await self._read_paths(realm, chunks[0])
        elif chunks:
            await self._read_together(realm, chunks)
        return [outcome(walk) for walk in walks]

    async def _read_upper(self, realm: RealmId, walks: list[PathWalk]) -> None:
        """Continue walks level by level to where versions are few; one whose node is gone stays where it is."""
        while True:
            walks = [walk for walk in walks if walk.wanted is not None and walk.depth < UPPER_BITS]
            if not walks:
                return
            wanted = sorted({walk.wanted_row for walk in walks})
            found = _stored(await self.table(realm).read_rows(RowSet(keys=wanted), selection=_FIRST_CELL))
            asked = [(walk, walk.wanted) for walk in walks if walk.wanted_row in found]
            for walk, _ in asked:
                self._follow(walk, found)
            walks = [walk for walk, before in asked if walk.wanted != before]  # the node of others is damaged

    async def _read_together(self, realm: RealmId, chunks: list[list[tuple[PathWalk, RecordId]]]) -> None:
        """Read several chunks of paths at the same time; raises the first error alone."""
        errors: list[StoreUnavailable | StoreInvalid] = []

        async def read(chunk: list[tuple[PathWalk, RecordId]], scope: trio.CancelScope) -> None:
            try:
                await self._read_paths(realm, chunk)
            except (StoreUnavailable, StoreInvalid) as error:
                errors.append(error)
                scope.cancel()

        async with trio.open_nursery() as nursery:
            for chunk in chunks:
                nursery.start_soon(read, chunk, nursery.cancel_scope)
        if errors:
            raise errors[0]

    async def _read_paths(self, realm: RealmId, chunk: list[tuple[PathWalk, RecordId]]) -> None:
        """Read all that the walks may still need in one request and continue them in what came.

        Each walk's next node is known exactly, the ones behind it by their prefixes only.
        """
        wanted = sorted({walk.wanted_row for walk, _ in chunk})
        starts = {start for walk, record in chunk for start in path_scan_starts(record, walk.depth)[1:]}
        ranges = [KeyRange(start, scan_end(start), end_open=True) for start in sorted(starts)]
        async with self._permit(len(ranges)):
            rows = await self.table(realm).read_rows(RowSet(wanted, ranges), selection=_FIRST_CELL)
        found = _stored(rows)
        used = sum(self._follow(walk, found) for walk, _ in chunk)
        self.extraneous_nodes += max(0, len(found) - used)

    @asynccontextmanager
    async def _permit(self, ranges: int) -> AsyncIterator[None]:
        """Hold one of the permits for large reads while a read of so many ranges runs."""
        if ranges < self._tuning.large_read_ranges:
            yield
            return
        borrower = object()
        with trio.move_on_after(LARGE_READ_WAIT_S) as waiting:
            await self._large_reads.acquire_on_behalf_of(borrower)
        if waiting.cancelled_caught:
            raise StoreUnavailable(f"busy: {self._tuning.large_read_permits} large reads of tree nodes are under way")
        try:
            yield
        finally:
            self._large_reads.release_on_behalf_of(borrower)

    def _follow(self, walk: Walk, found: dict[bytes, Stored]) -> int:
        """Walk on while the wanted nodes are remembered or were just read; used ones are remembered.

        Returns how many came from `found` and were not remembered before.
        """
        cache = self.cache
        used = 0
        try:
            while walk.wanted is not None:
                key = walk.wanted_row
                stored = cache.get(key)
                if stored is None:
                    stored = found.get(key)
                    if stored is None or not is_wanted(walk, stored[0]):
                        return used  # a damaged node is as good as a missing one
                    cache.put(key, stored)
                    used += 1
                walk.feed(stored[0])
        except DecodingError as error:
            raise damaged_node(walk, error) from None
        return used

    async def read_edge_proof(self, realm: RealmId, partition: Partition, side: Side) -> bytes:
        """Return the proof of the partition's outermost record on `side`; one read per unknown node of the path.

        Where the path leads is known only node by node. Raises `MissingNode` if the root is no longer current.
        """
        walk = EdgeWalk(side, partition.range, partition.root_hash)
        table = self.table(realm)
        self._follow(walk, {})
        while walk.wanted is not None:
            row = await table.read_row(walk.wanted_row, _FIRST_CELL)
            wanted = walk.wanted
            if row is not None:
                self._follow(walk, _stored([row]))
            if walk.wanted == wanted:
                raise MissingNode("the tree's root is no longer current, or its nodes are damaged")
        return walk.proof()


def _stored(rows: Sequence[Row]) -> dict[bytes, Stored]:
    return {row.key: (row.cells[0].value, row.cells[0].qualifier) for row in rows}
