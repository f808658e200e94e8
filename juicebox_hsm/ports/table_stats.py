"""The port behind `cluster table-stats`: what a store's tables hold (operator-tools.md 2.3).

Apart from the other ports because no service uses it: a back end without it serves a realm as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from juicebox_hsm.ids import GroupId, RealmId


@dataclass(frozen=True, slots=True)
class LogStats:
    """One group's log: row indexes, rows that hold entries, their entries, tombstones (expired: older than 7 days)."""

    group: GroupId
    first_index: int | None
    last_index: int | None
    rows: int
    entries: int
    tombstones: int
    expired_tombstones: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """Tree rows under one key prefix; times are Unix ms, None where the back end keeps none."""

    prefix: str
    nodes: int
    oldest_ms: int | None
    newest_ms: int | None


@dataclass(frozen=True, slots=True)
class TreeStats:
    """The trees of a realm. `roots` should not exceed the number of groups with a range."""

    leaves: int
    interior: int
    roots: int
    rows: int
    size_bytes: int
    prefixes: tuple[PrefixStats, ...]


@dataclass(frozen=True, slots=True)
class UserStats:
    """Accounting of one tenant: rows, and records that were ever registered."""

    tenant: str
    rows: int
    records: int


class TableStats(Protocol):
    """Full scans for operators; slow on a large realm, harmless to a running one."""

    async def log(self, realm: RealmId) -> list[LogStats]:
        """Return every group's log, sorted by group id. Raises `StoreInvalid` for an unknown realm."""
        ...

    async def tree(self, realm: RealmId, prefixes_max: int) -> TreeStats:
        """Return the realm's trees with the prefixes that hold most nodes. Raises `StoreInvalid`."""
        ...

    async def users(self, realm: RealmId) -> list[UserStats]:
        """Return the accounting of every tenant, sorted by name. Raises `StoreInvalid`."""
        ...
