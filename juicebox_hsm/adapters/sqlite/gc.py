"""Remove what no reader can need any more: hourly, jittered, by one process at a time (storage.md 10).

Runs on the writer's thread, one slice of 1,000 rows per group of writes, so that it delays a commit by no more than
that. Most tables clean up after themselves; what is left are accounting rows (of a record those of the last 116 days
stay, and the newest from before), and planner statistics.
"""

from __future__ import annotations

import random
import time
from typing import Final

import apsw

from juicebox_hsm.adapters.sqlite.cluster import obtain_lease
from juicebox_hsm.adapters.sqlite.reads import fetch, fetch_one
from juicebox_hsm.adapters.sqlite.writer import Operation
from juicebox_hsm.host.clocks import DAY_MS, past_ms

INTERVAL_S: Final = 3_600.0
LEASE: Final = "maintenance"
LEASE_MS: Final = 600_000
SLICE_ROWS: Final = 1_000
ACCOUNTING_DAYS: Final = 116
"""Age below which every accounting row stays: a count may start that far back (storage.md 4.6)."""

_SLICE: Final = "SELECT realm, tenant, record, day FROM users WHERE (realm, tenant, record, day) > (?, ?, ?, ?) LIMIT ?"
START: Final = (0, "", b"", -1)


class Maintenance:
    """When to clean, and what comes next. Used by the writer's thread only, after construction."""

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._due = time.monotonic() + interval_s * random.uniform(0.5, 1.5)  # noqa: S311 - spreads load, no secret
        self._at: tuple[int, str, bytes, int] | None = None

    def wait_s(self) -> float:
        """Return for how long the writer may sleep."""
        return 0.0 if self._at is not None else max(0.0, self._due - time.monotonic())

    def next(self) -> Operation[None] | None:
        """Return the operation that is due, if any."""
        if self._at is not None:
            return self._slice
        return self._begin if time.monotonic() >= self._due else None

    def _begin(self, db: apsw.Connection) -> None:
        """Begin a round unless another process had one within the last minutes."""
        self._due = time.monotonic() + self._interval_s * random.uniform(0.9, 1.1)  # noqa: S311
        now_ms = time.time_ns() // 1_000_000
        latest_ms = fetch_one(db, "SELECT expires_ms FROM leases WHERE name = ?", (LEASE,))
        if latest_ms is not None and latest_ms > now_ms + LEASE_MS:  # by a clock far ahead of ours: it says nothing
            db.execute("DELETE FROM leases WHERE name = ?", (LEASE,))
        if obtain_lease(db, LEASE, "maintenance", now_ms, LEASE_MS) is None:
            return
        self._at = START

    def _slice(self, db: apsw.Connection) -> None:
        """Look at one slice of the accounting rows."""
        at, self._at = self._at or START, None
        self._at = clean_users(db, at, removal_ms(db), SLICE_ROWS)


def removal_ms(db: apsw.Connection) -> int:
    """Return the time (Unix ms) by which rows may go for their age: by our clock and those of registered services."""
    told = [told_ms for (told_ms,) in fetch(db, "SELECT registered_ms FROM discovery")]
    return past_ms(time.time_ns() // 1_000_000, told)


def clean_users(
    db: apsw.Connection, after: tuple[int, str, bytes, int], now_ms: int, limit: int
) -> tuple[int, str, bytes, int] | None:
    """Clean the `limit` accounting rows after a key; return the last key seen, None at the end of the table.

    A row goes if its record has a newer one that is itself at least 116 days old: no period that may be asked for
    begins before that, so none needs the older one (decision record 0022).
    """
    rows = fetch(db, _SLICE, (*after, limit))
    oldest = now_ms // DAY_MS - ACCOUNTING_DAYS
    gone = []
    for realm, tenant, record, day in rows:
        if day < oldest:
            newer = fetch_one(
                db,
                "SELECT EXISTS (SELECT 1 FROM users WHERE realm = ? AND tenant = ? AND record = ?"
                " AND day > ? AND day <= ?)",
                (realm, tenant, record, day, oldest),
            )
            if newer:
                gone.append((realm, tenant, record, day))
    db.executemany("DELETE FROM users WHERE realm = ? AND tenant = ? AND record = ? AND day = ?", gone)
    return rows[-1] if len(rows) == limit else None
