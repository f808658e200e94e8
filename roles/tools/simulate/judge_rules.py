"""What the judge's parts share: a broken rule, and every tree node that an HSM ever made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from juicebox_hsm.consensus.types import Partition
from juicebox_hsm.crypto.sealing import open_sealed
from juicebox_hsm.hsm.records import NOT_REGISTERED, Record, decode_record
from juicebox_hsm.ids import RecordId
from juicebox_hsm.merkle.kernel import delta_rows
from juicebox_hsm.merkle.nodes import HASH_BYTES, KEY_BITS
from juicebox_hsm.merkle.walk import PathWalk, row_prefix

LEAF_HEADER_BYTES: Final = 4
"""Version, kind and length in front of a leaf's value (merkle.md 3.1)."""
LEAF_ROW_BYTES: Final = 70
"""Length of a leaf's row key: base128 of 256 bits and the hash (storage.md 2.2)."""


class BrokenRule(Exception):
    """A rule of the realm was broken; `rule` is its name, as I8 or `tree`."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule = rule
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule and when it was seen, in virtual seconds."""

    rule: str
    detail: str
    at_s: float

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.rule} at {self.at_s:.3f} s: {self.detail}"


def require(rule: str, condition: object, detail: str | Callable[[], str]) -> None:
    """Raise `BrokenRule` unless the condition holds; `detail` may be made only then."""
    if not condition:
        raise BrokenRule(rule, detail if isinstance(detail, str) else detail())


class EveryNode:
    """Every tree node that was ever in a delta, by hash, so that trees of any age can be read."""

    __slots__ = ("_nodes", "_record_key", "_records")

    def __init__(self, record_key: bytes) -> None:
        self._nodes: dict[bytes, bytes] = {}
        self._records: dict[bytes, Record] = {}
        """What was read of leaves, which are asked for when they are made, committed and replaced."""
        self._record_key = record_key

    def put(self, delta: bytes) -> None:
        """Take in the added nodes of a delta."""
        for row_key, node in delta_rows(delta).adds:
            self._nodes[row_key[-HASH_BYTES:]] = node

    def leaf(self, partition: Partition, record: RecordId) -> bytes | None:
        """Return the stored value of a record in a tree, None without a leaf. Raises `BrokenRule`."""
        walk = PathWalk(record, partition.range, partition.root_hash)
        found: bytes | None = None
        while walk.wanted is not None:
            node = self._nodes.get(walk.wanted)
            require("tree", node is not None, "a log entry names a tree that no HSM made")
            if walk.depth == KEY_BITS:
                found = node
            walk.feed(node or b"")
        return None if found is None else found[LEAF_HEADER_BYTES:]

    def record(self, partition: Partition, record: RecordId) -> Record:
        """Read a record with the realm's own key."""
        leaf = self.leaf(partition, record)
        if leaf is None:
            return NOT_REGISTERED
        known = self._records.get(leaf)
        if known is None:
            known = self._records[leaf] = decode_record(open_sealed(self._record_key, leaf))
        return known


def written_leaves(delta: bytes) -> list[tuple[bytes, int]]:
    """Return (base128 of the record id, length of the value) of each leaf that a delta adds."""
    return [
        (row_key[:-HASH_BYTES], len(node) - LEAF_HEADER_BYTES)
        for row_key, node in delta_rows(delta).adds
        if len(row_key) == LEAF_ROW_BYTES
    ]


def leaf_row(record: RecordId) -> bytes:
    """Return base128 of a record id, as `written_leaves` gives it."""
    return row_prefix(int.from_bytes(record, "big"), KEY_BITS)
