"""The role clock rule, and what is known of groups."""

from __future__ import annotations

import pytest

from juicebox_hsm.consensus.types import Leader, Role, RoleStatus, SteppingDown, Witness
from juicebox_hsm.errors import InvariantViolation
from juicebox_hsm.host.group import Groups, GroupState, is_quiet
from juicebox_hsm.host.leadership.events import RoleAdopted
from juicebox_hsm.wire.rpc import AgentGroupInfo, AgentStatus, GroupRole, Refusal, RoleInfo
from tests.host.script import GROUP, REALM, hsm

MEMBERS = (hsm("a"), hsm("b"), hsm("c"))


def group(role: Role | None = None, at: int = 5) -> GroupState:
    state = GroupState(REALM, GROUP, MEMBERS, RoleStatus(Witness(), 0))
    state.adopt(RoleStatus(role or Witness(), at))
    return state


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
def test_leading_roles_begin_a_leadership(role: Role) -> None:
    """Leader and SteppingDown both need somebody to append, commit and answer, from `starting` on."""
    state = group()
    change = state.adopt(RoleStatus(role, 6))
    assert change.started is state.leader
    assert change.ended is None
    assert state.leader is not None
    assert (state.leader.starting, state.leader.next_index) == (7, 7)
    assert state.leader.snapshot(0.0).recorded == 6
    assert state.is_leader == isinstance(role, Leader)


def test_stepping_down_keeps_the_leadership() -> None:
    """What was begun is finished by the leadership that began it."""
    state = group(Leader(2))
    before = state.leader
    change = state.adopt(RoleStatus(SteppingDown(2), 6))
    assert state.leader is before
    assert change.started is change.ended is None


def test_witness_ends_the_leadership() -> None:
    """The one that ended is named, so that it is told."""
    state = group(Leader(2))
    before = state.leader
    change = state.adopt(RoleStatus(Witness(), 7))
    assert (change.ended, change.started, state.leader) == (before, None, None)


def test_new_leadership_replaces_an_unseen_end() -> None:
    """Leader at a later clock is another leadership even with the same `starting`: the HSM's state is fresh."""
    state = group(Leader(2), at=5)
    first = state.leader
    change = state.adopt(RoleStatus(Leader(2), 7))
    assert change.ended is first
    assert change.started is state.leader
    assert state.leader is not first


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


def test_requests_are_made_of_a_leading_group() -> None:
    """A group is given with its leadership while requests may be made of it; else the refusal says what is wrong."""
    groups = Groups()
    assert groups.leading(REALM, GROUP) is Refusal.INVALID_REALM
    state = group(Leader(2))
    groups.add(state)
    assert groups.leading(REALM, GROUP) == (state, state.leader)
    assert groups.leading(REALM, b"x" * 16) is Refusal.INVALID_GROUP
    state.adopt(RoleStatus(SteppingDown(2), 6))
    assert state.leader is not None
    state.leader.step(RoleAdopted(state.role), 0.0)
    assert groups.leading(REALM, GROUP) is Refusal.NOT_LEADER
    state.adopt(RoleStatus(Witness(), 7))
    assert groups.leading(REALM, GROUP) is Refusal.NOT_LEADER


def test_who_is_quiet() -> None:
    """A former leader counts as quiet once it is a witness of that very group and owes nobody an answer."""
    witness, leads = RoleInfo(GroupRole.WITNESS, 1, None), RoleInfo(GroupRole.STEPPING_DOWN, 1, 1)

    def told(realm: bytes, of: bytes, role: RoleInfo, waiting: int = 0) -> bool:
        info = AgentGroupInfo(realm, of, role, leading=False, waiting_clients=waiting)
        return is_quiet(AgentStatus(1.0, None, "u", "", [info]), REALM, GROUP)

    assert told(REALM, GROUP, witness)
    assert not told(REALM, GROUP, witness, waiting=1)
    assert not told(REALM, GROUP, leads)
    assert not told(b"x" * 16, GROUP, witness)
    assert not told(REALM, b"x" * 16, witness)
