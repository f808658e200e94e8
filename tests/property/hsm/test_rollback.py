"""Rollback of an HSM's NVRAM by its host: refused by the counter, and seen by the ledger where nothing refuses it."""

from __future__ import annotations

import pytest

from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.hsm import messages as m
from juicebox_hsm.hsm.state import Poisoned
from juicebox_hsm.ids import GroupId
from juicebox_hsm.wire import requests as secrets
from tests.fakes.counter_nvram import CounterPlatform, RewindablePlatform, UnsealedPlatform
from tests.fakes.hsm import expect
from tests.property.hsm.adversary import Adversary
from tests.property.hsm.ledger import RECORDS


def duel(platform: type[CounterPlatform]) -> tuple[Adversary, GroupId, LogEntry, LogEntry]:
    """Return a group of three HSMs in which 0 and 2 lead, each with an entry of its own at the same index."""
    world = Adversary(3, "rollback", platform=platform)
    group = list(world.logs)[1]
    expect(world.send(2, m.BecomeLeader(world.realm, group, world.logs[group][-1])), m.RoleOk)
    entries = []
    for leader in (0, 2):
        client = world.client(RECORDS[0], leader)
        request = world.app_message(group, client, client.handshake(secrets.Recover1()))
        entries.append(expect(world.send(leader, request), m.AppRequestOk).entry)
    return world, group, entries[0], entries[1]


def vote(world: Adversary, number: int, group: GroupId, entry: LogEntry) -> m.PersistStateOk:
    """Let an HSM capture one entry if it will, persist and sign."""
    world.send(number, m.CaptureNext(world.realm, group, (entry,)))
    return expect(world.send(number, m.PersistState()), m.PersistStateOk)


def fork_by_rollback(platform: type[CounterPlatform]) -> bool:
    """Commit 0's entry with 1's vote, put 1 back to before it, and ask it to vote for 2's; tell if it started so."""
    world, group, entry, rival = duel(platform)
    before = list(world.counted(1).files)
    votes = [vote(world, number, group, entry) for number in (0, 1)]
    captures = tuple(found for answer in votes for found in answer.captured)
    assert isinstance(world.send(0, m.Commit(world.realm, group, captures)), m.CommitOk)
    started = world.restore(1, before)
    votes = [vote(world, number, group, rival) for number in (1, 2)]
    captures = tuple(found for answer in votes for found in answer.captured)
    assert world.send(2, m.Commit(world.realm, group, captures)) is m.Outcome.NO_QUORUM
    return started


def swap_prepared_writes(platform: type[CounterPlatform]) -> bool:
    """Keep the file of a write that a power cut interrupted, let the next one complete, and swap the two."""
    world, group, entry, rival = duel(platform)
    disk = world.counted(1)
    before = list(disk.files)
    world.send(1, m.CaptureNext(world.realm, group, (entry,)))
    disk.cut_after = 1  # the file is written, the counter not yet advanced
    with pytest.raises(Poisoned):
        world.send(1, m.PersistState())
    disk.cut_after = None
    interrupted = disk.envelopes[-1]
    assert world.restore(1, before), "an interrupted write may have happened or not"
    vote(world, 1, group, rival)
    return world.restore(1, [interrupted])


def test_a_restored_nvram_image_is_refused() -> None:
    """M8, I8: the counter refuses the start on an older image; whatever the host then does, nothing forks."""
    assert fork_by_rollback(CounterPlatform) is False


def test_a_rollback_that_succeeds_is_seen() -> None:
    """I8: without a counter one HSM of three votes twice; the observer that finds no fork elsewhere sees it here."""
    with pytest.raises(AssertionError, match="I8: heads are descendants"):
        fork_by_rollback(RewindablePlatform)


def test_an_interrupted_write_is_useless_after_a_start() -> None:
    """M9: a start re-seals, so that the file of an interrupted write never fits beside that of a later one."""
    assert swap_prepared_writes(CounterPlatform) is False


def test_a_start_that_does_not_reseal_is_seen() -> None:
    """I8: without re-sealing both files carry the count, and swapping them makes the HSM sign two captures."""
    with pytest.raises(AssertionError, match="I8"):
        swap_prepared_writes(UnsealedPlatform)


def test_files_of_another_hsm_and_damaged_ones_are_refused() -> None:
    """M8: an image of another HSM, a damaged one or none at all stops the start."""
    world, *_ = duel(CounterPlatform)
    [*_, newest] = world.counted(1).envelopes
    for files in ([], world.counted(2).files, [newest[:-1] + bytes([newest[-1] ^ 1])]):
        assert not world.restore(1, list(files))
    assert world.seen["RollbackRefused"] == 3
