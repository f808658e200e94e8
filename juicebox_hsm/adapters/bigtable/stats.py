"""Count what the tables of a realm hold, for operators (operator-tools.md 2.3).

Each figure is one scan in pages, not a snapshot: rows that agents write or remove meanwhile may be counted or not.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Final

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.accounting import REGISTERED
from juicebox_hsm.adapters.bigtable.check_trees import node_place
from juicebox_hsm.adapters.bigtable.codec import Row, Selection
from juicebox_hsm.adapters.bigtable.log_rows import is_tombstone
from juicebox_hsm.adapters.bigtable.table import Endpoint, Table
from juicebox_hsm.ids import ID_BYTES, GroupId, RealmId
from juicebox_hsm.merkle.nodes import KEY_BITS
from juicebox_hsm.ports.table_stats import LogStats, PrefixStats, TreeStats, UserStats

TOMBSTONE_EXPIRY_MICROS: Final = 7 * 86_400 * 1_000_000
"""Age from which the service may remove tombstones (storage.md 1)."""


@dataclass(slots=True)
class _Log:
    """One group's figures while its rows come, newest first."""

    first: int | None = None
    last: int | None = None
    rows: int = 0
    entries: int = 0
    tombstones: int = 0
    expired: int = 0
    size: int = 0

    def add(self, row: Row, now_micros: int) -> None:
        """Count a row."""
        self.size += _size(row)
        if is_tombstone(row):
            self.tombstones += 1
            self.expired += row.cells[0].timestamp < now_micros - TOMBSTONE_EXPIRY_MICROS
            return
        self.first = keys.log_index(row.key)
        self.last = self.last or keys.upward(row.cells[0].qualifier)
        self.rows += 1
        self.entries += len(row.cells)


def _size(row: Row) -> int:
    return sum(len(row.key) + len(cell.qualifier) + len(cell.value) for cell in row.cells)


class BigtableStats:
    """`table_stats.TableStats` on one instance."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def log(self, realm: RealmId) -> list[LogStats]:
        """Return every group's log, sorted by group id."""
        now_micros = time.time_ns() // 1000
        found: dict[GroupId, _Log] = defaultdict(_Log)
        async for page in Table(self._endpoint, keys.realm_tables(realm)[0]).scan(keys.whole_table()):
            for row in page:
                if len(row.key) == keys.LOG_KEY_BYTES:  # longer ones are certificates
                    found[GroupId(row.key[:ID_BYTES])].add(row, now_micros)
        return [
            LogStats(group, log.first, log.last, log.rows, log.entries, log.tombstones, log.expired, log.size)
            for group, log in sorted(found.items())
        ]

    async def tree(self, realm: RealmId, prefixes_max: int) -> TreeStats:
        """Return the realm's trees. A prefix with many nodes is one under which versions were left behind."""
        leaves = interior = roots = rows = size = 0
        times: dict[str, tuple[int, int]] = {}
        counts: Counter[str] = Counter()
        async for page in Table(self._endpoint, keys.realm_tables(realm)[1]).scan(keys.whole_table()):
            for row in page:
                record, nbits = node_place(row.key)
                rows += 1
                size += _size(row)
                leaves += nbits == KEY_BITS
                roots += nbits == 0
                interior += 0 < nbits < KEY_BITS
                name = _prefix_name(record, nbits)
                counts[name] += 1
                stamps = [cell.timestamp // 1000 for cell in row.cells]
                oldest, newest = times.get(name, (stamps[0], stamps[0]))
                times[name] = (min(oldest, *stamps), max(newest, *stamps))
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:prefixes_max]
        prefixes = tuple(PrefixStats(name, count, *times[name]) for name, count in ordered)
        return TreeStats(leaves, interior, roots, rows, size, prefixes)

    async def users(self, realm: RealmId) -> list[UserStats]:
        """Return the accounting of every tenant, sorted by name; rows are days with an event."""
        rows: Counter[str] = Counter()
        records: Counter[str] = Counter()
        table = Table(self._endpoint, keys.realm_tables(realm)[2])
        async for page in table.scan(keys.whole_table(), Selection(family="f")):
            for row in page:
                tenant = keys.user_tenant(row.key)
                rows[tenant] += len(row.cells)
                records[tenant] += any(cell.value == REGISTERED for cell in row.cells)
        return [UserStats(tenant, rows[tenant], records[tenant]) for tenant in sorted(rows)]


def _prefix_name(record: int, nbits: int) -> str:
    """Return the bits above a node, in full near the root, where versions gather, else its first byte."""
    if nbits <= 8:
        return "root" if nbits == 0 else f"{record >> (KEY_BITS - nbits):0{nbits}b}/{nbits}"
    return f"{record >> (KEY_BITS - 8):02x}"
