"""What `juicebox-hsm store gc` does on an SQLite file: the maintenance that agents do hourly, now, and a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import apsw
import trio

from juicebox_hsm.adapters.process.threads import in_thread
from juicebox_hsm.adapters.sqlite.gc import SLICE_ROWS, START, clean_users, removal_ms
from juicebox_hsm.adapters.sqlite.reads import fetch_one
from juicebox_hsm.adapters.sqlite.snapshot import open_snapshot
from juicebox_hsm.adapters.sqlite.writer import FileLock
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.host.clocks import DAY_MS, past_ms
from juicebox_hsm.host.dispatch import kept_name, late_name
from juicebox_hsm.host.events import EVENT_KEPT_MS

MARGIN_MS: Final = DAY_MS
"""Own: events stay a day longer here than the dispatcher keeps them, which knows what was published late."""
EVENT_ROWS: Final = 1_000

Progress = Callable[[str, int, int], None]


async def collect(path: Path, rate: int, progress: Progress) -> list[str]:
    """Remove what is due at no more than `rate` rows a second; return what was done and what takes space.

    Raises `LocalError`, `StoreInvalid` and `StoreUnavailable`.
    """
    with open_snapshot(path):
        pass  # a missing or foreign file is refused before anything is opened for writing
    events = await _remove_events(path, rate, progress)
    users = await in_thread(_clean_tables, path, rate, progress)
    with open_snapshot(path) as db:
        page_bytes, free, pages = (db.pragma(name) for name in ("page_size", "freelist_count", "page_count"))
    return [
        f"removed {events:,} events, {users:,} accounting rows",
        f"file: {pages * page_bytes:,} bytes, of which {free * page_bytes:,} are free for later writes",
    ]


async def _remove_events(path: Path, rate: int, progress: Progress) -> int:
    """Remove published events that are past their time, as the dispatcher does."""
    removed = 0
    async with open_store(f"sqlite:{path}", must_exist=True) as store:
        for realm in await store.realms.list_realms():
            late = await store.settings.get(late_name(realm))
            if late is not None:
                continue  # some were published late; only the dispatcher knows until when they stay
            kept_ms = int(await store.settings.get(kept_name(realm)) or EVENT_KEPT_MS)
            while True:
                told_ms = [entry.registered_ms for entry in await store.discovery.list()]
                now_ms = past_ms(time.time_ns() // 1_000_000, told_ms) - MARGIN_MS
                count = await store.outbox.remove_published(realm, now_ms, EVENT_ROWS, kept_ms=kept_ms)
                removed += count
                progress("events", removed, 0)
                if count < EVENT_ROWS:
                    break
                await trio.sleep(count / rate)
    return removed


def _clean_tables(path: Path, rate: int, progress: Progress) -> int:
    """Remove old accounting rows in slices, each a transaction under the writers' lock."""
    lock = FileLock(path.with_name(path.name + ".lock"))
    db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        db.set_busy_timeout(5_000)
        now_ms = removal_ms(db)
        before = fetch_one(db, "SELECT count(*) FROM users")
        at: tuple[int, str, bytes, int] | None = START
        seen = 0
        changed = db.total_changes()
        while at is not None:
            with lock, db:
                at = clean_users(db, at, now_ms, SLICE_ROWS)
            seen += SLICE_ROWS
            progress("accounting", min(seen, before), before)
            time.sleep(SLICE_ROWS / rate)
        return db.total_changes() - changed
    finally:
        with lock:
            db.close()
        lock.close()
