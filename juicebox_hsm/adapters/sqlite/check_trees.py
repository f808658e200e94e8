"""Check stored trees: from a root that the log names, every node down to every leaf (merkle.md 2, 9)."""

from __future__ import annotations

from typing import Final

import apsw

from juicebox_hsm.adapters.sqlite.layout import (
    Page,
    Position,
    leaf_id,
    level_of,
    page_id,
    position,
)
from juicebox_hsm.adapters.sqlite.nodes import decode_page
from juicebox_hsm.adapters.sqlite.reads import fetch_one
from juicebox_hsm.adapters.stores.check import Report, branches, is_intact, node_name, slice_of
from juicebox_hsm.consensus.types import Partition
from juicebox_hsm.ids import RECORD_ID_BYTES, OwnedRange, RecordId
from juicebox_hsm.merkle.nodes import HASH_BYTES, KEY_BITS
from juicebox_hsm.ports.errors import StoreInvalid

_LENGTH_BYTES: Final = 4
_PAGES_KEPT: Final = 16  # one of each level: the walk goes through the tree in order


class TreeWalk:
    """Walks through the trees of one realm, a slice of the record ids at a time. Memory: a page per level, the path.

    A node belongs to the slice of the first record id below it. Nodes above a slice are looked at for each of the
    slices below them, and counted and blamed in their own only.
    """

    def __init__(self, db: apsw.Connection, realm: int, report: Report) -> None:
        self._db = db
        self._realm = realm
        self._report = report
        self._silent = Report()
        self._pages: dict[int, Page] = {}
        self._where = ""
        self._bounds: OwnedRange | None = None

    def check(self, where: str, partition: Partition, number: int) -> None:
        """Check slice `number` of the tree of a partition."""
        self._where, self._bounds = where, partition.range
        first, last = slice_of(number)
        report = self._report if number == 0 else self._silent
        root = partition.root_hash
        node = fetch_one(self._db, "SELECT node FROM roots WHERE realm = ? AND hash = ?", (self._realm, root))
        if node is None:
            report.add(where, f"the root node {root.hex()} is missing")
            return
        encoding = self._verified(report, "root node", node, root, b"", partition.range)
        if encoding is None:
            return
        report.nodes += 1
        waiting = branches(encoding, 0, 0)  # last in, first out: the left branch is put last
        while waiting:
            record, nbits, expected = waiting.pop()
            if record > last or record + (1 << (KEY_BITS - nbits)) <= first:
                continue
            waiting += self._visit(self._report if record >= first else self._silent, record, nbits, expected)

    def _visit(self, report: Report, record: int, nbits: int, expected: bytes) -> list[tuple[int, int, bytes]]:
        """Check the node with the first `nbits` bits of `record`; return what it leads to."""
        is_leaf = nbits == KEY_BITS
        key = record.to_bytes(RECORD_ID_BYTES, "big")
        name = node_name(record, nbits)
        place: Position = key if is_leaf else position(record, nbits)
        row = leaf_id(self._realm, record) if is_leaf else page_id(self._realm, record, level_of(nbits))
        piece = self._page(report, row, level_of(nbits)).get(place)
        if piece is None:
            report.add(self._where, f"{name} is missing")
            return []
        if piece[:HASH_BYTES] != expected:
            report.add(self._where, f"{name} is another version than the node above it says")
            return []
        encoding = self._verified(report, name, piece[HASH_BYTES:], expected, key if is_leaf else b"", None)
        if encoding is None:
            return []
        report.nodes += 1
        if not is_leaf:
            return branches(encoding, record, nbits)
        if self._bounds is not None and not self._bounds.contains(RecordId(key)):
            report.add(self._where, f"{name} is outside the owned range")
        report.records += 1
        return []

    def _page(self, report: Report, row: int, level: int) -> Page:
        """Return a row's nodes, none for one that is not there or damaged."""
        page = self._pages.get(row)
        if page is None:
            data = fetch_one(self._db, "SELECT data FROM tree WHERE id = ?", (row,))
            try:
                page = {} if data is None else decode_page(row, data)
            except StoreInvalid as error:
                report.add(self._where, f"a page of level {level} is damaged: {error}")
                page = {}
            if len(self._pages) >= _PAGES_KEPT:
                del self._pages[next(iter(self._pages))]
        else:
            del self._pages[row]  # put at the end again: the oldest goes first
        self._pages[row] = page
        return page

    def _verified(
        self, report: Report, name: str, stored: bytes, expected: bytes, key: bytes, bounds: OwnedRange | None
    ) -> bytes | None:
        """Return the encoding of a node (stored behind its be32 length) if it has the expected hash."""
        encoding = stored[_LENGTH_BYTES:]
        is_whole = int.from_bytes(stored[:_LENGTH_BYTES], "big") == len(encoding)
        if not is_whole or not is_intact(encoding, expected, key, bounds):
            report.add(self._where, f"{name} was altered: its content does not have its hash")
            return None
        return encoding
