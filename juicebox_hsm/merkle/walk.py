"""Build proofs on the host's side: walk stored nodes from a root and encode what was met (merkle.md 4, 9).

A walk is a small state machine without I/O. It names the next node it wants, by row key and by hash; the
caller finds that node in a cache, a scan result or a store and feeds it. When nothing more is wanted the walk
encodes its proof. Hashes are checked by the HSM, not by the walk; what comes from a store and not from memory is looked
at before it is fed (`stored`), so that damage is found where it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from juicebox_hsm.errors import RealmError, check
from juicebox_hsm.ids import OwnedRange
from juicebox_hsm.merkle.nodes import (
    HASH_BYTES,
    KEY_BITS,
    KIND_INTERIOR,
    KIND_LEAF,
    PROOF_HEADER,
    VERSION,
    BadEncoding,
)

_GROUP_MASKS: Final = tuple((0x7F << (7 - bits)) & 0x7F for bits in range(8))
_BRANCH_END_MIN: Final = 2 + 2 + 1 + HASH_BYTES  # version and kind, length, a prefix of one byte, hash
_LAST_BYTES: Final = tuple(bytes((0x80 | bits,)) for bits in range(8))


class MissingNode(RealmError):
    """A node of the asked tree is not in the store: the root moved on. Read the log tail and try again."""

    retryable = True


@dataclass(frozen=True, slots=True)
class Lost:
    """The node that a path ended at: the root moved on, or it is damaged. `depth` is its prefix's length in bits."""

    depth: int
    hash: bytes


class Side(Enum):
    """Which edge of a tree an edge proof is of."""

    LEFT = 0
    RIGHT = 1


def row_prefix(prefix: int, nbits: int) -> bytes:
    """Return base128 of a full prefix given as an integer of `nbits` bits (merkle.md 3.4)."""
    groups, rest = divmod(nbits, 7)
    if rest:
        padded = prefix << (7 - rest)
        groups += 1
    else:
        padded, rest = prefix, 7 if groups else 0
    return bytes((padded >> (7 * at)) & 0x7F for at in range(groups - 1, -1, -1)) + _LAST_BYTES[rest]


def scan_end(scan_start: bytes) -> bytes:
    """Return the exclusive end of the row scan that starts at an encoded prefix (merkle.md 9)."""
    return scan_start[:-1] + bytes((scan_start[-1] + 1,))


def build_read_proof(key: bytes, bounds: OwnedRange, root: bytes, path: Sequence[bytes], leaf: bytes | None) -> bytes:
    """Encode a proof from node encodings: the path's interior nodes, root first, and the leaf (merkle.md 3.2)."""
    parts = [PROOF_HEADER, key, bounds.start, bounds.end, root, len(path).to_bytes(2, "big")]
    for node in path:
        parts.append(len(node).to_bytes(4, "big"))
        parts.append(node)
    if leaf is None:
        parts.append(b"\x00")
    else:
        parts += (b"\x01", len(leaf).to_bytes(4, "big"), leaf)
    return b"".join(parts)


def _branch(node: bytes, side: int) -> tuple[int, int, bytes] | None:
    """Return (bits, prefix, child hash) of one branch of a stored interior node, None if it has none there.

    The hot loop of every read.
    """
    if len(node) < 2 or node[0] != VERSION or not KIND_INTERIOR <= node[1] <= KIND_INTERIOR + 3:
        raise BadEncoding("stored node is not an interior node")
    kind = node[1]
    if not kind & (1 << side):
        return None
    if len(node) < _BRANCH_END_MIN:
        raise BadEncoding("stored node is cut short")
    at = 2
    if side and kind & 1:
        at += 2 + HASH_BYTES + (((node[2] << 8 | node[3]) + 7) >> 3)
        if len(node) < at + _BRANCH_END_MIN - 2:
            raise BadEncoding("stored node is cut short")
    nbits = node[at] << 8 | node[at + 1]
    if nbits == 1:  # most branches
        return 1, node[at + 2] >> 7, node[at + 3 : at + 3 + HASH_BYTES]
    middle = at + 2 + ((nbits + 7) >> 3)
    child = node[middle : middle + HASH_BYTES]
    if not 0 < nbits <= KEY_BITS or len(child) != HASH_BYTES:
        raise BadEncoding("stored node is cut short")
    return nbits, int.from_bytes(node[at + 2 : middle], "big") >> (-nbits & 7), child


def _require_leaf(node: bytes) -> None:
    if len(node) < 4 or node[0] != VERSION or node[1] != KIND_LEAF:
        raise BadEncoding("stored node is not a leaf")


class Walk(Protocol):
    """What a reader of nodes needs to know of a walk in progress."""

    @property
    def wanted(self) -> bytes | None:
        """Return the hash of the next node, or None when the walk is complete."""

    @property
    def wanted_row(self) -> bytes:
        """Return the row key of the next node; only while something is wanted."""

    @property
    def depth(self) -> int:
        """Return the length in bits of the next node's full prefix."""

    @property
    def aim(self) -> int:
        """Return a key of 256 bits below the next node's prefix: the likeliest to be walked to."""

    @property
    def bounds(self) -> OwnedRange:
        """Return the range of the tree, which the hash of its root contains."""

    def feed(self, node: bytes) -> None:
        """Take the encoding of the wanted node; raises `BadEncoding` if it cannot be it."""

    def proof(self) -> bytes:
        """Return the encoded proof of the completed walk."""


class PathWalk:
    """Walk towards a record id; the proof shows its leaf, or that there is none (merkle.md 4)."""

    __slots__ = ("_bounds", "_groups", "_key", "_leaf", "_path", "_root", "aim", "depth", "wanted")

    def __init__(self, key: bytes, bounds: OwnedRange, root: bytes) -> None:
        self._key = key
        self.aim = int.from_bytes(key, "big")
        self._groups = b""
        self._bounds = bounds
        self._root = root
        self._path: list[bytes] = []
        self._leaf: bytes | None = None
        self.depth: int = 0
        self.wanted: bytes | None = root

    @property
    def wanted_row(self) -> bytes:
        """Return the row key of the next node; only while something is wanted."""
        wanted = self.wanted
        check(wanted is not None, "a completed walk wants nothing")
        groups = self._groups
        if not groups:
            groups = self._groups = row_prefix(self.aim, KEY_BITS)
        full, rest = divmod(self.depth, 7)
        if rest:
            head = groups[:full] + bytes((groups[full] & _GROUP_MASKS[rest], 0x80 | rest))
        else:
            head = groups[:full] + _LAST_BYTES[7 if full else 0]
        return head + (wanted or b"")

    def feed(self, node: bytes) -> None:
        """Take the encoding of the wanted node; raises `BadEncoding` if it cannot be it."""
        depth = self.depth
        if depth == KEY_BITS:
            _require_leaf(node)
            self._leaf = node
            self.wanted = None
            return
        remaining = KEY_BITS - depth
        branch = _branch(node, (self.aim >> (remaining - 1)) & 1)
        self._path.append(node)
        self.wanted = None
        if branch is None:
            return
        nbits, prefix, child = branch
        if nbits > remaining:
            raise BadEncoding("stored branch reaches beyond the key")
        if (self.aim >> (remaining - nbits)) & ((1 << nbits) - 1) == prefix:
            self.depth = depth + nbits
            self.wanted = child

    @property
    def bounds(self) -> OwnedRange:
        """Return the range of the tree."""
        return self._bounds

    def proof(self) -> bytes:
        """Return the encoded proof of the completed walk."""
        check(self.wanted is None, "a proof needs a completed walk")
        return build_read_proof(self._key, self._bounds, self._root, self._path, self._leaf)


class EdgeWalk:
    """Walk along one edge of a tree, as merging needs it (merkle.md 4.2); the key comes out of the walk."""

    __slots__ = ("_bounds", "_leaf", "_path", "_prefix", "_root", "_side", "depth", "wanted")

    def __init__(self, side: Side, bounds: OwnedRange, root: bytes) -> None:
        self._side = side
        self._bounds = bounds
        self._root = root
        self._prefix = 0
        self._path: list[bytes] = []
        self._leaf: bytes | None = None
        self.depth: int = 0
        self.wanted: bytes | None = root

    @property
    def wanted_row(self) -> bytes:
        """Return the row key of the next node; only while something is wanted."""
        check(self.wanted is not None, "a completed walk wants nothing")
        return row_prefix(self._prefix, self.depth) + (self.wanted or b"")

    @property
    def aim(self) -> int:
        """Return the outermost key below the next node's prefix."""
        rest = KEY_BITS - self.depth
        return self._prefix << rest | ((1 << rest) - 1 if self._side is Side.RIGHT else 0)

    def feed(self, node: bytes) -> None:
        """Take the encoding of the wanted node; raises `BadEncoding` if it cannot be it."""
        if self.depth == KEY_BITS:
            _require_leaf(node)
            self._leaf = node
            self.wanted = None
            return
        branch = _branch(node, self._side.value) or _branch(node, 1 - self._side.value)
        self._path.append(node)
        self.wanted = None
        if branch is None:
            return
        nbits, prefix, child = branch
        if self.depth + nbits > KEY_BITS:
            raise BadEncoding("stored branch reaches beyond the key")
        self._prefix = self._prefix << nbits | prefix
        self.depth += nbits
        self.wanted = child

    @property
    def bounds(self) -> OwnedRange:
        """Return the range of the tree."""
        return self._bounds

    def proof(self) -> bytes:
        """Return the encoded proof; the key of an empty tree is the range's end on the walked side."""
        check(self.wanted is None, "a proof needs a completed walk")
        if self._leaf is not None:
            key = self._prefix.to_bytes(KEY_BITS // 8, "big")
        else:
            key = self._bounds.start if self._side is Side.LEFT else self._bounds.end
        return build_read_proof(key, self._bounds, self._root, self._path, self._leaf)


def outcome(walk: Walk) -> bytes | Lost:
    """Return the proof of a completed walk, else the node that it did not get."""
    wanted = walk.wanted
    return walk.proof() if wanted is None else Lost(walk.depth, wanted)


def finish_walk(walk: Walk, find: Callable[[bytes], bytes | None]) -> bytes:
    """Feed `walk` from `find` (row key -> node encoding or None) and return the proof.

    Raises `MissingNode` when `find` does not have a node; the walk can be continued from there.
    """
    while walk.wanted is not None:
        node = find(walk.wanted_row)
        if node is None:
            raise MissingNode(f"no stored node at depth {walk.depth}")
        walk.feed(node)
    return walk.proof()
