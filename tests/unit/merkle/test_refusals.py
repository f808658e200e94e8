"""Refusals that honest use and random input rarely reach, in both forms where both can be led there."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from juicebox_hsm.ids import FULL_RANGE
from juicebox_hsm.merkle import kernel
from juicebox_hsm.merkle._native import ffi, lib
from juicebox_hsm.merkle.nodes import BadEncoding, InvalidProof, StaleProof
from juicebox_hsm.merkle.walk import build_read_proof
from roles.tools.bench.memory_tree import MemoryTree
from tests.merkle_model import model
from tests.merkle_model.codec import Branch, Interior, Leaf, Proof
from tests.property.merkle.forms import FORMS, new_tree, number_key, outcome

both = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__.rpartition(".")[2])
LEAF, ROOT = b"\x01\x10\x00\x01v", b"\x01\x20"
KEY = number_key(9)


@both
@pytest.mark.parametrize(
    ("path", "leaf"),
    [([LEAF], None), ([ROOT, LEAF], None), ([ROOT], ROOT), ([], None), ([], LEAF), ([ROOT] * 257, None)],
    ids=["leaf as root", "leaf in path", "interior as leaf", "empty path", "leaf alone", "257 nodes"],
)
def test_proofs_of_the_wrong_parts(form: ModuleType, path: list[bytes], leaf: bytes | None) -> None:
    """Path elements are interior nodes, 1 to 256 of them, and the last part is a leaf."""
    host = MemoryTree.empty(FULL_RANGE)
    proof = build_read_proof(KEY, FULL_RANGE, host.root, path, leaf)
    assert outcome(lambda: new_tree(form, host).latest(proof)) is BadEncoding


@both
@pytest.mark.parametrize("flag", [2, 0x80, 0xFF])
def test_the_leaf_flag_is_zero_or_one(form: ModuleType, flag: int) -> None:
    """No third way of saying whether there is a leaf."""
    host = MemoryTree.empty(FULL_RANGE)
    proof = host.read(KEY)[:-1] + bytes((flag,))
    assert outcome(lambda: new_tree(form, host).latest(proof)) is BadEncoding


@both
def test_a_path_ends_with_the_key(form: ModuleType) -> None:
    """A node below a complete key is Invalid, even one whose hash the last branch names."""
    below = Interior(Branch("0", b"\x11" * 32), Branch("1", b"\x22" * 32))
    bits = format(int.from_bytes(KEY, "big"), "0256b")
    root = Interior(Branch(bits, model._interior_hash(below, None)), None)
    bounds = (FULL_RANGE.start, FULL_RANGE.end)
    proof = Proof(KEY, *bounds, model._interior_hash(root, bounds), (root, below), None)
    tree = form.Tree(proof.root, *bounds, 1)
    assert outcome(lambda: tree.latest(proof.encode())) is InvalidProof


@both
@pytest.mark.parametrize("side", ["0", "1"])
@pytest.mark.parametrize("length", [255, 256])
def test_no_branch_reaches_beyond_the_key(form: ModuleType, side: str, length: int) -> None:
    """A branch away from the key may take all remaining bits, and not one more (merkle.md 4.1, 2b)."""
    key = number_key(0 if side == "1" else 2**255 - 1 << 1)
    bits = format(int.from_bytes(key, "big"), "0256b")
    away = Branch(side * length, b"\x33" * 32)
    near = Branch(bits[1:], model._leaf_hash(key, b"v"))
    below = Interior(*((near, away) if side == "1" else (away, near)))
    towards = Branch(bits[0], model._interior_hash(below, None))
    root = Interior(*((towards, None) if bits[0] == "0" else (None, towards)))
    bounds = (FULL_RANGE.start, FULL_RANGE.end)
    proof = Proof(key, *bounds, model._interior_hash(root, bounds), (root, below), Leaf(b"v"))
    found = outcome(lambda: form.Tree(proof.root, *bounds, 1).latest(proof.encode()))
    assert found is InvalidProof if length == 256 else found.leaf == b"v"


@both
def test_a_prefix_has_at_most_256_bits(form: ModuleType) -> None:
    """257 bits are refused even when all their bytes are there."""
    form.check_node(b"\x01\x21\x01\x00" + bytes(32) + bytes(32))
    assert outcome(lambda: form.check_node(b"\x01\x21\x01\x01" + bytes(33) + bytes(32))) is BadEncoding


def test_an_encoder_refuses_an_impossible_path() -> None:
    """A proof without a path cannot be written."""
    with pytest.raises(BadEncoding):
        Proof(KEY, bytes(32), b"\xff" * 32, bytes(32), (), None).encode()


@pytest.mark.parametrize("lost", ["interior", "leaf", "interior is a leaf", "leaf is interior"])
def test_an_overlay_that_lost_a_node_is_stale(lost: str) -> None:
    """What cannot happen inside the window must not crash: it reads as Stale (merkle.md 5)."""
    host = MemoryTree.build(FULL_RANGE, [(KEY, b"a")])
    tree = new_tree(model, host)
    proof = host.read(KEY)
    host.apply(*tree.update(proof, b"b"))
    nodes: dict[bytes, Any] = tree._overlay._nodes
    for digest, node in list(nodes.items()):
        if isinstance(node, Leaf) == lost.startswith("leaf"):
            if lost in {"interior", "leaf"}:
                del nodes[digest]
            else:
                nodes[digest] = Interior(None, None) if isinstance(node, Leaf) else Leaf(b"")
    assert outcome(lambda: tree.latest(proof)) is StaleProof


def test_overlapping_subtrees_make_no_tree() -> None:
    """A subtree inside another is Invalid; edge proofs cannot lead there, and nothing else may."""
    for second in ("01", "010"):
        with pytest.raises(InvalidProof):
            model._assemble(FULL_RANGE, [Branch(second, bytes(32)), Branch("01", b"\x01" * 32)])


class _OutOfMemory:
    """The C library on a machine without memory."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("JBM_") or name.endswith("_free"):
            return getattr(lib, name)
        return lambda *_: lib.JBM_NO_MEMORY


def test_a_kernel_without_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed allocation is a MemoryError from every call, never a wrong answer."""
    host = MemoryTree.build(FULL_RANGE, [(KEY, b"a")])
    tree, proof = new_tree(kernel, host), host.read(KEY)
    refreshed = tree.latest(proof)
    _, delta = kernel.empty_root(bytes(32), b"\xff" * 32)
    monkeypatch.setattr(kernel, "lib", _OutOfMemory())
    calls = [
        lambda: kernel.Tree(host.root, bytes(32), b"\xff" * 32, 1),
        lambda: kernel.empty_root(bytes(32), b"\xff" * 32),
        lambda: kernel.node_hash(ROOT, KEY, FULL_RANGE),
        lambda: kernel.check_node(ROOT),
        lambda: kernel.row_key(b"", 0, bytes(32)),
        lambda: kernel.path_scan_starts(KEY, 0),
        lambda: kernel.decode_delta(delta),
        lambda: kernel.delta_rows(delta),
        lambda: kernel.squash([delta]),
        lambda: tree.latest(proof),
        lambda: tree.insert(refreshed, b"b"),
        lambda: tree.update(proof, b"b"),
        lambda: tree.split(proof),
        lambda: tree.merge(proof, proof, host.root, FULL_RANGE),
        tree.valid_roots,
    ]
    for call in calls:
        with pytest.raises(MemoryError):
            call()
    assert tree.root == host.root


def test_a_refreshed_proof_outlives_its_tree() -> None:
    """Handles own their memory: tree and input may be gone before what was made from them."""
    host = MemoryTree.build(FULL_RANGE, [(KEY, b"a" * 100)])
    tree = new_tree(kernel, host)
    refreshed = tree.latest(bytes(bytearray(host.read(KEY))))
    del tree
    size = ffi.new("size_t *")
    value = lib.jbm_path_value(refreshed._path, size)
    assert bytes(ffi.buffer(value, size[0])) == refreshed.leaf == b"a" * 100
    other = new_tree(kernel, host)
    host.apply(*other.insert(refreshed, b"b"))
    assert other.latest(host.read(KEY)).leaf == b"b"
