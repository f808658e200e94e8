"""CaptureJump and the attack that H1 closes (hsm.md 10; M5)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from juicebox_hsm.consensus.types import Captured, LogEntry
from juicebox_hsm.hsm import capture
from juicebox_hsm.hsm.messages import (
    CaptureJump,
    CaptureJumpOk,
    CaptureNext,
    Commit,
    CommitOk,
    NotWitness,
    Outcome,
    RoleOk,
    StepDown,
    StepDownOk,
)
from juicebox_hsm.hsm.state import GroupState, HsmState
from juicebox_hsm.ids import FULL_RANGE, GroupId, RealmId
from juicebox_hsm.wire import requests as secrets
from tests.fakes.hsm import World, expect, refused


def lagging() -> tuple[World, GroupId, tuple[LogEntry, ...], tuple[Captured, ...]]:
    """Return a group of three in which HSM 2 missed four committed entries, with those and the certificate."""
    world = World(3)
    group = world.new_group([0, 1, 2])
    world.move(world.first, 0, group, 0, FULL_RANGE)
    client = world.client(b"\1" * 32)
    missed = tuple(world.app(group, 0, client, secrets.Register1()).entry for _ in range(1))
    client.session = None
    for _ in range(3):
        missed += (world.app(group, 0, client, secrets.Register1()).entry,)
        client.session = None
    captures = world.witness(group, [0, 1])
    expect(world.send(0, Commit(world.realm, group, captures)), CommitOk)
    return world, group, missed, captures


def test_jump_with_a_majority_then_next() -> None:
    """A strict majority's statements move a lagging witness onto the certified entry, and it can follow again."""
    world, group, missed, captures = lagging()
    assert world.send(2, CaptureJump(world.realm, group, missed[-1:], captures)) == CaptureJumpOk()
    assert world.captured(2, group) == missed[-1].index
    client = world.client(b"\2" * 32, "later")
    later = world.app(group, 0, client, secrets.Register1()).entry
    expect(world.send(2, CaptureNext(world.realm, group, (later,))), RoleOk)
    (signed,) = world.persist(2, group)
    assert (signed.index, signed.mac) == (later.index, later.entry_mac)


def test_jump_to_an_ancestor_of_the_votes() -> None:
    """Votes at different indexes of one chain certify the lower one."""
    world, group, missed, captures = lagging()
    lower = replace(captures[0], index=missed[1].index, mac=missed[1].entry_mac)
    lower = replace(lower, statement=world.hsms[0]._state.macs.captured(*(lower.hsm, *captured_key(lower))))
    assert world.send(2, CaptureJump(world.realm, group, missed, (lower, captures[1]))) == CaptureJumpOk()
    assert world.captured(2, group) == missed[1].index


def captured_key(captured: Captured) -> tuple[RealmId, GroupId, int, bytes]:
    return captured.realm, captured.group, captured.index, captured.mac


def test_m5_checks_in_order() -> None:
    """Membership, role, entries, macs, chain, election, index: each refusal changes nothing."""
    world, group, missed, captures = lagging()
    hsm = world.hsms[2]
    last = missed[-1:]

    def answer(
        entries: tuple[LogEntry, ...],
        votes: tuple[Captured, ...] = captures,
        *,
        realm: RealmId = world.realm,
        of: GroupId = group,
    ) -> object:
        return refused(hsm, CaptureJump(realm, of, entries, votes))

    assert answer((), realm=RealmId(b"")) is Outcome.INVALID_REALM
    assert answer((), of=world.first) is Outcome.INVALID_GROUP
    assert answer(()) is Outcome.MISSING_ENTRIES
    altered = replace(missed[0], partition=None)
    assert answer((altered, missed[2]), ()) is Outcome.INVALID_MAC
    assert answer((missed[0], missed[2]), ()) is Outcome.INVALID_CHAIN
    assert answer((missed[1], missed[0]), ()) is Outcome.INVALID_CHAIN
    assert answer((missed[0], missed[0]), ()) is Outcome.INVALID_CHAIN
    assert answer(last, ()) is Outcome.NO_QUORUM
    assert answer(last, captures[:1]) is Outcome.NO_QUORUM, "one statement"
    assert answer(last, captures[:1] * 5) is Outcome.NO_QUORUM, "one HSM five times"
    forged = replace(captures[1], statement=bytes(32))
    assert answer(last, (captures[0], forged)) is Outcome.NO_QUORUM
    assert answer(missed[:1]) is Outcome.NO_QUORUM, "statements about an entry that is not shown"
    elsewhere = world.new_group([0, 1])
    others = world.witness(elsewhere)
    assert answer(last, (captures[0], *others)) is Outcome.NO_QUORUM, "statements of another group"
    moved = tuple(replace(captured, group=group) for captured in others)
    assert answer(last, (captures[0], *moved)) is Outcome.NO_QUORUM
    stored = tuple(entry for entry in world.logs[group] if entry.index <= world.captured(2, group))
    old = tuple(replace(captured, index=stored[-1].index, mac=stored[-1].entry_mac) for captured in captures)
    signer = world.hsms[0]._state.macs
    old = tuple(replace(vote, statement=signer.captured(vote.hsm, *captured_key(vote))) for vote in old)
    assert answer(stored[-1:], old) is Outcome.STALE_INDEX, "equal"
    expect(world.send(2, CaptureJump(world.realm, group, last, captures)), CaptureJumpOk)
    assert answer(stored[-1:], old) is Outcome.STALE_INDEX, "backwards"


def test_m5_strangers_do_not_vote() -> None:
    """Authentic statements of HSMs outside the configuration do not make a quorum."""
    world = World(4)
    group = world.new_group([0, 1, 2])
    captures = world.witness(group, [0])
    signer = world.hsms[3]._state.macs
    tail = world.logs[group][-1]
    stranger = Captured(world.id(3), world.realm, group, tail.index, tail.entry_mac, b"")
    stranger = replace(stranger, statement=signer.captured(stranger.hsm, *captured_key(stranger)))
    request = CaptureJump(world.realm, group, (tail,), (*captures, stranger))
    world.hsms[2]._state.captured.pop(group)
    assert refused(world.hsms[2], request) is Outcome.NO_QUORUM


def test_m5_not_while_leading() -> None:
    """A leader and a stepping-down HSM refuse to jump."""
    world, group, missed, captures = lagging()
    request = CaptureJump(world.realm, group, missed[-1:], captures)
    assert isinstance(refused(world.hsms[0], request), NotWitness)
    world.app(group, 0, world.client(b"\2" * 32), secrets.Register1())
    expect(world.send(0, StepDown(world.realm, group, force=False)), StepDownOk)
    assert isinstance(refused(world.hsms[0], request), NotWitness)


def h1_attack() -> tuple[World, GroupId, LogEntry, tuple[LogEntry, ...], tuple[Captured, ...]]:
    """Let {A, C} commit an entry while B, leading too, captured a rival branch; then step A down.

    Returns the committed entry, the rival branch and B's statement.
    """
    world = World(3)
    group = world.new_group([0, 1, 2])
    world.move(world.first, 0, group, 0, FULL_RANGE)
    world.lead(group, 1)
    stored = list(world.logs[group])
    branch = [
        world.app(group, 1, world.client(b"\1" * 32, ("b", number)), secrets.Register1()).entry for number in range(2)
    ]
    world.capture(1, group)
    statement = world.persist(1, group)
    world.logs[group] = stored
    honest = world.app(group, 0, world.client(b"\1" * 32, "a"), secrets.Register1()).entry
    done = world.commit(group, 0, voters=[0, 2])
    assert [mac for mac, _, _ in done.responses] == [honest.entry_mac]
    expect(world.send(0, StepDown(world.realm, group, force=True)), StepDownOk)
    return world, group, honest, tuple(branch), statement


def two_branches() -> tuple[World, GroupId, tuple[LogEntry, ...], tuple[LogEntry, ...], tuple[Captured, ...]]:
    """Let {0, 2} commit two entries while 1, leading too, made a rival branch; then depose 0, the one to be swung.

    Returns the committed branch, the rival branch, and statements of 1 for its first entry and 2 for its second.
    """
    world = World(3)
    group = world.new_group([0, 1, 2])
    world.move(world.first, 0, group, 0, FULL_RANGE)
    world.lead(group, 1)
    stored = list(world.logs[group])
    rival = tuple(
        world.app(group, 1, world.client(b"\1" * 32, ("b", number)), secrets.Register1()).entry for number in range(2)
    )
    expect(world.send(1, CaptureNext(world.realm, group, rival[:1])), RoleOk)
    votes = world.persist(1, group)
    world.logs[group] = stored
    committed = tuple(
        world.app(group, 0, world.client(b"\1" * 32, ("a", number)), secrets.Register1()).entry for number in range(2)
    )
    done = world.commit(group, 0, voters=[0, 2])
    assert [mac for mac, _, _ in done.responses] == [entry.entry_mac for entry in committed]
    expect(world.send(0, StepDown(world.realm, group, force=True)), StepDownOk)
    return world, group, committed, rival, (*votes, *world.persist(2, group))


def behind(world: World, number: int, group: GroupId, entry: LogEntry) -> None:
    """Put an HSM back to just before `entry`, as if it never captured it."""
    world.hsms[number]._state.captured[group] = (entry.index - 1, entry.prev_mac)


def test_h1_m5_entries_of_two_branches_certify_neither() -> None:
    """Consecutive and authentic is not enough: votes for a successor on another branch are no votes for this entry."""
    world, group, committed, rival, votes = two_branches()
    behind(world, 0, group, rival[0])
    spliced = (rival[0], committed[1])
    assert spliced[0].index + 1 == spliced[1].index
    assert refused(world.hsms[0], CaptureJump(world.realm, group, spliced, votes)) is Outcome.INVALID_CHAIN


def test_h1_m5_a_forged_link_certifies_nothing() -> None:
    """Every entry's mac counts, not only the first one's: its predecessor is one of the fields a host could alter."""
    world, group, committed, rival, votes = two_branches()
    behind(world, 0, group, rival[0])
    linked = replace(committed[1], prev_mac=rival[0].entry_mac)
    assert refused(world.hsms[0], CaptureJump(world.realm, group, (rival[0], linked), votes)) is Outcome.INVALID_MAC


def test_m5_linked_entries_are_consecutive_too() -> None:
    """Entries that are linked but skip an index, which only a faulty HSM could sign, do not make a path."""
    world, group, missed, captures = lagging()
    signer = world.hsms[0]._state.macs
    skipping = replace(missed[1], index=missed[1].index + 1)
    skipping = replace(skipping, entry_mac=signer.log_entry(world.realm, group, skipping))
    request = CaptureJump(world.realm, group, (missed[0], skipping), captures)
    assert refused(world.hsms[2], request) is Outcome.INVALID_CHAIN


def test_h1_m5_one_peers_statement_does_not_swing_a_witness() -> None:
    """The jump onto the rival branch is refused for lack of a quorum, and so the rival never commits."""
    world, group, honest, branch, statement = h1_attack()
    assert refused(world.hsms[0], CaptureJump(world.realm, group, branch[1:], statement)) is Outcome.NO_QUORUM
    votes = (*statement, *world.persist(0, group))
    assert refused(world.hsms[1], Commit(world.realm, group, votes)) is Outcome.NO_QUORUM
    # Statements of a majority, but on different branches, certify neither.
    votes = (*statement, *world.persist(2, group))
    assert votes[1].mac == honest.entry_mac
    assert refused(world.hsms[0], CaptureJump(world.realm, group, branch, votes)) is Outcome.NO_QUORUM


def test_h1_attack_succeeds_against_a_core_without_h1(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a jump that trusts one statement the same steps commit two entries at one index: the test can see it."""

    def trusting(state: HsmState, request: CaptureJump, member: GroupState) -> int | None:
        valid = [vote.index for vote in request.captures if state.is_valid_vote(vote, request.realm, member)]
        return max(valid, default=None)

    monkeypatch.setattr(capture, "certified_index", trusting)
    world, group, honest, branch, statement = h1_attack()
    expect(world.send(0, CaptureJump(world.realm, group, branch[1:], statement)), CaptureJumpOk)
    votes = (*statement, *world.persist(0, group))
    done = expect(world.send(1, Commit(world.realm, group, votes)), CommitOk)
    released = [mac for mac, _, _ in done.responses]
    assert released == [entry.entry_mac for entry in branch]
    assert branch[0].index == honest.index
    assert branch[0].entry_mac != honest.entry_mac
