"""Proofs against recent roots, both forms in lockstep with a dumb history (merkle.md 12, P7)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from juicebox_hsm.ids import FULL_RANGE
from juicebox_hsm.merkle import kernel
from juicebox_hsm.merkle.nodes import StaleProof
from roles.tools.bench.memory_tree import MemoryTree
from tests.examples import examples
from tests.merkle_model import model
from tests.property.merkle.forms import FORMS, Records, keys, new_tree, number_key, outcome

few_keys = st.one_of(st.integers(0, 1).map(number_key), st.integers(0, 5).map(number_key), keys)
few_values = st.sampled_from([b"", b"a", b"b"])  # few, so that the tree returns to former states


class RefreshMachine(RuleBasedStateMachine):
    """Every state the tree ever had stays readable; the trees must know exactly the recent ones."""

    @initialize(capacity=st.integers(1, 4), start=st.dictionaries(few_keys, few_values, max_size=4))
    def begin(self, capacity: int, start: Records) -> None:
        self.capacity = capacity
        self.records = dict(start)
        self.host = MemoryTree.build(FULL_RANGE, start.items())
        self.trees = [new_tree(form, self.host, capacity) for form in FORMS]
        self.states = [MemoryTree(FULL_RANGE, self.host.root, self.host.rows)]  # before each delta, then the latest
        self.held: list[Any] = []

    def _valid(self) -> set[bytes]:
        return {state.root for state in self.states[-self.capacity - 1 :]}

    def _moved(self, key: bytes, value: bytes, results: list[Any]) -> None:
        """Take the new root if both forms agree on it."""
        first, second = results
        assert first == second
        root, delta = first
        changed = self.records.get(key) != value
        assert (root != self.host.root) == changed
        assert bool(kernel.decode_delta(delta).adds) == changed
        self.host.apply(root, delta)
        self.records[key] = value
        if changed:
            self.states.append(MemoryTree(FULL_RANGE, root, self.host.rows))
        assert self.host.rows == MemoryTree.build(FULL_RANGE, self.records.items()).rows

    @rule(key=few_keys, value=few_values, age=st.integers(0, 6))
    def update_from(self, key: bytes, value: bytes, age: int) -> None:
        """Update with a proof that is `age` deltas old."""
        state = self.states[-1 - min(age, len(self.states) - 1)]
        proof = state.read(key)
        if state.root not in self._valid():
            assert [outcome(lambda t=tree: t.update(proof, value)) for tree in self.trees] == [StaleProof] * 2
            return
        for tree in self.trees:
            refreshed = tree.latest(proof)
            assert (refreshed.leaf, refreshed.root) == (self.records.get(key), self.host.root)
        fresh_results = [tree.update(proof, value) for tree in self.trees]
        self._moved(key, value, fresh_results)

    @rule(key=few_keys, age=st.integers(0, 3))
    def hold(self, key: bytes, age: int) -> None:
        """Keep refreshed proofs for a later insert."""
        proof = self.states[-1 - min(age, len(self.states) - 1)].read(key)
        found = [outcome(lambda t=tree: t.latest(proof)) for tree in self.trees]
        if found[0] is StaleProof:
            assert found[1] is StaleProof
        else:
            self.held.append((key, self.host.root, found))

    @rule(value=few_values, pick=st.integers(0, 99))
    def insert_held(self, value: bytes, pick: int) -> None:
        """Insert with a proof refreshed earlier: Stale unless the root is still, or again, the latest."""
        if not self.held:
            return
        key, root, refreshed = self.held[pick % len(self.held)]
        calls = zip(self.trees, refreshed, strict=True)
        results = [outcome(lambda t=tree, r=handle: t.insert(r, value)) for tree, handle in calls]
        if root != self.host.root:
            assert results == [StaleProof] * 2
        else:
            self._moved(key, value, results)

    @rule(key=few_keys, age=st.integers(0, 4))
    def split_from(self, key: bytes, age: int) -> None:
        """Split with an old proof gives what a fresh proof gives, and changes nothing."""
        state = self.states[-1 - min(age, len(self.states) - 1)]
        results = [outcome(lambda t=tree: t.split(state.read(key))) for tree in self.trees]
        assert results[0] == results[1]
        if state.root in self._valid() and key != FULL_RANGE.start:
            assert results[0] == new_tree(model, self.host).split(self.host.read(key))

    @invariant()
    def roots_agree(self) -> None:
        """The latest root and the set of valid roots are what the history says."""
        if not hasattr(self, "trees"):
            return
        for tree in self.trees:
            assert tree.root == self.host.root
            assert tree.valid_roots() == self._valid()


RefreshMachine.TestCase.settings = examples(100, stateful_step_count=30)


class TestP7Refresh(RefreshMachine.TestCase):  # type: ignore[valid-type]
    """P7: refreshing from every root in the window equals a fresh proof; beyond it is Stale."""


@pytest.mark.parametrize("capacity", [1, 2, 3, 4])
def test_p7_window_counts_returning_states(capacity: int) -> None:
    """P7: values that come and go again leave exactly the window's roots, each of them refreshable."""
    host = MemoryTree.build(FULL_RANGE, [(number_key(5), b""), (number_key(1 << 255), b"")])
    trees = [new_tree(form, host, capacity) for form in FORMS]
    key = number_key(7)
    proofs = [(host.root, host.read(key))]
    for value in (b"a", b"b", b"a", b"b", b"b", b"a", b"c", b"a", b"b", b"a"):
        results = [tree.update(host.read(key), value) for tree in trees]
        assert results[0] == results[1]
        host.apply(*results[0])
        if proofs[-1][0] != host.root:
            proofs.append((host.root, host.read(key)))
        valid = {root for root, _ in proofs[-capacity - 1 :]}
        for tree in trees:
            assert tree.valid_roots() == valid
            for root, proof in proofs:
                found = outcome(lambda tree=tree, proof=proof: tree.latest(proof))
                assert found.leaf == value if root in valid else found is StaleProof
    assert len({root for root, _ in proofs}) == 4


def test_p7_window_wraps_around() -> None:
    """P7: after many times its capacity the overlay still knows exactly capacity + 1 roots."""
    host = MemoryTree.build(FULL_RANGE, [(number_key(n << 240), b"") for n in range(50)])
    tree = new_tree(kernel, host, 16)
    proofs = [(host.root, host.read(number_key(1 << 240)))]
    for number in range(200):
        host.apply(*tree.update(host.read(number_key((number % 60) << 240)), b"%d" % number))
        proofs.append((host.root, host.read(number_key(1 << 240))))
    assert tree.valid_roots() == {root for root, _ in proofs[-17:]}
    for age, (_, proof) in enumerate(reversed(proofs)):
        found = outcome(lambda proof=proof: tree.latest(proof))
        assert found is StaleProof if age > 16 else found.leaf == tree.latest(proofs[-1][1]).leaf
