"""Opening a store: what is accepted, and what an operator is told otherwise."""

from __future__ import annotations

import random
import sqlite3
import tempfile
from pathlib import Path

import apsw
import pytest

from juicebox_hsm.adapters.sqlite import gc, schema
from juicebox_hsm.adapters.sqlite.accounting import SqliteAccounting
from juicebox_hsm.adapters.sqlite.reads import fetch, fetch_one
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.clocks import DAY_MS
from juicebox_hsm.host.events import AccountingEvent
from juicebox_hsm.ids import RealmId, RecordId
from juicebox_hsm.merkle.walk import Lost
from juicebox_hsm.ports.errors import StoreInvalid, StoreUnavailable
from juicebox_hsm.ports.store import Store
from roles.tools.bench.store import measure
from tests.emulator.realm_data import GROUP, Grown

REALM = RealmId(b"\x11" * 16)


async def refusal(url: str) -> str:
    """Open `url`, which must fail, and return the one line said about it."""
    with pytest.raises(LocalError) as caught:
        async with open_store(url):
            pass
    text = str(caught.value)
    assert "\n" not in text
    return text


def modes(directory: Path) -> dict[str, int]:
    """Return the mode of every file of a directory."""
    return {file.name: file.stat().st_mode for file in directory.iterdir()}


async def test_urls(tmp_path: Path) -> None:
    """Anything but sqlite:PATH is refused with what is expected."""
    for url in ("", "realm.db", "sqlite", "sqlite:", "sqlite::memory:", "sqlite://host/x", "mysql:x"):
        assert "sqlite:PATH" in await refusal(url)
    assert "bigtable:PROJECT/INSTANCE" in await refusal("bigtable:project")
    assert "directory" in await refusal(f"sqlite:{tmp_path}/absent/realm.db")
    assert "directory" in await refusal(f"sqlite:{tmp_path}")


async def test_foreign_files(tmp_path: Path) -> None:
    """A file that is no database, somebody else's, or of a newer version is refused and left alone."""
    path = tmp_path / "x.db"
    path.write_bytes(b"not a database at all" * 100)
    assert "not an SQLite database" in await refusal(f"sqlite:{path}")
    assert path.read_bytes() == b"not a database at all" * 100
    path.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE theirs (x)")
    other.close()
    assert "another program" in await refusal(f"sqlite:{path}")
    path.unlink()
    async with open_store(f"sqlite:{path}"):
        pass
    connection = apsw.Connection(str(path))
    connection.pragma("user_version", 99)
    connection.close()
    text = await refusal(f"sqlite:{path}")
    assert "99" in text
    assert str(schema.SCHEMA_VERSION) in text


async def test_read_only_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file we may only read is refused at once, not at the first write."""
    path = tmp_path / "x.db"
    async with open_store(f"sqlite:{path}"):
        pass
    monkeypatch.setattr(apsw, "SQLITE_OPEN_READWRITE", apsw.SQLITE_OPEN_READONLY)
    assert "read-only" in await refusal(f"sqlite:{path}")


async def test_files_are_private(tmp_path: Path) -> None:
    """Only the owner can read what we create."""
    path = tmp_path / "x.db"
    async with open_store(f"sqlite:{path}") as store:
        await store.settings.put("a", b"b")
        assert {name: mode & 0o077 for name, mode in modes(tmp_path).items()} == dict.fromkeys(modes(tmp_path), 0)
    assert modes(tmp_path).keys() == {"x.db", "x.db.lock"}


async def test_durability_settings(tmp_path: Path) -> None:
    """Every connection flushes at commit, in WAL mode, without checkpoints of its own."""
    async with open_store(f"sqlite:{tmp_path}/x.db"):
        connection = schema.connect(tmp_path / "x.db", 100)
        assert connection.pragma("journal_mode") == "wal"
        assert connection.pragma("synchronous") == 2
        assert connection.pragma("wal_autocheckpoint") == 0
        connection.close()


async def test_unknown_realm(tmp_path: Path) -> None:
    """Asking for a realm that was never created says so."""
    async with open_store(f"sqlite:{tmp_path}/x.db") as store:
        with pytest.raises(StoreInvalid, match=REALM.hex()):
            await store.log.list_groups(REALM)
        with pytest.raises(StoreInvalid):
            await store.outbox.record(REALM, [], {})


async def test_realms_have_a_limit(tmp_path: Path) -> None:
    """The realm after the last that row keys have room for is refused and not created."""
    async with open_store(f"sqlite:{tmp_path}/x.db") as store:
        connection = schema.connect(tmp_path / "x.db", 100)
        connection.execute("INSERT INTO realms VALUES (?, x'00')", (schema.REALMS_MAX,))
        connection.close()
        with pytest.raises(LocalError):
            await store.realms.create_realm(REALM)
        assert len(await store.realms.list_realms()) == 1


def test_errors_are_translated() -> None:
    """Damage is StoreInvalid, everything else of SQLite may pass."""
    path = Path("f.db")
    assert isinstance(schema.translate(apsw.CorruptError("x"), path), StoreInvalid)
    full = schema.translate(apsw.FullError("x"), path)
    assert isinstance(full, StoreUnavailable)
    assert "full" in str(full)
    for error in (apsw.BusyError("x"), apsw.IOError("x"), apsw.ReadOnlyError("x"), apsw.CantOpenError("x")):
        assert isinstance(schema.translate(error, path), StoreUnavailable)


def test_old_accounting_rows_go() -> None:
    """A row goes only when its record has a newer one that is no younger than 116 days."""
    db = apsw.Connection(":memory:")
    db.execute(schema._TABLES)
    today = 20_000
    days = {
        b"a": (1, 2, 3, today - 1, today),
        b"b": (1, 2),
        b"e": (1, today - 116, today),
        b"c": (today - 116, today - 1, today),
        b"d": (today - 117, 19_990, today),
    }
    for record, when in days.items():
        for day in when:
            db.execute("INSERT INTO users VALUES (1, 't', ?, ?, 0, 1)", (record, day))
    at: tuple[int, str, bytes, int] | None = (0, "", b"", -1)
    rounds = 0
    while at is not None:
        at = gc.clean_users(db, at, today * DAY_MS, 3)
        rounds += 1
    assert rounds > 2, "in slices"
    left: dict[bytes, list[int]] = {}
    for record, day in fetch(db, "SELECT record, day FROM users ORDER BY record, day"):
        left.setdefault(record, []).append(day)
    assert left == {
        b"a": [3, today - 1, today],
        b"b": [2],
        b"e": [today - 116, today],
        b"c": [today - 116, today - 1, today],
        b"d": [today - 117, 19_990, today],
    }


async def test_cleaning_changes_no_count(tmp_path: Path) -> None:
    """Every period that may be asked for counts the same users before and after old accounting rows are removed."""
    rng, today = random.Random(5), 20_000
    periods = [(today - back, today - back + days) for back in range(0, 117, 4) for days in (1, 9, 31)]

    async def counts(store: Store) -> list[dict[str, int]]:
        return [await store.accounting.count_users(REALM, a * DAY_MS, b * DAY_MS) for a, b in periods]

    async with open_store(f"sqlite:{tmp_path / 'realm.db'}") as store:
        await store.realms.create_realm(REALM)
        days = sorted((rng.randrange(today - 200, today + 1), rng.randrange(60)) for _ in range(600))
        await store.accounting.write(
            REALM,
            [
                AccountingEvent("t", RecordId(bytes([record]) * 32), seq, day * DAY_MS, rng.random() < 0.5)
                for seq, (day, record) in enumerate(days, 1)
            ],
        )
        before = await counts(store)
        assert isinstance(store.accounting, SqliteAccounting)
        await store.accounting._writer.run(lambda db: gc.clean_users(db, gc.START, today * DAY_MS, 1_000))
        left = await store.accounting._writer.run(lambda db: fetch_one(db, "SELECT count(*) FROM users"))
        assert left < len(set(days)), "old ones do go"
        assert await counts(store) == before


def test_maintenance_takes_turns() -> None:
    """A round begins when due, in one process at a time, and ends with the last slice."""
    db = apsw.Connection(":memory:")
    db.execute(schema._TABLES)
    first, second = gc.Maintenance(interval_s=0.0), gc.Maintenance(interval_s=0.0)
    assert gc.Maintenance().next() is None
    assert gc.Maintenance().wait_s() > 60
    begin = first.next()
    assert begin is not None
    begin(db)
    assert first.wait_s() == 0.0
    other = second.next()
    assert other is not None
    other(db)
    assert second.next() != second._slice, "the other holds the lease"
    piece = first.next()
    assert piece == first._slice
    piece(db)
    assert first._at is None


async def test_damaged_rows_are_named(tmp_path: Path) -> None:
    """Content that does not decode is named, as a log's row or as the node that is lost, and never taken for data."""
    async with open_store(f"sqlite:{tmp_path}/x.db") as store:
        await store.realms.create_realm(REALM)
        grown = await Grown.start(store)
        key = RecordId(b"\x42" * 32)
        await grown.write({key: b"v"})
    connection = schema.connect(tmp_path / "x.db", 100)
    connection.execute("UPDATE log SET entries = x'c1'; UPDATE tree SET data = x'c1'")
    connection.close()
    async with open_store(f"sqlite:{tmp_path}/x.db") as store:
        with pytest.raises(StoreInvalid, match="log row"):
            await store.log.read_last(REALM, GROUP)
        (proof,) = await store.nodes.read_proofs(REALM, grown.partition, [key])
        assert isinstance(proof, Lost), "a page that does not decode is as good as missing"
        await store.settings.put("still", b"usable")


async def test_benchmark_measures() -> None:
    """The benchmark runs end to end and reports every figure for each batch size."""
    with tempfile.TemporaryDirectory() as place:
        figures = await measure(f"sqlite:{place}/bench.db", leaves=30, batches=[1, 4], rounds=2, value_bytes=50)
    assert [len(list(each.lines())) for each in figures] == [4, 4]
    assert all(value > 0 for each in figures for value in each.append_wall)
