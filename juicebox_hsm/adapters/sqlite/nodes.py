"""Read paths through the stored trees and write what appends change (merkle.md 4, 9; storage.md 4.4).

A walk follows hashes from the partition's root: each node comes from the cache, or from the page that its prefix
names, where it must have the hash its parent gives. All pages a walk may still need are read in one statement per
round; rounds of a call share a snapshot. A node that is not there any more ends the walk without a proof: the caller
reads the log's tail and asks again.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final, cast

import apsw
import msgspec

from juicebox_hsm.adapters.sqlite.layout import (
    LAST_LEVEL,
    Changes,
    Page,
    is_bounded,
    leaf_id,
    level_of,
    page_id,
    plan_changes,
    position,
)
from juicebox_hsm.adapters.sqlite.reads import Reads, fetch_one
from juicebox_hsm.adapters.sqlite.rows import unpack
from juicebox_hsm.adapters.sqlite.schema import translate
from juicebox_hsm.adapters.stores.damage import damaged_node
from juicebox_hsm.adapters.stores.node_cache import NodeCache
from juicebox_hsm.adapters.stores.node_tuning import CACHE_NODES
from juicebox_hsm.consensus.types import Partition
from juicebox_hsm.errors import DecodingError
from juicebox_hsm.ids import RealmId, RecordId
from juicebox_hsm.merkle.nodes import HASH_BYTES, KEY_BITS
from juicebox_hsm.merkle.stored import is_wanted
from juicebox_hsm.merkle.walk import EdgeWalk, Lost, PathWalk, Side, Walk, outcome
from juicebox_hsm.ports.errors import MissingNode, StoreDamaged, StoreInvalid
from juicebox_hsm.wire.rpc import DamageKind

PAGES_AHEAD: Final = 4
"""Levels of pages asked for in one round; a path of random records in a tree of a million needs six from the root."""
_FRAME_BYTES: Final = 4  # nodes are stored with their length in front, as in a delta
_NODE: Final = HASH_BYTES + _FRAME_BYTES
_READ: Final = "SELECT id, data FROM tree WHERE id IN carray(?)"

_pack = msgspec.msgpack.Encoder().encode
_bounded = msgspec.msgpack.Decoder(dict[int, bytes])
_unbounded = msgspec.msgpack.Decoder(dict[bytes, bytes])


def decode_page(row: int, data: bytes) -> Page:
    """Decode a row of the tree; raises `StoreInvalid`."""
    if is_bounded(row):
        return cast("Page", unpack(_bounded, data, "tree page"))
    return cast("Page", unpack(_unbounded, data, "tree page"))


def _rows_ahead(realm: int, walk: Walk) -> list[int]:
    """Return the rows in which the rest of a path may be, as far as one round looks."""
    leaf = leaf_id(realm, walk.aim)
    if walk.depth == KEY_BITS:
        return [leaf]
    level = level_of(walk.depth)
    return [page_id(realm, walk.aim, k) for k in range(level, min(level + PAGES_AHEAD, LAST_LEVEL) + 1)] + [leaf]


def _find(realm: int, walk: Walk, pages: dict[int, Page]) -> bytes | None:
    """Return the wanted node if its page was read and has it."""
    if walk.depth == KEY_BITS:
        page = pages.get(leaf_id(realm, walk.aim))
        place: int | bytes = walk.aim.to_bytes(32, "big")
    else:
        page = pages.get(page_id(realm, walk.aim, level_of(walk.depth)))
        place = position(walk.aim, walk.depth)
    piece = None if page is None else page.get(place)
    return piece[_NODE:] if piece is not None and piece[:HASH_BYTES] == walk.wanted else None


class TreeNodes:
    """`ports.NodeStore` on one file, and the node half of an append."""

    def __init__(self, reads: Reads, cache_nodes: int = CACHE_NODES) -> None:
        self._reads = reads
        self.cache: NodeCache[bytes] = NodeCache(cache_nodes)
        self.extraneous_nodes = 0
        """Nodes in the pages that were read and not needed: neighbours on the page."""

    # --- writing ---------------------------------------------------------------------------------

    def plan(self, realm: RealmId, delta: bytes) -> Changes:
        """Sort a delta into rows; raises `BadEncoding` or `StoreInvalid` (no such realm)."""
        return plan_changes(self._reads.realm(realm), delta)

    def remember(self, changes: Changes) -> None:
        """Take the new nodes of a committed append into the cache."""
        self.cache.put_all(changes.by_hash)

    @staticmethod
    def apply(connection: apsw.Connection, changes: Changes) -> None:
        """Write a delta inside a transaction. A removed node goes only if its hash is still the stored one."""
        rows = sorted(changes.puts.keys() | changes.takes.keys())
        pages: dict[int, Page] = {}
        if rows:
            asked = array("q", rows)
            for row, data in connection.execute(_READ, (apsw.carray(asked),)):
                try:
                    pages[row] = decode_page(row, data)
                except StoreInvalid:
                    raise StoreDamaged(DamageKind.NODE, f"page {row}") from None
        updates: list[tuple[bytes, int]] = []
        inserts: list[tuple[int, bytes]] = []
        deletes: list[tuple[int]] = []
        for row in rows:
            stored = pages.get(row)
            page = {} if stored is None else stored
            for place, node_hash in changes.takes.get(row, {}).items():
                if page.get(place, b"")[:HASH_BYTES] == node_hash:
                    del page[place]
            page.update(changes.puts.get(row, {}))
            if not page:
                deletes.append((row,))
            elif stored is None:
                inserts.append((row, _pack(page)))
            else:
                updates.append((_pack(page), row))
        connection.executemany("UPDATE tree SET data = ? WHERE id = ?", updates)
        connection.executemany("INSERT INTO tree VALUES (?, ?)", inserts)
        connection.executemany("DELETE FROM tree WHERE id = ?", deletes)
        connection.executemany("DELETE FROM roots WHERE realm = ? AND hash = ?", changes.gone_roots)
        connection.executemany("INSERT OR REPLACE INTO roots VALUES (?, ?, ?)", changes.roots)

    # --- reading ---------------------------------------------------------------------------------

    async def read_proofs(
        self, realm: RealmId, partition: Partition, records: Sequence[RecordId]
    ) -> list[bytes | Lost]:
        """Return a read proof per record, or the node that is gone: the root is no longer current, or it is damaged."""
        walks = [PathWalk(record, partition.range, partition.root_hash) for record in records]
        self._walk(self._reads.realm(realm), walks)
        return [outcome(walk) for walk in walks]

    def _walk(self, realm: int, walks: Sequence[Walk]) -> None:
        """Finish walks from the cache, then with pages from the file, in one snapshot; some may stay incomplete."""
        for walk in walks:
            self._follow(walk)
        walks = [walk for walk in walks if walk.wanted is not None]
        if not walks:
            return
        connection = self._reads.connection
        try:
            connection.execute("BEGIN")
            try:
                self._read_rounds(connection, realm, walks)
            finally:
                connection.execute("COMMIT")
        except apsw.Error as error:
            raise translate(error, self._reads.path) from error

    def _follow(self, walk: Walk, node: bytes | None = None) -> None:
        """Walk on, from `node` if it is given, while the wanted nodes are remembered; raises `StoreDamaged`."""
        get = self.cache.get
        try:
            if node is not None:
                walk.feed(node)
            while (wanted := walk.wanted) is not None:
                node = get(wanted)
                if node is None:
                    return
                walk.feed(node)
        except DecodingError as error:
            raise damaged_node(walk, error) from None

    def _read_rounds(self, connection: apsw.Connection, realm: int, walks: Sequence[Walk]) -> None:
        pages: dict[int, Page] = {}
        known: set[int] = set()
        walks = [walk for walk in walks if self._has_root(connection, realm, walk)]
        while walks:
            asked = {row for walk in walks for row in _rows_ahead(realm, walk)} - known
            known |= asked
            rows = array("q", sorted(asked))
            for row, data in connection.execute(_READ, (apsw.carray(rows),)):
                try:
                    page = pages[row] = decode_page(row, data)
                except StoreInvalid:
                    continue  # as good as missing
                self.extraneous_nodes += len(page)
            walks = [walk for walk in walks if self._continue(realm, walk, pages, known)]

    def _continue(self, realm: int, walk: Walk, pages: dict[int, Page], known: set[int]) -> bool:
        """Walk on through cache and pages; True if another round may find the next node."""
        while walk.wanted is not None:
            node = _find(realm, walk, pages)
            if node is None:
                return _rows_ahead(realm, walk)[0] not in known
            if not is_wanted(walk, node):
                return False  # damaged: as good as missing, and nothing to remember
            self.cache.put(walk.wanted, node)
            self.extraneous_nodes -= 1
            self._follow(walk, node)
        return False

    def _has_root(self, connection: apsw.Connection, realm: int, walk: Walk) -> bool:
        """Take a walk past its root node; False if that is gone or the walk is then complete."""
        root = walk.wanted
        if not walk.depth and root is not None:
            stored = fetch_one(connection, "SELECT node FROM roots WHERE realm = ? AND hash = ?", (realm, root))
            if stored is None:
                return False
            node = stored[_FRAME_BYTES:]
            if not is_wanted(walk, node):
                return False  # damaged, as below
            self.cache.put(root, node)
            self._follow(walk, node)
        return walk.wanted is not None

    async def read_edge_proof(self, realm: RealmId, partition: Partition, side: Side) -> bytes:
        """Return the proof of the partition's outermost record on `side`; raises `MissingNode`."""
        walk = EdgeWalk(side, partition.range, partition.root_hash)
        self._walk(self._reads.realm(realm), [walk])
        if walk.wanted is not None:
            raise MissingNode("the tree's root is no longer current")
        return walk.proof()
