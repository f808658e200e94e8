"""Bounds and small rules of a leadership that no transcript shows."""

from __future__ import annotations

import pytest

from juicebox_hsm.consensus.types import Leader, RoleStatus, SteppingDown, Witness
from juicebox_hsm.errors import InvariantViolation
from juicebox_hsm.host.compaction import compactible_rows, compaction_index
from juicebox_hsm.host.leadership import commit, push
from juicebox_hsm.host.leadership.effects import (
    Append,
    Note,
    Noted,
    Push,
    ReadProofs,
    Refuse,
    RetryLater,
    TellDamaged,
    Wake,
)
from juicebox_hsm.host.leadership.events import (
    AppendFinished,
    AppendResult,
    ClientRequest,
    CommitWait,
    Inherited,
    Lane,
    MemberTurn,
    OwnShown,
    ProofsFailed,
    ProofsRead,
    RequestArrived,
    RetryDue,
    TransferMade,
    Turn,
)
from juicebox_hsm.host.leadership.machine import Leadership
from juicebox_hsm.host.leadership.push import PUSH_ENTRIES_MAX
from juicebox_hsm.host.leadership.state import (
    APPEND_BATCH_MAX,
    RECENT_ENTRIES_MAX,
    Limits,
    Queued,
    RateMeter,
    State,
)
from juicebox_hsm.host.leadership.waits import still_ours
from juicebox_hsm.ids import RecordId
from juicebox_hsm.wire.client import TransportRequest
from juicebox_hsm.wire.rpc import Refusal
from tests.host.script import GROUP, LOST, REALM, captured, entry, hsm

MEMBERS = (hsm("a"), hsm("b"), hsm("c"))
ROLE = RoleStatus(Leader(2), 5)


def state(starting: int = 2) -> State:
    made = State(REALM, GROUP, MEMBERS, starting, ROLE, Limits())
    made.inherit(entry(str(starting - 1)))
    return made


def made(index: int) -> TransferMade:
    return TransferMade(CommitWait(index, 5, lambda _refusal: None), entry(str(index)))


def request(user: str) -> ClientRequest:
    return ClientRequest(RecordId(bytes(32)), 1, TransportRequest(b""), "acme", user, 0, lambda _reply: None)


def appended(machine: Leadership) -> int:
    """Carry out one append; returns how many entries it had."""
    append = machine.step(Turn(Lane.PRODUCE), 0.0)[-1]
    assert isinstance(append, Append)
    machine.step(AppendFinished(AppendResult.APPENDED), 0.0)
    return len(append.entries)


def test_batches_are_consecutive_and_bounded() -> None:
    """Entries queued out of order are appended in order, at most 100 at a time, and a gap stops a batch."""
    machine = Leadership(REALM, GROUP, MEMBERS, 2, ROLE, Limits())
    for index in reversed(range(2, 122)):
        if index != 110:
            machine.step(made(index), 0.0)
    assert appended(machine) == APPEND_BATCH_MAX
    [following] = machine.step(OwnShown(), 0.0)
    assert isinstance(following, Append)
    assert [each.index for each in following.entries] == list(range(102, 110))


def test_an_index_is_queued_once() -> None:
    """A second entry at one index, queued or appended, is a bug if it reaches the queue."""
    known = state()
    known.enqueue(Queued(entry("2"), b"", None))
    assert not known.takes(2)
    with pytest.raises(InvariantViolation):
        known.enqueue(Queued(entry("2"), b"", None))
    known.queue.clear()
    known.next_index = 3
    with pytest.raises(InvariantViolation):
        known.enqueue(Queued(entry("2"), b"", None))


def test_certificate_holds_captures_of_our_branch_only() -> None:
    """Captures below the index or of a rival branch prove nothing about the commit."""
    known = state()
    for name in ("2", "3", "4"):
        known.enqueue(Queued(entry(name), b"", None))
    for capture in (captured("a", "4"), captured("b", "2"), captured("c", "3'")):
        commit.vote(known, capture)
    certificate = commit.certify(known, 3)
    assert certificate.index == 3
    assert [vote.hsm for vote in certificate.captures] == [hsm("a")]


def test_commits_forget_macs_below() -> None:
    """Only macs from the last commit on are kept, and a commit never falls."""
    known = state()
    for name in ("2", "3", "4"):
        known.enqueue(Queued(entry(name), b"", None))
    commit.raise_committed(known, 3)
    commit.raise_committed(known, 2)
    assert known.committed == 3
    assert set(known.own_macs) == {3, 4}


def test_recent_entries() -> None:
    """Members get what follows their position, [] at the end, None when it is no longer kept."""
    known = state()
    known.recent.extend((index, bytes([index])) for index in range(4, 8))
    known.next_index = 8
    assert push.recent_from(known, 8) == []
    assert push.recent_from(known, 6) == [b"\x06", b"\x07"]
    assert push.recent_from(known, 3) is None


def test_pushes_are_bounded_and_skip_what_is_no_longer_kept() -> None:
    """A member gets at most 200 entries at once; one behind what is kept is told only where the log ends."""
    machine = Leadership(REALM, GROUP, MEMBERS, 2, ROLE, Limits())
    machine.step(MemberTurn(hsm("b")), 0.0)
    total = RECENT_ENTRIES_MAX + 500
    for index in range(2, 2 + total):
        machine.step(made(index), 0.0)
    while machine.next_index < 2 + total:
        appended(machine)
        machine._state.producing = type(machine._state.producing).FREE
    assert len(machine._state.recent) == RECENT_ENTRIES_MAX
    assert machine.step(MemberTurn(hsm("b")), 0.0) == [Push(hsm("b"), [], 1 + total)]
    machine._state.members[hsm("c")] = type(machine._state.members[hsm("b")])(2 + 600, heard_s=0.0)
    [bounded] = machine.step(MemberTurn(hsm("c")), 0.0)
    assert isinstance(bounded, Push)
    assert (len(bounded.entries), bounded.last) == (PUSH_ENTRIES_MAX, 601 + PUSH_ENTRIES_MAX)


def test_rate_is_the_mean_of_a_minute() -> None:
    """Counts leave the mean after 60 s, also after a long silence."""
    meter = RateMeter()
    meter.add(1000.5, 120)
    assert meter.per_second(1001.0) == 2.0
    meter.add(1030.0, 60)
    assert meter.per_second(1059.9) == 3.0
    assert meter.per_second(1060.1) == 1.0
    assert meter.per_second(5000.0) == 0.0


@pytest.mark.parametrize(
    ("role", "at", "ours"),
    [
        (Leader(2), 5, True),
        (SteppingDown(2), 6, True),
        (SteppingDown(2), 5, False),
        (Witness(), 6, False),
        (Leader(9), 7, False),
        (SteppingDown(2), 7, False),
        (Leader(2), 4, False),
    ],
)
def test_commits_speak_of_our_entry_only_at_its_clock(
    role: Leader | SteppingDown | Witness, at: int, ours: bool
) -> None:
    """A commit is about an entry of clock c only while the clock is c, or c + 1 and stepping down (hsm.md 6.3)."""
    assert still_ours(RoleStatus(role, at), 5) is ours


@pytest.mark.parametrize(
    ("starts", "index", "compacted"),
    [
        ([1], 1, []),
        ([1, 3], 2, [1]),
        ([1, 3, 5], 3, [1]),
        ([1, 3, 5], 4, [1, 3]),
        ([1, 3, 10], 6, [1]),
        ([1, 3, 10], 9, [1, 3]),
        ([], 5, []),
        ([1, 3], 1, []),
        ([1, 3], 100, [1]),
    ],
)
def test_compactible_prefix(starts: list[int], index: int, compacted: list[int]) -> None:
    """A row is compacted only if all its entries are at or below the index; the last row never is."""
    assert starts[: compactible_rows(starts, index)] == compacted


def test_compaction_waits_for_commit_capture_and_settling() -> None:
    """The last committed entry, what our own HSM has not persisted and what is not settled stay in the log."""
    assert compaction_index(None, 7, 8) == 0
    assert compaction_index(10, None, 8) == 0
    assert compaction_index(10, 7, 8) == 7
    assert compaction_index(10, 12, 8) == 8
    assert compaction_index(10, 12, 10) == 9


def test_reads_of_proofs_share_their_requests_time() -> None:
    """What the store takes to fail is time of the requests: after a second of it nobody waits any more."""
    machine = Leadership(REALM, GROUP, MEMBERS, 2, ROLE, Limits())
    machine.step(Inherited(entry("1")), 0.0)
    first, second = request("r1"), request("r2")
    machine.step(RequestArrived(first), 0.0)
    [read] = machine.step(Turn(Lane.PRODUCE), 0.0)
    assert isinstance(read, ReadProofs)
    assert read.within_s == 5.0
    assert machine.step(ProofsFailed(), 0.6) == [RetryLater(first, 0.01)]
    machine.step(RetryDue(first), 0.61)
    machine.step(RequestArrived(second), 0.61)
    machine.step(Turn(Lane.PRODUCE), 0.61)
    assert machine.step(ProofsFailed(), 1.0) == [
        Note(Noted.QUORUM_LOST),
        Refuse(first, Refusal.NO_STORE),
        Refuse(second, Refusal.NO_STORE),
    ]
    assert machine.quorum(1.0).lacks_store


def test_a_leader_that_wants_to_be_asked_does_not_say_that_it_stands_still() -> None:
    """Balancers ask no leader that is stalled: one that lacks the store must show a moment to ask, or it never ends."""
    machine = Leadership(REALM, GROUP, MEMBERS, 2, ROLE, Limits())
    machine.step(Inherited(entry("1")), 0.0)
    machine.step(RequestArrived(request("r1")), 0.0)
    machine.step(Turn(Lane.PRODUCE), 0.0)
    machine.step(ProofsFailed(), 1.0)
    assert machine.quorum(3.4).stalled_s == pytest.approx(2.4)
    assert machine.quorum(3.6).stalled_s is None
    assert machine.step(RequestArrived(request("r2")), 3.6) == [Wake(Lane.PRODUCE)]
    assert machine.quorum(3.6).stalled_s == pytest.approx(2.6), "one finds out for all"
    machine.step(Turn(Lane.PRODUCE), 3.6)
    machine.step(ProofsRead([b"proof"]), 3.7)
    assert machine.quorum(3.7).stalled_s is None


def test_a_node_that_stays_missing_is_damage() -> None:
    """A missing node is tried again with newer roots; one that stays away ends the request in about a second, told."""
    machine = Leadership(REALM, GROUP, MEMBERS, 2, ROLE, Limits())
    machine.step(Inherited(entry("1")), 0.0)
    asked = request("r1")
    machine.step(RequestArrived(asked), 0.0)
    machine.step(Turn(Lane.PRODUCE), 0.0)
    assert machine.step(ProofsRead([LOST]), 0.0) == [RetryLater(asked, 0.01)]
    machine.step(RetryDue(asked), 0.3)
    machine.step(Turn(Lane.PRODUCE), 0.3)
    assert machine.step(ProofsFailed(), 0.3) == [RetryLater(asked, 0.02)], "a store in trouble says nothing of damage"
    machine.step(RetryDue(asked), 0.6)
    machine.step(Turn(Lane.PRODUCE), 0.6)
    assert machine.step(ProofsRead([LOST]), 0.6) == [TellDamaged(LOST), Refuse(asked, Refusal.STORE_DAMAGED)]
