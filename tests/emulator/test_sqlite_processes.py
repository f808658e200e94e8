"""Several real processes on one SQLite file: kills, races, a full disk."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import IO

import apsw
import pytest

from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.ids import RecordId
from juicebox_hsm.merkle.kernel import Tree
from tests.emulator.realm_data import GROUP, REALM, Grown, append, batch, entry
from tests.emulator.sqlite_process import RACE_INDEXES
from tests.patience import HANGS_S

pytestmark = pytest.mark.processes
LIMIT_S = HANGS_S


def start(task: str, path: Path, *arguments: int) -> subprocess.Popen[str]:
    """Start a child with a task."""
    command = [sys.executable, "-m", "tests.emulator.sqlite_process", task, str(path), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def output(child: subprocess.Popen[str]) -> IO[str]:
    """Return the child's output."""
    assert child.stdout is not None
    return child.stdout


@pytest.mark.parametrize("kill_after", [1, 60, 233, 400])
async def test_a_killed_writer_loses_nothing_acknowledged(tmp_path: Path, kill_after: int) -> None:
    """After kill -9 in the middle of appends every acknowledged row is there, chained, with its tree and events."""
    path = tmp_path / "realm.db"
    child = start("write", path, 1000)
    said = {"append": 0, "record": 0}
    for count, line in enumerate(output(child), 1):
        what, told = line.split()
        said[what] = int(told)
        if count == kill_after:
            child.send_signal(signal.SIGKILL)
    output(child).close()
    assert child.wait(LIMIT_S) == -signal.SIGKILL
    assert said["append"] < 1000
    check_file(path)
    async with open_store(f"sqlite:{path}") as store:
        entries = await store.log.read_from(REALM, GROUP, 1, 10_000)
        assert isinstance(entries, list)
        assert [each.index for each in entries] == list(range(1, len(entries) + 1))
        assert all(entry(each.index, partition=each.partition) == each for each in entries), "the chain is whole"
        assert len(entries) - said["append"] in (0, 1), "at most the one not yet acknowledged more"
        for tenant in ("acme", "b"):
            rows = await store.outbox.read(REALM, tenant, 0, 10_000)
            assert [row.seq for row in rows] == list(range(1, len(rows) + 1))
            assert len(rows) - said["record"] in (0, 1)
        partition = entries[-1].partition
        assert partition is not None
        grown = Grown(store, GROUP, Tree(partition.root_hash, partition.range.start, partition.range.end, 4))
        rng = random.Random(1)
        for number in range(1, len(entries)):
            grown.values |= {RecordId(rng.randbytes(32)): number.to_bytes(8, "big") for _ in range(4)}
        await grown.check()


def check_file(path: Path) -> None:
    """Ask SQLite itself whether the file is in order."""
    connection = apsw.Connection(str(path))
    assert connection.execute("PRAGMA integrity_check").get == "ok"
    connection.close()


async def test_two_processes_race_for_every_index(tmp_path: Path) -> None:
    """Exactly one of two processes wins each index, and the log is what the winners wrote."""
    path = tmp_path / "realm.db"
    children = [start("race", path, salt) for salt in (1, 2)]
    won = []
    for child in children:
        with output(child) as lines:
            won.append({int(line.split()[1]) for line in lines})
    assert [child.wait(LIMIT_S) for child in children] == [0, 0]
    assert not won[0] & won[1]
    assert won[0] | won[1] == set(range(1, RACE_INDEXES + 1))
    async with open_store(f"sqlite:{path}") as store:
        entries = await store.log.read_from(REALM, GROUP, 1, 10_000)
        assert isinstance(entries, list)
        for before, after in pairwise(entries):
            assert after.prev_mac == before.entry_mac
        for salt in (1, 2):
            written = {each.index for each in entries if each.entry_mac == entry(each.index, salt).entry_mac}
            assert written == won[salt - 1]


async def test_outbox_stays_dense_across_processes(tmp_path: Path) -> None:
    """Three processes that append to one tenant's sequence leave neither gap nor duplicate."""
    path = tmp_path / "realm.db"
    children = [start("record", path, number) for number in (1, 2, 3)]
    assert [child.wait(LIMIT_S) for child in children] == [0, 0, 0]
    for child in children:
        output(child).close()
    async with open_store(f"sqlite:{path}") as store:
        rows = await store.outbox.read(REALM, "acme", 0, 10_000)
        assert [row.seq for row in rows] == list(range(1, 601))
        pairs = [(row.new.index, row.new.kind.value) for row in rows]
        assert len(set(pairs)) == 600
        assert all(a[0] == b[0] for a, b in zip(pairs[::2], pairs[1::2], strict=True)), "a batch stays together"


async def test_a_full_disk(tmp_path: Path) -> None:
    """Appends that do not fit raise StoreUnavailable and leave nothing; with room again the store goes on."""
    path = tmp_path / "realm.db"
    child = start("fill", path)
    with output(child) as lines:
        text = lines.read()
    assert child.wait(LIMIT_S) == 0
    index = int(text.split()[-1])
    check_file(path)
    async with open_store(f"sqlite:{path}") as store:
        assert await store.log.read_last(REALM, GROUP) == entry(index + 50)


async def test_killed_while_others_write(tmp_path: Path) -> None:
    """A process killed at any point neither blocks the others nor costs them anything."""
    path = tmp_path / "realm.db"
    async with open_store(f"sqlite:{path}") as store:
        await store.realms.create_realm(REALM)
        victims = [start("record", path, 1), start("record", path, 2)]
        index, until = 0, time.monotonic() + 1.5
        while time.monotonic() < until:
            index += 1
            assert (await append(store, batch(index, index))).value == "Appended"
            if index == 50:
                victims[0].kill()
        for victim in victims:
            victim.kill()
            victim.wait(LIMIT_S)
            output(victim).close()
        assert await store.log.read_from(REALM, GROUP, 1, 100_000) == batch(1, index)
    check_file(path)
