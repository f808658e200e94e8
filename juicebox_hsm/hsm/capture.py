"""Following a group's log: capture, jump and persist (hsm.md 10).

An HSM's captured head moves along one chain, or by a jump onto an entry that a strict majority captured (H1). It
signs only heads that are durable (I7). A leader that sees somebody else's entry steps down.
"""

from __future__ import annotations

from itertools import pairwise

from juicebox_hsm.consensus.election import elect, highest_votes
from juicebox_hsm.consensus.macs import same
from juicebox_hsm.consensus.types import ZERO_MAC, Captured, LogEntry
from juicebox_hsm.hsm.messages import (
    CaptureJump,
    CaptureJumpOk,
    CaptureNext,
    NotWitness,
    Outcome,
    PersistStateOk,
    RoleOk,
)
from juicebox_hsm.hsm.state import GroupState, HsmState, LeaderState, Log, SteppingDownState, WitnessState
from juicebox_hsm.ids import RealmId


def capture_next(state: HsmState, request: CaptureNext) -> RoleOk | Outcome:
    """Capture entries in order; at a refusal the earlier entries of the request stay captured."""
    if not request.entries:
        return Outcome.MISSING_ENTRIES
    member = state.member(request.realm, request.group)
    if isinstance(member, Outcome):
        return member
    for entry in request.entries:
        refusal = _capture(state, request.realm, member, entry)
        if refusal is not None:
            return refusal
    return RoleOk(member.status())


def _capture(state: HsmState, realm: RealmId, member: GroupState, entry: LogEntry) -> Outcome | None:
    if not state.macs.verify_log_entry(realm, member.id, entry):
        return Outcome.INVALID_MAC
    index, mac = state.captured.get(member.id, (0, ZERO_MAC))
    if entry.index != index + 1:
        return Outcome.MISSING_PREV
    if not same(entry.prev_mac, mac):
        return Outcome.INVALID_CHAIN
    role = member.role
    if isinstance(role, WitnessState):
        state.captured[member.id] = (entry.index, entry.entry_mac)
        return None
    conflicts = _conflicts(role.log, entry)
    if conflicts and entry.index == role.log.first:
        return Outcome.INVALID_CHAIN
    is_future = entry.index > role.log.last.index
    state.captured[member.id] = (entry.index, entry.entry_mac)
    if isinstance(role, LeaderState):
        if is_future:
            member.step_down_at(role, role.log.last.index)
        elif conflicts:
            member.step_down_at(role, entry.index - 1)
    if isinstance(member.role, SteppingDownState):
        _follow(member.role, entry, is_future=is_future, conflicts=conflicts)
    return None


def _conflicts(log: Log, entry: LogEntry) -> bool:
    """Tell whether the log holds another entry at this index."""
    own = log.get(entry.index)
    return own is not None and not same(own.entry.entry_mac, entry.entry_mac)


def _follow(role: SteppingDownState, entry: LogEntry, *, is_future: bool, conflicts: bool) -> None:
    """Keep a foreign entry: witnesses past `stepdown_at` can no longer sign for it, but for its descendants."""
    if conflicts:
        role.stepdown_at = min(role.stepdown_at, entry.index - 1)
        role.abandoned += role.log.pop_from(entry.index)
    if is_future or conflicts:
        role.log.append(entry)


def capture_jump(state: HsmState, request: CaptureJump) -> CaptureJumpOk | Outcome | NotWitness:
    """Move a lagging witness onto an entry that a strict majority of its group captured (H1).

    Two certified entries always lie on one chain, so a jump can only abandon a branch that can no longer win.
    """
    member = state.member(request.realm, request.group)
    if isinstance(member, Outcome):
        return member
    if not isinstance(member.role, WitnessState):
        return NotWitness(member.status())
    entries = request.entries
    if not entries:
        return Outcome.MISSING_ENTRIES
    if not all(state.macs.verify_log_entry(request.realm, member.id, entry) for entry in entries):
        return Outcome.INVALID_MAC
    for before, after in pairwise(entries):
        if after.index != before.index + 1 or not same(after.prev_mac, before.entry_mac):
            return Outcome.INVALID_CHAIN
    certified = certified_index(state, request, member)
    if certified is None:
        return Outcome.NO_QUORUM
    index, _ = state.captured.get(member.id, (0, ZERO_MAC))
    if certified <= index:
        return Outcome.STALE_INDEX
    state.captured[member.id] = (certified, entries[certified - entries[0].index].entry_mac)
    return CaptureJumpOk()


def certified_index(state: HsmState, request: CaptureJump, member: GroupState) -> int | None:
    """Return the index that a strict majority of valid captures of these entries proves, if any."""
    macs = {entry.index: entry.entry_mac for entry in request.entries}

    def is_valid(captured: Captured) -> bool:
        mac = macs.get(captured.index)
        return mac is not None and same(mac, captured.mac) and state.is_valid_vote(captured, request.realm, member)

    return elect(member.configuration, highest_votes(request.captures, is_valid))


def persist_state(state: HsmState) -> PersistStateOk:
    """Make all captured pairs durable and sign exactly what was written."""
    state.persist_captured()
    realm = state.persistent.realm
    if realm is None:
        return PersistStateOk(())
    hsm = state.persistent.id
    statements = []
    for group in sorted(realm.groups):
        pair = realm.groups[group].captured
        if pair is not None:
            index, mac = pair
            statement = state.macs.captured(hsm, realm.id, group, index, mac)
            statements.append(Captured(hsm, realm.id, group, index, mac, statement))
    return PersistStateOk(tuple(statements))
