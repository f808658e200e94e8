"""What proofs show and what they cannot be made to show (merkle.md 12, P3, P4, P5)."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.ids import FULL_RANGE, OwnedRange
from juicebox_hsm.merkle import kernel
from juicebox_hsm.merkle.nodes import BadEncoding, InvalidProof, StaleProof
from roles.tools.bench.memory_tree import MemoryTree
from tests.merkle_model import model
from tests.merkle_model.codec import Branch, Interior, Leaf, Proof, decode_proof, unpack_bits
from tests.property.merkle.forms import (
    FORMS,
    Records,
    fresh,
    keys,
    new_tree,
    outcome,
    ranged_records,
    records,
    values,
)

both = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__.rpartition(".")[2])


@both
@given(case=ranged_records(), absent=st.lists(keys, max_size=4))
def test_p3_proofs_verify_and_yield_the_value(
    form: ModuleType, case: tuple[OwnedRange, Records], absent: list[bytes]
) -> None:
    """P3: the proof of every key, present or absent, verifies and yields the right value or none."""
    bounds, stored = case
    host = MemoryTree.build(bounds, stored.items())
    tree = new_tree(form, host)
    for key in [*stored, *filter(bounds.contains, absent)]:
        refreshed = tree.latest(host.read(key))
        assert (refreshed.key, refreshed.leaf, refreshed.root) == (key, stored.get(key), host.root)
    for key in absent:
        if not bounds.contains(key):
            proof = replace(decode_proof(host.read(bounds.start)), key=key).encode()
            assert outcome(lambda proof=proof: tree.latest(proof)) is InvalidProof


@given(stored=records, key=keys, flips=st.lists(st.integers(0, 2**32), min_size=1, max_size=200))
def test_p4_flipped_bits_never_lie(stored: Records, key: bytes, flips: list[int]) -> None:
    """P4: a proof with one bit flipped is refused, or is a true statement about another absent key."""
    host = MemoryTree.build(FULL_RANGE, stored.items())
    tree, oracle = new_tree(kernel, host), new_tree(model, host)
    proof = host.read(key)
    for number, flip in enumerate(flips):
        at = flip % (8 * len(proof))
        data = bytearray(proof)
        data[at // 8] ^= 0x80 >> at % 8
        found = outcome(lambda data=data: tree.latest(bytes(data)))
        if isinstance(found, kernel.Refreshed):
            assert found.key != key
            assert found.key not in stored
            assert found.leaf is None
        if number < 10:
            expected = outcome(lambda data=data: oracle.latest(bytes(data)))
            assert isinstance(expected, type) == isinstance(found, type)
            assert not isinstance(found, type) or found is expected


@both
@given(stored=records.filter(lambda stored: len(stored) >= 2), pick=st.integers(0, 99))
def test_p5_reshaped_paths_are_invalid(form: ModuleType, stored: Records, pick: int) -> None:
    """P5: removing or swapping the leaf, or truncating or extending the path, is Invalid."""
    host = MemoryTree.build(FULL_RANGE, stored.items())
    tree = new_tree(form, host)
    present = sorted(stored)
    key, other = present[pick % len(present)], present[(pick + 1) % len(present)]
    good, foreign = decode_proof(host.read(key)), decode_proof(host.read(other))
    assert tree.latest(good.encode()).leaf == stored[key]
    wrong = [
        replace(good, leaf=None),
        replace(good, path=(*good.path, good.path[-1])),
        replace(good, path=(*good.path, Interior(Branch("0", bytes(32)), Branch("1", bytes(32))))),
        replace(good, leaf=Leaf(stored[key] + b"+")),
        replace(good, key=other),
        replace(good, path=foreign.path, leaf=foreign.leaf),
    ]
    if len(good.path) > 1:
        wrong += [
            replace(good, path=good.path[:-1]),
            replace(good, path=good.path[:-1], leaf=None),
            replace(good, path=good.path[1:]),
        ]
    if stored[key] != stored[other]:
        wrong.append(replace(good, leaf=foreign.leaf))
    for proof in wrong:
        if proof not in (good, foreign):
            assert outcome(lambda proof=proof: tree.latest(proof.encode())) is InvalidProof


@both
@given(stored=records, key=keys)
def test_refusals_come_in_order(form: ModuleType, stored: Records, key: bytes) -> None:
    """Malformed bytes, then an unknown root, then a foreign range, then an untrue path."""
    host = MemoryTree.build(FULL_RANGE, stored.items())
    tree = new_tree(form, host)
    good = decode_proof(host.read(key))
    unknown = replace(good, root=bytes(32))
    foreign = replace(good, end=b"\xff" * 31 + b"\xfe")
    assert outcome(lambda: tree.latest(fresh(unknown.encode() + b"\0"))) is BadEncoding
    assert outcome(lambda: tree.latest(replace(unknown, end=foreign.end).encode())) is StaleProof
    assert outcome(lambda: tree.latest(foreign.encode())) is InvalidProof


@st.composite
def crafted(draw: st.DrawFn) -> Proof:
    """Draw a proof whose every hash is right, but whose shape need not be: a dishonest tree's proof."""
    key = draw(keys)
    bits = unpack_bits(key, 256)
    leaf = Leaf(draw(values)) if draw(st.booleans()) else None
    cuts = sorted(draw(st.sets(st.integers(1, 256), max_size=6)))
    nodes: list[Interior] = []
    below = model._leaf_hash(key, leaf.value) if leaf and draw(st.integers(0, 9)) else draw(st.just(b"\x11" * 32))
    lengths = [stop - start for start, stop in zip([0, *cuts], [*cuts, 256], strict=True) if stop > start]
    positions = [sum(lengths[:index]) for index in range(len(lengths))]
    for index in reversed(range(len(lengths))):
        prefix = bits[positions[index] : positions[index] + lengths[index]]
        damage = draw(st.sampled_from(["", "", "", "", "", "long", "far", "bend", "drop"]))
        if damage == "long":
            prefix = (prefix + "01" * 128)[: draw(st.integers(1, 256))]
        elif damage == "bend" and len(prefix) > 1:
            prefix = prefix[:-1] + ("1" if prefix[-1] == "0" else "0")
        away = "1" if prefix[0] == "0" else "0"
        length = draw(st.integers(1, 256 if damage in {"long", "far"} else max(1, 255 - positions[index])))
        sibling: Branch | None = Branch((away + draw(st.sampled_from(["0", "1", "01"])) * 256)[:length], b"\x22" * 32)
        towards: Branch | None = Branch(prefix, below)
        if damage == "drop" or (index == 0 and draw(st.booleans())):
            sibling = None
        if index == len(lengths) - 1 and leaf is None and draw(st.booleans()):
            towards = None if index == 0 and draw(st.booleans()) else Branch(prefix[0] + away * 3, below)
        pair = (towards, sibling) if prefix[0] == "0" else (sibling, towards)
        node = Interior(*pair)
        nodes.insert(0, node)
        bounds = (FULL_RANGE.start, FULL_RANGE.end) if index == 0 else None
        below = model._interior_hash(node, bounds)
    return Proof(key, FULL_RANGE.start, FULL_RANGE.end, below, tuple(nodes), leaf)


def _plain(result: object) -> object:
    return (result.key, result.leaf) if isinstance(result, (kernel.Refreshed, model.Refreshed)) else result


@given(proof=crafted(), value=values)
def test_dishonest_trees_are_judged_alike(proof: Proof, value: bytes) -> None:
    """On proofs with right hashes and arbitrary shapes both forms agree: on refusal, insert and split."""
    encoded = fresh(proof.encode())
    trees = [form.Tree(proof.root, proof.start, proof.end, 4) for form in FORMS]
    first, second = (_plain(outcome(lambda tree=tree: tree.latest(encoded))) for tree in trees)
    assert first == second
    first, second = (outcome(lambda tree=tree: tree.split(encoded)) for tree in trees)
    assert first == second
    first, second = (outcome(lambda tree=tree: tree.update(encoded, value)) for tree in trees)
    assert first == second
    first, second = (_plain(outcome(lambda tree=tree: tree.latest(encoded))) for tree in trees)
    assert first == second


@given(own=crafted(), other=crafted())
def test_dishonest_merges_are_judged_alike(own: Proof, other: Proof) -> None:
    """Merging with a tree whose shape nobody checked gives the same verdict and bytes in both forms."""
    half = b"\x80" + bytes(31)
    below = b"\x7f" + b"\xff" * 31
    own = _rebound(replace(own, start=bytes(32), end=below))
    other = _rebound(replace(other, start=half, end=b"\xff" * 32))
    bounds = OwnedRange(other.start, other.end)
    trees = [form.Tree(own.root, own.start, own.end, 4) for form in FORMS]
    first, second = (
        outcome(lambda tree=tree: tree.merge(own.encode(), other.encode(), other.root, bounds)) for tree in trees
    )
    assert first == second


def _rebound(proof: Proof) -> Proof:
    """Return the proof with its root hash computed for its range."""
    return replace(proof, root=model._interior_hash(proof.path[0], (proof.start, proof.end)))
