"""The published vectors of merkle.md 13, against both forms of the tree."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from blake3 import blake3

from juicebox_hsm.ids import FULL_RANGE, OwnedRange, RecordId
from juicebox_hsm.merkle.nodes import BadEncoding
from juicebox_hsm.merkle.walk import Side, row_prefix
from roles.tools.bench.memory_tree import MemoryTree
from tests.merkle_model.codec import Interior, base128, decode_node, decode_proof, pack_bits
from tests.property.merkle.forms import FORMS, new_tree

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "data" / "merkle_vectors.json").read_text(encoding="ascii")
)
both = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__.rpartition(".")[2])


def vector_key(number: int) -> bytes:
    return blake3(b"juicebox-merkle-vector-key" + number.to_bytes(4, "big")).digest()


def vector_value(number: int) -> bytes:
    return blake3(b"juicebox-merkle-vector-value" + number.to_bytes(4, "big")).digest()[: 8 + number % 24]


def named_key(text: str) -> bytes:
    return vector_key(int(text[4:-1])) if text.startswith("key(") else bytes.fromhex(text)


def inserted(form: ModuleType, count: int) -> tuple[MemoryTree, Any]:
    """Return a full-range tree with keys 0..count-1, inserted one by one."""
    host = MemoryTree.empty(FULL_RANGE)
    tree = new_tree(form, host)
    for number in range(count):
        host.apply(*tree.insert(tree.latest(host.read(vector_key(number))), vector_value(number)))
    return host, tree


def digest(delta: bytes) -> str:
    return blake3(delta).hexdigest(16)


def test_keys_and_values() -> None:
    """The vectors' own keys and values are derived as stated."""
    assert {str(n): vector_key(n).hex() for n in (0, 1)} == VECTORS["keys"]
    assert {str(n): vector_value(n).hex() for n in (0, 1)} == VECTORS["values"]


@both
def test_leaf_hashes(form: ModuleType) -> None:
    """A leaf's hash covers key, length and value."""
    for row in VECTORS["leaf_hashes"]:
        value = bytes.fromhex(row["value"])
        node = b"\x01\x10" + len(value).to_bytes(2, "big") + value
        assert form.node_hash(node, bytes.fromhex(row["key"]), None).hex() == row["hash"]


@both
def test_empty_roots(form: ModuleType) -> None:
    """An empty root commits to its range and comes with the delta that stores it."""
    for row in VECTORS["empty_roots"]:
        root, delta = form.empty_root(bytes.fromhex(row["start"]), bytes.fromhex(row["end"]))
        assert root.hex() == row["root"]
        decoded = form.decode_delta(delta)
        assert [(add.nbits, add.hash, add.node) for add in decoded.adds] == [(0, root, b"\x01\x20")]
        assert decoded.removes == []


@both
def test_trees(form: ModuleType) -> None:
    """Trees of 1, 2, 5 and 100 keys have the published root, node count and longest path."""
    for row in VECTORS["trees"]:
        host, tree = inserted(form, row["keys"])
        assert tree.root.hex() == host.root.hex() == row["root"]
        assert len(host.rows) == row["nodes"]
        longest = max(len(decode_proof(host.read(vector_key(n))).path) for n in range(row["keys"]))
        assert longest == row["longest"]


@both
@pytest.mark.parametrize("row", VECTORS["splits"], ids=lambda row: row["at"][:8])
def test_splits_and_merges_back(form: ModuleType, row: dict[str, Any]) -> None:
    """Splitting 100 keys gives the published halves and deltas, and merging gives the tree back."""
    host, tree = inserted(form, 100)
    before = dict(host.rows)
    (left_range, left_root), (right_range, right_root), delta = tree.split(host.read(named_key(row["at"])))
    decoded = form.decode_delta(delta)
    assert (len(decoded.adds), len(decoded.removes)) == (row["split_delta"]["adds"], row["split_delta"]["removes"])
    assert digest(delta) == row["split_delta"]["digest"]
    assert (left_root.hex(), right_root.hex()) == (row["left"]["root"], row["right"]["root"])
    host.apply(left_root, delta)
    halves = MemoryTree(left_range, left_root, host.rows), MemoryTree(right_range, right_root, host.rows)
    in_left = sum(left_range.contains(vector_key(number)) for number in range(100))
    assert (in_left, 100 - in_left) == (row["left"]["keys"], row["right"]["keys"])

    lower, upper = halves
    own, other = lower.read_edge(Side.RIGHT), upper.read_edge(Side.LEFT)
    joined, root, delta = new_tree(form, lower).merge(own, other, upper.root, upper.range)
    assert (joined, root) == (FULL_RANGE, tree.root)
    decoded = form.decode_delta(delta)
    assert (len(decoded.adds), len(decoded.removes)) == (row["merge_delta"]["adds"], row["merge_delta"]["removes"])
    assert digest(delta) == row["merge_delta"]["digest"]
    host.apply(root, delta)
    assert host.rows == before


@both
def test_merge_of_independent_trees(form: ModuleType) -> None:
    """Trees that were never one merge into the canonical tree of all their keys."""
    row = VECTORS["merge"]
    cut = bytes.fromhex(row["split_at"])
    below = RecordId((int.from_bytes(cut, "big") - 1).to_bytes(32, "big"))
    bounds = OwnedRange(FULL_RANGE.start, below), OwnedRange(RecordId(cut), FULL_RANGE.end)
    pairs = [(vector_key(number), vector_value(number)) for number in range(row["keys"])]
    lower, upper = (MemoryTree.build(b, [p for p in pairs if b.contains(p[0])]) for b in bounds)
    assert (lower.root.hex(), upper.root.hex()) == (row["lower"]["root"], row["upper"]["root"])
    _, root, delta = new_tree(form, upper).merge(
        upper.read_edge(Side.LEFT), lower.read_edge(Side.RIGHT), lower.root, lower.range
    )
    assert root.hex() == row["merged"]
    upper.rows.update(lower.rows)
    upper.apply(root, delta)
    assert upper.rows == MemoryTree.build(FULL_RANGE, pairs).rows


@both
def test_node_encodings(form: ModuleType) -> None:
    """Every published node encoding is accepted, and the reference encoder writes exactly it."""
    for row in VECTORS["node_encodings"]:
        node = bytes.fromhex(row["node"])
        form.check_node(node)
        decoded = decode_node(node)
        assert decoded.encode() == node
        if isinstance(decoded, Interior):
            found = [b and [b.prefix, b.hash.hex()] for b in (decoded.left, decoded.right)]
            assert found == row["branches"]
        else:
            assert decoded.value.hex() == row["leaf"]


@both
def test_node_hashes(form: ModuleType) -> None:
    """The same node hashes differently as an interior node and as the root of a range."""
    for row in VECTORS["node_hashes"]:
        bounds = FULL_RANGE if row["root"] else None
        assert form.node_hash(bytes.fromhex(row["node"]), b"", bounds).hex() == row["hash"]


@both
@pytest.mark.parametrize("node", VECTORS["refused_nodes"])
def test_refused_nodes(form: ModuleType, node: str) -> None:
    """Every published malformed node is refused."""
    with pytest.raises(BadEncoding):
        form.check_node(bytes.fromhex(node))


@both
def test_proof(form: ModuleType) -> None:
    """The published proof is what the walk writes, and it verifies."""
    row = VECTORS["proof"]
    host, tree = inserted(form, row["keys"])
    proof = host.read(named_key(row["key"]))
    assert proof.hex() == row["encoding"]
    assert tree.latest(proof).leaf == vector_value(0)


@both
def test_insert_delta(form: ModuleType) -> None:
    """Inserting a third key writes the published delta."""
    row = VECTORS["insert"]
    host, tree = inserted(form, row["keys"])
    key = named_key(row["insert"])
    _, delta = tree.insert(tree.latest(host.read(key)), vector_value(2))
    decoded = form.decode_delta(delta)
    assert (len(decoded.adds), len(decoded.removes)) == (row["adds"], row["removes"])
    assert len(delta) == row["size_bytes"]
    assert blake3(delta).hexdigest() == row["digest"]


@both
def test_base128(form: ModuleType) -> None:
    """Published prefixes encode as stated, in the reference, in the walk and in row keys."""
    for bits, encoded in VECTORS["base128"]:
        assert base128(bits).hex() == encoded
        assert row_prefix(int(bits or "0", 2), len(bits)).hex() == encoded
        assert form.row_key(pack_bits(bits), len(bits), bytes(32)) == bytes.fromhex(encoded) + bytes(32)
    row = VECTORS["root_row_key"]
    assert form.row_key(b"", 0, bytes.fromhex(row["hash"])).hex() == row["row"]
