"""The end of a group and what can no longer happen after it (hsm.md 12a; I20, I21; M21 to M25)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from juicebox_hsm.consensus.nvram import encode_state
from juicebox_hsm.consensus.types import Captured, Leader, LogEntry, Witness
from juicebox_hsm.errors import InvariantViolation
from juicebox_hsm.hsm.messages import (
    BecomeLeader,
    CancelPreparedTransfer,
    CaptureNext,
    Commit,
    CommitOk,
    CompleteTransfer,
    ForgetGroup,
    ForgetGroupOk,
    JoinGroup,
    NewGroup,
    NewGroupOk,
    NotLeader,
    Outcome,
    PersistState,
    PrepareTransfer,
    RetireGroup,
    RetireGroupOk,
    RoleOk,
    StepDown,
    StepDownOk,
)
from juicebox_hsm.hsm.state import GENERATION_MAX, Poisoned
from juicebox_hsm.ids import FULL_RANGE, GroupId, HsmId, RealmId
from juicebox_hsm.wire import requests as secrets
from tests.fakes.hsm import World, expect, refused

RECORD = b"\x40" + bytes(31)


def ended(size: int = 3) -> tuple[World, GroupId, LogEntry, tuple[Captured, ...]]:
    """Return a group that owned everything once and is retired now, with its retired entry and all captures."""
    world = World(size)
    group = world.new_group(list(range(size)), 0)
    world.move(world.first, 0, group, 0, FULL_RANGE)
    client = world.client(RECORD)
    world.open_session(group, 0, client)
    world.ask(group, 0, client, client.register2(2))
    world.move(group, 0, world.first, 0, FULL_RANGE)
    entry, captures = world.retire(group, 0)
    return world, group, entry, captures


def joining(world: World, group: GroupId, generations: tuple[int, ...] = ()) -> JoinGroup:
    """Return the request with which the group's members joined it, as a host that keeps everything has it."""
    configuration = tuple(sorted(world.id(number) for number in world.members[group]))
    statement = world.hsms[0]._state.macs.group_configuration(world.realm, group, configuration, generations)
    return JoinGroup(world.realm, group, configuration, statement, generations)


def test_a_group_ends_and_its_place_is_free() -> None:
    """All members forget a retired group, durably: its place among the sixteen is free, others are untouched."""
    world, group, entry, captures = ended()
    assert entry.retired
    assert (entry.partition, entry.transferring) == (None, None)
    for number in range(3):
        assert world.forget(group, number, entry, captures) == 1
        world.crash(number)
        realm = world.status(number).realm
        assert realm is not None
        assert realm.generation == 1
        assert [known.id for known in realm.groups] == ([world.first] if number == 0 else [])
        statements = world.persist(number, group)
        assert statements == ()
    for _ in range(3):
        again = world.new_group([0, 1, 2])
        entry, captures = world.retire(again, 0)
        for number in range(3):
            world.forget(again, number, entry, captures)
    assert world.generation(1) == 4


def test_m21_retire_checks_in_order() -> None:
    """RetireGroup: not a member, not leader, still an owner, a transfer either way: each changes nothing."""
    world = World(2)
    group = world.new_group([0, 1], 0)
    hsm = world.hsms[0]
    assert refused(hsm, RetireGroup(RealmId(bytes(16)), group)) is Outcome.INVALID_REALM
    assert refused(hsm, RetireGroup(world.realm, GroupId(bytes(16)))) is Outcome.INVALID_GROUP
    assert refused(world.hsms[1], RetireGroup(world.realm, group)) == NotLeader()
    assert refused(hsm, RetireGroup(world.realm, world.first)) is Outcome.STILL_OWNER
    prepared = world.prepare(world.first, group, 0, FULL_RANGE)
    world.commit(group, 0)
    assert refused(hsm, RetireGroup(world.realm, group)) is Outcome.OTHER_TRANSFER_PENDING
    out = world.send(0, world.out_request(world.first, group, FULL_RANGE, prepared))
    assert not isinstance(out, Outcome)
    assert refused(hsm, RetireGroup(world.realm, world.first)) is Outcome.OTHER_TRANSFER_PENDING


def test_m22_nothing_follows_a_retired_entry() -> None:
    """I20: a leader of a retired group, also a later one, answers nothing that would append; retiring again is Ok."""
    world, group, entry, _ = ended()
    client = world.client(RECORD, "late")
    other = world.first
    for leader in (0, 1):
        if leader == 1:
            expect(world.send(1, BecomeLeader(world.realm, group, entry)), RoleOk)
        hsm = world.hsms[leader]
        clock = hsm._state.groups[group].clock
        assert refused(hsm, RetireGroup(world.realm, group)) == RetireGroupOk(None, entry.index, clock)
        assert refused(hsm, PrepareTransfer(world.realm, other, group, FULL_RANGE)) is Outcome.RETIRED
        assert refused(hsm, CancelPreparedTransfer(world.realm, other, group, FULL_RANGE)) is Outcome.NOT_PREPARED
        assert refused(hsm, CompleteTransfer(world.realm, group, other, FULL_RANGE)) is Outcome.NOT_TRANSFERRING
        message = world.app_message(group, client, client.handshake(secrets.Recover1()), proof=b"")
        assert refused(hsm, message) is Outcome.NOT_OWNER
        with pytest.raises(InvariantViolation, match="follows a retired one"):
            hsm._state.new_entry(group, entry, None)


def test_m22_a_rival_of_the_retired_entry_never_commits() -> None:
    """A leader that did not see the end goes on alone: its entries find no majority, forgotten group or not."""
    world = World(3)
    group = world.new_group([0, 1, 2], 0)
    world.lead(group, 2)
    before = world.logs[group][-1]
    rival = expect(world.send(2, PrepareTransfer(world.realm, world.first, group, FULL_RANGE)), object)
    entry = expect(world.send(0, RetireGroup(world.realm, group)), RetireGroupOk).entry
    assert entry is not None
    assert entry.prev_mac == before.entry_mac
    world.store(group, entry)
    captures = world.witness(group, [0, 1])
    expect(world.send(0, Commit(world.realm, group, captures)), CommitOk)
    foreign = getattr(rival, "entry", None)
    assert isinstance(foreign, LogEntry)
    expect(world.send(2, CaptureNext(world.realm, group, (foreign,))), RoleOk)
    own = world.persist(2, group)
    assert refused(world.hsms[2], Commit(world.realm, group, (*captures, *own))) is Outcome.NO_QUORUM
    for number in (0, 1):
        world.forget(group, number, entry, captures)
    assert refused(world.hsms[2], Commit(world.realm, group, (*captures, *own))) is Outcome.NO_QUORUM
    assert world.forget(group, 2, entry, captures) == 1, "the odd one out leaves too, with what it had of its own"


def test_m23_forget_checks_in_order() -> None:
    """ForgetGroup: membership, the entry's mac, that it is retired, a strict majority of the group for exactly it."""
    world, group, entry, captures = ended()
    hsm = world.hsms[2]
    other = world.new_group([0, 1, 2], 0)
    last, of_other = world.retire(other, 0)

    def answer(shown: LogEntry = entry, votes: tuple[Captured, ...] = captures, realm: RealmId = world.realm) -> object:
        return refused(hsm, ForgetGroup(realm, group, shown, votes))

    assert answer(realm=RealmId(bytes(16))) is Outcome.INVALID_REALM
    assert refused(hsm, ForgetGroup(world.realm, GroupId(bytes(16)), entry, captures)) is Outcome.INVALID_GROUP
    assert answer(replace(entry, index=entry.index + 1)) is Outcome.INVALID_MAC
    assert answer(replace(world.logs[group][-2], retired=True)) is Outcome.INVALID_MAC
    assert answer(last) is Outcome.INVALID_MAC, "the end of another group"
    earlier = world.logs[group][-2]
    assert answer(earlier) is Outcome.NOT_RETIRED
    assert answer(votes=()) is Outcome.NO_QUORUM
    assert answer(votes=captures[:1] * 3) is Outcome.NO_QUORUM
    assert answer(votes=of_other) is Outcome.NO_QUORUM
    assert answer(votes=tuple(replace(vote, group=group) for vote in of_other)) is Outcome.NO_QUORUM
    stranger = tuple(replace(vote, hsm=HsmId(bytes([number]) * 16)) for number, vote in enumerate(captures))
    assert answer(votes=stranger) is Outcome.NO_QUORUM
    macs = hsm._state.macs
    of_earlier = tuple(
        replace(
            vote,
            index=earlier.index,
            mac=earlier.entry_mac,
            statement=macs.captured(vote.hsm, world.realm, group, earlier.index, earlier.entry_mac),
        )
        for vote in captures
    )
    assert answer(votes=of_earlier) is Outcome.NO_QUORUM
    assert world.send(2, ForgetGroup(world.realm, group, entry, captures[:2])) == ForgetGroupOk(1)
    assert answer() is Outcome.INVALID_GROUP, "and only once"


def test_m24_a_forgotten_group_is_never_joined_again() -> None:
    """I21: with the old statement and a prefix of the old log no member is talked into a second life of the group.

    This is the attack that generations close: the prefix ends before the range left, and a group that led from it
    would serve every record at its old guess count.
    """
    world, group, entry, captures = ended()
    join = joining(world, group)
    for number in range(3):
        world.forget(group, number, entry, captures)
    for number in range(3):
        assert refused(world.hsms[number], join) is Outcome.STALE_GENERATION
        world.crash(number)
        assert refused(world.hsms[number], join) is Outcome.STALE_GENERATION
        prefix = tuple(world.logs[group][:3])
        assert refused(world.hsms[number], CaptureNext(world.realm, group, prefix)) is Outcome.INVALID_GROUP
        assert world.send(number, BecomeLeader(world.realm, group, prefix[-1])) is Outcome.INVALID_GROUP
        assert refused(world.hsms[number], Commit(world.realm, group, captures)) is Outcome.INVALID_GROUP


def test_m24_a_statement_for_a_later_generation() -> None:
    """A creator signs for itself only in its own generation, else it could come back after it has forgotten."""
    world = World(2)
    ordered = sorted(range(2), key=world.id)
    signed = tuple((world.id(number), world.statement(number)) for number in ordered)
    for own in (1, GENERATION_MAX):
        ahead = tuple(own if number == 0 else 0 for number in ordered)
        assert refused(world.hsms[0], NewGroup(world.realm, signed, ahead)) is Outcome.STALE_GENERATION
    for shape in ((0,), (0, 0, 0), (0, -1), (0, GENERATION_MAX + 1)):
        assert refused(world.hsms[0], NewGroup(world.realm, signed, shape)) is Outcome.INVALID_CONFIGURATION
    later = tuple(int(number == 1) for number in ordered)
    made = expect(world.send(0, NewGroup(world.realm, signed, later)), NewGroupOk)
    configuration = tuple(member for member, _ in signed)

    def answer(generations: tuple[int, ...]) -> object:
        return refused(world.hsms[1], JoinGroup(world.realm, made.group, configuration, made.statement, generations))

    assert answer(later) is Outcome.STALE_GENERATION
    assert answer(()) is Outcome.INVALID_STATEMENT
    assert answer((0, 0)) is Outcome.INVALID_STATEMENT
    assert answer((1,)) is Outcome.INVALID_CONFIGURATION
    gone = world.new_group([1])
    world.forget(gone, 1, *world.retire(gone, 1))
    assert world.generation(1) == 1
    expect(world.send(1, JoinGroup(world.realm, made.group, configuration, made.statement, later)), RoleOk)
    assert refused(world.hsms[1], JoinGroup(world.realm, made.group, configuration, made.statement, later)) == RoleOk(
        world.hsms[1]._state.groups[made.group].status()
    ), "a repetition changes nothing"


def test_m24_a_member_that_joins_late_cannot_revive_the_group() -> None:
    """A member that never joined may still do so; old statements prove nothing new, so its fork stays its own."""
    world = World(3)
    ordered = sorted(range(3), key=world.id)
    signed = tuple((world.id(number), world.statement(number)) for number in ordered)
    made = expect(world.send(0, NewGroup(world.realm, signed)), NewGroupOk)
    configuration = tuple(member for member, _ in signed)
    join = JoinGroup(world.realm, made.group, configuration, made.statement)
    expect(world.send(1, join), RoleOk)
    world.logs[made.group], world.members[made.group] = [made.entry], [0, 1]
    captures = world.witness(made.group)
    world.commit(made.group, 0)
    entry, certificate = world.retire(made.group, 0)
    for number in (0, 1):
        world.forget(made.group, number, entry, certificate)
    expect(world.send(2, join), RoleOk)
    expect(world.send(2, CaptureNext(world.realm, made.group, (made.entry,))), RoleOk)
    world.send(2, PersistState())
    expect(world.send(2, BecomeLeader(world.realm, made.group, made.entry)), RoleOk)
    fork = world.send(2, PrepareTransfer(world.realm, world.first, made.group, FULL_RANGE))
    foreign = getattr(fork, "entry", None)
    assert isinstance(foreign, LogEntry)
    expect(world.send(2, CaptureNext(world.realm, made.group, (foreign,))), RoleOk)
    votes = (*captures, *world.persist(2, made.group), *certificate)
    assert expect(world.send(2, Commit(world.realm, made.group, votes)), CommitOk).committed == 1, "what was committed"
    world.forget(made.group, 2, entry, certificate)


def test_m25_a_failed_write_forgets_nothing() -> None:
    """H6: the group leaves memory only after it has left the NVRAM; after a failed write a restart knows it."""
    world, group, entry, captures = ended()
    world.platforms[1].fail()
    with pytest.raises(Poisoned):
        world.send(1, ForgetGroup(world.realm, group, entry, captures))
    world.platforms[1].on_write = None
    world.crash(1)
    assert group in world.hsms[1]._state.groups
    assert world.generation(1) == 0
    assert world.forget(group, 1, entry, captures) == 1


def test_forgetting_keeps_other_groups_as_they_are() -> None:
    """A leader of another group goes on leading it, with what it captured but did not yet persist."""
    world, group, entry, captures = ended()
    other = world.new_group([0, 1, 2], 0, commit=False)
    world.capture(0, other)
    role = world.hsms[0]._state.groups[other].status()
    world.forget(group, 0, entry, captures)
    assert world.hsms[0]._state.groups[other].status() == role
    assert world.captured(0, other) == 1
    assert encode_state(world.hsms[0]._state.persistent) == world.platforms[0].nvram
    world.commit(other, 0)


def test_the_retired_entry_may_be_committed_by_another_leader() -> None:
    """A leader lost after the retired entry was stored: the next one leads from it, commits it, and cannot go on."""
    world = World(3)
    group = world.new_group([0, 1, 2], 0)
    entry = expect(world.send(0, RetireGroup(world.realm, group)), RetireGroupOk).entry
    assert entry is not None
    world.store(group, entry)
    world.crash(0)
    world.lead(group, 1)
    role = world.hsms[1]._state.groups[group].status().role
    assert role == Leader(entry.index + 1)
    assert world.commit(group, 1).committed == entry.index
    expect(world.send(1, StepDown(world.realm, group, force=False)), StepDownOk)
    assert world.hsms[1]._state.groups[group].status().role == Witness()
