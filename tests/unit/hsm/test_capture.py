"""CaptureNext (hsm.md 10; M3, M4, H4)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from juicebox_hsm.consensus.types import LogEntry, Partition, SteppingDown, TransferringIn, Witness
from juicebox_hsm.hsm.messages import (
    BecomeLeader,
    CaptureNext,
    Commit,
    CommitOk,
    Outcome,
    RoleOk,
    StepDown,
    StepDownOk,
)
from juicebox_hsm.hsm.state import LeaderState, SteppingDownState
from juicebox_hsm.ids import FULL_RANGE, GroupId, HsmId, RealmId
from juicebox_hsm.wire import requests as secrets
from tests.fakes.hsm import World, expect, refused


def three() -> tuple[World, GroupId]:
    """Return three HSMs in one group that owns everything, led by HSM 0."""
    world = World(3)
    group = world.new_group([0, 1, 2])
    world.move(world.first, 0, group, 0, FULL_RANGE)
    return world, group


def produce(world: World, group: GroupId, leader: int, count: int, seed: object = 0) -> list[LogEntry]:
    """Let a leader make entries without storing them."""
    client = world.client(b"\1" * 32, seed)
    log = world.logs[group]
    made = []
    for _ in range(count):
        made.append(world.app(group, leader, client, secrets.Register1()).entry)
        client.session = None
    world.logs[group] = log[: len(log) - count]
    return made


def rival(world: World, group: GroupId, count: int, leader: int = 1) -> list[LogEntry]:
    """Let another HSM lead from the stored tail and make rival entries."""
    world.lead(group, leader)
    return produce(world, group, leader, count, seed="rival")


def test_m3_checks_in_order() -> None:
    """Empty list, realm, group, mac, predecessor, chain: each is refused and leaves everything as it was."""
    world, group = three()
    (entry,) = produce(world, group, 0, 1)
    hsm = world.hsms[1]

    def answer(*entries: LogEntry, realm: RealmId = world.realm, of: GroupId = group) -> object:
        return refused(hsm, CaptureNext(realm, of, entries))

    nowhere = RealmId(bytes(16))
    assert answer(realm=nowhere) is Outcome.MISSING_ENTRIES
    assert answer(entry, realm=nowhere, of=GroupId(b"")) is Outcome.INVALID_REALM
    assert answer(entry, of=GroupId(b"")) is Outcome.INVALID_GROUP
    assert answer(entry, of=world.first) is Outcome.INVALID_GROUP, "HSM 1 is not in the first group"
    assert answer(world.logs[world.first][-1]) is Outcome.INVALID_MAC, "an entry of another group"
    assert answer(world.logs[group][0]) is Outcome.MISSING_PREV, "a repeat"
    later = produce_on(world, group, entry)
    assert answer(later) is Outcome.MISSING_PREV, "a gap"
    (other,) = rival_on(world, group)
    expect(world.send(1, CaptureNext(world.realm, group, (entry,))), RoleOk)
    successor = replace(later, prev_mac=other.entry_mac)
    assert refused(hsm, CaptureNext(world.realm, group, (successor,))) is Outcome.INVALID_MAC
    assert refused(hsm, CaptureNext(world.realm, group, (entry,))) is Outcome.MISSING_PREV


def produce_on(world: World, group: GroupId, entry: LogEntry) -> LogEntry:
    """Return one more entry of leader 0 after `entry`."""
    world.logs[group].append(entry)
    (later,) = produce(world, group, 0, 1)
    world.logs[group].pop()
    return later


def rival_on(world: World, group: GroupId) -> list[LogEntry]:
    return rival(world, group, 1, leader=2)


ALTERATIONS = {
    "hsm": lambda entry: replace(entry, hsm=HsmId(bytes(16))),
    "partition": lambda entry: replace(entry, partition=Partition(FULL_RANGE, bytes(32))),
    "no partition": lambda entry: replace(entry, partition=None),
    "marker": lambda entry: replace(entry, transferring=TransferringIn(GroupId(bytes(16)), FULL_RANGE, 1)),
    "consumed": lambda entry: replace(entry, consumed=((GroupId(bytes(16)), 1),)),
    "prev_mac": lambda entry: replace(entry, prev_mac=bytes(32)),
    "index": lambda entry: replace(entry, index=entry.index + 1),
    "mac": lambda entry: replace(entry, entry_mac=bytes(32)),
    "short mac": lambda entry: replace(entry, entry_mac=b""),
    "huge index": lambda entry: replace(entry, index=2**70),
}


@pytest.mark.parametrize("name", sorted(ALTERATIONS))
def test_m3_any_altered_field_is_refused(name: str) -> None:
    """An entry with one field changed is not captured."""
    world, group = three()
    (entry,) = produce(world, group, 0, 1)
    altered = ALTERATIONS[name](entry)
    assert refused(world.hsms[1], CaptureNext(world.realm, group, (altered,))) is Outcome.INVALID_MAC


def test_m3_wrong_chain() -> None:
    """An authentic entry that continues another branch is not captured."""
    world, group = three()
    first = rival(world, group, 2)
    mine = produce(world, group, 0, 2)
    expect(world.send(2, CaptureNext(world.realm, group, (mine[0],))), RoleOk)
    assert refused(world.hsms[2], CaptureNext(world.realm, group, (first[1],))) is Outcome.INVALID_CHAIN


def test_m3_first_entry() -> None:
    """The first capture of a group is index 1 with zero prev_mac."""
    world = World(2)
    group = world.new_group([0, 1], commit=False)
    signer = world.hsms[0]._state
    genuine = world.logs[group][0]
    crooked = replace(genuine, prev_mac=b"\1" * 32)
    crooked = replace(crooked, entry_mac=signer.macs.log_entry(world.realm, group, crooked))
    later = signer.new_entry(group, genuine, None)
    assert refused(world.hsms[1], CaptureNext(world.realm, group, (crooked,))) is Outcome.INVALID_CHAIN
    assert refused(world.hsms[1], CaptureNext(world.realm, group, (later,))) is Outcome.MISSING_PREV
    expect(world.send(1, CaptureNext(world.realm, group, (genuine, later))), RoleOk)


def test_i16_prefix_stays_captured() -> None:
    """When a later entry of the request is refused, the earlier ones stay captured."""
    world, group = three()
    entries = produce(world, group, 0, 3)
    request = CaptureNext(world.realm, group, (entries[0], entries[1], replace(entries[2], index=1)))
    assert world.send(1, request) is Outcome.INVALID_MAC
    assert world.captured(1, group) == entries[1].index


def leader_state(world: World, group: GroupId, number: int = 0) -> LeaderState | SteppingDownState:
    role = world.hsms[number]._state.groups[group].role
    assert isinstance(role, LeaderState | SteppingDownState)
    return role


def test_own_entries_are_captured_without_consequence() -> None:
    """A leader that captures its own entries stays leader."""
    world, group = three()
    entries = produce(world, group, 0, 2)
    role = expect(world.send(0, CaptureNext(world.realm, group, tuple(entries))), RoleOk).role
    assert "Leader" in repr(role.role)
    assert world.captured(0, group) == entries[1].index


def test_m4_rival_at_the_next_index() -> None:
    """Somebody else's entry right after the last committed own one ends the leadership at once."""
    world, group = three()
    (other,) = rival(world, group, 1)
    role = expect(world.send(0, CaptureNext(world.realm, group, (other,))), RoleOk).role
    assert isinstance(role.role, Witness)


def test_m4_rival_beyond_the_last_while_uncommitted() -> None:
    """With own entries uncommitted, a foreign entry beyond them makes the leader step down at its last one."""
    world, group = three()
    mine = produce(world, group, 0, 2)
    world.logs[group] += mine
    world.capture(1, group)
    world.persist(1, group)
    (other,) = rival(world, group, 1)
    request = CaptureNext(world.realm, group, (*mine, other))
    role = expect(world.send(0, request), RoleOk).role
    assert isinstance(role.role, SteppingDown)
    state = leader_state(world, group)
    assert isinstance(state, SteppingDownState)
    assert state.stepdown_at == mine[-1].index
    assert state.abandoned == []
    assert state.log.last == other
    world.send(1, CaptureNext(world.realm, group, (other,)))
    captures = (*world.persist(0, group), *world.persist(1, group))
    done = expect(world.send(0, Commit(world.realm, group, captures)), CommitOk)
    assert [mac for mac, _, _ in done.responses] == [entry.entry_mac for entry in mine]
    assert done.committed == mine[-1].index, "the foreign entry at the higher index is not reported as ours"
    assert isinstance(done.role.role, Witness)


def test_m4_rival_in_the_middle_of_pipelined_entries() -> None:
    """A rival at index k abandons the own entries from k on; those below may still commit."""
    world, group = three()
    mine = produce(world, group, 0, 3)
    world.logs[group].append(mine[0])
    theirs = rival(world, group, 1)
    role = expect(world.send(0, CaptureNext(world.realm, group, (mine[0], theirs[0]))), RoleOk).role
    assert isinstance(role.role, SteppingDown)
    state = leader_state(world, group)
    assert isinstance(state, SteppingDownState)
    assert state.stepdown_at == mine[0].index
    assert state.abandoned == [mine[1].entry_mac, mine[2].entry_mac]
    assert state.log.last == theirs[0]


def test_m4_second_rival_lowers_the_step_down() -> None:
    """While stepping down, a conflict below lowers the last index and abandons more; foreign entries follow."""
    world, group = three()
    mine = produce(world, group, 0, 3)
    world.logs[group].append(mine[0])
    theirs = rival(world, group, 2)
    expect(world.send(0, StepDown(world.realm, group, force=False)), StepDownOk)
    expect(world.send(0, CaptureNext(world.realm, group, (mine[0], *theirs))), RoleOk)
    state = leader_state(world, group)
    assert isinstance(state, SteppingDownState)
    assert state.stepdown_at == mine[0].index
    assert state.abandoned == [mine[1].entry_mac, mine[2].entry_mac]
    assert state.log.last == theirs[1]


@pytest.mark.parametrize("stepping_down", [False, True])
def test_h4_m4_rival_at_the_first_index_is_not_captured(stepping_down: bool) -> None:
    """A fork of what the leader knows committed is refused and changes nothing (H4)."""
    world, group = three()
    world.ask(group, 0, world.client(b"\1" * 32), secrets.Register1())
    tail = world.logs[group][-1]
    before = world.logs[group][-2]
    # HSM 1 is taken back by hand to the predecessor, as if it never captured the tail.
    world.hsms[1]._state.captured[group] = (before.index, before.entry_mac)
    expect(world.send(1, BecomeLeader(world.realm, group, before)), RoleOk)
    log, world.logs[group] = world.logs[group], world.logs[group][:-1]
    (fork,) = produce(world, group, 1, 1, seed="fork")
    world.logs[group] = log
    assert fork.index == tail.index
    world.hsms[0]._state.captured[group] = (before.index, before.entry_mac)
    if stepping_down:
        world.logs[group] += produce(world, group, 0, 1)
        expect(world.send(0, StepDown(world.realm, group, force=False)), StepDownOk)
    assert refused(world.hsms[0], CaptureNext(world.realm, group, (fork,))) is Outcome.INVALID_CHAIN
    expect(world.send(0, CaptureNext(world.realm, group, (tail,))), RoleOk)


def test_prior_entries_are_captured_by_a_leader_that_lags() -> None:
    """A leader that commits with others' captures may capture its own past later, staying leader."""
    world, group = three()
    mine = produce(world, group, 0, 3)
    world.logs[group] += mine
    world.commit(group, 0, voters=[1, 2])
    assert leader_state(world, group).log.first == mine[-1].index
    role = expect(world.send(0, CaptureNext(world.realm, group, tuple(mine))), RoleOk).role
    assert "Leader" in repr(role.role)
