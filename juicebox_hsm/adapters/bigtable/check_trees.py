"""Check the stored trees of a realm part by part, and tell which rows no tree needs (merkle.md 2, 3.4; storage.md 2.2).

A row of the merkle table belongs to the *part* of the key space that its prefix begins with: the bytes of a row key
carry seven bits each, so all rows below a prefix of n bytes are one key range. A part is read as a whole and walked in
memory, from the roots that the logs' tails name at that moment; one with too many rows is divided by the next byte.

Agents go on meanwhile: a node they replaced is deleted seconds later. So what is missing is believed only if the tails
are still the same afterwards; else the part is read again. Memory: the rows of one part, and one path above it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import KeyRange, Row, RowSet
from juicebox_hsm.adapters.bigtable.log import BigtableLog
from juicebox_hsm.adapters.bigtable.table import Endpoint, Table
from juicebox_hsm.adapters.stores.check import (
    GroupTail,
    Report,
    branches,
    is_intact,
    node_name,
    trees_of,
)
from juicebox_hsm.consensus.types import Partition
from juicebox_hsm.ids import RECORD_ID_BYTES, GroupId, OwnedRange, RealmId, RecordId
from juicebox_hsm.merkle.kernel import row_key
from juicebox_hsm.merkle.nodes import HASH_BYTES, KEY_BITS
from juicebox_hsm.ports.errors import StoreInvalid, StoreUnavailable

PART_ROWS_MAX: Final = 20_000
"""Rows of a part held at a time, 20 MB of leaves; read in some 3 s, while obsolete nodes stay for 5."""
PART_BYTES_MAX: Final = 4
"""Bytes by which parts are divided at most; 28 bits of random record ids tell more records apart than there are."""
ATTEMPTS_MAX: Final = 20
"""Readings of one part whose trees changed each time; a root changes with every append."""
UPPER_ROWS_MAX: Final = 4_096
"""Nodes above parts that are remembered; a path down to a part has 28 at most."""
_TERMINATOR: Final = 0x80


@dataclass(frozen=True, slots=True)
class Tree:
    """A tree that must be whole: where it is named, for findings, and its range and root."""

    where: str
    partition: Partition


@dataclass(slots=True)
class Part:
    """The rows under a prefix of row key bytes; `own_only` those whose keys have no more bytes than it."""

    prefix: bytes
    own_only: bool = False
    rows: dict[bytes, Row] = field(default_factory=dict)

    @property
    def key_range(self) -> KeyRange:
        """Return the row keys of the part."""
        start = self.prefix + bytes((_TERMINATOR,)) if self.own_only else self.prefix or b"\x00"
        end = self.prefix[:-1] + bytes((self.prefix[-1] + 1,)) if self.prefix else b"\xff"
        return KeyRange(start, end, end_open=True)

    @property
    def records(self) -> tuple[int, int]:
        """Return the first and the last record id below the prefix, as integers."""
        bits = 7 * len(self.prefix)
        value = 0
        for byte in self.prefix:
            value = value << 7 | byte
        first = value << (KEY_BITS - bits)
        return first, first + (1 << (KEY_BITS - bits)) - 1

    def has(self, record: int, nbits: int) -> bool:
        """Tell whether a node of these bits is in the part."""
        first, last = self.records
        size = (nbits + 6) // 7
        return first <= record <= last and (size == len(self.prefix) if self.own_only else size >= len(self.prefix))

    def leads_to(self, record: int, nbits: int) -> bool:
        """Tell whether nodes of the part can be at or below a node of these bits."""
        first, last = self.records
        if record > last or record + (1 << (KEY_BITS - nbits)) <= first:
            return False
        return not self.own_only or (nbits + 6) // 7 <= len(self.prefix)


def node_place(key: bytes) -> tuple[int, int]:
    """Return (bits as an integer of 256, their number) of the node in a row. Raises `StoreInvalid`."""
    at = value = 0
    while at < len(key) and key[at] < _TERMINATOR:
        value = value << 7 | key[at]
        at += 1
    used = key[at] & 0x7F if at < len(key) else 8
    nbits = 7 * (at - 1) + used if at else 0
    if used > 7 or (used == 0) != (at == 0) or nbits > KEY_BITS or len(key) != at + 1 + HASH_BYTES:
        raise StoreInvalid("a row of the table of nodes has a strange key")
    return (value >> (7 - used) << (KEY_BITS - nbits) if at else 0), nbits


@dataclass(frozen=True, slots=True)
class Looked:
    """What a look at a part gave: its rows, and the keys of those that a tree needs."""

    part: Part
    needed: frozenset[bytes]
    trees: tuple[Tree, ...]


class TreeCheck:
    """The trees of one realm."""

    def __init__(self, endpoint: Endpoint, log: BigtableLog, realm: RealmId) -> None:
        self._table = Table(endpoint, keys.realm_tables(realm)[1])
        self._log = log
        self._realm = realm
        self._is_whole = False
        self._upper: dict[bytes, Row] = {}  # nodes above parts; a row's key has its hash, so it never changes

    async def tails(self) -> dict[GroupId, GroupTail]:
        """Return every group's last entry."""
        found: dict[GroupId, GroupTail] = {}
        for group in await self._log.list_groups(self._realm):
            last = await self._log.read_last(self._realm, group)
            if last is not None:
                found[group] = GroupTail(last.index, last)
        return found

    async def trees(self) -> list[Tree]:
        """Return the trees that the tails of the logs name now."""
        tails = await self.tails()
        return [
            Tree(f"realm {self._realm.hex()}, group {group.hex()}, {kind}", partition)
            for group, tail in sorted(tails.items())
            for partition, kind in trees_of(group, tail, tails)
        ]

    async def slice(self, number: int, report: Report, visit: Callable[[Looked], None]) -> None:
        """Check slice `number` of the record ids (see `store_check.SLICES`), showing `visit` each part looked at.

        A table that is small enough is looked at as a whole with slice 0; the others then have nothing left.
        """
        if number == 0:
            self._is_whole = await self._look_undivided(Part(b""), report, visit)
            if not self._is_whole:
                await self._look(Part(b"", own_only=True), report, visit)
        if not self._is_whole:
            await self._look(Part(bytes((number,))), report, visit)

    async def _look(self, part: Part, report: Report, visit: Callable[[Looked], None]) -> None:
        """Check a part, divided if it is large."""
        if not await self._look_undivided(part, report, visit):
            for byte in range(_TERMINATOR):
                await self._look(Part(part.prefix + bytes((byte,))), report, visit)
            await self._look(Part(part.prefix, own_only=True), report, visit)

    async def _look_undivided(self, part: Part, report: Report, visit: Callable[[Looked], None]) -> bool:
        """Check a part; False if it is so large that it is divided instead."""
        for _ in range(ATTEMPTS_MAX):
            trees = await self.trees()
            rows = await self._table.read_rows(RowSet(ranges=(part.key_range,)), limit=PART_ROWS_MAX + 1)
            if len(rows) > PART_ROWS_MAX and not part.own_only and len(part.prefix) < PART_BYTES_MAX:
                return False
            if len(rows) > PART_ROWS_MAX:
                rows += await self._rest(part, rows[-1].key)
            part.rows = {row.key: row for row in rows}
            attempt = Report()
            needed = await self._walk(part, trees, attempt)
            if not attempt.findings or await self.trees() == trees:
                _strange_keys(part, self._realm, attempt)
                report.take(attempt)
                visit(Looked(part, needed, tuple(trees)))
                return True
        raise StoreUnavailable(f"the trees under {part.prefix.hex() or 'the root'} changed during every look at them")

    async def _rest(self, part: Part, after: bytes) -> list[Row]:
        """Return the rows behind the first page of a part that cannot be divided: versions of its upper nodes."""
        left = part.key_range.after(after)
        if left is None:
            return []
        return [row async for page in self._table.scan(left) for row in page]

    async def _walk(self, part: Part, trees: Sequence[Tree], report: Report) -> frozenset[bytes]:
        """Verify the nodes of the part from the roots of all trees; return the keys of those that are needed."""
        needed: set[bytes] = set()
        for tree in trees:
            waiting: list[tuple[int, int, bytes]] = [(0, 0, tree.partition.root_hash)]
            while waiting:
                record, nbits, expected = waiting.pop()
                if part.leads_to(record, nbits):
                    waiting += await self._visit(part, tree, record, nbits, expected, needed, report)
        return frozenset(needed)

    async def _visit(
        self,
        part: Part,
        tree: Tree,
        record: int,
        nbits: int,
        expected: bytes,
        needed: set[bytes],
        report: Report,
    ) -> list[tuple[int, int, bytes]]:
        """Check one node; return what it leads to. Nodes above the part are read by key, and blamed in their own."""
        raw = record.to_bytes(RECORD_ID_BYTES, "big")
        key = row_key(raw[: (nbits + 7) // 8], nbits, expected)
        is_own, is_leaf = part.has(record, nbits), nbits == KEY_BITS
        row = part.rows.get(key) if is_own else await self._upper_row(key)
        name = node_name(record, nbits) if nbits else f"root node {expected.hex()}"
        blamed = report if is_own else Report()
        if row is None:
            blamed.add(tree.where, f"{name} is missing")
            return []
        encoding = row.cells[0].value
        bounds = tree.partition.range if nbits == 0 else None
        if not is_intact(encoding, expected, raw if is_leaf else b"", bounds):
            blamed.add(tree.where, f"{name} was altered: its content does not have its hash")
            return []
        if is_own:
            if key not in needed:
                report.nodes += 1
                report.records += is_leaf
            needed.add(key)
        if not is_leaf:
            return branches(encoding, record, nbits)
        _check_owner(tree, tree.partition.range, RecordId(raw), blamed)
        return []

    async def _upper_row(self, key: bytes) -> Row | None:
        row = self._upper.get(key) or await self._table.read_row(key)
        if row is not None:
            if len(self._upper) >= UPPER_ROWS_MAX:
                self._upper.clear()
            self._upper[key] = row
        return row


def _check_owner(tree: Tree, owned: OwnedRange, record: RecordId, report: Report) -> None:
    if not owned.contains(record):
        report.add(tree.where, f"record {record.hex()} is outside the owned range")


def _strange_keys(part: Part, realm: RealmId, report: Report) -> None:
    for key in part.rows:
        try:
            node_place(key)
        except StoreInvalid as error:
            report.add(f"realm {realm.hex()}", f"{error}: {key.hex()}")
