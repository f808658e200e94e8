"""Encode and decode nodes, proofs and deltas in pure Python (merkle.md 3).

One canonical byte string per object; a decoder accepts nothing else and raises only `BadEncoding`.
This is the model's half of the format: written to be read. Bit strings are Python strings of `0` and `1`,
whose natural order is the order of node keys (a proper prefix sorts first). The C kernel has its own decoder;
differential tests keep the two equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from juicebox_hsm.merkle.nodes import (
    HASH_BYTES,
    KEY_BITS,
    KEY_BYTES,
    KIND_INTERIOR,
    KIND_LEAF,
    PROOF_HEADER,
    VALUE_BYTES_MAX,
    VERSION,
    BadEncoding,
    Delta,
    DeltaRows,
    NodeAdd,
    NodeKey,
)

FLAG_LEFT: Final = 1
FLAG_RIGHT: Final = 2
DELTA_HEADER: Final = b"\x01\x50"
PATH_NODES_MAX: Final = 256  # every step consumes at least one of 256 key bits


def unpack_bits(packed: bytes, nbits: int) -> str:
    """Return the first `nbits` of `packed` as a string of 0 and 1."""
    if nbits == 0:
        return ""
    return format(int.from_bytes(packed, "big"), f"0{8 * len(packed)}b")[:nbits]


def pack_bits(bits: str) -> bytes:
    """Pack a string of 0 and 1 most significant bit first, the last byte padded with zeros."""
    size = (len(bits) + 7) // 8
    return int(bits.ljust(8 * size, "0"), 2).to_bytes(size, "big") if bits else b""


@dataclass(frozen=True, slots=True)
class Branch:
    """An edge to a child: key bits from this node to the child (relative, 1..256) and the child's hash."""

    prefix: str
    hash: bytes


@dataclass(frozen=True, slots=True)
class Leaf:
    """A stored value, opaque here, at most 65535 bytes."""

    value: bytes

    def encode(self) -> bytes:
        """Return the node encoding (merkle.md 3.1)."""
        return bytes((VERSION, KIND_LEAF)) + len(self.value).to_bytes(2, "big") + self.value


@dataclass(frozen=True, slots=True)
class Interior:
    """A node with branches; only a root may lack one (T1), which whoever knows the position checks."""

    left: Branch | None
    right: Branch | None

    def branch(self, bit: str) -> Branch | None:
        """Return the branch for key bit `0` (left) or `1` (right)."""
        return self.left if bit == "0" else self.right

    def replace(self, bit: str, branch: Branch) -> Interior:
        """Return a copy whose branch on the side of `bit` is `branch`."""
        return Interior(branch, self.right) if bit == "0" else Interior(self.left, branch)

    def encode(self) -> bytes:
        """Return the node encoding (merkle.md 3.1)."""
        flags = (FLAG_LEFT if self.left else 0) | (FLAG_RIGHT if self.right else 0)
        parts = [bytes((VERSION, KIND_INTERIOR + flags))]
        parts += [
            len(b.prefix).to_bytes(2, "big") + pack_bits(b.prefix) + b.hash
            for b in (self.left, self.right)
            if b is not None
        ]
        return b"".join(parts)


Node = Leaf | Interior


class _Reader:
    """A view that checks the remaining length before every read."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes or raise `BadEncoding`."""
        end = self._at + size
        if end > len(self._data):
            raise BadEncoding("encoding ends early")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def bits(self, least: int) -> str:
        """Read `be16 nbits || bits`, refusing set padding bits."""
        nbits = self.number(2)
        if not least <= nbits <= KEY_BITS:
            raise BadEncoding(f"prefix of {nbits} bits")
        packed = self.take((nbits + 7) // 8)
        bits = unpack_bits(packed, nbits)
        if pack_bits(bits) != packed:
            raise BadEncoding("padding bits are set")
        return bits

    def expect(self, literal: bytes) -> None:
        if self.take(len(literal)) != literal:
            raise BadEncoding("unknown version or kind")

    def finish(self) -> None:
        if self._at != len(self._data):
            raise BadEncoding("bytes after the end")


def decode_node(data: bytes) -> Node:
    """Decode one node; raises `BadEncoding` for anything but a canonical encoding."""
    reader = _Reader(data)
    reader.expect(bytes((VERSION,)))
    kind = reader.number(1)
    node: Node
    if kind == KIND_LEAF:
        node = Leaf(reader.take(reader.number(2)))
    elif KIND_INTERIOR <= kind <= KIND_INTERIOR + (FLAG_LEFT | FLAG_RIGHT):
        branches: list[Branch | None] = []
        for flag, side in ((FLAG_LEFT, "0"), (FLAG_RIGHT, "1")):
            if not kind & flag:
                branches.append(None)
                continue
            prefix = reader.bits(1)
            if prefix[0] != side:
                raise BadEncoding("branch is on the wrong side")
            branches.append(Branch(prefix, reader.take(HASH_BYTES)))
        node = Interior(*branches)
    else:
        raise BadEncoding("unknown kind of node")
    reader.finish()
    return node


def _interior(data: bytes) -> Interior:
    node = decode_node(data)
    if not isinstance(node, Interior):
        raise BadEncoding("leaf inside a path")
    return node


@dataclass(frozen=True, slots=True)
class Proof:
    """A claim that `key` has `leaf` (or nothing) in the tree `root` over `[start, end]` (merkle.md 3.2)."""

    key: bytes
    start: bytes
    end: bytes
    root: bytes
    path: tuple[Interior, ...]
    leaf: Leaf | None

    def encode(self) -> bytes:
        """Return the canonical encoding; raises `BadEncoding` unless the path has 1..256 nodes."""
        if not 1 <= len(self.path) <= PATH_NODES_MAX:
            raise BadEncoding(f"path of {len(self.path)} nodes, must be 1..{PATH_NODES_MAX}")
        parts = [PROOF_HEADER, self.key, self.start, self.end, self.root, len(self.path).to_bytes(2, "big")]
        for node in self.path:
            encoded = node.encode()
            parts += [len(encoded).to_bytes(4, "big"), encoded]
        if self.leaf is None:
            parts.append(b"\x00")
        else:
            encoded = self.leaf.encode()
            parts += [b"\x01", len(encoded).to_bytes(4, "big"), encoded]
        return b"".join(parts)


def decode_proof(data: bytes) -> Proof:
    """Decode a proof; raises `BadEncoding`. Nothing about its truth is checked here."""
    reader = _Reader(data)
    reader.expect(PROOF_HEADER)
    key, start, end = reader.take(KEY_BYTES), reader.take(KEY_BYTES), reader.take(KEY_BYTES)
    root = reader.take(HASH_BYTES)
    count = reader.number(2)
    if not 1 <= count <= PATH_NODES_MAX:
        raise BadEncoding(f"path of {count} nodes, must be 1..{PATH_NODES_MAX}")
    path = tuple(_interior(reader.take(reader.number(4))) for _ in range(count))
    flag = reader.number(1)
    leaf = None
    if flag == 1:
        last = decode_node(reader.take(reader.number(4)))
        if not isinstance(last, Leaf):
            raise BadEncoding("interior node in place of the leaf")
        leaf = last
    elif flag != 0:
        raise BadEncoding("leaf flag is neither 0 nor 1")
    reader.finish()
    return Proof(key, start, end, root, path, leaf)


BitsKey = tuple[str, bytes]  # (full prefix, hash): orders exactly as node keys do


@dataclass(frozen=True, slots=True)
class BitsDelta:
    """A delta with bit-string keys, in the order the dictionaries happen to have (merkle.md 8)."""

    adds: dict[BitsKey, bytes]
    removes: set[BitsKey]

    def normalised(self) -> BitsDelta:
        """Drop every key that is both added and removed."""
        both = self.adds.keys() & self.removes
        return BitsDelta({k: v for k, v in self.adds.items() if k not in both}, self.removes - both)

    def encode(self) -> bytes:
        """Return the canonical encoding (merkle.md 3.3)."""
        parts = [DELTA_HEADER, len(self.adds).to_bytes(4, "big")]
        for key in sorted(self.adds):
            node = self.adds[key]
            parts += [_encode_key(key), len(node).to_bytes(4, "big"), node]
        parts.append(len(self.removes).to_bytes(4, "big"))
        parts += [_encode_key(key) for key in sorted(self.removes)]
        return b"".join(parts)


def _encode_key(key: BitsKey) -> bytes:
    prefix, node_hash = key
    return len(prefix).to_bytes(2, "big") + pack_bits(prefix) + node_hash


def _read_keys(reader: _Reader, adds: dict[BitsKey, bytes] | None) -> list[BitsKey]:
    keys: list[BitsKey] = []
    for _ in range(reader.number(4)):
        key = (reader.bits(0), reader.take(HASH_BYTES))
        if keys and key <= keys[-1]:
            raise BadEncoding("node keys are not strictly ascending")
        keys.append(key)
        if adds is not None:
            node = reader.take(reader.number(4))
            decode_node(node)
            adds[key] = node
    return keys


def decode_bits_delta(data: bytes) -> BitsDelta:
    """Decode a delta; raises `BadEncoding`. Whether a node fits its position is not the codec's business."""
    reader = _Reader(data)
    reader.expect(DELTA_HEADER)
    adds: dict[BitsKey, bytes] = {}
    _read_keys(reader, adds)
    removes = set(_read_keys(reader, None))
    reader.finish()
    if adds.keys() & removes:
        raise BadEncoding("a node is both added and removed")
    return BitsDelta(adds, removes)


def packed_key(key: BitsKey) -> NodeKey:
    """Return the public form of a bit-string key."""
    return NodeKey(pack_bits(key[0]), len(key[0]), key[1])


def base128(prefix: str) -> bytes:
    """Encode a bit string in groups of 7 bits with a terminator that counts the last group (merkle.md 3.4)."""
    groups = [prefix[at : at + 7] for at in range(0, len(prefix), 7)]
    terminator = 0x80 | (len(groups[-1]) if groups else 0)
    return bytes(int(group.ljust(7, "0"), 2) for group in groups) + bytes((terminator,))


def require_size(name: str, data: bytes, size: int) -> None:
    """Raise `BadEncoding` unless `data` has exactly `size` bytes."""
    if len(data) != size:
        raise BadEncoding(f"{name} has {len(data)} bytes, must be {size}")


def require_value(value: bytes) -> None:
    """Raise `BadEncoding` if `value` is too long for a leaf."""
    if len(value) > VALUE_BYTES_MAX:
        raise BadEncoding(f"value of {len(value)} bytes, must be at most {VALUE_BYTES_MAX}")


def row_key(prefix: bytes, nbits: int, node_hash: bytes) -> bytes:
    """Return the storage key of a node: base128 of its full prefix, then its hash (merkle.md 3.4)."""
    if not 0 <= nbits <= KEY_BITS:
        raise BadEncoding(f"prefix of {nbits} bits")
    require_size("prefix", prefix, (nbits + 7) // 8)
    require_size("hash", node_hash, HASH_BYTES)
    bits = unpack_bits(prefix, nbits)
    if pack_bits(bits) != prefix:
        raise BadEncoding("padding bits are set")
    return base128(bits) + node_hash


def path_scan_starts(key: bytes, first: int) -> list[bytes]:
    """Return base128 of the first n bits of `key` for n = first..256: where a path's row scans start."""
    require_size("key", key, KEY_BYTES)
    if not 0 <= first <= KEY_BITS:
        raise BadEncoding(f"depth {first}, must be 0..{KEY_BITS}")
    bits = unpack_bits(key, KEY_BITS)
    return [base128(bits[:depth]) for depth in range(first, KEY_BITS + 1)]


def decode_delta(delta: bytes) -> Delta:
    """Decode a delta; raises `BadEncoding`."""
    bits = decode_bits_delta(delta)
    return Delta(
        [NodeAdd(*packed_key(key), bits.adds[key]) for key in sorted(bits.adds)],
        [packed_key(key) for key in sorted(bits.removes)],
    )


def delta_rows(delta: bytes) -> DeltaRows:
    """Decode a delta into row keys and nodes, in node key order; raises `BadEncoding`."""
    bits = decode_bits_delta(delta)
    return DeltaRows(
        [(base128(key[0]) + key[1], bits.adds[key]) for key in sorted(bits.adds)],
        [base128(key[0]) + key[1] for key in sorted(bits.removes)],
    )


def squash(deltas: Sequence[bytes]) -> bytes:
    """Join deltas, oldest first, into one with the same effect (merkle.md 8); raises `BadEncoding`."""
    adds: dict[BitsKey, bytes] = {}
    removes: set[BitsKey] = set()
    for delta in deltas:
        later = decode_bits_delta(delta)
        for key in later.removes:
            if key in adds:
                del adds[key]
            else:
                removes.add(key)
        for key, node in later.adds.items():
            if key in removes:
                removes.remove(key)
            else:
                adds[key] = node
    return BitsDelta(adds, removes).encode()
