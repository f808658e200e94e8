"""Encodings and hashing on honest and hostile bytes (merkle.md 12, P11)."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.ids import FULL_RANGE, OwnedRange, RecordId
from juicebox_hsm.merkle import kernel
from juicebox_hsm.merkle.nodes import BadEncoding
from roles.tools.bench.memory_tree import MemoryTree
from tests.merkle_model import model
from tests.merkle_model.codec import Branch, Interior, Leaf, decode_bits_delta, decode_node, decode_proof
from tests.property.merkle.forms import FORMS, fresh, keys, new_tree, outcome, records, values

both = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__.rpartition(".")[2])

relative = st.text("01", max_size=255)
branches = st.none() | st.tuples(relative, st.binary(min_size=32, max_size=32))


@st.composite
def node_bytes(draw: st.DrawFn) -> bytes:
    """Draw any encodable node."""
    if draw(st.booleans()):
        return Leaf(draw(values)).encode()
    left, right = draw(branches), draw(branches)
    return Interior(left and Branch("0" + left[0], left[1]), right and Branch("1" + right[0], right[1])).encode()


hostile = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=80).map(b"\x01\x10\x00\x05".__add__),
    st.binary(max_size=150).map(b"\x01\x23\x00\x08".__add__),
    st.binary(max_size=150).map(b"\x01\x21\x01\x00".__add__),
)


@given(node=node_bytes(), bounds=st.none() | st.just(FULL_RANGE), key=keys)
def test_p11_nodes_round_trip_and_hash_alike(node: bytes, bounds: OwnedRange | None, key: bytes) -> None:
    """P11: what is accepted re-encodes to itself, and both forms give it the same hash or refusal."""
    assert decode_node(node).encode() == node
    first, second = (outcome(lambda f=form: f.node_hash(fresh(node), key, bounds)) for form in FORMS)
    assert first == second


@given(data=hostile)
def test_p11_hostile_nodes_are_judged_alike(data: bytes) -> None:
    """P11: on arbitrary bytes both forms accept or refuse alike, and acceptance means canonical."""
    first, second = (outcome(lambda f=form: f.check_node(fresh(data))) for form in FORMS)
    assert first is second
    if first is None:
        assert decode_node(data).encode() == data


@given(node=node_bytes(), data=st.data())
def test_p11_damaged_nodes_are_judged_alike(node: bytes, data: st.DataObject) -> None:
    """P11: cut, extended or changed nodes are judged alike."""
    at = data.draw(st.integers(0, len(node)))
    damaged = fresh(node[:at] + data.draw(st.binary(max_size=3)) + node[data.draw(st.integers(at, len(node))) :])
    first, second = (outcome(lambda f=form: f.check_node(damaged)) for form in FORMS)
    assert first is second


@given(stored=records, key=keys, data=st.data())
def test_p11_damaged_proofs_are_judged_alike(stored: dict[bytes, bytes], key: bytes, data: st.DataObject) -> None:
    """P11: a proof cut, extended or changed anywhere is judged alike; accepted ones re-encode to themselves."""
    host = MemoryTree.build(FULL_RANGE, stored.items())
    proof = host.read(key)
    assert decode_proof(proof).encode() == proof
    at = data.draw(st.integers(0, len(proof)))
    damaged = fresh(proof[:at] + data.draw(st.binary(max_size=4)) + proof[data.draw(st.integers(at, len(proof))) :])
    found = [outcome(lambda f=form: new_tree(f, host).latest(damaged)) for form in FORMS]
    plain = [item if isinstance(item, type) else (item.key, item.leaf, item.root) for item in found]
    assert plain[0] == plain[1]


@given(data=st.binary(max_size=400))
def test_p11_random_bytes_never_crash(data: bytes) -> None:
    """P11: random bytes meet documented refusals everywhere, with or without a plausible start."""
    tree = kernel.Tree(bytes(32), bytes(32), b"\xff" * 32, 3)
    for start in (
        b"",
        b"\x01\x40" + bytes(96),
        b"\x01\x40" + bytes(32) + bytes(32) + b"\xff" * 32 + bytes(32) + b"\0\1",
    ):
        outcome(lambda s=start: tree.latest(fresh(s + data)))
        outcome(lambda s=start: tree.update(fresh(s + data), fresh(data)))
        outcome(lambda s=start: tree.split(fresh(s + data)))
        outcome(lambda s=start: tree.merge(fresh(s + data), fresh(data), bytes(32), FULL_RANGE))
    outcome(lambda: kernel.decode_delta(fresh(b"\x01\x50" + data)))
    assert tree.root == bytes(32)


def test_p11_decoders_agree_on_trailing_bytes() -> None:
    """P11: a byte after the end is refused in nodes, proofs and deltas."""
    host = MemoryTree.empty(FULL_RANGE)
    _, delta = kernel.empty_root(bytes(32), b"\xff" * 32)
    for decode, data in ((decode_node, b"\x01\x20"), (decode_proof, host.read(bytes(32))), (decode_bits_delta, delta)):
        assert outcome(lambda d=decode, b=data: d(b + b"\0")) is BadEncoding
        assert outcome(lambda d=decode, b=data: d(b[:-1])) is BadEncoding


@pytest.mark.parametrize(
    "size",
    [
        0,
        1,
        19,
        20,
        21,
        63,
        64,
        83,
        84,
        85,
        979,
        980,
        981,
        1024,
        2003,
        2004,
        2005,
        3028,
        3029,
        5000,
        16_340,
        65_534,
        65_535,
    ],
)
def test_blake3_of_every_shape(size: int) -> None:
    """Our BLAKE3 equals the reference around block, chunk and subtree borders, up to the largest leaf."""
    value = bytes(at * 7 % 251 for at in range(size))
    key = bytes(range(32))
    expected = blake3(b"leaf" + key + size.to_bytes(8, "big") + value).digest()
    assert kernel.node_hash(b"\x01\x10" + size.to_bytes(2, "big") + value, key, None) == expected


@both
def test_the_largest_value_is_stored(form: ModuleType) -> None:
    """A value of 65535 bytes goes in and comes out; one more is refused and changes nothing."""
    host = MemoryTree.empty(FULL_RANGE)
    tree = new_tree(form, host)
    proof = host.read(bytes(32))
    refreshed = tree.latest(proof)
    assert outcome(lambda: tree.update(proof, bytes(65_536))) is BadEncoding
    assert outcome(lambda: tree.insert(refreshed, bytes(65_536))) is BadEncoding
    assert tree.root == host.root
    host.apply(*tree.insert(refreshed, b"\xab" * 65_535))
    assert tree.latest(host.read(bytes(32))).leaf == b"\xab" * 65_535


KEY, HASH = bytes(range(32)), b"\x07" * 32
WRONG_SIZES: list[tuple[str, Callable[[ModuleType], Any]]] = [
    ("leaf key", lambda form: form.node_hash(b"\x01\x10\0\0", KEY[1:], None)),
    ("root range", lambda form: form.node_hash(b"\x01\x20", KEY, OwnedRange(RecordId(b"\0"), RecordId(KEY)))),
    ("root range order", lambda form: form.node_hash(b"\x01\x20", KEY, OwnedRange(RecordId(KEY), RecordId(bytes(32))))),
    ("lone branch", lambda form: form.node_hash(b"\x01\x21\0\1\0" + HASH, KEY, None)),
    ("range start", lambda form: form.empty_root(KEY[1:], KEY)),
    ("range end", lambda form: form.empty_root(KEY, KEY + b"\0")),
    ("range order", lambda form: form.empty_root(KEY, bytes(32))),
    ("bits", lambda form: form.row_key(KEY, 257, HASH)),
    ("negative bits", lambda form: form.row_key(b"", -1, HASH)),
    ("prefix", lambda form: form.row_key(KEY, 248, HASH)),
    ("prefix padding", lambda form: form.row_key(b"\x01", 7, HASH)),
    ("hash", lambda form: form.row_key(b"", 0, HASH[1:])),
    ("scan key", lambda form: form.path_scan_starts(KEY + b"\0", 0)),
    ("scan depth", lambda form: form.path_scan_starts(KEY, 257)),
    ("negative scan depth", lambda form: form.path_scan_starts(KEY, -1)),
    ("root", lambda form: form.Tree(HASH[1:], bytes(32), KEY, 1)),
    ("tree range", lambda form: form.Tree(HASH, KEY, bytes(32), 1)),
    ("capacity 0", lambda form: form.Tree(HASH, bytes(32), KEY, 0)),
    ("capacity", lambda form: form.Tree(HASH, bytes(32), KEY, 65_536)),
    ("other root", lambda form: form.Tree(HASH, bytes(32), KEY, 1).merge(b"", b"", HASH[1:], FULL_RANGE)),
    (
        "other range",
        lambda form: form.Tree(HASH, bytes(32), KEY, 1).merge(
            b"", b"", HASH, OwnedRange(RecordId(KEY), RecordId(bytes(32)))
        ),
    ),
]


@both
@pytest.mark.parametrize(("name", "call"), WRONG_SIZES, ids=[name for name, _ in WRONG_SIZES])
def test_sizes_out_of_bounds_are_refused(form: ModuleType, name: str, call: Callable[[ModuleType], Any]) -> None:
    """Every argument of a wrong size is refused with BadEncoding, before C sees it."""
    assert outcome(lambda: call(form)) is BadEncoding, name


def test_both_forms_have_the_same_names() -> None:
    """The model exposes the kernel's functions and classes."""
    names = {"Tree", "Refreshed", "empty_root", "node_hash", "check_node", "row_key", "path_scan_starts", "squash"}
    names |= {"decode_delta", "delta_rows"}
    assert names <= set(kernel.__all__)
    assert names <= set(model.__all__)
    public = {name for name in dir(model.Tree) if not name.startswith("_")} | {"range"}
    assert public == {name for name in dir(kernel.Tree) if not name.startswith("_")}
