"""Check groups' logs and certificates: rows, chain, MACs, and what was compacted (storage.md 2.1, 4.5; agent.md 10).

A log is read backwards from its newest row, as rows are ordered. Its contiguous end is checked in full. Behind the
first tombstone or gap at most 99 further rows may still hold entries, where compactions met; anything beyond is a
hole. Agents go on meanwhile: what looks wrong is believed only if the log's end is still the same afterwards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import Row
from juicebox_hsm.adapters.bigtable.log import WINDOW_ROWS, BigtableLog
from juicebox_hsm.adapters.bigtable.log_rows import decode_entries, decode_with_intents, is_tombstone
from juicebox_hsm.adapters.bigtable.settled import Settled
from juicebox_hsm.adapters.bigtable.table import Endpoint, Table
from juicebox_hsm.adapters.stores.check import (
    GroupTail,
    Progress,
    Report,
    check_certificate,
    check_link,
    tail_of,
)
from juicebox_hsm.consensus.macs import Macs
from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.ports.errors import StoreInvalid

ATTEMPTS_MAX: Final = 5
"""Readings of a log in which something looked wrong while it grew."""
RECENT_ENTRIES: Final = 100_000
"""Entries of a log's end that captures are compared with; older ones are compacted as a rule."""


@dataclass(slots=True)
class _Backwards:
    """What is known while rows come newest first."""

    where: str
    realm: RealmId
    group: GroupId
    macs: Macs | None
    report: Report
    newest: LogEntry | None = None
    oldest: LogEntry | None = None
    rows_behind_gap: int = 0
    is_behind_gap: bool = False
    entries: deque[LogEntry] = field(default_factory=lambda: deque(maxlen=RECENT_ENTRIES))

    def take(self, row: Row) -> None:
        """Check one row."""
        if is_tombstone(row):
            self.is_behind_gap = True
            self.rows_behind_gap += 1
            return
        first = keys.log_index(row.key)
        try:
            entries = decode_entries(row)
            decode_with_intents(row)
        except StoreInvalid as error:
            self.report.add(self.where, f"the row of entries from {first} is damaged: {error}")
            self.is_behind_gap = True
            return
        if entries[0].index != first:
            self.report.add(self.where, f"the row of entries from {first} holds other entries than it says")
        for before, entry in pairwise(entries):
            check_link(self.where, before, entry, self.report)
        self._verify(entries)
        self.report.entries += len(entries)
        self._join(entries)

    def _verify(self, entries: Sequence[LogEntry]) -> None:
        if self.macs is None:
            return
        for entry in entries:
            self.report.verified_macs += 1
            if not self.macs.verify_log_entry(self.realm, self.group, entry):
                self.report.add(self.where, f"entry {entry.index} was altered: its MAC is not that of its content")

    def _join(self, entries: Sequence[LogEntry]) -> None:
        """Put a row in front of what is known, if it belongs there."""
        if self.oldest is None:
            self.newest = entries[-1]
        elif self.oldest.index != entries[-1].index + 1:
            self.is_behind_gap = True
        elif not self.is_behind_gap:
            check_link(self.where, entries[-1], self.oldest, self.report)
        if self.is_behind_gap and self.oldest is not None:
            self.rows_behind_gap += 1
            if self.rows_behind_gap > WINDOW_ROWS:
                last = self.oldest.index - 1
                self.report.add(self.where, f"entries {entries[-1].index + 1} to {last} are missing")
                self.rows_behind_gap = -(2**63)  # said once
            return
        self.oldest = entries[0]
        self.entries.extendleft(reversed(entries))


class LogCheck:
    """The logs of one realm."""

    def __init__(self, endpoint: Endpoint, log: BigtableLog, realm: RealmId, macs: Macs | None) -> None:
        self._table = Table(endpoint, keys.realm_tables(realm)[0])
        self._log = log
        self._settled = Settled(endpoint)
        self._realm = realm
        self._macs = macs

    async def check(self, report: Report, progress: Progress) -> Mapping[GroupId, GroupTail]:
        """Check all groups' logs; return where each begins and ends."""
        tails = {}
        for group in await self._log.list_groups(self._realm):
            progress(f"log of group {group.hex()[:8]}", 0, 0)
            tail = await self._check_group(group, report)
            report.groups += 1
            if tail is not None:
                tails[group] = tail
        return tails

    async def _check_group(self, group: GroupId, report: Report) -> GroupTail | None:
        for number in range(ATTEMPTS_MAX):
            attempt = Report()
            tail = await self._attempt(group, attempt)
            last = await self._log.read_last(self._realm, group) if attempt.findings else None
            same = last is None or tail is None or last.entry_mac == tail.entry.entry_mac
            if same or number == ATTEMPTS_MAX - 1:
                break
        report.take(attempt)
        report.tails += attempt.tails
        return tail

    async def _attempt(self, group: GroupId, report: Report) -> GroupTail | None:
        where = f"realm {self._realm.hex()}, group {group.hex()}"
        seen = _Backwards(where, self._realm, group, self._macs, report)
        async for page in self._table.scan(keys.log_range(group, keys.TOP, 0)):
            for row in page:
                seen.take(row)
        report.tails.append(tail_of(self._realm, group, seen.entries))
        if seen.newest is None or seen.oldest is None:
            report.add(where, "no entry of the log is left")
            return None
        check_link(where, None, seen.oldest, report)
        tail = GroupTail(seen.oldest.index, seen.newest)
        await self._check_certificate(where, group, tail, {e.index: e.entry_mac for e in seen.entries}, report)
        settled = await self._settled.read(self._realm, group)
        if settled > seen.newest.index:
            report.add(where, f"entries {seen.newest.index + 1} to {settled} are missing: their events are there")
        return tail

    async def _check_certificate(
        self, where: str, group: GroupId, tail: GroupTail, macs: Mapping[int, bytes], report: Report
    ) -> None:
        try:
            certificate = await self._log.read_certificate(self._realm, group)
        except StoreInvalid as error:
            report.add(where, str(error))
            return
        if certificate is not None:
            check_certificate(where, certificate, tail, macs.get, self._macs, report)
        elif tail.first > 1:
            report.add(where, f"entries 1 to {tail.first - 1} are missing and there is no commit certificate")
