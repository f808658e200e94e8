"""Splitting and merging (merkle.md 12, P8, P9)."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from juicebox_hsm.ids import FULL_RANGE, OwnedRange, RecordId, prev_record_id
from juicebox_hsm.merkle.nodes import InvalidProof, NotAdjacent, StaleProof
from juicebox_hsm.merkle.walk import Side
from roles.tools.bench.memory_tree import MemoryTree
from tests.property.merkle.forms import (
    FORMS,
    Records,
    check_structure,
    keys,
    new_tree,
    node_keys,
    number_key,
    outcome,
    ranged_records,
    ranges,
    records,
    unpack_row,
)

both = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__.rpartition(".")[2])


def halves_of(bounds: OwnedRange, middle: bytes) -> tuple[OwnedRange, OwnedRange]:
    before = prev_record_id(RecordId(middle))
    assert before is not None
    return OwnedRange(bounds.start, before), OwnedRange(RecordId(middle), bounds.end)


def within(stored: Records, bounds: OwnedRange) -> Records:
    return {key: value for key, value in stored.items() if bounds.contains(key)}


@given(case=ranged_records(), drawn=keys, pick=st.integers(0, 99))
def test_p8_split_gives_both_canonical_halves(case: tuple[OwnedRange, Records], drawn: bytes, pick: int) -> None:
    """P8: at existing, absent, smallest and largest keys both halves are the canonical builds."""
    bounds, stored = case
    candidates = [
        *sorted(stored),
        drawn,
        bounds.end,
        number_key(min(int.from_bytes(bounds.start, "big") + 1, 2**256 - 1)),
    ]
    middle = candidates[pick % len(candidates)]
    assume(bounds.start < middle <= bounds.end)
    host = MemoryTree.build(bounds, stored.items())
    results = [new_tree(form, host).split(host.read(middle)) for form in FORMS]
    assert results[0] == results[1]
    (left_range, left_root), (right_range, right_root), delta = results[0]
    assert (left_range, right_range) == halves_of(bounds, middle)
    left = MemoryTree.build(left_range, within(stored, left_range).items())
    right = MemoryTree.build(right_range, within(stored, right_range).items())
    assert (left_root, right_root) == (left.root, right.root)

    before, after = node_keys(host.rows), node_keys(left.rows) | node_keys(right.rows)
    rows = FORMS[0].delta_rows(delta)
    assert {unpack_row(row) for row, _ in rows.adds} == after - before
    assert {unpack_row(row) for row in rows.removes} == before - after
    check_structure(left, within(stored, left_range))
    check_structure(right, within(stored, right_range))


@both
@given(bounds=ranges(), stored=records)
def test_p8_split_at_the_first_key_is_invalid(form: ModuleType, bounds: OwnedRange, stored: Records) -> None:
    """P8: a half without any key is no tree."""
    host = MemoryTree.build(bounds, within(stored, bounds).items())
    tree = new_tree(form, host)
    assert outcome(lambda: tree.split(host.read(bounds.start))) is InvalidProof


@given(case=ranged_records(), middle=keys)
def test_p9_merge_undoes_split(case: tuple[OwnedRange, Records], middle: bytes) -> None:
    """P9: split then merge restores root and node set; merging is symmetric, delta included."""
    bounds, stored = case
    assume(bounds.start < middle <= bounds.end)
    host = MemoryTree.build(bounds, stored.items())
    lower, upper = (MemoryTree.build(half, within(stored, half).items()) for half in halves_of(bounds, middle))
    own, other = lower.read_edge(Side.RIGHT), upper.read_edge(Side.LEFT)
    results = [new_tree(form, lower).merge(own, other, upper.root, upper.range) for form in FORMS]
    results += [new_tree(form, upper).merge(other, own, lower.root, lower.range) for form in FORMS]
    assert all(result == results[0] for result in results)
    joined, root, delta = results[0]
    assert (joined, root) == (bounds, host.root)
    rows = FORMS[0].delta_rows(delta)
    before, after = node_keys(lower.rows) | node_keys(upper.rows), node_keys(host.rows)
    assert {unpack_row(row) for row, _ in rows.adds} == after - before
    assert {unpack_row(row) for row in rows.removes} == before - after


@both
@given(stored=records.filter(lambda stored: len(stored) >= 3), middle=keys)
def test_p9_only_edges_merge(form: ModuleType, stored: Records, middle: bytes) -> None:
    """P9: proofs of other paths, on either side, and proofs of absent keys are refused."""
    assume(middle > FULL_RANGE.start)
    lower_range, upper_range = halves_of(FULL_RANGE, middle)
    lower = MemoryTree.build(lower_range, within(stored, lower_range).items())
    upper = MemoryTree.build(upper_range, within(stored, upper_range).items())
    tree = new_tree(form, lower)
    own, other = lower.read_edge(Side.RIGHT), upper.read_edge(Side.LEFT)
    for key in sorted(within(stored, upper_range))[1:]:
        wrong = upper.read(key)
        assert outcome(lambda w=wrong: tree.merge(own, w, upper.root, upper_range)) is InvalidProof
    for key in sorted(within(stored, lower_range))[:-1]:
        wrong = lower.read(key)
        assert outcome(lambda w=wrong: tree.merge(w, other, upper.root, upper_range)) is InvalidProof
    if within(stored, lower_range) and lower_range.end not in stored:
        absent = lower.read(lower_range.end)
        assert outcome(lambda: tree.merge(absent, other, upper.root, upper_range)) is InvalidProof


@both
def test_p9_the_other_tree_must_be_the_authenticated_one(form: ModuleType) -> None:
    """The foreign proof's root and range must equal the statement's; the ranges must touch."""
    stored = {number_key(n << 248): b"" for n in range(0, 256, 8)}
    lower_range, upper_range = halves_of(FULL_RANGE, number_key(128 << 248))
    lower = MemoryTree.build(lower_range, within(stored, lower_range).items())
    upper = MemoryTree.build(upper_range, within(stored, upper_range).items())
    tree = new_tree(form, lower)
    own, other = lower.read_edge(Side.RIGHT), upper.read_edge(Side.LEFT)
    shorter = OwnedRange(upper_range.start, RecordId(number_key(2**256 - 2)))
    assert outcome(lambda: tree.merge(own, other, bytes(32), upper_range)) is InvalidProof
    assert outcome(lambda: tree.merge(own, other, upper.root, shorter)) is InvalidProof
    apart_range = OwnedRange(RecordId(number_key(129 << 248)), upper_range.end)
    apart = MemoryTree.build(apart_range, within(stored, apart_range).items())
    proof = apart.read_edge(Side.LEFT)
    assert outcome(lambda: tree.merge(own, proof, apart.root, apart_range)) is NotAdjacent
    same = lower.read_edge(Side.LEFT)
    assert outcome(lambda: tree.merge(own, same, lower.root, lower_range)) is NotAdjacent


@both
def test_p9_an_edge_that_moved_is_stale(form: ModuleType) -> None:
    """An own proof from before the edge moved is Stale, not Invalid: reading again helps."""
    lower_range, upper_range = halves_of(FULL_RANGE, number_key(1 << 255))
    lower = MemoryTree.build(lower_range, [(number_key(5), b"five"), (number_key(6), b"six")])
    upper = MemoryTree.build(upper_range, [(number_key(1 << 255), b"top")])
    tree = new_tree(form, lower)
    old, other = lower.read_edge(Side.RIGHT), upper.read_edge(Side.LEFT)
    lower.apply(*tree.update(lower.read(number_key(5)), b"changed"))
    assert tree.merge(old, other, upper.root, upper_range)[0] == FULL_RANGE
    lower.apply(*tree.update(lower.read(number_key(9)), b"nine"))
    assert outcome(lambda: tree.merge(old, other, upper.root, upper_range)) is StaleProof
    now = lower.read_edge(Side.RIGHT)
    assert tree.merge(now, other, upper.root, upper_range)[0] == FULL_RANGE
    bad = upper.read_edge(Side.RIGHT)
    wrong = upper.read(number_key((1 << 255) + 1))
    assert bad == other
    assert outcome(lambda: tree.merge(old, wrong, upper.root, upper_range)) is InvalidProof


@both
@given(stored=records, cuts=st.sets(keys.filter(lambda key: key > FULL_RANGE.start), min_size=1, max_size=3))
def test_trees_survive_many_cuts(form: ModuleType, stored: Records, cuts: set[bytes]) -> None:
    """Cutting a tree into pieces and joining them again, with one shared store, gives the tree back."""
    host = MemoryTree.build(FULL_RANGE, stored.items())
    original = dict(host.rows)
    rows = host.rows
    pieces = [(FULL_RANGE, host.root)]
    for cut in sorted(cuts):
        bounds, root = pieces.pop()
        piece = MemoryTree(bounds, root, {})
        piece.rows = rows
        left, right, delta = new_tree(form, piece).split(piece.read(cut))
        piece.apply(left[1], delta)
        pieces += [left, right]
    assert [low.end < high.start for (low, _), (high, _) in pairwise(pieces)] == [True] * len(cuts)
    while len(pieces) > 1:
        (upper_range, upper_root), (lower_range, lower_root) = pieces.pop(), pieces.pop()
        lower, upper = MemoryTree(lower_range, lower_root, {}), MemoryTree(upper_range, upper_root, {})
        lower.rows = upper.rows = rows
        joined, root, delta = new_tree(form, lower).merge(
            lower.read_edge(Side.RIGHT), upper.read_edge(Side.LEFT), upper_root, upper_range
        )
        lower.apply(root, delta)
        pieces.append((joined, root))
    assert pieces == [(FULL_RANGE, host.root)]
    assert rows == original
