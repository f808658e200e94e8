"""Walks over stored nodes: what they want, what they refuse, and the proofs they write."""

from __future__ import annotations

import pytest

from juicebox_hsm.errors import InvariantViolation
from juicebox_hsm.ids import FULL_RANGE, OwnedRange, RecordId
from juicebox_hsm.merkle.kernel import Tree
from juicebox_hsm.merkle.nodes import BadEncoding
from juicebox_hsm.merkle.walk import EdgeWalk, MissingNode, PathWalk, Side, Walk, build_read_proof, finish_walk
from roles.tools.bench.memory_tree import MemoryTree
from tests.merkle_model.codec import decode_proof

HASH = b"\xaa" * 32
LEAF = b"\x01\x10\x00\x01v"
MIN, MAX = bytes(32), b"\xff" * 32


def branch(bits: int, packed: bytes) -> bytes:
    return bits.to_bytes(2, "big") + packed + HASH


def walks() -> list[Walk]:
    return [PathWalk(MIN, FULL_RANGE, HASH), EdgeWalk(Side.LEFT, FULL_RANGE, HASH)]


def test_a_path_walk_follows_its_key() -> None:
    """The walk wants root, fork and leaf in turn, and its proof verifies."""
    host = MemoryTree.build(FULL_RANGE, [(MIN, b"a"), (MAX, b"b"), (b"\x80" + MIN[1:], b"c")])
    walk = PathWalk(MAX, FULL_RANGE, host.root)
    depths = []
    while walk.wanted is not None:
        depths.append(walk.depth)
        assert walk.wanted_row.endswith(walk.wanted)
        walk.feed(host.rows[walk.wanted_row])
    assert depths == [0, 1, 256]
    assert Tree(host.root, MIN, MAX, 1).latest(walk.proof()).leaf == b"b"


def test_a_missing_node_can_be_supplied_later() -> None:
    """A walk that misses a node says so as something worth retrying, and continues from where it stood."""
    host = MemoryTree.build(FULL_RANGE, [(MIN, b"a"), (MAX, b"b")])
    complete = dict(host.rows)
    walk = PathWalk(MIN, FULL_RANGE, host.root)
    leaf_row = next(row for row, node in host.rows.items() if node == b"\x01\x10\x00\x01a")
    del host.rows[leaf_row]
    with pytest.raises(MissingNode, match="depth 256") as caught:
        finish_walk(walk, host.rows.get)
    assert caught.value.retryable
    assert finish_walk(walk, complete.get) == MemoryTree(FULL_RANGE, host.root, complete).read(MIN)


@pytest.mark.parametrize(
    ("keys", "side", "edge"),
    [
        ([], Side.LEFT, MIN),
        ([], Side.RIGHT, MAX),
        ([b"\x10" + MIN[1:], b"\x20" + MIN[1:]], Side.RIGHT, b"\x20" + MIN[1:]),
        ([b"\xf0" + MIN[1:], b"\xe0" + MIN[1:]], Side.LEFT, b"\xe0" + MIN[1:]),
        ([b"\x10" + MIN[1:], b"\xe0" + MIN[1:], MAX], Side.RIGHT, MAX),
    ],
)
def test_edge_walks_end_at_the_outermost_record(keys: list[bytes], side: Side, edge: bytes) -> None:
    """An edge proof's key is the outermost record's, or the range's end if the tree is empty."""
    host = MemoryTree.build(FULL_RANGE, [(key, b"v") for key in keys])
    proof = decode_proof(host.read_edge(side))
    assert (proof.key, proof.leaf is None) == (edge, not keys)
    bounds = OwnedRange(RecordId(proof.start), RecordId(proof.end))
    assert (bounds, proof.root) == (FULL_RANGE, host.root)
    assert Tree(host.root, MIN, MAX, 1).latest(proof.encode()).leaf == (b"v" if keys else None)


BROKEN = {
    "nothing": b"",
    "a leaf": LEAF,
    "another version": b"\x02\x21" + branch(1, b"\0"),
    "another kind": b"\x01\x24" + branch(1, b"\0"),
    "no bits": b"\x01\x21" + branch(0, b""),
    "too many bits": b"\x01\x21" + branch(257, bytes(33)),
    "a short hash": b"\x01\x21" + branch(1, b"\0")[:-1],
    "a short prefix": b"\x01\x21\x00\xff\x00",
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_interior_nodes_are_refused(name: str) -> None:
    """A store that returns anything but an interior node is reported, not followed."""
    for walk in walks():
        with pytest.raises(BadEncoding):
            walk.feed(BROKEN[name])


def test_branches_beyond_the_key_are_refused() -> None:
    """A stored branch cannot lead a walk past the 256 bits of a key."""
    for walk in walks():
        walk.feed(b"\x01\x21" + branch(1, b"\0"))
        with pytest.raises(BadEncoding):
            walk.feed(b"\x01\x23" + branch(256, bytes(32)) + branch(1, b"\x80"))


@pytest.mark.parametrize("node", [b"", b"\x01\x20", b"\x02" + LEAF[1:]])
def test_damaged_leaves_are_refused(node: bytes) -> None:
    """At the end of a key only a leaf will do."""
    for walk in walks():
        walk.feed(b"\x01\x21" + branch(256, bytes(32)))
        with pytest.raises(BadEncoding):
            walk.feed(node)


def test_walks_are_used_in_order() -> None:
    """A proof before the end, and a row after it, are mistakes of the caller and stop the process."""
    for walk in walks():
        with pytest.raises(InvariantViolation):
            walk.proof()
        walk.feed(b"\x01\x20")
        assert decode_proof(walk.proof()).leaf is None
        with pytest.raises(InvariantViolation):
            _ = walk.wanted_row


def test_proofs_are_assembled_from_encodings() -> None:
    """`build_read_proof` writes the canonical encoding of its parts."""
    path = [b"\x01\x21" + branch(256, bytes(32))]
    for leaf in (None, LEAF):
        encoded = build_read_proof(MIN, FULL_RANGE, HASH, path, leaf)
        proof = decode_proof(encoded)
        assert proof.encode() == encoded
        assert [node.encode() for node in proof.path] == path
        assert (proof.leaf and proof.leaf.encode()) == leaf
