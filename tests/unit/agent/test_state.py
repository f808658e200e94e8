"""Group and leader state: the role clock rule, queue, votes, certificates, rates."""

from __future__ import annotations

import pytest

from juicebox_hsm.consensus.types import (
    ZERO_MAC,
    Captured,
    Leader,
    LogEntry,
    Role,
    RoleStatus,
    SteppingDown,
    Witness,
)
from juicebox_hsm.errors import InvariantViolation
from juicebox_hsm.ids import GroupId, HsmId, RealmId, RecordId
from juicebox_hsm.wire.client import TransportRequest
from juicebox_hsm.wire.rpc import Refusal, Refused
from roles.agent.state import Groups, GroupState, LeaderState, PendingRequest, Queued, RateMeter

REALM, GROUP = RealmId(b"r" * 16), GroupId(b"g" * 16)
HSMS = tuple(HsmId(bytes([number]) * 16) for number in range(1, 4))


def mac(index: int) -> bytes:
    return index.to_bytes(32, "big")


def entry(index: int) -> LogEntry:
    return LogEntry(index, None, None, ZERO_MAC if index == 1 else mac(index - 1), mac(index), HSMS[0])


def queued(index: int) -> Queued:
    return Queued(entry(index), b"", None)


def captured(hsm: HsmId, index: int, of: bytes | None = None) -> Captured:
    return Captured(hsm, REALM, GROUP, index, mac(index) if of is None else of, bytes(32))


def group(role: Role | None = None, at: int = 5) -> GroupState:
    state = GroupState(REALM, GROUP, HSMS, RoleStatus(Witness(), 0))
    state.adopt(RoleStatus(role or Witness(), at))
    return state


def request() -> PendingRequest:
    return PendingRequest(RecordId(bytes(32)), 1, TransportRequest(b""), "acme", "u", 0)


def test_smaller_clock_is_stale() -> None:
    """A role older than the stored one is dropped."""
    state = group(Leader(2), at=5)
    assert state.adopt(RoleStatus(Witness(), 4)).stale
    assert state.is_leader


def test_equal_clock_must_be_the_same_role() -> None:
    """Two roles at one clock value would mean that the HSM repeated a clock."""
    state = group(Leader(2), at=5)
    assert state.adopt(RoleStatus(Leader(2), 5)).started is None
    with pytest.raises(InvariantViolation):
        state.adopt(RoleStatus(Witness(), 5))


@pytest.mark.parametrize("role", [Leader(7), SteppingDown(7)])
def test_leading_roles_create_leader_state(role: Role) -> None:
    """Leader and SteppingDown both need somebody to append, commit and answer, from `starting` on."""
    state = group()
    change = state.adopt(RoleStatus(role, 6))
    assert change.started is state.leader
    assert change.ended is None
    assert state.leader is not None
    assert (state.leader.starting, state.leader.next_index, state.leader.recorded) == (7, 7, 6)


def test_stepping_down_keeps_the_leader_state() -> None:
    """Queue and waiters survive the step from Leader to SteppingDown; requests are no longer accepted."""
    state = group(Leader(2))
    before = state.leader
    assert before is not None
    waiting = request()
    before.waiters[mac(2)] = waiting
    state.adopt(RoleStatus(SteppingDown(2), 6))
    assert state.leader is before
    assert not state.is_leader
    assert not waiting.filled


def test_witness_drops_who_waits() -> None:
    """Losing leadership refuses everybody; only messages the HSM was given count as consumed."""
    state = group(Leader(2))
    leader = state.leader
    assert leader is not None
    begun, unbegun = request(), request()
    leader.waiters[mac(2)] = begun
    leader.incoming.append(unbegun)
    leader.enqueue(queued(2))
    change = state.adopt(RoleStatus(Witness(), 7))
    assert change.ended is leader
    assert state.leader is None
    assert leader.append_blocked
    assert not leader.queue
    assert begun._value == Refused(Refusal.NOT_LEADER, consumed=True)
    assert unbegun._value == Refused(Refusal.NOT_LEADER)


def test_new_leadership_replaces_an_unseen_end() -> None:
    """Leader at a later clock is another leadership even with the same `starting`: the HSM's state is fresh."""
    state = group(Leader(2), at=5)
    first = state.leader
    change = state.adopt(RoleStatus(Leader(2), 7))
    assert change.ended is first
    assert change.started is state.leader
    assert state.leader is not first


def test_batches_are_consecutive_and_bounded() -> None:
    """Entries queued out of order are appended in order, at most 100 at a time, and a gap stops a batch."""
    leader = LeaderState(2)
    for index in reversed(range(2, 122)):
        if index != 110:
            leader.enqueue(queued(index))
    batch = leader.take_batch()
    assert [item.entry.index for item in batch] == list(range(2, 102))
    leader.appended(batch)
    batch = leader.take_batch()
    assert [item.entry.index for item in batch] == list(range(102, 110))
    leader.appended(batch)
    assert leader.take_batch() == []
    assert leader.next_index == 110
    assert [row.first_index for row in leader.uncompacted] == [2, 102]


def test_an_index_is_queued_once() -> None:
    """A second entry at one index, queued or appended, is a bug."""
    leader = LeaderState(2)
    leader.enqueue(queued(2))
    with pytest.raises(InvariantViolation):
        leader.enqueue(queued(2))
    leader.appended(leader.take_batch())
    with pytest.raises(InvariantViolation):
        leader.enqueue(queued(2))


def test_uncommitted_counts_everything_begun() -> None:
    """Appended, queued and waiting requests all count against the Busy bound."""
    leader = LeaderState(5)
    assert leader.uncommitted == 0
    leader.incoming.append(request())
    leader.enqueue(queued(5))
    leader.enqueue(queued(6))
    assert leader.uncommitted == 3
    leader.incoming.clear()
    leader.appended(leader.take_batch())
    assert leader.uncommitted == 2
    leader.raise_committed(5)
    assert leader.uncommitted == 1


def test_votes_only_rise() -> None:
    """A capture older than a known one neither replaces it nor wakes the committer."""
    leader = LeaderState(2)
    assert leader.vote(captured(HSMS[0], 3))
    assert not leader.vote(captured(HSMS[0], 2))
    assert not leader.vote(captured(HSMS[0], 3))
    assert leader.votes[HSMS[0]].index == 3


def test_certificate_holds_captures_of_our_branch_only() -> None:
    """Captures below the index or of a rival branch prove nothing about the commit."""
    leader = LeaderState(2)
    leader.inherit(entry(1))
    for index in (2, 3, 4):
        leader.enqueue(queued(index))
    leader.vote(captured(HSMS[0], 4))
    leader.vote(captured(HSMS[1], 2))
    leader.vote(captured(HSMS[2], 3, of=b"x" * 32))
    certificate = leader.certify(3)
    assert certificate.index == 3
    assert [vote.hsm for vote in certificate.captures] == [HSMS[0]]


def test_commits_forget_macs_below() -> None:
    """Only macs from the last commit on are kept, and a commit never falls."""
    leader = LeaderState(2)
    leader.inherit(entry(1))
    for index in (2, 3, 4):
        leader.enqueue(queued(index))
    leader.raise_committed(3)
    leader.raise_committed(2)
    assert leader.committed == 3
    assert set(leader.own_macs) == {3, 4}


def test_inherit_takes_only_the_entry_before_starting() -> None:
    """An entry of another leadership's end must not pass for the one we started from."""
    leader = LeaderState(5)
    leader.inherit(entry(3))
    assert leader.last_appended is None
    leader.inherit(entry(4))
    assert leader.last_appended == entry(4)


def test_recent_entries() -> None:
    """Members get what follows their position, [] at the end, None when it is no longer kept."""
    leader = LeaderState(2, next_index=0)
    leader.recent.extend((index, bytes([index])) for index in range(4, 8))
    leader.next_index = 8
    assert leader.recent_from(8, 10) == []
    assert leader.recent_from(6, 10) == [b"\x06", b"\x07"]
    assert leader.recent_from(4, 2) == [b"\x04", b"\x05"]
    assert leader.recent_from(3, 2) is None


def test_groups_name_what_is_wrong() -> None:
    """An unknown realm and an unknown group of a known realm are different refusals."""
    groups = Groups()
    assert groups.find(REALM, GROUP) is Refusal.INVALID_REALM
    state = group()
    groups.add(state)
    assert groups.find(REALM, GROUP) is state
    assert groups.find(REALM, b"x" * 16) is Refusal.INVALID_GROUP
    assert groups.find(b"x" * 16, GROUP) is Refusal.INVALID_REALM
    assert list(groups.realms) == [REALM]


def test_rate_is_the_mean_of_a_minute() -> None:
    """Counts leave the mean after 60 s, also after a long silence."""
    meter = RateMeter()
    meter.add(1000.5, 120)
    assert meter.per_second(1001.0) == 2.0
    meter.add(1030.0, 60)
    assert meter.per_second(1059.9) == 3.0
    assert meter.per_second(1060.1) == 1.0
    assert meter.per_second(5000.0) == 0.0
