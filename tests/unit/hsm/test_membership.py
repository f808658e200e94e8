"""Realms and groups (hsm.md 9; M1 and M2)."""

from __future__ import annotations

import pytest

from juicebox_hsm.consensus.nvram import decode_state
from juicebox_hsm.consensus.types import GROUP_MEMBERS_MAX, ZERO_MAC, Leader, RoleStatus, Witness
from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.hsm.messages import (
    JoinGroup,
    JoinRealm,
    JoinRealmOk,
    NewGroup,
    NewGroupOk,
    NewRealm,
    NewRealmOk,
    Outcome,
    RoleOk,
)
from juicebox_hsm.ids import FULL_RANGE, GroupId, HsmId, RealmId
from juicebox_hsm.merkle.kernel import empty_root
from tests.fakes.hsm import MemoryPlatform, World, expect, realm_keys, refused


def test_new_realm_owns_everything() -> None:
    """Entry 1 owns the full range with the empty tree, zero prev_mac, and is not captured yet."""
    platform = MemoryPlatform(realm_keys())
    hsm = Hsm(platform)
    created = expect(hsm.handle(NewRealm()), NewRealmOk)
    assert created.entry.index == 1
    assert created.entry.prev_mac == ZERO_MAC
    assert created.entry.partition is not None
    assert created.entry.partition.range == FULL_RANGE
    assert (created.entry.partition.root_hash, created.delta) == empty_root(FULL_RANGE.start, FULL_RANGE.end)
    assert created.role == RoleStatus(Leader(2), 1)
    stored = decode_state(platform.nvram)
    assert stored is not None
    assert stored.realm is not None
    assert stored.realm.groups[created.group].captured is None
    assert stored.realm.groups[created.group].configuration == (stored.id,)


def test_m1_one_realm_per_hsm() -> None:
    """A member neither creates nor joins another realm; joining the own realm again is fine."""
    world = World(2)
    assert refused(world.hsms[1], NewRealm()) is Outcome.HAVE_REALM
    other = RealmId(bytes(16))
    assert refused(world.hsms[1], JoinRealm(other, world.id(0), world.statement(0))) is Outcome.HAVE_OTHER_REALM
    again = refused(world.hsms[1], JoinRealm(world.realm, world.id(0), bytes(32)))
    assert again == JoinRealmOk(world.id(1))


@pytest.mark.parametrize("case", ["other keys", "other realm", "other peer", "garbage", "empty", "long realm"])
def test_m1_joining_takes_proof_of_the_same_keys(case: str) -> None:
    """The peer's statement must be for this realm, this peer and the very keys this HSM holds."""
    world = World(1)
    realm, peer, statement = world.realm, world.id(0), world.statement(0)
    keys = realm_keys(1 if case == "other keys" else 0)
    if case == "other realm":
        realm = RealmId(bytes(16))
    elif case == "other peer":
        peer = HsmId(bytes(16))
    elif case == "garbage":
        statement = bytes(32)
    elif case == "empty":
        statement = b""
    elif case == "long realm":
        realm = RealmId(world.realm + b"\0")
    stranger = Hsm(MemoryPlatform(keys, "stranger"))
    assert refused(stranger, JoinRealm(realm, peer, statement)) is Outcome.INVALID_STATEMENT


def test_join_realm_stores_the_own_statement() -> None:
    """A joiner can itself introduce the next one."""
    world = World(2)
    third = Hsm(MemoryPlatform(realm_keys(), "third"))
    expect(third.handle(JoinRealm(world.realm, world.id(1), world.statement(1))), JoinRealmOk)


def members(world: World, *numbers: int) -> tuple[tuple[HsmId, bytes], ...]:
    return tuple(sorted((world.id(number), world.statement(number)) for number in numbers))


def test_new_group_starts_without_a_partition() -> None:
    """A new group owns nothing and is led from index 2 by its creator; its members follow as witnesses."""
    world = World(2)
    created = expect(world.send(1, NewGroup(world.realm, members(world, 0, 1))), NewGroupOk)
    assert (created.entry.index, created.entry.partition, created.entry.prev_mac) == (1, None, ZERO_MAC)
    assert isinstance(created.role.role, Leader)
    configuration = tuple(member for member, _ in members(world, 0, 1))
    joined = world.send(0, JoinGroup(world.realm, created.group, configuration, created.statement))
    assert joined == RoleOk(RoleStatus(Witness(), 1))


def test_m2_new_group_checks_in_order() -> None:
    """Each wrong configuration gets its documented refusal and changes nothing."""
    world = World(3)
    hsm = world.hsms[0]
    good = members(world, 0, 1, 2)
    stranger = HsmId(b"\xff" * 16)

    def answer(chosen: tuple[tuple[HsmId, bytes], ...], realm: RealmId = world.realm) -> object:
        return refused(hsm, NewGroup(realm, chosen))

    assert answer(good, RealmId(bytes(16))) is Outcome.INVALID_REALM
    assert answer(good * 4, RealmId(bytes(16))) is Outcome.INVALID_REALM
    assert answer(good * 4) is Outcome.INVALID_CONFIGURATION
    assert answer(tuple((stranger, bytes(32)) for _ in range(10))) is Outcome.INVALID_CONFIGURATION
    assert answer((*good, (stranger, bytes(32)))) is Outcome.INVALID_STATEMENT
    assert answer((*good[:2], (good[2][0], b""))) is Outcome.INVALID_STATEMENT
    assert answer((*good[:2], (HsmId(good[2][0][:15]), good[2][1]))) is Outcome.INVALID_STATEMENT
    assert answer((*good[:2], (good[2][0], good[1][1]))) is Outcome.INVALID_STATEMENT
    assert answer(()) is Outcome.INVALID_CONFIGURATION
    assert answer(good[::-1]) is Outcome.INVALID_CONFIGURATION
    assert answer((good[0], good[0], good[1])) is Outcome.INVALID_CONFIGURATION
    assert answer(members(world, 1, 2)) is Outcome.INVALID_CONFIGURATION


def join_arguments(world: World) -> tuple[GroupId, tuple[HsmId, ...], bytes]:
    """Create a group of all at HSM 0 and return what the others need to join."""
    created = expect(world.send(0, NewGroup(world.realm, members(world, *range(world.size)))), NewGroupOk)
    configuration = tuple(member for member, _ in members(world, *range(world.size)))
    return created.group, configuration, created.statement


def test_m2_join_group_checks_in_order() -> None:
    """Shape first, then realm, then the statement for exactly this realm, group and configuration."""
    world = World(3)
    group, configuration, statement = join_arguments(world)
    hsm = world.hsms[1]
    nowhere = RealmId(bytes(16))

    def answer(chosen: tuple[HsmId, ...], realm: RealmId = world.realm, signed: bytes = statement) -> object:
        return refused(hsm, JoinGroup(realm, group, chosen, signed))

    assert answer((), nowhere) is Outcome.INVALID_CONFIGURATION
    assert answer(configuration[::-1]) is Outcome.INVALID_CONFIGURATION
    assert answer((configuration[0], *configuration)) is Outcome.INVALID_CONFIGURATION
    assert answer(tuple(sorted({*configuration} - {world.id(1)}))) is Outcome.INVALID_CONFIGURATION
    assert answer(tuple(sorted((*configuration, HsmId(b""))))) is Outcome.INVALID_CONFIGURATION
    ten = tuple(sorted((world.id(1), *(HsmId(bytes([number]) * 16) for number in range(9)))))
    assert answer(ten) is Outcome.INVALID_CONFIGURATION
    assert answer(configuration, nowhere) is Outcome.INVALID_REALM
    assert answer(configuration, signed=bytes(32)) is Outcome.INVALID_STATEMENT
    assert answer(configuration, signed=b"") is Outcome.INVALID_STATEMENT
    fewer = tuple(sorted((world.id(0), world.id(1))))
    assert answer(fewer) is Outcome.INVALID_STATEMENT
    elsewhere = JoinGroup(world.realm, world.first, configuration, statement)
    assert refused(hsm, elsewhere) is Outcome.INVALID_STATEMENT
    assert refused(hsm, JoinGroup(world.realm, GroupId(group + b"\0"), configuration, statement)) is (
        Outcome.INVALID_STATEMENT
    )


def test_a_group_of_nine() -> None:
    """Nine members, the most there may be, are a group: created, joined, committed by five of them."""
    world = World(GROUP_MEMBERS_MAX)
    group = world.new_group(list(range(9)), commit=False)
    assert world.commit(group, world.members[group][0], voters=world.members[group][:5]).committed == 1


def test_m2_joining_again_never_overwrites() -> None:
    """A repeated JoinGroup is Ok and changes neither configuration nor captured head, at the limit too."""
    world = World(2)
    group, configuration, statement = join_arguments(world)
    request = JoinGroup(world.realm, group, configuration, statement)
    expect(world.send(1, request), RoleOk)
    assert refused(world.hsms[1], request) == RoleOk(RoleStatus(Witness(), 1))
    for _ in range(15):
        world.new_group([1], commit=False)
    assert refused(world.hsms[1], request) == RoleOk(RoleStatus(Witness(), 1))


def test_m2_sixteen_groups() -> None:
    """The 17th group is refused, created or joined."""
    world = World(2)
    for _ in range(15):
        world.new_group([0], commit=False)
    assert refused(world.hsms[0], NewGroup(world.realm, members(world, 0))) is Outcome.TOO_MANY_GROUPS
    too_many = members(world, 0) * 10
    assert refused(world.hsms[0], NewGroup(world.realm, too_many)) is Outcome.TOO_MANY_GROUPS
    created = expect(world.send(1, NewGroup(world.realm, members(world, 0, 1))), NewGroupOk)
    configuration = tuple(member for member, _ in members(world, 0, 1))
    request = JoinGroup(world.realm, created.group, configuration, created.statement)
    assert refused(world.hsms[0], request) is Outcome.TOO_MANY_GROUPS


def test_status_reports_the_persisted_head() -> None:
    """Status shows the durable pair, not the volatile one, and the leader's view of its log."""
    world = World(1)
    group = world.new_group([0], commit=False)
    world.capture(0, group)
    realm = world.status(0).realm
    assert realm is not None
    shown = {kept.id: kept for kept in realm.groups}
    assert list(shown) == sorted(shown)
    assert shown[group].captured is None
    leader = shown[world.first].leader
    assert leader is not None
    assert (leader.committed, leader.last, leader.owned_range) == (1, world.logs[world.first][0], FULL_RANGE)
