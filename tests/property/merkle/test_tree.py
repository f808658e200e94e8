"""The tree as a function of its records: structure, insertion order, exact deltas (merkle.md 12, P1, P2, P6)."""

from __future__ import annotations

import random
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.ids import OwnedRange
from roles.tools.bench.memory_tree import MemoryTree
from tests.property.merkle.forms import (
    FORMS,
    Records,
    check_structure,
    keys,
    new_tree,
    node_keys,
    number_key,
    ranged_records,
    unpack_row,
    values,
)

both = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__.rpartition(".")[2])


@both
@given(case=ranged_records(), shuffle=st.randoms(use_true_random=False))
def test_p1_insertion_order_is_irrelevant(
    form: ModuleType, case: tuple[OwnedRange, Records], shuffle: random.Random
) -> None:
    """P1: any order of insertion gives the root and nodes of the canonical build from scratch."""
    bounds, records = case
    canonical = MemoryTree.build(bounds, records.items())
    for _ in range(2):
        order = list(records.items())
        shuffle.shuffle(order)
        host = MemoryTree.empty(bounds)
        tree = new_tree(form, host)
        for key, value in order:
            host.apply(*tree.insert(tree.latest(host.read(key)), value))
        assert (tree.root, host.rows) == (canonical.root, canonical.rows)


@both
@given(case=ranged_records(), updates=st.lists(st.tuples(keys, values), max_size=4))
def test_p2_structure_holds_after_every_operation(
    form: ModuleType, case: tuple[OwnedRange, Records], updates: list[tuple[bytes, bytes]]
) -> None:
    """P2: T1 to T5 hold and every stored node has its key's hash, after each insert and update."""
    bounds, records = case
    host = MemoryTree.build(bounds, records.items())
    check_structure(host, records)
    tree = new_tree(form, host)
    expected = dict(records)
    for key, value in [*updates, *((key, b"changed") for key in list(records)[:2])]:
        if not bounds.contains(key):
            continue
        host.apply(*tree.update(host.read(key), value))
        expected[key] = value
        check_structure(host, expected)


@both
@given(case=ranged_records(), key=keys, value=values)
def test_p6_delta_is_the_exact_difference(
    form: ModuleType, case: tuple[OwnedRange, Records], key: bytes, value: bytes
) -> None:
    """P6: a delta names exactly the nodes that differ, and applying it to the old set gives the new one."""
    bounds, records = case
    key = key if bounds.contains(key) else bounds.start
    host = MemoryTree.build(bounds, records.items())
    before = node_keys(host.rows)
    root, delta = new_tree(form, host).update(host.read(key), value)
    target = MemoryTree.build(bounds, {**records, key: value}.items())
    after = node_keys(target.rows)
    rows = form.delta_rows(delta)
    assert {unpack_row(row) for row, _ in rows.adds} == after - before
    assert {unpack_row(row) for row in rows.removes} == before - after
    host.apply(root, delta)
    assert (host.root, host.rows) == (target.root, target.rows)


@both
@given(case=ranged_records())
def test_an_equal_value_changes_nothing(form: ModuleType, case: tuple[OwnedRange, Records]) -> None:
    """Writing what is there gives the same root and an empty delta, and retains nothing."""
    bounds, records = case
    host = MemoryTree.build(bounds, records.items())
    tree = new_tree(form, host, capacity=1)
    for key, value in records.items():
        root, delta = tree.update(host.read(key), value)
        assert root == host.root
        decoded = form.decode_delta(delta)
        assert (decoded.adds, decoded.removes) == ([], [])
    assert tree.valid_roots() == {host.root}


@both
def test_the_deepest_possible_path(form: ModuleType) -> None:
    """256 interior nodes on one path, the most there can be, are inserted, proved, updated and split."""
    host = MemoryTree.empty(OwnedRange(number_key(0), number_key(2**256 - 1)))
    tree = new_tree(form, host)
    records = {number_key(0): b"zero"}
    host.apply(*tree.update(host.read(number_key(0)), b"zero"))
    for bit in reversed(range(256)):
        key = number_key(1 << bit)
        records[key] = b"%d" % bit
        host.apply(*tree.update(host.read(key), records[key]))
    assert host.root == MemoryTree.build(host.range, records.items()).root
    proof = host.read(number_key(0))
    assert int.from_bytes(proof[130:132], "big") == 256
    assert tree.latest(proof).leaf == b"zero"
    (_, left), (_, right), delta = tree.split(host.read(number_key(1)))
    assert len(form.decode_delta(delta).removes) == 256
    assert left != right
    host.apply(*tree.update(proof, b"changed"))
    assert tree.latest(host.read(number_key(0))).leaf == b"changed"
