"""Deltas: squashing, decoding and rows (merkle.md 12, P10, P11)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.ids import FULL_RANGE
from juicebox_hsm.merkle import kernel
from juicebox_hsm.merkle.nodes import BadEncoding
from roles.tools.bench.memory_tree import MemoryTree
from tests.merkle_model import model
from tests.merkle_model.codec import BitsDelta, BitsKey, Branch, Interior, Leaf
from tests.property.merkle.forms import FORMS, fresh, keys, new_tree, number_key, outcome, values

prefixes = st.text("01", max_size=9)
hashes = st.sampled_from([b"\x01" * 32, b"\x02" * 32, b"\xff" * 32])
nodes = st.one_of(
    values.map(Leaf),
    st.builds(Interior, st.builds(Branch, prefixes.map("0".__add__), hashes), st.none()),
).map(lambda node: node.encode())
node_ids = st.tuples(prefixes, hashes)


@st.composite
def deltas(draw: st.DrawFn) -> bytes:
    """Draw any well-formed delta over few keys, so that several of them interact."""
    adds: dict[BitsKey, bytes] = draw(st.dictionaries(node_ids, nodes, max_size=6))
    removes = {key for key in draw(st.sets(node_ids, max_size=6)) if key not in adds}
    return BitsDelta(adds, removes).encode()


@given(sequence=st.lists(deltas(), max_size=5))
def test_p10_squash_agrees_with_the_model(sequence: list[bytes]) -> None:
    """P10: the kernel's squash is the model's, on any well-formed deltas."""
    assert kernel.squash(sequence) == model.squash(sequence)


@given(
    updates=st.lists(st.tuples(st.integers(0, 4).map(number_key) | keys, st.sampled_from([b"a", b"b"])), max_size=12),
    cut=st.integers(0, 12),
)
def test_p10_squash_is_sequential_application(updates: list[tuple[bytes, bytes]], cut: int) -> None:
    """P10: one squashed delta has the effect of all, in any grouping; returning values vanish."""
    host = MemoryTree.build(FULL_RANGE, [(number_key(3), b"a"), (number_key(1 << 200), b"b")])
    start = dict(host.rows)
    tree = new_tree(kernel, host, 2)
    sequence = []
    for key, value in updates:
        root, delta = tree.update(host.read(key), value)
        host.apply(root, delta)
        sequence.append(delta)
    whole = kernel.squash(sequence)
    rows = kernel.delta_rows(whole)
    assert {row for row, _ in rows.adds} == host.rows.keys() - start.keys()
    assert set(rows.removes) == start.keys() - host.rows.keys()
    grouped = kernel.squash([kernel.squash(sequence[:cut]), kernel.squash(sequence[cut:])])
    assert grouped == whole


@given(delta=deltas())
def test_decoding_agrees_with_the_model(delta: bytes) -> None:
    """Both forms decode the same parts and rows, and a single delta squashes to itself."""
    assert kernel.decode_delta(delta) == model.decode_delta(delta)
    assert kernel.delta_rows(delta) == model.delta_rows(delta)
    assert kernel.squash([delta]) == delta
    rows = kernel.delta_rows(delta)
    decoded = kernel.decode_delta(delta)
    assert [row for row, _ in rows.adds] == [kernel.row_key(a.prefix, a.nbits, a.hash) for a in decoded.adds]
    assert rows.removes == [kernel.row_key(*key) for key in decoded.removes]
    assert [add.key[:3] for add in decoded.adds] == [add[:3] for add in decoded.adds]


@given(delta=deltas(), data=st.data())
def test_p11_damaged_deltas_are_judged_alike(delta: bytes, data: st.DataObject) -> None:
    """P11: after any cut, insertion or byte change both forms refuse, or read the same."""
    at = data.draw(st.integers(0, len(delta)))
    tail = data.draw(st.integers(at, len(delta)))
    damaged = fresh(delta[:at] + data.draw(st.binary(max_size=4)) + delta[tail:])
    for name in ("decode_delta", "delta_rows"):
        first, second = (outcome(lambda f=form, n=name: getattr(f, n)(damaged)) for form in FORMS)
        assert first == second
    first, second = (outcome(lambda f=form: f.squash([delta, damaged])) for form in FORMS)
    assert first == second


def test_order_and_disjointness_are_required() -> None:
    """Lists out of order, repeated keys and a key in both lists are refused by both forms."""
    leaf = b"\x00\x00\x00\x04\x01\x10\x00\x00"
    low, high = b"\x00\x00" + b"\x01" * 32, b"\x00\x01\x80" + b"\x00" * 32
    header, none, one, two = b"\x01\x50", bytes(4), b"\0\0\0\1", b"\0\0\0\2"
    good = [
        header + two + low + leaf + high + leaf + none,
        header + one + low + leaf + one + high,
        header + none + two + low + high,
    ]
    bad = [
        header + two + high + leaf + low + leaf + none,
        header + two + low + leaf + low + leaf + none,
        header + none + two + high + low,
        header + none + two + low + low,
        header + one + low + leaf + one + low,
        header + two + low + leaf + high + leaf + one + high,
        header + one + low + leaf + two + low + high,
        header + none + b"\xff\xff\xff\xff",
        header + b"\xff\xff\xff\xff" + low + leaf + none,
        header + none + one + b"\x01\x01" + bytes(33) + b"\x01" * 32,
        header + none + one + b"\x00\x01\x40" + b"\x01" * 32,
    ]
    for form in FORMS:
        assert [outcome(lambda d=delta, f=form: f.decode_delta(d)) is BadEncoding for delta in good] == [False] * 3
        assert {outcome(lambda d=delta, f=form: f.decode_delta(d)) for delta in bad} == {BadEncoding}
        assert outcome(lambda f=form: f.squash([good[0], bad[0]])) is BadEncoding
        assert form.squash([]) == header + none + none == kernel.EMPTY_DELTA
