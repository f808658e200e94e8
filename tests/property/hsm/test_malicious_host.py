"""HSM cores against a malicious host: I1 to I12, I14 and I19 after every request (hsm.md 14 and 16)."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from juicebox_hsm.consensus.macs import Macs
from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.hsm import capture, leadership, membership, retirement, transfer
from juicebox_hsm.hsm.messages import (
    CaptureJump,
    CaptureJumpOk,
    Commit,
    CommitOk,
    NotLeader,
    NotWitness,
    Outcome,
    PrepareTransfer,
    PrepareTransferOk,
)
from juicebox_hsm.hsm.state import GroupState, HsmState
from tests.examples import examples
from tests.property.hsm.adversary import Adversary
from tests.property.hsm.schedules import ACTIONS, ENDING_ACTIONS, MOVING_ACTIONS, UNALTERED_ACTIONS, Action, run

seeds = st.integers(0, 2**32)


class MaliciousHost(RuleBasedStateMachine):
    """Hypothesis chooses the order of actions and a seed for each; the ledger checks inside every request."""

    @initialize(
        size=st.integers(1, 5), groups=st.integers(1, 3), withheld=st.integers(0, 3), neglected=st.integers(0, 5)
    )
    def start(self, size: int, groups: int, withheld: int, neglected: int) -> None:
        """Create a realm."""
        self.world = Adversary(size, "hypothesis", groups=groups)
        self.world.withheld = [None, *self.world.logs][min(withheld, groups)]
        self.world.neglected = neglected if neglected < size else None

    def act(self, action: Callable[[Adversary, random.Random], None], seed: int) -> None:
        """Run one action."""
        self.world.steps += 1
        action(self.world, random.Random(seed))

    @rule(seed=seeds)
    def client(self, seed: int) -> None:
        """Serve a user."""
        self.act(Adversary.act_client, seed)

    @rule(seed=seeds)
    def capture(self, seed: int) -> None:
        """Show entries."""
        self.act(Adversary.act_capture, seed)

    @rule(seed=seeds)
    def persist(self, seed: int) -> None:
        """Persist and sign."""
        self.act(Adversary.act_persist, seed)

    @rule(seed=seeds)
    def commit(self, seed: int) -> None:
        """Show captures."""
        self.act(Adversary.act_commit, seed)

    @rule(seed=seeds)
    def settle(self, seed: int) -> None:
        """Replicate and commit."""
        self.act(Adversary.act_settle, seed)

    @rule(seed=seeds)
    def rival(self, seed: int) -> None:
        """Fork."""
        self.act(Adversary.act_rival, seed)

    @rule(seed=seeds)
    def lead(self, seed: int) -> None:
        """Appoint."""
        self.act(Adversary.act_lead, seed)

    @rule(seed=seeds)
    def step_down(self, seed: int) -> None:
        """Depose."""
        self.act(Adversary.act_step_down, seed)

    @rule(seed=seeds)
    def jump(self, seed: int) -> None:
        """Jump."""
        self.act(Adversary.act_jump, seed)

    @rule(seed=seeds)
    def splice(self, seed: int) -> None:
        """Jump onto two branches at once."""
        self.act(Adversary.act_splice, seed)

    @rule(seed=seeds)
    def crash(self, seed: int) -> None:
        """Crash, in a write or not."""
        chosen = Adversary.act_crash if seed % 2 else Adversary.act_crash_in_write
        self.act(chosen, seed)

    @rule(seed=seeds)
    def restore(self, seed: int) -> None:
        """Restart on old NVRAM files."""
        self.act(Adversary.act_restore, seed)

    @rule(seed=seeds)
    def replay(self, seed: int) -> None:
        """Replay anything."""
        self.act(Adversary.act_replay, seed)

    @rule(seed=seeds)
    def forge(self, seed: int) -> None:
        """Alter something old, or something fresh on its way."""
        chosen = Adversary.act_forge if seed % 3 == 0 else Adversary.act_tamper
        self.act(chosen, seed)

    @rule(seed=seeds)
    def transfer(self, seed: int) -> None:
        """Take a transfer along."""
        chosen = Adversary.act_transfer if seed % 3 else Adversary.act_move
        self.act(chosen, seed)

    @rule(seed=seeds)
    def retire(self, seed: int) -> None:
        """End a group, forget one, or come back to it."""
        chosen = (Adversary.act_retire, Adversary.act_forget, Adversary.act_come_back)[seed % 3]
        self.act(chosen, seed)


MaliciousHost.TestCase.settings = examples(40, stateful_step_count=50)
test_i1_to_i14_stateful = MaliciousHost.TestCase


@examples(60)
@given(seeds)
def test_i1_to_i14_long_schedules(seed: int) -> None:
    """No invariant breaks in long random schedules with weights of their own."""
    run(seed, 120)


def test_schedules_reach_deep_states() -> None:
    """The schedules are not vacuous: every size of realm occurs, and what the attacks need to begin with happens."""
    seen: Counter[str] = Counter()
    shapes = set()
    depth = 0
    for seed, (size, groups) in enumerate(itertools.product(range(1, 6), range(1, 4))):
        for world in (run(seed + turn, 160, size=size, groups=groups) for turn in (0, 100, 200, 300)):
            shapes.add((len(world.hsms), world.groups))
            seen += world.seen
            seen["released"] += world.ledger.releases
            seen["forks"] += sum(len(children) > 1 for children in world.ledger.children.values())
            depth = max(depth, *(len(chain) for chain in world.ledger.committed.values()))
    assert shapes >= set(itertools.product(range(1, 6), range(1, 4)))
    assert seen["released"] > 150
    assert seen["forks"] > 30
    assert depth > 15
    assert seen["CaptureJump: CaptureJumpOk"] > 10
    assert seen["spliced"] > 20
    assert seen["TransferIn: TransferInOk"] > 30
    assert seen["RetireGroup: RetireGroupOk"] > 20
    assert seen["ForgetGroup: ForgetGroupOk"] > 10
    assert seen["JoinGroup: STALE_GENERATION"] > 5
    assert seen["altered"] > 500
    assert seen["replayed"] > 150
    assert seen["RollbackRefused"] > 30
    assert seen["PowerCut"] > 50
    for refusal in (
        "CaptureNext: INVALID_MAC",
        "BecomeLeader: INVALID_MAC",
        "CaptureJump: INVALID_MAC",
        "AppRequest: INVALID_PROOF",
        "TransferOut: INVALID_STATEMENT",
        "TransferIn: INVALID_NONCE",
        "ForgetGroup: INVALID_MAC",
        "ForgetGroup: NOT_RETIRED",
        "ForgetGroup: NO_QUORUM",
        "NewGroup: STALE_GENERATION",
    ):
        assert seen[refusal] > 0, (refusal, sorted(seen.items()))


def first_violation(
    schedules: int,
    steps: int,
    size: int,
    groups: int,
    actions: Collection[Action] = UNALTERED_ACTIONS,
) -> str | None:
    """Return the message of the first broken invariant in these schedules; fewer kinds of `actions` search deeper."""
    for seed in range(schedules):
        try:
            run(seed, steps, size=size, groups=groups, actions=actions)
        except AssertionError as violation:
            return str(violation).splitlines()[0]
    return None


def test_h1_is_found_in_a_core_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search finds two committed entries at one index when a jump trusts one member's statement."""

    def trusting(state: HsmState, request: CaptureJump, member: GroupState) -> int | None:
        macs = {(entry.index, entry.entry_mac) for entry in request.entries}
        votes = (vote for vote in request.captures if state.is_valid_vote(vote, request.realm, member))
        return max((vote.index for vote in votes if (vote.index, vote.mac) in macs), default=None)

    monkeypatch.setattr(capture, "certified_index", trusting)
    violation = first_violation(400, 200, 3, 2)
    assert violation is not None
    assert violation.startswith("I2")


def test_a_jump_that_skips_the_link_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search splices two branches: a jump that asks of its entries only that they are consecutive is seen."""

    def unlinked(entries: Sequence[LogEntry]) -> Iterator[tuple[LogEntry, LogEntry]]:
        return ((replace(one, entry_mac=other.prev_mac), other) for one, other in itertools.pairwise(entries))

    monkeypatch.setattr(capture, "pairwise", unlinked)
    violation = first_violation(200, 200, 3, 2)
    assert violation is not None
    assert violation.startswith("I2")


def test_a_jump_that_verifies_only_its_first_entry_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search forges the link between two branches: a jump that skips the macs of later entries is seen."""
    real, verify = capture.capture_jump, Macs.verify_log_entry

    def lenient(state: HsmState, request: CaptureJump) -> CaptureJumpOk | Outcome | NotWitness:
        with monkeypatch.context() as patch:
            later = request.entries[1:]
            patch.setattr(Macs, "verify_log_entry", lambda macs, *of: of[2] in later or verify(macs, *of))
            return real(state, request)

    monkeypatch.setattr(capture, "capture_jump", lenient)
    violation = first_violation(200, 200, 3, 2)
    assert violation is not None
    assert violation.startswith("I2")


def test_h2_is_found_in_a_core_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search finds the resurrected range when a destination forgets what it consumed."""
    monkeypatch.setattr(transfer, "is_consumed", lambda *_: False)
    violation = first_violation(100, 200, 1, 3, MOVING_ACTIONS)
    assert violation is not None
    assert violation.startswith(("I4", "I5"))


def test_commit_without_quorum_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug in the election (one vote suffices) is seen at once."""
    monkeypatch.setattr(leadership, "elect", lambda _, votes: max(votes.values(), default=None))
    violation = first_violation(20, 100, 3, 2)
    assert violation is not None
    assert violation.startswith(("I2", "I3"))


def test_missing_step_down_cap_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit without the cap at the last own index is seen: hosts would count abandoned entries as committed."""
    real = leadership.commit

    def uncapped(state: HsmState, request: Commit) -> CommitOk | Outcome | NotLeader:
        member = state.groups.get(request.group)
        role = getattr(member, "role", None)
        if hasattr(role, "stepdown_at"):
            role.stepdown_at = role.log.last.index  # type: ignore[union-attr]  # a stepping-down role
        return real(state, request)

    monkeypatch.setattr(leadership, "commit", uncapped)
    assert first_violation(100, 150, 3, 2) is not None, "a foreign entry passes as one's own"


@pytest.mark.parametrize("check", ["verify_log_entry", "verify_captured"])
def test_an_unchecked_mac_is_found(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The alterations reach the MACs of entries and captures: a core that trusts either is seen."""
    monkeypatch.setattr(Macs, check, lambda *_: True)
    violation = first_violation(100, 150, 3, 2, ACTIONS)
    assert violation is not None
    assert violation.startswith(("I2", "I3", "I9"))


def test_an_unchecked_transfer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The alterations reach transfers: a core that compares neither their statements nor their nonces is seen."""
    monkeypatch.setattr(transfer, "same", lambda *_: True)
    violation = first_violation(200, 150, 1, 3, ACTIONS)
    assert violation is not None
    assert violation.startswith(("I4", "I5"))


def test_a_group_that_is_joined_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search comes back to a forgotten group where statements bind no generation: I21 is not vacuous."""

    def whatever(state: HsmState, *_: object) -> int:
        realm = state.persistent.realm
        return 0 if realm is None else realm.generation

    monkeypatch.setattr(membership, "_own_generation", whatever)
    violation = first_violation(100, 150, 3, 3, ENDING_ACTIONS)
    assert violation is not None
    assert violation.startswith("I21")


def test_a_group_forgotten_without_quorum_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search talks a member out of its group with a minority's captures where nobody counts them."""
    monkeypatch.setattr(retirement, "is_certified", lambda *_: True)
    violation = first_violation(100, 150, 3, 3, ENDING_ACTIONS)
    assert violation is not None
    assert violation.startswith("I6")


def test_a_log_that_goes_on_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search prepares a transfer at a retired group where its leader does not refuse it."""
    real = transfer.prepare_transfer

    def lenient(state: HsmState, request: PrepareTransfer) -> PrepareTransferOk | Outcome | NotLeader:
        found = state.leading(request.realm, request.destination)
        if not isinstance(found, tuple):
            return real(state, request)
        log, last = found[1].log, found[1].log.last
        log.last = replace(last, retired=False)
        answer = real(state, request)
        log.last = last if log.last.index == last.index else log.last
        return answer

    monkeypatch.setattr(transfer, "prepare_transfer", lenient)
    violation = first_violation(100, 150, 1, 3, ENDING_ACTIONS)
    assert violation is not None
    assert violation.startswith("I20")
