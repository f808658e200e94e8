"""Name the tree's public values and errors (merkle.md 2, 5, 8 and 11).

Everything the C kernel and its oracle, the model of the tests, hand out is one of these types, so either can stand
in for the other. Bit strings cross this boundary packed: most significant bit first in `ceil(n / 8)` bytes,
unused low bits of the last byte zero, with their length in bits beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from juicebox_hsm.errors import DecodingError, RealmError

HASH_BYTES: Final = 32
KEY_BYTES: Final = 32
KEY_BITS: Final = 256
VALUE_BYTES_MAX: Final = 65_535  # the leaf encoding has a 16-bit length (merkle.md 3.1)
CAPACITY_MAX: Final = 65_535  # `tree_overlay_size` is 1..65535 (hsm.md 2)

# the first bytes of encodings (merkle.md 3)
VERSION: Final = 1
KIND_LEAF: Final = 0x10
KIND_INTERIOR: Final = 0x20
PROOF_HEADER: Final = b"\x01\x40"
PROOF_PATH_AT: Final = len(PROOF_HEADER) + 4 * 32  # behind key, start, end and root hash


class InvalidProof(RealmError, ValueError):
    """A proof does not show what it claims; asking again with the same bytes never helps."""


class StaleProof(RealmError, ValueError):
    """A proof is against a root this tree no longer knows; read a newer one and try again."""

    retryable = True


class BadEncoding(DecodingError):
    """Bytes are not the canonical encoding of a node, proof or delta, or a length is out of bounds."""


class NotAdjacent(RealmError, ValueError):
    """Two trees to be merged do not own ranges that touch end to start."""


class NodeKey(NamedTuple):
    """Identify a node: its full prefix from the root (packed, with its bit length) and its hash."""

    prefix: bytes
    nbits: int
    hash: bytes


class NodeAdd(NamedTuple):
    """One node to store: the parts of its key and its encoding (merkle.md 3.1)."""

    prefix: bytes
    nbits: int
    hash: bytes
    node: bytes

    @property
    def key(self) -> NodeKey:
        """Return the node's identity."""
        return NodeKey(self.prefix, self.nbits, self.hash)


@dataclass(frozen=True, slots=True)
class Delta:
    """Difference between two trees; both lists strictly ascending by node key (merkle.md 8)."""

    adds: list[NodeAdd]
    removes: list[NodeKey]


@dataclass(frozen=True, slots=True)
class DeltaRows:
    """A delta as storage wants it: (row key, node) pairs to write and row keys to delete (merkle.md 3.4)."""

    adds: list[tuple[bytes, bytes]]
    removes: list[bytes]


def read_proof_shape(data: bytes) -> tuple[int, bool]:
    """Return how many nodes the path of a well-formed read proof has, and whether it ends in a leaf."""
    at = PROOF_PATH_AT
    count = int.from_bytes(data[at : at + 2], "big")
    at += 2
    for _ in range(count):
        at += 4 + int.from_bytes(data[at : at + 4], "big")
    return count, data[at] == 1
