"""Joining realms and groups, and the status (hsm.md 9)."""

from __future__ import annotations

from itertools import pairwise

from juicebox_hsm.consensus.macs import same
from juicebox_hsm.consensus.nvram import PersistentGroup, PersistentRealm, PersistentState
from juicebox_hsm.consensus.types import GROUP_MEMBERS_MAX, GROUPS_PER_HSM_MAX, Partition
from juicebox_hsm.hsm.messages import (
    GroupStatus,
    JoinGroup,
    JoinRealm,
    JoinRealmOk,
    LeaderStatus,
    NewGroup,
    NewGroupOk,
    NewRealmOk,
    Outcome,
    RealmStatus,
    RoleOk,
    StatusOk,
)
from juicebox_hsm.hsm.state import GENERATION_MAX, GroupState, HsmState, LeaderState, WitnessState
from juicebox_hsm.ids import FULL_RANGE, GroupId, HsmId, RealmId
from juicebox_hsm.merkle.kernel import empty_root


def status(state: HsmState) -> StatusOk:
    """Report identity, memberships and roles. Captured pairs are the persisted ones; groups are sorted by id."""
    realm = state.persistent.realm
    reported = None
    if realm is not None:
        groups = tuple(
            GroupStatus(
                group,
                realm.groups[group].configuration,
                realm.groups[group].captured,
                _leader_status(state.groups[group]),
                state.groups[group].status(),
            )
            for group in sorted(realm.groups)
        )
        reported = RealmStatus(realm.id, realm.statement, groups, realm.generation)
    return StatusOk(state.persistent.id, reported, state.keys.communication_public)


def _leader_status(group: GroupState) -> LeaderStatus | None:
    role = group.role
    if not isinstance(role, LeaderState):
        return None
    last = role.log.last
    owned = None if last.partition is None else last.partition.range
    return LeaderStatus(role.committed, last, owned, last.transferring)


def new_realm(state: HsmState) -> NewRealmOk | Outcome:
    """Create a realm whose one group is this HSM alone; entry 1 owns everything and is not captured yet."""
    if state.persistent.realm is not None:
        return Outcome.HAVE_REALM
    hsm = state.persistent.id
    realm, group = RealmId(state.draw_id()), GroupId(state.draw_id())
    configuration = (hsm,)
    statement = state.macs.hsm_realm(realm, hsm, state.keys.signed_parts())
    groups = {group: PersistentGroup(configuration, None)}
    state.persist(PersistentState(hsm, PersistentRealm(realm, statement, groups)))
    root, delta = empty_root(FULL_RANGE.start, FULL_RANGE.end)
    entry = state.new_entry(group, None, Partition(FULL_RANGE, root))
    member = GroupState(group, configuration, state.new_leader(entry), state.platform.clock_start)
    state.groups[group] = member
    return NewRealmOk(realm, group, entry, delta, member.status())


def join_realm(state: HsmState, request: JoinRealm) -> JoinRealmOk | Outcome:
    """Join the realm of a peer that proves to hold the same keys."""
    own = state.persistent.realm
    hsm = state.persistent.id
    if own is not None:
        return JoinRealmOk(hsm) if own.id == request.realm else Outcome.HAVE_OTHER_REALM
    if not state.has_own_keys(request.realm, request.peer, request.statement):
        return Outcome.INVALID_STATEMENT
    statement = state.macs.hsm_realm(request.realm, hsm, state.keys.signed_parts())
    state.persist(PersistentState(hsm, PersistentRealm(request.realm, statement, {})))
    return JoinRealmOk(hsm)


def _is_configuration(state: HsmState, members: tuple[HsmId, ...]) -> bool:
    """Tell whether `members` are 1 to 9 ids, strictly ascending, this HSM among them."""
    return (
        1 <= len(members) <= GROUP_MEMBERS_MAX
        and all(len(member) == len(state.persistent.id) for member in members)
        and all(left < right for left, right in pairwise(members))
        and state.persistent.id in members
    )


def _own_generation(state: HsmState, members: tuple[HsmId, ...], generations: tuple[int, ...]) -> int | None:
    """Return the generation that `generations` (empty for all 0) claim for this HSM; None if they are no such list."""
    if not generations:
        return 0
    if len(generations) != len(members) or not all(0 <= claimed <= GENERATION_MAX for claimed in generations):
        return None
    return generations[members.index(state.persistent.id)]


def new_group(state: HsmState, request: NewGroup) -> NewGroupOk | Outcome:
    """Create a group without a partition, led by this HSM."""
    realm = state.in_realm(request.realm)
    if realm is None:
        return Outcome.INVALID_REALM
    if len(realm.groups) >= GROUPS_PER_HSM_MAX:
        return Outcome.TOO_MANY_GROUPS
    if len(request.members) > GROUP_MEMBERS_MAX:
        return Outcome.INVALID_CONFIGURATION
    if not all(state.has_own_keys(realm.id, hsm, statement) for hsm, statement in request.members):
        return Outcome.INVALID_STATEMENT
    configuration = tuple(hsm for hsm, _ in request.members)
    if not _is_configuration(state, configuration):
        return Outcome.INVALID_CONFIGURATION
    own = _own_generation(state, configuration, request.generations)
    if own is None:
        return Outcome.INVALID_CONFIGURATION
    if own != realm.generation:  # a later one would let this HSM come back to the group after it forgot it
        return Outcome.STALE_GENERATION
    group = GroupId(state.draw_id())
    state.persist_group(realm, group, configuration)
    entry = state.new_entry(group, None, None)
    member = GroupState(group, configuration, state.new_leader(entry), state.platform.clock_start)
    state.groups[group] = member
    statement = state.macs.group_configuration(realm.id, group, configuration, request.generations)
    return NewGroupOk(group, statement, entry, member.status())


def join_group(state: HsmState, request: JoinGroup) -> RoleOk | Outcome:
    """Join a group that a peer created; repeating it changes nothing.

    The statement admits this HSM in one generation, and leaving any group ends that: what it captured of a group that
    it forgot cannot be asked of it a second time (I21).
    """
    if not _is_configuration(state, request.configuration):
        return Outcome.INVALID_CONFIGURATION
    own = _own_generation(state, request.configuration, request.generations)
    if own is None:
        return Outcome.INVALID_CONFIGURATION
    realm = state.in_realm(request.realm)
    if realm is None:
        return Outcome.INVALID_REALM
    expected = state.macs.group_configuration(realm.id, request.group, request.configuration, request.generations)
    if not same(expected, request.statement):
        return Outcome.INVALID_STATEMENT
    known = state.groups.get(request.group)
    if known is not None:
        return RoleOk(known.status())
    if own != realm.generation:
        return Outcome.STALE_GENERATION
    if len(realm.groups) >= GROUPS_PER_HSM_MAX:
        return Outcome.TOO_MANY_GROUPS
    state.persist_group(realm, request.group, request.configuration)
    member = GroupState(request.group, request.configuration, WitnessState(), state.platform.clock_start)
    state.groups[request.group] = member
    return RoleOk(member.status())
