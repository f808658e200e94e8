"""BecomeLeader, StepDown and Commit (hsm.md 10; M6, M7, M19, I3, I12)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from juicebox_hsm.consensus.types import Captured, Leader, LogEntry, Partition, SteppingDown, Witness
from juicebox_hsm.errors import InvariantViolation
from juicebox_hsm.hsm.messages import (
    BecomeLeader,
    CaptureNext,
    Commit,
    CommitOk,
    NotCaptured,
    NotLeader,
    Outcome,
    ResultKind,
    RoleOk,
    StepDown,
    StepDownOk,
)
from juicebox_hsm.hsm.state import LeaderState
from juicebox_hsm.ids import FULL_RANGE, GroupId, RealmId
from juicebox_hsm.wire import requests as secrets
from tests.fakes.hsm import World, expect, refused, snapshot


def three() -> tuple[World, GroupId]:
    world = World(3)
    group = world.new_group([0, 1, 2])
    world.move(world.first, 0, group, 0, FULL_RANGE)
    return world, group


def test_m6_checks_in_order() -> None:
    """Membership, head and mac are checked in order; only captures may have become durable."""
    world, group = three()
    tail = world.logs[group][-1]
    hsm = world.hsms[1]

    def answer(entry: LogEntry, *, realm: RealmId = world.realm, of: GroupId = group) -> object:
        return refused(hsm, BecomeLeader(realm, of, entry))

    assert answer(tail, realm=RealmId(b"")) is Outcome.INVALID_REALM
    assert answer(tail, of=world.first) is Outcome.INVALID_GROUP
    assert answer(world.logs[group][-2]) == NotCaptured(tail.index), "older than the head"
    assert answer(replace(tail, index=tail.index + 1)) == NotCaptured(tail.index)
    assert answer(replace(tail, entry_mac=bytes(32))) == NotCaptured(tail.index)
    assert answer(replace(tail, entry_mac=b"")) == NotCaptured(tail.index)
    assert answer(replace(tail, partition=None)) is Outcome.INVALID_MAC, "right index and mac, other body"
    assert answer(replace(tail, partition=Partition(FULL_RANGE, bytes(32)))) is Outcome.INVALID_MAC
    assert answer(replace(tail, hsm=world.id(1))) is Outcome.INVALID_MAC


def test_m6_never_captured() -> None:
    """Without a captured head nobody leads."""
    world = World(2)
    group = world.new_group([0, 1], commit=False)
    request = BecomeLeader(world.realm, group, world.logs[group][0])
    assert refused(world.hsms[1], request) == NotCaptured(None)


def test_m6_rival_head() -> None:
    """The head of another branch at the same index is not the own one."""
    world, group = three()
    stored = list(world.logs[group])
    world.lead(group, 1)
    theirs = world.app(group, 1, world.client(b"\1" * 32), secrets.Register1()).entry
    world.logs[group] = stored
    mine = world.app(group, 0, world.client(b"\1" * 32), secrets.Register1()).entry
    expect(world.send(2, CaptureNext(world.realm, group, (mine,))), RoleOk)
    world.persist(2, group)
    assert refused(world.hsms[2], BecomeLeader(world.realm, group, theirs)) == NotCaptured(mine.index)


def test_m6_volatile_head_is_made_durable_and_lost_by_a_crash() -> None:
    """BecomeLeader persists captures itself; a head that a crash took cannot be led from."""
    world, group = three()
    entry = world.app(group, 0, world.client(b"\1" * 32), secrets.Register1()).entry
    world.capture(1, group)
    world.crash(1)
    assert world.send(1, BecomeLeader(world.realm, group, entry)) == NotCaptured(entry.index - 1)
    world.capture(1, group)
    expect(world.send(1, BecomeLeader(world.realm, group, entry)), RoleOk)
    world.crash(1)
    assert world.captured(1, group) == entry.index


def test_i16_become_leader_refused_still_persists() -> None:
    """The one effect of a refused BecomeLeader is that captures became durable."""
    world, group = three()
    world.app(group, 0, world.client(b"\1" * 32), secrets.Register1())
    world.capture(1, group)
    writes = len(world.platforms[1].history)
    request = BecomeLeader(world.realm, GroupId(b""), world.logs[group][-1])
    assert world.send(1, request) is Outcome.INVALID_GROUP
    assert len(world.platforms[1].history) == writes + 1
    assert refused(world.hsms[1], request) is Outcome.INVALID_GROUP


def test_m6_not_during_step_down() -> None:
    """A stepping-down HSM first finishes."""
    world, group = three()
    world.app(group, 0, world.client(b"\1" * 32), secrets.Register1())
    expect(world.send(0, StepDown(world.realm, group, force=False)), StepDownOk)
    world.capture(0, group)
    world.persist(0, group)
    request = BecomeLeader(world.realm, group, world.logs[group][-1])
    assert refused(world.hsms[0], request) is Outcome.STEPDOWN_IN_PROGRESS


def test_become_leader_twice_keeps_everything() -> None:
    """Becoming leader again changes neither log, sessions nor clock."""
    world, group = three()
    client = world.client(b"\1" * 32)
    world.open_session(group, 0, client)
    world.capture(0, group)
    world.persist(0, group)
    before = snapshot(world.hsms[0])
    request = BecomeLeader(world.realm, group, world.logs[group][-1])
    expect(world.send(0, request), RoleOk)
    assert snapshot(world.hsms[0]) == before


def test_new_leader_commits_what_it_inherits() -> None:
    """An inherited entry commits under the new leader, without its reply."""
    world, group = three()
    entry = world.app(group, 0, world.client(b"\1" * 32), secrets.Register1()).entry
    world.lead(group, 1)
    done = world.commit(group, 1, voters=[1, 2])
    assert done.committed == entry.index
    assert done.responses == ()


def test_step_down_forms() -> None:
    """Gentle step-down with everything committed is immediate; else it waits; force always ends it."""
    world, group = three()
    realm = world.realm
    assert refused(world.hsms[1], StepDown(RealmId(b""), group, force=True)) is Outcome.INVALID_REALM
    assert refused(world.hsms[1], StepDown(realm, GroupId(b""), force=True)) is Outcome.INVALID_GROUP
    for force in (False, True):
        assert isinstance(refused(world.hsms[1], StepDown(realm, group, force=force)), NotLeader)
    entry = world.app(group, 0, world.client(b"\1" * 32), secrets.Register1()).entry
    down = expect(world.send(0, StepDown(realm, group, force=False)), StepDownOk)
    assert down.last == entry.index
    assert isinstance(down.role.role, SteppingDown)
    again = refused(world.hsms[0], StepDown(realm, group, force=False))
    assert again == NotLeader(down.role)
    done = world.commit(group, 0)
    assert [mac for mac, _, _ in done.responses] == [entry.entry_mac]
    assert isinstance(done.role.role, Witness)
    world.lead(group, 0)
    world.commit(group, 0)
    assert isinstance(expect(world.send(0, StepDown(realm, group, force=False)), StepDownOk).role.role, Witness)
    world.lead(group, 0)
    forced = expect(world.send(0, StepDown(realm, group, force=True)), StepDownOk)
    assert forced.last == world.logs[group][-1].index
    assert isinstance(forced.role.role, Witness)


def test_leader_that_never_committed_steps_down_slowly() -> None:
    """Even without own entries a leader that knows of no commit goes through stepping down."""
    world, group = three()
    world.lead(group, 1)
    down = expect(world.send(1, StepDown(world.realm, group, force=False)), StepDownOk)
    assert isinstance(down.role.role, SteppingDown)
    forced = expect(world.send(1, StepDown(world.realm, group, force=True)), StepDownOk)
    assert forced.last == down.last


def test_i12_forced_step_down_drops_replies_for_good() -> None:
    """Replies dropped by force are never released, whatever commits later."""
    world, group = three()
    entry = world.app(group, 0, world.client(b"\1" * 32), secrets.Register1()).entry
    expect(world.send(0, StepDown(world.realm, group, force=True)), StepDownOk)
    world.lead(group, 0)
    done = world.commit(group, 0)
    assert done.committed == entry.index
    assert done.responses == ()


def pipelined(count: int = 3) -> tuple[World, GroupId, list[LogEntry]]:
    world, group = three()
    made = []
    for number in range(count):
        client = world.client(b"\1" * 32, number)
        made.append(world.app(group, 0, client, secrets.Register1()).entry)
    return world, group, made


def test_i3_reply_leaves_once_and_only_with_a_majority() -> None:
    """Pipelined replies are released up to the elected index, in order, each exactly once."""
    world, group, made = pipelined()
    expect(world.send(1, CaptureNext(world.realm, group, tuple(made[:2]))), RoleOk)
    votes = world.persist(1, group)
    assert refused(world.hsms[0], Commit(world.realm, group, votes)) is Outcome.NO_QUORUM
    expect(world.send(2, CaptureNext(world.realm, group, tuple(made))), RoleOk)
    votes += world.persist(2, group)
    done = expect(world.send(0, Commit(world.realm, group, votes)), CommitOk)
    assert done.committed == made[1].index
    assert [mac for mac, _, _ in done.responses] == [made[0].entry_mac, made[1].entry_mac]
    assert {result.kind for _, _, result in done.responses} == {ResultKind.REGISTER1}
    again = expect(world.send(0, Commit(world.realm, group, votes)), CommitOk)
    assert (again.committed, again.responses) == (made[1].index, ())


def test_i11_replayed_captures_do_not_move_the_commit_back() -> None:
    """Old statements lie below the log and are skipped, so the commit index never falls."""
    world, group, made = pipelined()
    expect(world.send(1, CaptureNext(world.realm, group, (made[0],))), RoleOk)
    expect(world.send(2, CaptureNext(world.realm, group, (made[0],))), RoleOk)
    old = (*world.persist(1, group), *world.persist(2, group))
    world.commit(group, 0)
    assert refused(world.hsms[0], Commit(world.realm, group, old)) is Outcome.NO_QUORUM


@pytest.mark.parametrize(
    "case",
    [
        "none",
        "minority",
        "duplicates",
        "stranger",
        "forged",
        "empty statement",
        "other group",
        "relabelled",
        "rival mac",
        "beyond the log",
        "other realm",
        "index 0",
    ],
)
def test_m7_no_quorum(case: str) -> None:
    """Nothing but authentic statements of a majority of members about the log's own entries commits."""
    world, group, made = pipelined()
    votes = world.witness(group, [1, 2])
    one, two = votes
    elsewhere = world.new_group([1, 2])
    foreign = world.witness(elsewhere)
    macs = world.hsms[0]._state.macs

    def signed(captured: Captured) -> Captured:
        key = (captured.hsm, captured.realm, captured.group, captured.index, captured.mac)
        return replace(captured, statement=macs.captured(*key))

    chosen: dict[str, tuple[Captured, ...]] = {
        "none": (),
        "minority": (one,),
        "duplicates": (one, one, replace(one), one),
        "stranger": (one, signed(replace(two, hsm=bytes(16)))),  # type: ignore[arg-type]  # a raw id
        "forged": (one, replace(two, statement=bytes(32))),
        "empty statement": (one, replace(two, statement=b"")),
        "other group": (one, *foreign),
        "relabelled": (one, replace(foreign[1], group=group)),
        "rival mac": (one, signed(replace(two, mac=bytes(32)))),
        "beyond the log": (one, signed(replace(two, index=made[-1].index + 1))),
        "other realm": (one, signed(replace(two, realm=RealmId(bytes(16))))),
        "index 0": (one, signed(replace(two, index=0))),
    }
    assert refused(world.hsms[0], Commit(world.realm, group, chosen[case])) is Outcome.NO_QUORUM
    expect(world.send(0, Commit(world.realm, group, votes)), CommitOk)


def test_m7_witness_and_forced_step_down_do_not_commit() -> None:
    """Only leading or stepping-down HSMs commit."""
    world, group, _ = pipelined()
    votes = world.witness(group)
    assert isinstance(refused(world.hsms[1], Commit(world.realm, group, votes)), NotLeader)
    assert refused(world.hsms[1], Commit(RealmId(b""), group, votes)) is Outcome.INVALID_REALM
    assert refused(world.hsms[1], Commit(world.realm, GroupId(b""), votes)) is Outcome.INVALID_GROUP
    expect(world.send(0, StepDown(world.realm, group, force=True)), StepDownOk)
    answer = refused(world.hsms[0], Commit(world.realm, group, votes))
    assert isinstance(answer, NotLeader)
    assert answer.role is not None


def test_leader_commits_without_having_captured() -> None:
    """The leader's own statement is not special."""
    world, group, made = pipelined()
    done = world.commit(group, 0, voters=[1, 2])
    assert done.committed == made[-1].index
    role = world.hsms[0]._state.groups[group].role
    assert isinstance(role, LeaderState)
    assert len(role.log) == 1


def test_i12_abandoned_macs_wait_for_a_quorum_and_are_told_once() -> None:
    """NoQuorum keeps abandoned macs queued; the commit that reports them does so once."""
    world, group, mine = pipelined()
    world.logs[group] = world.logs[group][:-2]
    world.lead(group, 1)
    theirs = world.app(group, 1, world.client(b"\1" * 32, "rival"), secrets.Register1()).entry
    expect(world.send(0, CaptureNext(world.realm, group, (mine[0], theirs))), RoleOk)
    assert refused(world.hsms[0], Commit(world.realm, group, ())) is Outcome.NO_QUORUM
    expect(world.send(1, CaptureNext(world.realm, group, (theirs,))), RoleOk)
    votes = (*world.persist(0, group), *world.persist(1, group))
    done = expect(world.send(0, Commit(world.realm, group, votes)), CommitOk)
    assert [mac for mac, _, _ in done.responses] == [mine[0].entry_mac]
    assert done.abandoned == (mine[1].entry_mac, mine[2].entry_mac)
    assert isinstance(done.role.role, Witness)


def test_i12_abandoned_macs_are_told_once_over_several_commits() -> None:
    """A commit that leaves the HSM stepping down tells the abandoned macs; the next one does not repeat them."""
    world, group, mine = pipelined(4)
    for number in (1, 2):
        expect(world.send(number, CaptureNext(world.realm, group, (mine[0],))), RoleOk)
    votes = (*world.persist(1, group), *world.persist(2, group))
    world.logs[group] = world.logs[group][:-2]
    world.lead(group, 1)
    theirs = world.app(group, 1, world.client(b"\1" * 32, "rival"), secrets.Register1()).entry
    expect(world.send(0, CaptureNext(world.realm, group, (mine[0], mine[1], theirs))), RoleOk)
    first = expect(world.send(0, Commit(world.realm, group, votes)), CommitOk)
    assert first.committed == mine[0].index
    assert first.abandoned == (mine[2].entry_mac, mine[3].entry_mac)
    assert isinstance(first.role.role, SteppingDown)
    again = expect(world.send(0, Commit(world.realm, group, votes)), CommitOk)
    assert again.abandoned == ()
    assert isinstance(again.role.role, SteppingDown)


def test_forced_step_down_names_the_last_own_entry() -> None:
    """Foreign entries kept while stepping down are not part of the leadership that ends."""
    world, group, mine = pipelined()
    world.logs[group] = world.logs[group][:-2]
    world.lead(group, 1)
    rivals = [world.app(group, 1, world.client(b"\1" * 32, n), secrets.Register1()).entry for n in ("r1", "r2")]
    expect(world.send(0, CaptureNext(world.realm, group, (mine[0], *rivals))), RoleOk)
    forced = expect(world.send(0, StepDown(world.realm, group, force=True)), StepDownOk)
    assert forced.last == mine[0].index
    assert isinstance(forced.role.role, Witness)


def test_partial_commit_while_stepping_down() -> None:
    """A commit below the last own index releases its part and leaves the HSM stepping down (I11)."""
    world, group, made = pipelined()
    expect(world.send(0, StepDown(world.realm, group, force=False)), StepDownOk)
    for number in (1, 2):
        expect(world.send(number, CaptureNext(world.realm, group, (made[0],))), RoleOk)
    votes = (*world.persist(1, group), *world.persist(2, group))
    done = expect(world.send(0, Commit(world.realm, group, votes)), CommitOk)
    assert done.committed == made[0].index
    assert isinstance(done.role.role, SteppingDown)
    assert isinstance(world.commit(group, 0).role.role, Witness)


def test_i2_i8_a_witness_votes_for_one_branch() -> None:
    """Shown rival entries of one index, a witness captures one, signs one mac per index, and one branch commits."""
    world, group = three()
    stored = list(world.logs[group])
    branches = []
    for leader in range(2):
        if leader:
            world.logs[group] = list(stored)
            world.lead(group, leader)
        branches.append(world.app(group, leader, world.client(b"\1" * 32, leader), secrets.Register1()).entry)
    signed: dict[int, set[bytes]] = {}
    for first, second in ((0, 1), (1, 0)):
        answers = [world.send(2, CaptureNext(world.realm, group, (branches[number],))) for number in (first, second)]
        assert Outcome.MISSING_PREV in answers
        (vote,) = world.persist(2, group)
        signed.setdefault(vote.index, set()).add(vote.mac)
    assert signed == {branches[0].index: {branches[0].entry_mac}}
    expect(world.send(0, CaptureNext(world.realm, group, (branches[0],))), RoleOk)
    votes = (*world.persist(0, group), *world.persist(2, group))
    assert refused(world.hsms[1], Commit(world.realm, group, votes)) is Outcome.NO_QUORUM
    expect(world.send(0, Commit(world.realm, group, votes)), CommitOk)


@pytest.mark.parametrize("wrong", ["realm", "group", "hsm", "statement"])
def test_authentic_votes_of_elsewhere_are_none(wrong: str) -> None:
    """A vote counts for its realm and group and from a member only, whatever key signed it (I3, H1)."""
    world = World(4)
    group = world.new_group([0, 1, 2])
    elsewhere = world.new_group([0, 1, 2])
    state = world.hsms[0]._state
    member = state.groups[group]
    (genuine,) = world.persist(1, group)
    assert state.is_valid_vote(genuine, world.realm, member)
    changes: dict[str, dict[str, bytes]] = {
        "realm": {"realm": RealmId(bytes(16))},
        "group": {"group": elsewhere},
        "hsm": {"hsm": world.id(3)},
        "statement": {},
    }
    vote = replace(genuine, **changes[wrong])  # type: ignore[arg-type]  # ids all
    signed = state.macs.captured(vote.hsm, vote.realm, vote.group, vote.index, vote.mac)
    vote = replace(vote, statement=bytes(32) if wrong == "statement" else signed)
    assert not state.is_valid_vote(vote, world.realm, member)


def test_i9_logs_stay_chained() -> None:
    """Appending anything but the chained successor, or emptying a log, is a broken invariant."""
    world, group, made = pipelined()
    role = world.hsms[0]._state.groups[group].role
    assert isinstance(role, LeaderState)
    assert role.log.last == made[-1]
    last = made[-1]
    unlinked = replace(last, index=last.index + 1)
    skipping = replace(last, index=last.index + 2, prev_mac=last.entry_mac)
    for bad in (last, unlinked, skipping, made[0]):
        with pytest.raises(InvariantViolation):
            role.log.append(bad)
    with pytest.raises(InvariantViolation):
        role.log.pop_from(role.log.first)
    with pytest.raises(InvariantViolation):
        role.log.release_to(role.log.last.index + 1)
    with pytest.raises(InvariantViolation):
        world.hsms[0]._state.groups[group].become(role)
    assert role.log.last == last


def test_m19_two_leaders_one_branch_releases() -> None:
    """With two leaders fed traffic and the host alternating whose entries it shows, only one branch releases."""
    world, group = three()
    world.lead(group, 1)
    released: dict[int, set[bytes]] = {}
    branches: dict[int, list[LogEntry]] = {0: [], 1: []}
    stored = list(world.logs[group])
    for leader in (0, 1):
        world.logs[group] = list(stored)
        for number in range(3):
            client = world.client(b"\1" * 32, (leader, number))
            branches[leader].append(world.app(group, leader, client, secrets.Register1()).entry)
    for number in range(6):
        for hsm in range(3):
            for leader in ((number + hsm) % 2, (number + hsm + 1) % 2):
                world.send(hsm, CaptureNext(world.realm, group, tuple(branches[leader][: number + 1])))
                head = world.captured(hsm, group)
                rest = tuple(entry for entry in branches[leader] if entry.index == head + 1)
                if rest:
                    world.send(hsm, CaptureNext(world.realm, group, rest))
        votes = tuple(vote for hsm in range(3) for vote in world.persist(hsm, group))
        for leader in (0, 1):
            done = world.send(leader, Commit(world.realm, group, votes))
            if isinstance(done, CommitOk):
                released.setdefault(leader, set()).update(mac for mac, _, _ in done.responses)
    winners = [leader for leader, macs in released.items() if macs]
    assert len(winners) == 1
    assert released[winners[0]] <= {entry.entry_mac for entry in branches[winners[0]]}


def test_leader_status_in_role() -> None:
    """The role names the first index this leadership may create."""
    world, group = three()
    world.lead(group, 2)
    role = world.hsms[2]._state.groups[group].status().role
    assert role == Leader(world.logs[group][-1].index + 1)
