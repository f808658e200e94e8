"""Keep a whole tree's nodes in memory: the host's half for benchmarks and tests (own).

`MemoryTree` is the smallest thing that serves proofs and takes deltas, so that code which needs "a store"
needs no storage back end. `build` makes the canonical tree of a set of records from scratch without `Tree`,
in one pass over the sorted keys: fast enough for a million records, and independent enough to be an oracle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from juicebox_hsm.errors import check
from juicebox_hsm.ids import OwnedRange
from juicebox_hsm.merkle.kernel import delta_rows, empty_root, node_hash
from juicebox_hsm.merkle.nodes import KEY_BITS
from juicebox_hsm.merkle.walk import EdgeWalk, PathWalk, Side, finish_walk, row_prefix

_Subtree = tuple[int, int, bytes]  # full prefix, its length in bits, hash


class MemoryTree:
    """All nodes of a tree by row key, the root they start from and the range."""

    def __init__(self, bounds: OwnedRange, root: bytes, rows: Mapping[bytes, bytes]) -> None:
        self.range = bounds
        self.root = root
        self.rows = dict(rows)

    @classmethod
    def empty(cls, bounds: OwnedRange) -> MemoryTree:
        """Return the tree without records over `bounds`."""
        root, delta = empty_root(bounds.start, bounds.end)
        return cls(bounds, root, dict(delta_rows(delta).adds))

    @classmethod
    def build(cls, bounds: OwnedRange, records: Iterable[tuple[bytes, bytes]]) -> MemoryTree:
        """Return the canonical tree of (key, value) pairs, whose keys are distinct and inside `bounds`."""
        builder = _Builder()
        for key, value in sorted(records):
            check(bounds.contains(key), "every key lies inside the range")
            builder.add(key, b"\x01\x10" + len(value).to_bytes(2, "big") + value)
        root = builder.finish(bounds)
        return cls(bounds, root, builder.rows)

    def read(self, key: bytes) -> bytes:
        """Return the encoded proof for `key`; raises `MissingNode` if `root` is not all there."""
        return finish_walk(PathWalk(key, self.range, self.root), self.rows.get)

    def read_edge(self, side: Side) -> bytes:
        """Return the encoded edge proof of `side`."""
        return finish_walk(EdgeWalk(side, self.range, self.root), self.rows.get)

    def apply(self, root: bytes, delta: bytes) -> None:
        """Take the nodes of a delta and move to the root it leads to."""
        rows = delta_rows(delta)
        self.rows.update(rows.adds)
        for row in rows.removes:
            del self.rows[row]
        self.root = root


class _Builder:
    """Build a radix tree left to right: an open node per fork on the right spine, deepest last."""

    def __init__(self) -> None:
        self.rows: dict[bytes, bytes] = {}
        self._open: list[tuple[int, _Subtree]] = []  # (depth of the fork, its left subtree)
        self._current: _Subtree | None = None
        self._last = 0

    def add(self, key: bytes, leaf: bytes) -> None:
        """Append a leaf; keys come in strictly ascending order."""
        leaf_hash = node_hash(leaf, key, None)
        number = int.from_bytes(key, "big")
        if self._current is not None:
            check(self._last < number, "keys are distinct and ascending")
            self._close(fork := KEY_BITS - (self._last ^ number).bit_length())
            self._open.append((fork, self._current))
        self._last = number
        self._current = (number, KEY_BITS, leaf_hash)
        self.rows[row_prefix(number, KEY_BITS) + leaf_hash] = leaf

    def _close(self, depth: int) -> None:
        """Finish every fork below `depth` with the current subtree as its right side."""
        while self._open and self._open[-1][0] > depth and self._current is not None:
            fork, left = self._open.pop()
            node = b"\x01\x23" + _branch(fork, left) + _branch(fork, self._current)
            prefix = left[0] >> (left[1] - fork)
            digest = node_hash(node, b"", None)
            self.rows[row_prefix(prefix, fork) + digest] = node
            self._current = (prefix, fork, digest)

    def finish(self, bounds: OwnedRange) -> bytes:
        """Close every fork, write the root node and return its hash."""
        self._close(0)
        if self._current is None:
            node = b"\x01\x20"
        elif self._open:
            node = b"\x01\x23" + _branch(0, self._open[0][1]) + _branch(0, self._current)
        else:
            prefix, nbits, _ = self._current
            node = bytes((1, 0x22 if prefix >> (nbits - 1) else 0x21)) + _branch(0, self._current)
        root = node_hash(node, b"", bounds)
        self.rows[row_prefix(0, 0) + root] = node
        return root


def _branch(depth: int, child: _Subtree) -> bytes:
    """Encode the branch from a node at `depth` to `child`."""
    prefix, length, digest = child
    nbits = length - depth
    relative = prefix & ((1 << nbits) - 1)
    return nbits.to_bytes(2, "big") + (relative << (-nbits % 8)).to_bytes((nbits + 7) // 8, "big") + digest
