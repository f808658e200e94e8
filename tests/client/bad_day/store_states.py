"""States of an SQLite store: its file deleted, replaced, or an older one under HSMs that know more."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

import trio

from tests.client.bad_day.day import ONLY_SQLITE, Channel, Day, State
from tests.client.bad_day.listening import INFO, PIN, registered

PARTS: Final = ("", "-wal", "-shm")
"""Endings of the files a store in use consists of."""
START_S: Final = 30.0
"""Services that do not listen by then have refused to start; that, too, is listened to."""


def _file(day: Day, part: str = "") -> Path:
    return day.cluster.state.path / f"store.db{part}"


def _copy(day: Day) -> Path:
    """Return a whole copy of the store as it is now."""
    target = day.directory / "older.db"
    with closing(sqlite3.connect(_file(day))) as source, closing(sqlite3.connect(target)) as copy:
        source.backup(copy)
    return target


async def _older(day: Day) -> Path:
    """Return a copy of the store that misses what a new user did since."""
    older = _copy(day)
    async with registered(day.cluster) as user:
        for _ in range(3):
            await user.client.recover(PIN, INFO)
    return older


def _remove(day: Day) -> None:
    for part in PARTS:
        _file(day, part).unlink(missing_ok=True)


async def _delete(day: Day) -> None:
    await trio.lowlevel.checkpoint()
    _remove(day)


async def _replace(day: Day) -> None:
    (await _older(day)).replace(_file(day))


async def _start_on_older(day: Day) -> None:
    older = await _older(day)
    services = [running for running in day.cluster.processes if running.is_running]
    for running in services:
        await running.kill()
    _remove(day)
    older.replace(_file(day))
    with trio.move_on_after(START_S):
        for running in services:
            running.start()
        for running in services:
            await running.wait_listening()


_GONE: Final = {
    Channel.READY: r"removed or replaced",
    Channel.METRICS: r"store_client_\w*errors\w*(\{.*\})? [1-9]",
    Channel.LOG: r"removed or replaced",
    Channel.CLIENT: r"",
}
STATES: Final = (
    State(
        "store-deleted",
        "the store's files are deleted under running services",
        {**_GONE, Channel.STATUS: r"store\.db"},
        _delete,
        stores=ONLY_SQLITE,
    ),
    State(
        "store-replaced",
        "an older copy of the store is moved over it under running services",
        {**_GONE, Channel.STATUS: r"removed or replaced|older"},
        _replace,
        stores=ONLY_SQLITE,
    ),
    State(
        "store-older",
        "all services are stopped and started on a copy of the store that is older than what the HSMs know",
        {
            Channel.READY: r"older|another store|store check",
            Channel.LOG: r"older|another store|store check",
            Channel.STATUS: r"older|another store|store check",
            Channel.CLIENT: r"",
        },
        _start_on_older,
        stores=ONLY_SQLITE,
    ),
)
