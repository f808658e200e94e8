"""The port to a group's log (storage.md part A)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from juicebox_hsm.consensus.types import Certificate, LogEntry
from juicebox_hsm.host.log import AppendOutcome, Compacted, Intent, LogRow
from juicebox_hsm.ids import GroupId, RealmId


class LogStore(Protocol):
    """A group's log: appended in batches by whoever holds the tail, read by all members."""

    async def append(
        self,
        realm: RealmId,
        group: GroupId,
        entries: Sequence[LogEntry],
        intents: Sequence[Intent | None],
        delta: bytes,
    ) -> AppendOutcome:
        """Append a batch of 1..100 chained entries with its tree delta (squashed, merkle.md 3.3) atomically.

        CONFLICT unless the entry before the first is the last entry of the log with the mac that the batch names.
        `intents` is parallel to `entries`. After APPENDED the nodes are readable and the removed ones may be gone.
        """
        ...

    async def read_last(self, realm: RealmId, group: GroupId) -> LogEntry | None:
        """Return the last entry, None for an empty log. Reads its own writes."""
        ...

    async def read_from(
        self, realm: RealmId, group: GroupId, index: int, entries_max: int
    ) -> list[LogEntry] | Compacted:
        """Return up to about `entries_max` consecutive entries from `index`; [] at the end of the log."""
        ...

    async def read_intents(
        self, realm: RealmId, group: GroupId, first: int, last: int
    ) -> list[tuple[LogEntry, Intent]]:
        """Return the entries with an intent whose index is in first..last and that are still in the log."""
        ...

    async def list_rows(self, realm: RealmId, group: GroupId, below: int) -> list[LogRow]:
        """Return the rows that start below index `below`, oldest first, leading tombstones stripped."""
        ...

    async def compact(self, realm: RealmId, group: GroupId, rows: Sequence[LogRow]) -> None:
        """Replace rows by tombstones (or remove them). Idempotent."""
        ...

    async def write_certificate(self, realm: RealmId, group: GroupId, certificate: Certificate) -> None:
        """Store the certificate in a row of its own, then delete those with a smaller index."""
        ...

    async def read_certificate(self, realm: RealmId, group: GroupId) -> Certificate | None:
        """Return the certificate with the highest index, if any."""
        ...

    async def list_groups(self, realm: RealmId) -> list[GroupId]:
        """Return the groups that have a log in this realm."""
        ...
