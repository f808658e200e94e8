"""Give the library its Merkle tree: the C kernel behind checked Python names (merkle.md 11).

The only module that imports `_native`. Sizes are checked here and again in C; statuses become exceptions.
`model` has the same functions and classes in plain Python; what each of them does is written there in full.

A `Tree` and everything made from it is used by one caller at a time: the foreign calls release the GIL, so two
threads in one tree would race. Its caller, the HSM, is strictly serialised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NoReturn

from juicebox_hsm.ids import OwnedRange, RecordId
from juicebox_hsm.merkle._native import ffi, lib
from juicebox_hsm.merkle.nodes import (
    CAPACITY_MAX,
    HASH_BYTES,
    KEY_BITS,
    KEY_BYTES,
    VALUE_BYTES_MAX,
    BadEncoding,
    Delta,
    DeltaRows,
    InvalidProof,
    NodeAdd,
    NodeKey,
    NotAdjacent,
    StaleProof,
)
from juicebox_hsm.merkle.walk import (
    EdgeWalk,
    MissingNode,
    PathWalk,
    Side,
    Walk,
    build_read_proof,
    finish_walk,
    scan_end,
)

if TYPE_CHECKING:
    from juicebox_hsm.merkle._native import CData  # known to the stub only

__all__ = [
    "EMPTY_DELTA",
    "BadEncoding",
    "Delta",
    "DeltaRows",
    "EdgeWalk",
    "Half",
    "InvalidProof",
    "MissingNode",
    "NodeAdd",
    "NodeKey",
    "NotAdjacent",
    "PathWalk",
    "Refreshed",
    "Side",
    "StaleProof",
    "Tree",
    "Walk",
    "build_read_proof",
    "check_node",
    "decode_delta",
    "delta_rows",
    "empty_root",
    "finish_walk",
    "node_hash",
    "path_scan_starts",
    "row_key",
    "scan_end",
    "squash",
]

Half = tuple[OwnedRange, bytes]

_OK: Final = lib.JBM_OK
_SCAN_START_SIZES: Final = tuple((nbits + 6) // 7 + 1 for nbits in range(KEY_BITS + 1))
_MESSAGES: Final = {
    lib.JBM_BAD_ENCODING: (BadEncoding, "not a canonical encoding, or a size out of bounds"),
    lib.JBM_INVALID_PROOF: (InvalidProof, "the proof does not show what it must"),
    lib.JBM_STALE_PROOF: (StaleProof, "the proof is against a root that is not, or no longer, known"),
    lib.JBM_NOT_ADJACENT: (NotAdjacent, "the ranges do not touch"),
}


def _refuse(status: int) -> NoReturn:
    if status == lib.JBM_NO_MEMORY:
        raise MemoryError("the Merkle kernel could not allocate")
    error, message = _MESSAGES[status]
    raise error(message)


def _require_size(name: str, data: bytes, size: int) -> None:
    if len(data) != size:
        raise BadEncoding(f"{name} has {len(data)} bytes, must be {size}")


def _bounds(start: bytes, end: bytes) -> bytes:
    """Return the kernel's 64-byte form of a range."""
    _require_size("range start", start, KEY_BYTES)
    _require_size("range end", end, KEY_BYTES)
    if start > end:
        raise BadEncoding("range starts after its end")
    return start + end


def _new_buffer() -> CData:
    return ffi.gc(ffi.new("jbm_buffer *"), lib.jbm_buffer_free)


def _taken(buffer: CData) -> bytes:
    """Copy what a call left in an output buffer."""
    return bytes(ffi.buffer(buffer.data, buffer.size))


def node_hash(node: bytes, key: bytes, bounds: OwnedRange | None) -> bytes:
    """Return a node's 32-byte hash (merkle.md 2).

    `key` is the record id of a leaf and ignored for interior nodes, whose hash does not contain their
    position; `bounds` is the tree's range if the node is its root. Raises `BadEncoding` for malformed bytes,
    a key that is not 32 bytes, and an interior node without both branches (only a root may lack one).
    """
    packed = b"" if bounds is None else _bounds(bounds.start, bounds.end)
    out = ffi.new("uint8_t[32]")
    status = lib.jbm_node_hash(node, len(node), key, len(key), packed, len(packed), out)
    if status != _OK:
        _refuse(status)
    return bytes(ffi.buffer(out, HASH_BYTES))


def check_node(node: bytes) -> None:
    """Raise `BadEncoding` unless `node` is a canonical node encoding."""
    status = lib.jbm_check_node(node, len(node))
    if status != _OK:
        _refuse(status)


def empty_root(start: bytes, end: bytes) -> tuple[bytes, bytes]:
    """Return (root hash, delta) of the tree without records over `[start, end]`."""
    packed = _bounds(start, end)
    root, delta = ffi.new("uint8_t[32]"), _new_buffer()
    status = lib.jbm_empty_root(packed, len(packed), root, delta)
    if status != _OK:
        _refuse(status)
    return bytes(ffi.buffer(root, HASH_BYTES)), _taken(delta)


def row_key(prefix: bytes, nbits: int, node_hash: bytes) -> bytes:
    """Return the storage key of a node: base128 of its full prefix, then its hash (merkle.md 3.4)."""
    if not 0 <= nbits <= KEY_BITS:
        raise BadEncoding(f"prefix of {nbits} bits")
    _require_size("prefix", prefix, (nbits + 7) // 8)
    _require_size("hash", node_hash, HASH_BYTES)
    out, size = ffi.new("uint8_t[]", lib.JBM_ROW_KEY_MAX), ffi.new("size_t *")
    status = lib.jbm_row_key(prefix, len(prefix), nbits, node_hash, len(node_hash), out, size)
    if status != _OK:
        _refuse(status)
    return bytes(ffi.buffer(out, size[0]))


def path_scan_starts(key: bytes, first: int) -> list[bytes]:
    """Return base128 of the first n bits of `key` for n = first..256: where a path's row scans start."""
    _require_size("key", key, KEY_BYTES)
    if not 0 <= first <= KEY_BITS:
        raise BadEncoding(f"depth {first}, must be 0..{KEY_BITS}")
    buffer = _new_buffer()
    status = lib.jbm_path_scan_starts(key, len(key), first, buffer)
    if status != _OK:
        _refuse(status)
    packed = _taken(buffer)
    starts: list[bytes] = []
    at = 0
    for size in _SCAN_START_SIZES[first:]:
        starts.append(packed[at : at + size])
        at += size
    return starts


def decode_delta(delta: bytes) -> Delta:
    """Decode a delta; raises `BadEncoding`. Cost: about 1 us per node; `delta_rows` is the storage's way."""
    counts, index = ffi.new("uint32_t[2]"), _new_buffer()
    status = lib.jbm_delta_index(delta, len(delta), counts, index)
    if status != _OK:
        _refuse(status)
    adds: list[NodeAdd] = []
    removes: list[NodeKey] = []
    if index.size:
        numbers = iter(ffi.unpack(ffi.cast("uint32_t *", index.data), index.size // 4))
        for at, nbits, node_at, node_size in zip(numbers, numbers, numbers, numbers, strict=True):
            middle = at + (nbits + 7) // 8
            end = middle + HASH_BYTES
            if len(adds) < counts[0]:
                node = delta[node_at : node_at + node_size]
                adds.append(NodeAdd(delta[at:middle], nbits, delta[middle:end], node))
            else:
                removes.append(NodeKey(delta[at:middle], nbits, delta[middle:end]))
    return Delta(adds, removes)


def delta_rows(delta: bytes) -> DeltaRows:
    """Decode a delta into row keys and nodes, in node key order; raises `BadEncoding`."""
    counts, buffer = ffi.new("uint32_t[2]"), _new_buffer()
    status = lib.jbm_delta_rows(delta, len(delta), counts, buffer)
    if status != _OK:
        _refuse(status)
    add_count: int = counts[0]
    total: int = add_count + counts[1]
    if not total:
        return DeltaRows([], [])
    packed = _taken(buffer)
    numbers = ffi.unpack(ffi.cast("uint32_t *", buffer.data), 3 * total)
    at = 12 * total
    adds: list[tuple[bytes, bytes]] = []
    removes: list[bytes] = []
    for place in range(0, 3 * add_count, 3):
        end = at + numbers[place]
        node_at = numbers[place + 1]
        adds.append((packed[at:end], delta[node_at : node_at + numbers[place + 2]]))
        at = end
    for place in range(3 * add_count, 3 * total, 3):
        end = at + numbers[place]
        removes.append(packed[at:end])
        at = end
    return DeltaRows(adds, removes)


EMPTY_DELTA: Final = b"\x01\x50" + bytes(8)
"""Nothing added, nothing removed (merkle.md 3.3); what `squash` makes of no deltas."""


def squash(deltas: Sequence[bytes]) -> bytes:
    """Join deltas, oldest first, into one with the same effect (merkle.md 8); raises `BadEncoding`.

    Cost: n log n in the number of nodes, about 1 us per node.
    """
    buffer = _new_buffer()
    views = [ffi.from_buffer("uint8_t[]", delta) for delta in deltas]
    sizes = ffi.new("size_t[]", [len(delta) for delta in deltas])
    status = lib.jbm_squash(ffi.new("uint8_t *[]", views), sizes, len(views), buffer)
    if status != _OK:
        _refuse(status)
    return _taken(buffer)


class Refreshed:
    """A proof brought up to a tree's latest root: what the tree holds at `key` now.

    `leaf` is the stored value, or None if the tree has no record there; `root` is the root it speaks of.
    """

    __slots__ = ("_path", "key", "leaf", "root")

    def __init__(self, path: CData, key: bytes, leaf: bytes | None, root: bytes) -> None:
        self._path = path
        self.key = key
        self.leaf = leaf
        self.root = root


class Tree:
    """An authenticated tree of which only the latest root and recent changes are remembered.

    `root` over `[start, end]` MUST come from a trusted place; `capacity` (1..65535) is how many deltas stay
    refreshable. A fresh tree knows exactly its initial root. Raises `BadEncoding` for sizes out of bounds.
    Every method that raises leaves the tree as it was. Memory: about 250 KB, and 5 KB per retained delta.
    """

    __slots__ = ("_delta", "_out", "_path_out", "_root", "_size_out", "_tree", "range")

    def __init__(self, root: bytes, start: bytes, end: bytes, capacity: int) -> None:
        _require_size("root", root, HASH_BYTES)
        packed = _bounds(start, end)
        if not 1 <= capacity <= CAPACITY_MAX:
            raise BadEncoding(f"overlay of {capacity} deltas, must be 1..{CAPACITY_MAX}")
        self.range = OwnedRange(RecordId(start), RecordId(end))
        out = ffi.new("jbm_tree **")
        status = lib.jbm_tree_new(root, len(root), packed, len(packed), capacity, out)
        if status != _OK:
            _refuse(status)
        self._tree = ffi.gc(out[0], lib.jbm_tree_free)
        self._root = root
        # Out-parameters are made once: a call then costs no Python allocation but its results.
        self._out = ffi.new("uint8_t[96]")
        self._path_out = ffi.new("jbm_path **")
        self._size_out = ffi.new("size_t *")
        self._delta = _new_buffer()

    @property
    def root(self) -> bytes:
        """Return the latest root hash."""
        return self._root

    def valid_roots(self) -> set[bytes]:
        """Return the roots a proof may be against: the latest, and the one before each retained delta."""
        buffer = _new_buffer()
        status = lib.jbm_tree_valid_roots(self._tree, buffer)
        if status != _OK:
            _refuse(status)
        packed = _taken(buffer)
        return {packed[at : at + HASH_BYTES] for at in range(0, len(packed), HASH_BYTES)}

    def latest(self, proof: bytes) -> Refreshed:
        """Verify a proof and bring it up to the latest root (merkle.md 5).

        Raises `BadEncoding`, `StaleProof` (root not known, before any hashing) or `InvalidProof`.
        """
        status = lib.jbm_tree_latest(self._tree, proof, len(proof), self._path_out)
        if status != _OK:
            _refuse(status)
        path = ffi.gc(self._path_out[0], lib.jbm_path_free)
        value = lib.jbm_path_value(path, self._size_out)
        leaf = None if value == ffi.NULL else bytes(ffi.buffer(value, self._size_out[0]))
        return Refreshed(path, proof[2 : 2 + KEY_BYTES], leaf, self._root)

    def insert(self, refreshed: Refreshed, value: bytes) -> tuple[bytes, bytes]:
        """Set the value at the proof's key and return (new root, delta); the tree moves to the new root.

        An equal value changes nothing and gives an empty delta. Raises `StaleProof` unless `refreshed` is at
        the latest root, `BadEncoding` if the value exceeds 65535 bytes.
        """
        _require_value(value)
        path = refreshed._path  # noqa: SLF001 - the opaque half of our own handle
        status = lib.jbm_tree_insert(self._tree, path, value, len(value), self._out, self._delta)
        return self._moved(status)

    def update(self, proof: bytes, value: bytes) -> tuple[bytes, bytes]:
        """Do `insert(latest(proof), value)` in one call."""
        _require_value(value)
        status = lib.jbm_tree_update(self._tree, proof, len(proof), value, len(value), self._out, self._delta)
        return self._moved(status)

    def _moved(self, status: int) -> tuple[bytes, bytes]:
        if status != _OK:
            _refuse(status)
        self._root = bytes(ffi.buffer(self._out, HASH_BYTES))
        return self._root, _taken(self._delta)

    def split(self, proof: bytes) -> tuple[Half, Half, bytes]:
        """Return ((range, root), (range, root), delta) of both halves, the right one starting at the key.

        The tree itself is unchanged. Raises `BadEncoding`, `StaleProof`, or `InvalidProof`, the last also
        if the key is the first of the range, for then one half would be nothing.
        """
        roots, left_end = ffi.new("uint8_t[64]"), ffi.new("uint8_t[32]")
        status = lib.jbm_tree_split(self._tree, proof, len(proof), roots, left_end, self._delta)
        if status != _OK:
            _refuse(status)
        packed = bytes(ffi.buffer(roots, 2 * HASH_BYTES))
        left = OwnedRange(self.range.start, RecordId(bytes(ffi.buffer(left_end, KEY_BYTES))))
        right = OwnedRange(RecordId(proof[2 : 2 + KEY_BYTES]), self.range.end)
        return (left, packed[:HASH_BYTES]), (right, packed[HASH_BYTES:]), _taken(self._delta)

    def merge(
        self, own: bytes, other: bytes, other_root: bytes, other_range: OwnedRange
    ) -> tuple[OwnedRange, bytes, bytes]:
        """Return (range, root, delta) of this tree joined with an adjacent one (merkle.md 7).

        `other_root` and `other_range` MUST be authenticated by the caller; both proofs are edge proofs. The
        tree itself is unchanged. Raises `BadEncoding`; `StaleProof` if the own proof is too old or its edge
        may have moved; `NotAdjacent`; else `InvalidProof`.
        """
        _require_size("other root", other_root, HASH_BYTES)
        packed = _bounds(other_range.start, other_range.end)
        root, bounds = ffi.new("uint8_t[32]"), ffi.new("uint8_t[64]")
        status = lib.jbm_tree_merge(
            self._tree,
            own,
            len(own),
            other,
            len(other),
            other_root,
            len(other_root),
            packed,
            len(packed),
            root,
            bounds,
            self._delta,
        )
        if status != _OK:
            _refuse(status)
        joined = bytes(ffi.buffer(bounds, 2 * KEY_BYTES))
        both = OwnedRange(RecordId(joined[:KEY_BYTES]), RecordId(joined[KEY_BYTES:]))
        return both, bytes(ffi.buffer(root, HASH_BYTES)), _taken(self._delta)


def _require_value(value: bytes) -> None:
    if len(value) > VALUE_BYTES_MAX:
        raise BadEncoding(f"value of {len(value)} bytes, must be at most {VALUE_BYTES_MAX}")
