"""Leading a group: begin, commit and step down (hsm.md 10)."""

from __future__ import annotations

from juicebox_hsm.consensus.election import elect, highest_votes
from juicebox_hsm.consensus.macs import same
from juicebox_hsm.consensus.types import Captured
from juicebox_hsm.hsm.messages import (
    BecomeLeader,
    Commit,
    CommitOk,
    NotCaptured,
    NotLeader,
    Outcome,
    RoleOk,
    StepDown,
    StepDownOk,
)
from juicebox_hsm.hsm.state import HsmState, LeaderState, SteppingDownState, WitnessState


def become_leader(state: HsmState, request: BecomeLeader) -> RoleOk | Outcome | NotCaptured:
    """Lead from the persisted captured head. Captures are made durable first, whatever the answer."""
    state.persist_captured()
    member = state.member(request.realm, request.group)
    if isinstance(member, Outcome):
        return member
    if isinstance(member.role, SteppingDownState):
        return Outcome.STEPDOWN_IN_PROGRESS
    realm = state.persistent.realm
    pair = None if realm is None else realm.groups[member.id].captured
    if pair is None:
        return NotCaptured(None)
    last = request.last_entry
    if pair[0] != last.index or not same(pair[1], last.entry_mac):
        return NotCaptured(pair[0])
    # Index and mac alone do not authenticate the other fields.
    if not state.macs.verify_log_entry(request.realm, member.id, last):
        return Outcome.INVALID_MAC
    if isinstance(member.role, WitnessState):
        member.become(state.new_leader(last))
    return RoleOk(member.status())


def step_down(state: HsmState, request: StepDown) -> StepDownOk | Outcome | NotLeader:
    """End a leadership: gently, so that what was created may still commit, or by force, dropping all replies."""
    member = state.member(request.realm, request.group)
    if isinstance(member, Outcome):
        return member
    role = member.role
    if isinstance(role, LeaderState):
        last = role.log.last.index
        if request.force:
            member.become(WitnessState())
        else:
            member.step_down_at(role, last)
    elif isinstance(role, SteppingDownState) and request.force:
        last = role.stepdown_at
        member.become(WitnessState())
    else:
        return NotLeader(member.status())
    return StepDownOk(last, member.status())


def commit(state: HsmState, request: Commit) -> CommitOk | Outcome | NotLeader:
    """Commit what a strict majority captured and release the replies up to there, each exactly once (I3)."""
    member = state.member(request.realm, request.group)
    if isinstance(member, Outcome):
        return member
    role = member.role
    if isinstance(role, WitnessState):
        return NotLeader(member.status())
    log = role.log

    def is_valid(captured: Captured) -> bool:
        element = log.get(captured.index)
        return (
            element is not None
            and same(element.entry.entry_mac, captured.mac)
            and state.is_valid_vote(captured, request.realm, member)
        )

    committed = elect(member.configuration, highest_votes(request.captures, is_valid))
    if committed is None:
        return Outcome.NO_QUORUM
    if isinstance(role, SteppingDownState):
        # A foreign entry at the same index must not look like one of ours to the host.
        committed = min(committed, role.stepdown_at)
    if role.committed is not None:
        committed = max(committed, role.committed)
    responses = log.release_to(committed)
    role.committed = committed
    abandoned: list[bytes] = []
    if isinstance(role, SteppingDownState):
        abandoned, role.abandoned = role.abandoned, []
        if committed >= role.stepdown_at:
            member.become(WitnessState())
    return CommitOk(committed, tuple(responses), tuple(abandoned), member.status())
