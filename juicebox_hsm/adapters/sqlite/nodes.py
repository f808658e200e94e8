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

from juicebox_hsm.adapters.sqlite.cache import NodeCache
from juicebox_hsm.adapters.sqlite.layout import (
    HASH_BYTES,
    LAST_LEVEL,
    LEAF_BITS,
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
from juicebox_hsm.adapters.stores.node_tuning import CACHE_NODES
from juicebox_hsm.consensus.types import Partition
from juicebox_hsm.host.tree import TreeSide
from juicebox_hsm.ids import OwnedRange, RealmId, RecordId
from juicebox_hsm.ports.errors import MissingNode, StoreInvalid

PAGES_AHEAD: Final = 4
"""Levels of pages asked for in one round; a path of random records in a tree of a million needs six from the root."""
_LEFT: Final = 1
_RIGHT: Final = 2
_FIRST_BRANCH: Final = 6  # after be32 length, version and kind
_READ: Final = "SELECT id, data FROM tree WHERE id IN carray(?)"

_pack = msgspec.msgpack.Encoder().encode
_bounded = msgspec.msgpack.Decoder(dict[int, bytes])
_unbounded = msgspec.msgpack.Decoder(dict[bytes, bytes])


def decode_page(row: int, data: bytes) -> Page:
    """Decode a row of the tree; raises `StoreInvalid`."""
    if is_bounded(row):
        return cast("Page", unpack(_bounded, data, "tree page"))
    return cast("Page", unpack(_unbounded, data, "tree page"))


class _Walk:
    """A walk in progress: what was met, and the node wanted next (None: complete)."""

    __slots__ = ("key", "leaf", "nbits", "path", "wanted")

    def __init__(self, key: int, root: bytes) -> None:
        self.key = key
        self.path: list[bytes] = []
        self.leaf: bytes | None = None
        self.nbits = 0
        self.wanted: bytes | None = root

    def follow(self, cache: NodeCache) -> None:
        """Walk on while the wanted nodes are remembered."""
        young, wanted = cache.young, self.wanted
        while wanted is not None:
            node = young.get(wanted)
            if node is None:
                node = cache.get(wanted)
                young = cache.young
                if node is None:
                    break
            wanted = self.take(node)
        self.wanted = wanted

    def take(self, node: bytes) -> bytes | None:
        """Take the wanted node (be32 length || encoding); return the hash wanted next."""
        nbits = self.nbits
        if nbits == LEAF_BITS:
            self.leaf = node
            return None
        self.path.append(node)
        flags = node[5]
        at = _FIRST_BRANCH
        if (self.key >> (LEAF_BITS - 1 - nbits)) & 1:
            if not flags & _RIGHT:
                return None
            if flags & _LEFT:
                at += 34 + (((node[6] << 8 | node[7]) + 7) >> 3)
        elif not flags & _LEFT:
            return None
        length = node[at] << 8 | node[at + 1]
        if length == 1:  # most branches: the bit already chose it
            self.nbits = nbits + 1
            return node[at + 3 : at + 35]
        end = at + 2 + ((length + 7) >> 3)
        prefix = int.from_bytes(node[at + 2 : end], "big") >> (-length & 7)
        if (self.key >> (LEAF_BITS - nbits - length)) & ((1 << length) - 1) != prefix:
            return None
        self.nbits = nbits + length
        return node[end : end + HASH_BYTES]

    def rows(self, realm: int) -> list[int]:
        """Return the rows in which the rest of the path may be, as far as one round looks."""
        leaf = leaf_id(realm, self.key)
        if self.nbits == LEAF_BITS:
            return [leaf]
        level = level_of(self.nbits)
        return [page_id(realm, self.key, k) for k in range(level, min(level + PAGES_AHEAD, LAST_LEVEL) + 1)] + [leaf]

    def find(self, realm: int, pages: dict[int, Page]) -> bytes | None:
        """Return the wanted node if its page was read and has it."""
        if self.nbits == LEAF_BITS:
            page = pages.get(leaf_id(realm, self.key))
            place: int | bytes = self.key.to_bytes(32, "big")
        else:
            page = pages.get(page_id(realm, self.key, level_of(self.nbits)))
            place = position(self.key, self.nbits)
        piece = None if page is None else page.get(place)
        return piece[HASH_BYTES:] if piece is not None and piece[:HASH_BYTES] == self.wanted else None


def _encode_proof(key: bytes, bounds: OwnedRange, root: bytes, path: list[bytes], leaf: bytes | None) -> bytes:
    """Encode a read proof (merkle.md 3.2) from nodes that have their length in front."""
    head = b"".join((b"\x01\x40", key, bounds.start, bounds.end, root, len(path).to_bytes(2, "big")))
    return b"".join((head, *path, b"\x00" if leaf is None else b"\x01" + leaf))


class TreeNodes:
    """`ports.NodeStore` on one file, and the node half of an append."""

    def __init__(self, reads: Reads, cache_nodes: int = CACHE_NODES) -> None:
        self._reads = reads
        self.cache = NodeCache(cache_nodes)
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
                pages[row] = decode_page(row, data)
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
    ) -> list[bytes | None]:
        """Return a read proof per record, None where a node is gone because the root is no longer current."""
        number = self._reads.realm(realm)
        root, cache = partition.root_hash, self.cache
        walks = [_Walk(int.from_bytes(record, "big"), root) for record in records]
        for walk in walks:
            walk.follow(cache)
        if any(walk.wanted is not None for walk in walks):
            self._read_missing(number, [walk for walk in walks if walk.wanted is not None])
        return [
            None if walk.wanted is not None else _encode_proof(record, partition.range, root, walk.path, walk.leaf)
            for record, walk in zip(records, walks, strict=True)
        ]

    def _read_missing(self, realm: int, walks: list[_Walk]) -> None:
        """Finish walks with pages from the file, in one snapshot."""
        connection = self._reads.connection
        try:
            connection.execute("BEGIN")
            try:
                self._read_rounds(connection, realm, walks)
            finally:
                connection.execute("COMMIT")
        except apsw.Error as error:
            raise translate(error, self._reads.path) from error

    def _read_rounds(self, connection: apsw.Connection, realm: int, walks: list[_Walk]) -> None:
        pages: dict[int, Page] = {}
        known: set[int] = set()
        walks = [walk for walk in walks if self._has_root(connection, realm, walk)]
        while walks:
            asked = {row for walk in walks for row in walk.rows(realm)} - known
            known |= asked
            rows = array("q", sorted(asked))
            for row, data in connection.execute(_READ, (apsw.carray(rows),)):
                page = pages[row] = decode_page(row, data)
                self.extraneous_nodes += len(page)
            walks = [walk for walk in walks if self._continue(realm, walk, pages, known)]

    def _continue(self, realm: int, walk: _Walk, pages: dict[int, Page], known: set[int]) -> bool:
        """Walk on through cache and pages; True if another round may find the next node."""
        while walk.wanted is not None:
            node = walk.find(realm, pages)
            if node is None:
                return walk.rows(realm)[0] not in known
            self.cache.put(walk.wanted, node)
            self.extraneous_nodes -= 1
            walk.wanted = walk.take(node)
            walk.follow(self.cache)
        return False

    def _has_root(self, connection: apsw.Connection, realm: int, walk: _Walk) -> bool:
        """Take a walk past its root node; False if that is gone or the walk is then complete."""
        if not walk.nbits and walk.wanted is not None:
            root = walk.wanted
            node = self.cache.get(root)
            if node is None:
                node = fetch_one(connection, "SELECT node FROM roots WHERE realm = ? AND hash = ?", (realm, root))
                if node is None:
                    return False
                self.cache.put(root, node)
            walk.wanted = walk.take(node)
            walk.follow(self.cache)
        return walk.wanted is not None

    async def read_edge_proof(self, realm: RealmId, partition: Partition, side: TreeSide) -> bytes:
        """Return the proof of the partition's outermost record on `side`; raises `MissingNode`."""
        number = self._reads.realm(realm)
        key = self._edge_key(number, partition, side)
        proof = (await self.read_proofs(realm, partition, [key]))[0]
        if proof is None:
            raise MissingNode("the tree's root is no longer current")
        return proof

    def _edge_key(self, realm: int, partition: Partition, side: TreeSide) -> RecordId:
        """Return the outermost record id, or the range's end on that side for an empty tree (merkle.md 4.2).

        Found by walking towards all zeros or all ones: where a branch leads elsewhere, the walk is sent after it.
        """
        bit = 0 if side is TreeSide.LEFT else 1
        walk = _Walk((1 << LEAF_BITS) - 1 if bit else 0, partition.root_hash)
        while True:
            walk.follow(self.cache)
            if walk.wanted is not None:
                self._read_missing(realm, [walk])
            if walk.wanted is not None:
                raise MissingNode("the tree's root is no longer current")
            if walk.leaf is not None:
                return RecordId(walk.key.to_bytes(32, "big"))
            aim = _aim(walk, bit)
            if aim is None:
                return partition.range.end if bit else partition.range.start
            walk = _Walk(aim, partition.root_hash)


def _aim(walk: _Walk, bit: int) -> int | None:
    """Return a key whose path goes one branch further along the edge than `walk` did; None in an empty tree."""
    node = walk.path[-1]
    flags = node[5]
    if not flags & (_LEFT | _RIGHT):
        return None
    take_right = bool(flags & _RIGHT) if bit else not flags & _LEFT
    at = _FIRST_BRANCH
    if take_right and flags & _LEFT:
        at += 34 + (((node[6] << 8 | node[7]) + 7) >> 3)
    length = node[at] << 8 | node[at + 1]
    end = at + 2 + ((length + 7) >> 3)
    if end + HASH_BYTES > len(node):
        raise StoreInvalid("a stored tree node is damaged")
    prefix = int.from_bytes(node[at + 2 : end], "big") >> (-length & 7)
    rest = LEAF_BITS - walk.nbits - length
    filler = (1 << rest) - 1 if bit else 0
    return ((walk.key >> (LEAF_BITS - walk.nbits)) << length | prefix) << rest | filler
