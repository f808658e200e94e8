"""The judge of logs, trees and ranges sees each of its rules broken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from juicebox_hsm.consensus.types import Certificate, LogEntry, Partition
from juicebox_hsm.hsm import messages as m
from juicebox_hsm.ids import FULL_RANGE, GroupId
from juicebox_hsm.wire import requests as secrets
from roles.tools.simulate.judge import Quiet
from roles.tools.simulate.store_data import Row
from tests.fakes.hsm import expect
from tests.unit.simulate.judged import LOWER, NO_CHANGE, JudgedWorld, broken


@pytest.fixture
def group(world: JudgedWorld) -> GroupId:
    """Return a group with a user and some history."""
    group = world.grouped()
    client = world.user()
    for request in (secrets.Register1(), client.register2(2), secrets.Recover1(), client.recover2()):
        world.ask(group, 0, client, request)
    return group


def rows(world: JudgedWorld, group: GroupId) -> list[Row]:
    """Return the stored rows of a log."""
    return world.shared.data.realms[world.realm].groups[group].rows


def test_a_sound_store(world: JudgedWorld, group: GroupId) -> None:
    """Logs, trees and ranges of a realm whose half a range moves: no rule is broken at any step."""
    world.judge.check_now()
    other = world.new_group([0, 1, 2], 1)
    world.move(group, 0, other, 1, LOWER)
    world.judge.check_now()
    world.judge.check(world.judge.logs.check_trees)
    assert world.judge.violations == []


def test_an_entry_that_no_hsm_made(world: JudgedWorld, group: GroupId) -> None:
    """chain: a log that takes an entry nobody made, or one that differs from what was made."""
    last = world.logs[group][-1]
    forged = LogEntry(last.index + 1, last.partition, None, last.entry_mac, b"\x07" * 32, last.hsm)
    broken("chain", lambda: world.append(group, [forged]))


def test_captured_before_it_is_in_the_log(world: JudgedWorld, group: GroupId) -> None:
    """chain: an entry that goes to the members while the store has not acknowledged it."""
    client = world.user()
    made = expect(world.send(0, world.app_message(group, client, client.handshake(secrets.Recover1()))), m.AppRequestOk)
    broken("chain", lambda: world.send(1, m.CaptureNext(world.realm, group, (made.entry,))))


def test_an_acknowledged_entry_is_lost(world: JudgedWorld, group: GroupId) -> None:
    """chain: a log that lost an entry in the middle, or altered one."""
    del rows(world, group)[3]
    broken("chain", world.judge.check_now)


def test_compacted_without_a_certificate(world: JudgedWorld, group: GroupId) -> None:
    """chain: rows that are gone while no certificate proves what came before; or one of what is not committed."""
    log = world.shared.data.realms[world.realm].groups[group]
    votes = world.witness(group)
    log.compact([1, 2], keeps_tombstones=False)
    broken("chain", world.judge.check_now)
    log.certificates.replace(0.0, {votes[0].index: Certificate(votes[0].index, votes)})
    world.judge.check_now()
    forged = replace(votes[0], statement=bytes(32))
    log.certificates.replace(0.0, {votes[0].index: Certificate(votes[0].index, (forged, *votes[1:]))})
    broken("chain", world.judge.check_now)
    log.certificates.replace(0.0, {99: Certificate(99, votes)})
    broken("chain", world.judge.check_now)


def test_a_missing_node(world: JudgedWorld, group: GroupId) -> None:
    """tree: a node of a current tree that is gone, or is not what its hash says."""
    realm = world.shared.data.realms[world.realm]
    root = world.partition(group).root_hash
    kept = realm.nodes.pop(root)
    broken("tree", lambda: world.judge.check(world.judge.logs.check_trees))
    realm.nodes[root] = (b"\x01\x20", kept[1])
    broken("tree", lambda: world.judge.check(world.judge.logs.check_trees))


def test_a_node_that_nobody_removes(world: JudgedWorld, group: GroupId) -> None:
    """tree: a stored node that no tree leads to and that is not on its way out."""
    realm = world.shared.data.realms[world.realm]
    realm.doomed.clear()
    broken("tree", lambda: world.judge.check(world.judge.logs.check_trees))


def test_ranges_twice_or_nowhere(world: JudgedWorld, group: GroupId) -> None:
    """ranges: records that two groups own, or none."""
    last = rows(world, group)[-1]
    entry = last.entries[-1]
    rows(world, group)[-1] = Row(last.first, (replace(entry, partition=None),), last.intents)
    broken("ranges", world.judge.check_now)
    rows(world, group)[-1] = last
    first = rows(world, world.first)[-1]
    owned = replace(first.entries[-1], partition=Partition(FULL_RANGE, bytes(32)))
    rows(world, world.first)[-1] = Row(first.first, (owned,), first.intents)
    broken("ranges", world.judge.check_now)


def test_committed_and_not_in_the_log(world: JudgedWorld, group: GroupId) -> None:
    """chain: what HSMs committed is missing from what was appended."""
    client = world.user()
    world.app(group, 0, client, secrets.Recover1())
    last = world.logs[group][-1]
    votes = world.witness(group)
    del world.judge.logs.logged[group][last.index]
    broken("chain", lambda: world.send(0, m.Commit(world.realm, group, votes)))


def test_a_wrong_intent(world: JudgedWorld, group: GroupId) -> None:
    """events: a client's entry that is appended without its intent."""
    client = world.user()
    made = expect(world.send(0, world.app_message(group, client, client.handshake(secrets.Recover1()))), m.AppRequestOk)
    data = world.shared.data
    broken("events", lambda: data.append(world.realm, group, [made.entry], [None], made.delta or NO_CHANGE))


def test_finish_looks_at_everything(world: JudgedWorld, group: GroupId) -> None:
    """The end of a run checks logs, trees, events and quiet: each is reported when it is broken."""
    world.stops = False
    silent = JudgedWorld(1, stops=False)
    silent.judge.finish(Quiet(died=["agent a"]))
    assert [each.rule for each in silent.judge.violations] == ["liveness.died"]
