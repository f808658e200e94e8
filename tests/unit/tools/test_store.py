"""The store tools as typed: init, check, gc, backup, restore; and the rule that a restore rewinds no guess."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio
from click.testing import CliRunner, Result

from juicebox_hsm.adapters.hsm_directory.hsm_host import InProcessHsm, generate_keys, init_hsm_dir, open_hsm_dir
from juicebox_hsm.adapters.sqlite import schema
from juicebox_hsm.adapters.sqlite.backup import read_tails
from juicebox_hsm.adapters.sqlite.check import check_file
from juicebox_hsm.adapters.sqlite.digest import TRAILER_BYTES
from juicebox_hsm.adapters.stores.check import SLICES, Checkpoint, LogTail
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.clocks import DAY_MS
from juicebox_hsm.host.cluster.view import AgentView
from juicebox_hsm.host.dispatch import kept_name
from juicebox_hsm.host.events import AccountingEvent
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.hsm.messages import CaptureNext, NewRealm, NewRealmOk, PersistState
from juicebox_hsm.ids import GroupId, HsmId, RealmId, RecordId
from roles.cli import cli
from roles.tools.store.restore import HsmWitness, Membership, restore_problems, witness_of
from tests.emulator.realm_data import GROUP, OTHER_GROUP, REALM, Grown, entry, event, mac

_rng = random.Random(1)
RECORDS = [(RecordId(_rng.randbytes(32)), _rng.randbytes(50)) for _ in range(5)]
A, B, C = (HsmId(bytes([n]) * 16) for n in (1, 2, 3))


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["store", *map(str, arguments)])


def _ok(*arguments: str | Path) -> str:
    result = _run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Make a store with a small realm, a registered service and events."""
    file = tmp_path / "realm.db"

    async def fill() -> None:
        async with open_store(f"sqlite:{file}") as store:
            await store.realms.create_realm(REALM)
            grown = await Grown.start(store)
            for record, value in RECORDS:
                await grown.write({record: value})
            await store.outbox.record(REALM, [event(1), event(2, body={"event": "deleted"})], {GROUP: 6})
            await store.discovery.register(ServiceKind.AGENT, "tls://127.0.0.1:1", time.time_ns() // 1_000_000)

    trio.run(fill)
    return file


def test_init_twice(tmp_path: Path) -> None:
    """A first run makes the file, a second changes nothing; a place without directory is one line and exit 1."""
    for _ in range(2):
        assert "ready; it holds 0 realms" in _ok("init", "--store", f"sqlite:{tmp_path / 'new.db'}")
    result = _run("init", "--store", f"sqlite:{tmp_path / 'no' / 'new.db'}")
    assert result.exit_code == 1
    assert "does not exist" in result.output


def test_check(path: Path) -> None:
    """A good store: totals and exit 0; a bad one: one line per finding and exit 5; both as JSON."""
    store = ("--store", f"sqlite:{path}")
    assert "no findings" in _ok("check", *store)
    assert json.loads(_ok("check", *store, "--json"))["records"] == 5
    connection = apsw.Connection(str(path))
    connection.execute("DELETE FROM log WHERE id & 255 = 3; UPDATE outbox SET data = x'00' WHERE seq = 2")
    connection.close()
    result = _run("check", *store)
    assert result.exit_code == 5
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("entries 3 to 3 are missing")
    result = _run("check", *store, "--json")
    assert result.exit_code == 5
    assert json.loads(result.stdout)["findings"] == lines
    assert _run("check", "--store", f"sqlite:{path}.not").exit_code == 3


def test_a_stopped_check_goes_on(path: Path, tmp_path: Path) -> None:
    """Slices of the trees that were done are not looked at again; their counts and findings are kept."""
    store, file = f"sqlite:{path}", tmp_path / "position"
    stopped = Checkpoint(file, store)
    stopped.trees.records, stopped.trees.nodes, stopped.nodes = 3, 7, 7
    stopped.trees.add("somewhere", "a leaf was altered")
    stopped.done(REALM, SLICES - 2)
    result = _run("check", "--store", store, "--resume", file, "--json")
    assert result.exit_code == 5, result.output
    assert f"going on from {file}" in result.stderr
    told = json.loads(result.stdout)
    assert told["findings"] == ["somewhere: a leaf was altered"]
    assert told["records"] == 3 + sum(record[0] >> 1 == SLICES - 1 for record, _ in RECORDS)
    assert not file.exists(), "a check that got to its end leaves nothing"


def test_a_check_that_is_stopped_keeps_its_place(path: Path, tmp_path: Path) -> None:
    """Whatever ends a check, the next one begins behind the last slice that was done."""
    store, file = f"sqlite:{path}", tmp_path / "position"
    checkpoint = Checkpoint(file, store)

    def stop(phase: str, done: int, whole: int) -> None:
        if phase.startswith("trees") and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_file(path, {}, stop, checkpoint)
    resumed = Checkpoint(file, store)
    assert [resumed.is_done(REALM, number) for number in (0, 4, 5, 127)] == [True, True, False, False]
    assert check_file(path, {}, lambda *_: None, resumed).records == 5


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"store": 1}'])
def test_a_foreign_position_is_refused(path: Path, tmp_path: Path, content: str) -> None:
    """A file that is no position, or that of another store, is one line and exit 1, and stays as it is."""
    file = tmp_path / "position"
    file.write_text(content)
    result = _run("check", "--store", f"sqlite:{path}", "--resume", file)
    assert result.exit_code == 1
    assert "remove it to begin anew" in result.output
    Checkpoint(tmp_path / "other", "sqlite:elsewhere").done(REALM, 3)
    assert (
        "is the position of a check of sqlite:elsewhere"
        in _run("check", "--store", f"sqlite:{path}", "--resume", tmp_path / "other").output
    )
    assert file.read_text() == content


def test_what_an_hsm_remembers_is_compared(tmp_path: Path) -> None:
    """A log that ends before what an HSM captured, another entry there, and a lost group are findings."""
    file, hsm_dir = tmp_path / "realm.db", tmp_path / "hsm"
    generate_keys(tmp_path / "keys", "test")
    init_hsm_dir(tmp_path / "keys", hsm_dir)
    trio.run(_one_hsm_realm, file, hsm_dir)
    arguments = ("check", "--store", f"sqlite:{file}", "--hsm-dir", hsm_dir)
    assert "no findings" in _ok(*arguments)
    connection = apsw.Connection(str(file))
    connection.execute("DELETE FROM log")
    result = _run(*arguments)
    assert result.exit_code == 5
    assert "captured index 1, the store's log ends at 0" in result.output
    connection.execute("DELETE FROM groups")
    assert "captured index 1, the store has no such group" in _run(*arguments).output
    connection.close()


def test_check_of_a_wrecked_file_is_a_finding(path: Path) -> None:
    """A file SQLite cannot even open is exit 5 with SQLite's word, not a traceback."""
    raw = bytearray(path.read_bytes())
    raw[100:4096] = b"\xee" * 3996
    path.write_bytes(raw)
    result = _run("check", "--store", f"sqlite:{path}")
    assert result.exit_code == 5, result.output
    assert "malformed" in result.output


def test_gc(path: Path) -> None:
    """What is due goes, what is not stays, and the report says what takes space."""

    async def age() -> None:
        async with open_store(f"sqlite:{path}") as store:
            await store.discovery.register(ServiceKind.AGENT, "tls://127.0.0.1:2", time.time_ns() // 1_000_000)
            days = [
                AccountingEvent("acme", RecordId(bytes(32)), day, day * 86_400_000, True) for day in range(100, 110)
            ]
            await store.accounting.write(REALM, days)
            await store.outbox.advance(REALM, "acme", 0, 2, "20231114", {})

    trio.run(age)
    output = _ok("gc", "--store", f"sqlite:{path}")
    assert "removed 2 events, 9 accounting rows" in output
    assert "bytes, of which" in output
    assert "removed 0 events, 0 accounting rows" in _ok("gc", "--store", f"sqlite:{path}")
    assert _run("gc", "--store", f"sqlite:{path}.not").exit_code == 3


def test_gc_believes_no_single_clock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose clock is a year ahead nothing goes that is young by the clocks of registered services."""
    now_ms = time.time_ns() // 1_000_000

    async def fill() -> None:
        async with open_store(f"sqlite:{path}") as store:
            for number in range(2):
                await store.discovery.register(ServiceKind.AGENT, f"tls://127.0.0.1:{number}", now_ms)
            days = [
                AccountingEvent("acme", RecordId(bytes(32)), day, now_ms - day * 86_400_000, True) for day in (3, 2, 1)
            ]
            await store.accounting.write(REALM, days)

    trio.run(fill)
    monkeypatch.setattr(time, "time_ns", lambda: (now_ms + 366 * 86_400_000) * 1_000_000)
    assert "removed 0 events, 0 accounting rows" in _ok("gc", "--store", f"sqlite:{path}")


def test_gc_keeps_what_agents_keep(path: Path) -> None:
    """Events stay as long as the realm's agents say in the store, not just the usual week."""

    async def set_up(kept_days: int) -> None:
        async with open_store(f"sqlite:{path}") as store:
            cursor = (await store.outbox.cursors(REALM))[0]
            await store.outbox.advance(REALM, "acme", cursor.published, 2, "20231114", {})
            await store.settings.put(kept_name(REALM), str(kept_days * DAY_MS).encode())

    trio.run(set_up, 99_999)
    assert "removed 1 events" in _ok("gc", "--store", f"sqlite:{path}"), "the one without a body"
    trio.run(set_up, 7)
    assert "removed 1 events" in _ok("gc", "--store", f"sqlite:{path}")


def test_backup(path: Path, tmp_path: Path) -> None:
    """A backup is one complete file, private, checked like a store, and never overwrites."""
    target = tmp_path / "copy.backup"
    output = _ok("backup", target, "--store", f"sqlite:{path}")
    assert f"group {GROUP.hex()}: log up to index 6" in output
    assert target.stat().st_mode & 0o777 == 0o600
    assert sorted(each.name for each in tmp_path.iterdir() if "copy" in each.name) == ["copy.backup"]
    assert "no findings" in _ok("check", "--store", f"sqlite:{target}")
    before = target.read_bytes()
    result = _run("backup", target, "--store", f"sqlite:{path}")
    assert result.exit_code == 1
    assert "never overwrites" in result.output
    assert target.read_bytes() == before
    assert _run("backup", tmp_path / "no" / "x", "--store", f"sqlite:{path}").exit_code == 1
    assert _run("backup", tmp_path / "y", "--store", f"sqlite:{path}.not").exit_code == 3
    assert not (tmp_path / "y").exists()


# --- restore ------------------------------------------------------------------------------------------


def _tail(last: int = 10, group: GroupId = GROUP) -> LogTail:
    return LogTail(REALM, group, last, {index: mac(index) for index in range(5, last + 1)}, frozenset({A}))


def _witness(hsm: HsmId, index: int | None, *, salt: int = 0, group: GroupId = GROUP) -> HsmWitness:
    captured = None if index is None else (index, mac(index, salt))
    return HsmWitness(hsm, f"--hsm-dir {hsm.hex()[:2]}", {(REALM, group): Membership((A, B, C), captured)})


@pytest.mark.parametrize(
    ("witnesses", "unknown", "says"),
    [
        ([_witness(A, 10), _witness(B, 9), _witness(C, 3)], [], []),
        ([_witness(A, 10), _witness(B, None), _witness(C, 10)], [], []),
        ([_witness(A, 10), _witness(B, 11), _witness(C, 10)], [], [["02" * 16, "index 11", "ends at 10", GROUP.hex()]]),
        ([_witness(A, 10), _witness(B, 10)], [], [["03" * 16, "was not asked"]]),
        ([_witness(A, 10), _witness(B, 10)], [C], []),
        ([_witness(A, 12), _witness(B, 10)], [C], [["01" * 16, "index 12"]]),
        ([_witness(A, 10), _witness(B, 9, salt=1), _witness(C, 3)], [], [["02" * 16, "another entry at index 9"]]),
        ([], [], [["none of its HSMs was asked", "01" * 16]]),
        ([], [A, B, C], [["none of its HSMs was asked"]]),
        (
            [_witness(A, 10), _witness(B, 10), _witness(C, 10), _witness(A, 1, group=OTHER_GROUP)],
            [],
            [["the backup has no such group", OTHER_GROUP.hex()]],
        ),
    ],
)
def test_who_may_go_on(witnesses: list[HsmWitness], unknown: list[HsmId], says: list[list[str]]) -> None:
    """A member beyond the tail, on another history, or not asked refuses the restore, named with its indexes."""
    problems = restore_problems([_tail()], witnesses, unknown)
    assert len(problems) == len(says), problems
    for problem, words in zip(problems, says, strict=True):
        assert all(word in problem for word in words), problem


def test_an_agent_without_hsm_is_no_witness() -> None:
    """An agent that does not answer cannot vouch for its HSM."""
    with pytest.raises(LocalError, match="tls://x"):
        witness_of(AgentView("tls://x", None, "refused"))


async def _one_hsm_realm(file: Path, hsm_dir: Path) -> tuple[RealmId, HsmId]:
    """Create a realm with one HSM that captured entry 1."""
    async with open_store(f"sqlite:{file}") as store:
        with open_hsm_dir(hsm_dir) as platform:
            hsm = InProcessHsm(Hsm(platform))
            made: Any = await hsm.send(NewRealm())
            assert isinstance(made, NewRealmOk)
            await store.realms.create_realm(made.realm)
            await store.log.append(made.realm, made.group, [made.entry], [None], made.delta)
            await hsm.send(CaptureNext(made.realm, made.group, (made.entry,)))
            await hsm.send(PersistState())
    from juicebox_hsm.adapters.hsm_directory.hsm_host import read_hsm_dir

    _, state = read_hsm_dir(hsm_dir)
    assert state is not None
    assert state.realm is not None
    assert [kept.captured is not None for kept in state.realm.groups.values()] == [True]
    return made.realm, state.id


def test_restore(tmp_path: Path) -> None:
    """Into an empty store, with the HSM's word: what was backed up is back, except addresses of services."""
    file, hsm_dir, copy, new = (tmp_path / name for name in ("realm.db", "hsm", "copy", "new.db"))
    generate_keys(tmp_path / "keys.json", "test")
    init_hsm_dir(tmp_path / "keys.json", hsm_dir)
    trio.run(_one_hsm_realm, file, hsm_dir)
    checked = _ok("check", "--store", f"sqlite:{file}", "--hsm-dir", hsm_dir)
    assert "1 log entries, 1 MACs verified" in checked
    _ok("backup", copy, "--store", f"sqlite:{file}")

    result = _run("restore", copy, "--store", f"sqlite:{new}")
    assert result.exit_code == 1
    assert "none of its HSMs was asked" in result.output
    assert not new.exists()
    result = _run("restore", copy, "--store", f"sqlite:{file}", "--hsm-dir", hsm_dir)
    assert result.exit_code == 1
    assert "empty store only" in result.output
    with open_hsm_dir(hsm_dir):
        result = _run("restore", copy, "--store", f"sqlite:{new}", "--hsm-dir", hsm_dir)
        assert result.exit_code == 1
        assert "stop it first" in result.output
    _ok("init", "--store", f"sqlite:{new}")
    assert "the HSMs can go on" in _ok("restore", copy, "--store", f"sqlite:{new}", "--hsm-dir", hsm_dir)
    assert "no findings" in _ok("check", "--store", f"sqlite:{new}", "--hsm-dir", hsm_dir)
    assert _tails(new, tmp_path) == read_tails(copy)
    assert _run("restore", copy, "--store", f"sqlite:{new}", "--hsm-dir", hsm_dir).exit_code == 1


def _tails(file: Path, tmp_path: Path) -> list[LogTail]:
    _ok("backup", tmp_path / "again", "--store", f"sqlite:{file}")
    return read_tails(tmp_path / "again")


def _backed_up(tmp_path: Path) -> tuple[Path, Path]:
    """Make a realm with one HSM and a backup of its store; return the HSM's directory and the backup."""
    file, hsm_dir, copy = (tmp_path / name for name in ("realm.db", "hsm", "copy"))
    generate_keys(tmp_path / "keys.json", "test")
    init_hsm_dir(tmp_path / "keys.json", hsm_dir)
    trio.run(_one_hsm_realm, file, hsm_dir)
    _ok("backup", copy, "--store", f"sqlite:{file}")
    return hsm_dir, copy


def test_no_damaged_backup_is_restored(tmp_path: Path) -> None:
    """Whichever byte of a backup changed, its restore is refused, nothing is written, and nobody is told to go on."""
    hsm_dir, copy = _backed_up(tmp_path)
    new = tmp_path / "new.db"
    whole = copy.read_bytes()
    chance = random.Random(5)
    for at in [0, 20, len(whole) - 1, len(whole) - 40, *chance.sample(range(len(whole)), 40)]:
        copy.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << chance.randrange(8))]) + whole[at + 1 :])
        result = _run("restore", copy, "--store", f"sqlite:{new}", "--hsm-dir", hsm_dir)
        assert result.exit_code == 1, at
        assert "not restored" in result.output
        assert "go on" not in result.output
        assert not new.exists()
        assert _run("check", "--backup", "--store", f"sqlite:{copy}").exit_code in {1, 5}
    copy.write_bytes(whole)
    assert "the HSMs can go on" in _ok("restore", copy, "--store", f"sqlite:{new}", "--hsm-dir", hsm_dir)


def test_no_store_in_use_is_restored_into(tmp_path: Path) -> None:
    """Services that were started on an empty store are left alone, and named."""
    hsm_dir, copy = _backed_up(tmp_path)
    new = tmp_path / "new.db"
    _ok("init", "--store", f"sqlite:{new}")
    with closing(schema.connect(new, 100)) as user:
        assert user.execute("SELECT count(*) FROM realms").get == 0
        result = _run("restore", copy, "--store", f"sqlite:{new}", "--hsm-dir", hsm_dir)
        assert result.exit_code == 1
        assert f"is in use by process {os.getpid()}" in result.output
        assert user.execute("SELECT count(*) FROM realms").get == 0
    assert "the HSMs can go on" in _ok("restore", copy, "--store", f"sqlite:{new}", "--hsm-dir", hsm_dir)


def test_restore_checks_backups_without_a_digest(tmp_path: Path) -> None:
    """A backup of an older version needs the word of the operator, and what a check finds still refuses it."""
    hsm_dir, copy = _backed_up(tmp_path)
    new = tmp_path / "new.db"
    whole = copy.read_bytes()[:-TRAILER_BYTES]
    restore = ("restore", copy, "--store", f"sqlite:{new}", "--hsm-dir", hsm_dir)
    copy.write_bytes(whole)
    result = _run(*restore)
    assert result.exit_code == 1
    assert "carries no digest" in result.output
    connection = apsw.Connection(str(copy))
    connection.execute("UPDATE log SET entries = zeroblob(length(entries))")
    connection.close()
    result = _run(*restore, "--no-digest")
    assert result.exit_code == 1
    assert not new.exists()
    copy.write_bytes(whole)
    _ok(*restore, "--no-digest")


def test_a_backup_that_cannot_be_written_blames_its_target(path: Path, tmp_path: Path) -> None:
    """A limit on the size of files is told with the target and the system's reason, and the source is not blamed."""
    target = tmp_path / "copy"
    program = (
        "import resource, sys\n"
        "from roles.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "main(sys.argv[1:])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, "store", "backup", str(target), "--store", f"sqlite:{path}"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert f"{target}: cannot be written: File too large" in ended.stderr
    assert not target.exists()


def test_restore_forgets_services(path: Path, tmp_path: Path) -> None:
    """Addresses and leases of the past are not restored: nobody is there any more."""
    _ok("backup", tmp_path / "copy", "--store", f"sqlite:{path}")
    from juicebox_hsm.adapters.sqlite.backup import restore_file

    (tmp_path / "new.db").touch()
    restore_file(tmp_path / "copy", tmp_path / "new.db", lambda phase, done, whole: None)

    async def look() -> None:
        async with open_store(f"sqlite:{tmp_path / 'new.db'}") as store:
            assert await store.discovery.list() == []
            assert await store.leases.list() == []
            last = await store.log.read_last(REALM, GROUP)
            assert last is not None
            assert last.entry_mac == entry(6).entry_mac
            assert len(await store.outbox.read(REALM, "acme", 0, 10)) == 2

    trio.run(look)
