"""A store whose file is taken away while it is open: nothing is acknowledged any more, and nothing else is harmed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest
import trio

from juicebox_hsm.adapters.sqlite import identity
from juicebox_hsm.adapters.sqlite.backend import open_sqlite
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.errors import NoStore
from juicebox_hsm.ports.errors import StoreReplaced


def _replace(path: Path) -> None:
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").rename(path)


def _replace_log(path: Path) -> None:
    log = path.with_name(path.name + "-wal")
    shutil.copy(log, log.with_name("copy"))
    log.with_name("copy").rename(log)


@pytest.mark.parametrize(
    "take_away",
    [Path.unlink, _replace, lambda path: path.with_name(path.name + "-wal").unlink(), _replace_log],
    ids=["removed", "replaced", "log removed", "log replaced"],
)
async def test_a_store_that_was_taken_away_refuses(
    take_away: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No write is acknowledged from the moment on, and reads say so with the next look; the message names the file."""
    monkeypatch.setattr(identity, "LOOK_S", 0.0)
    path = tmp_path / "x.db"
    async with open_sqlite(path) as store:
        await store.settings.put("a", b"1")
        await store.settings.get("a")
        take_away(path)
        with pytest.raises(StoreReplaced, match=r"x\.db.* removed or replaced"):
            await store.settings.put("a", b"2")
        with pytest.raises(StoreReplaced, match="removed or replaced"):
            await store.settings.get("a")
        with pytest.raises(StoreReplaced, match="removed or replaced"):
            await store.discovery.list()


async def test_a_store_that_is_put_back_serves_again(tmp_path: Path) -> None:
    """The very file under its old name is the store again: a mistaken `mv` costs no restart."""
    path = tmp_path / "x.db"
    async with open_sqlite(path) as store:
        await store.settings.put("a", b"1")
        path.rename(tmp_path / "away")
        with pytest.raises(StoreReplaced):
            await store.settings.put("a", b"2")
        (tmp_path / "away").rename(path)
        await store.settings.put("a", b"3")
        assert await store.settings.get("a") == b"3"


async def test_leaving_a_lost_store_spares_its_successor(tmp_path: Path) -> None:
    """The last process of a replaced file does not remove the write-ahead log that now belongs to another one."""
    path = tmp_path / "x.db"
    other = apsw.Connection(str(tmp_path / "other.db"))
    other.pragma("journal_mode", "wal")
    other.execute("CREATE TABLE t (x); INSERT INTO t VALUES (1)")
    async with open_sqlite(path) as store:
        await store.settings.put("a", b"1")
        for end in ("", "-wal", "-shm"):
            (tmp_path / f"other.db{end}").rename(tmp_path / f"x.db{end}")
    assert (tmp_path / "x.db-wal").stat().st_size > 0
    other.execute("INSERT INTO t VALUES (2)")
    found = apsw.Connection(str(path))
    assert found.execute("SELECT count(*) FROM t").get == 2
    found.close()
    other.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    other.close()


async def test_who_makes_a_store_can_tell(tmp_path: Path) -> None:
    """Services warn about a store they had to make: its path may be mistyped."""
    for is_new in (True, False):
        async with open_store(f"sqlite:{tmp_path}/x.db") as store:
            assert store.is_new is is_new


def test_only_who_may_makes_a_store(tmp_path: Path) -> None:
    """With `must_exist` a path that leads nowhere is an error, and nothing is left there."""

    async def look() -> None:
        async with open_store(f"sqlite:{tmp_path}/none.db", must_exist=True):
            pass

    with pytest.raises(NoStore, match="store init"):
        trio.run(look)
    assert list(tmp_path.iterdir()) == []
