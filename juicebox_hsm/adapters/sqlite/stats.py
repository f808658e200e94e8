"""Count what the tables of a realm hold, for operators (operator-tools.md 2.3).

Each figure is one full scan in a worker thread and one snapshot; nothing is changed and no writer waits. SQLite keeps
no times with tree nodes and no tombstones, so those figures are empty.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import apsw

from juicebox_hsm.adapters.sqlite.layout import rows_of_realm, shape_of
from juicebox_hsm.adapters.sqlite.reads import Reads, Values, fetch, fetch_one
from juicebox_hsm.adapters.sqlite.rows import entries_size
from juicebox_hsm.adapters.sqlite.schema import INDEX_BITS, INDEX_MAX
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.ports.errors import StoreInvalid
from juicebox_hsm.ports.table_stats import LogStats, PrefixStats, TreeStats, UserStats

_LOG: Final = "SELECT id, last, length(entries) + coalesce(length(intents), 0) FROM log WHERE id BETWEEN ? AND ?"
_TREE: Final = "SELECT id, substr(data, 1, 5), length(data) FROM tree WHERE id BETWEEN ? AND ?"
_ROOTS: Final = "SELECT count(*), coalesce(sum(length(node)), 0) FROM roots WHERE realm = ?"
_USERS: Final = """SELECT tenant, count(*), count(DISTINCT CASE WHEN registered THEN record END) FROM users
  WHERE realm = ? GROUP BY tenant ORDER BY tenant"""
_INDEX_MASK: Final = INDEX_MAX


class SqliteStats:
    """`ports.TableStats` on one file."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads

    async def log(self, realm: RealmId) -> list[LogStats]:
        """Return every group's log, sorted by group id. Raises `StoreInvalid` for an unknown realm."""
        number = self._reads.realm(realm)
        return await self._reads.scan(lambda db: _log(db, number))

    async def tree(self, realm: RealmId, prefixes_max: int) -> TreeStats:
        """Return the realm's trees; a prefix is the first byte of the record ids below it. Raises `StoreInvalid`."""
        number = self._reads.realm(realm)
        return await self._reads.scan(lambda db: _tree(db, number, prefixes_max))

    async def users(self, realm: RealmId) -> list[UserStats]:
        """Return the accounting of every tenant, sorted by name. Raises `StoreInvalid`."""
        arguments: Values = (self._reads.realm(realm),)
        rows = await self._reads.scan(lambda db: fetch(db, _USERS, arguments))
        return [UserStats(tenant, count, records) for tenant, count, records in rows]


def _log(db: apsw.Connection, realm: int) -> list[LogStats]:
    found = []
    for group, number in fetch(db, "SELECT grp, number FROM groups WHERE realm = ? ORDER BY grp", (realm,)):
        first: int | None = None
        newest: int | None = None
        rows = entries = size = 0
        for row, last, length in db.execute(_LOG, (number << INDEX_BITS, (number << INDEX_BITS) + _INDEX_MASK)):
            begins = row & _INDEX_MASK
            first = begins if first is None else min(first, begins)
            newest = last if newest is None else max(newest, last)
            rows += 1
            entries += last - begins + 1
            size += length
        found.append(LogStats(GroupId(group), first, newest, rows, entries, 0, 0, size))
    return found


def _tree(db: apsw.Connection, realm: int, prefixes_max: int) -> TreeStats:
    leaves = interior = rows = 0
    by_prefix: Counter[int] = Counter()
    roots, size = fetch_one(db, _ROOTS, (realm,))
    for row, head, length in db.execute(_TREE, rows_of_realm(realm)):
        count = entries_size(head)
        if count is None:
            raise StoreInvalid(f"tree row {row} does not hold a page; run a check of the store")
        is_leaf, prefix = shape_of(row)
        leaves += count if is_leaf else 0
        interior += 0 if is_leaf else count
        if prefix is not None:
            by_prefix[prefix] += count
        rows += 1
        size += length
    ordered = sorted(by_prefix.items(), key=lambda item: (-item[1], item[0]))[:prefixes_max]
    prefixes = tuple(PrefixStats(f"{prefix:02x}", count, None, None) for prefix, count in ordered)
    return TreeStats(leaves, interior, roots, rows + roots, size, prefixes)
