"""The port to the tenant events between commit and publication (storage.md 2.7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from juicebox_hsm.host.events import EVENT_KEPT_MS, Backlog, EventKind, NewEvent, OutboxEvent, TenantCursor
from juicebox_hsm.ids import GroupId, RealmId


class EventOutbox(Protocol):
    """Tenant events between commit and publication (agent.md 11, storage.md 2.7)."""

    async def record(
        self, realm: RealmId, events: Sequence[NewEvent], settled: Mapping[GroupId, int]
    ) -> dict[str, int]:
        """Append events, each tenant's dense sequence continued, and raise settled indexes; one atomic write.

        Returns for each tenant in `events` its new tail.
        """
        ...

    async def settled(self, realm: RealmId, group: GroupId) -> int:
        """Return the highest index at or below which every intent has its row; 0 when never written."""
        ...

    async def read(self, realm: RealmId, tenant: str, after_seq: int, limit: int) -> list[OutboxEvent]:
        """Return events with seq > after_seq in order."""
        ...

    async def cursors(self, realm: RealmId) -> list[TenantCursor]:
        """Return every tenant with rows, sorted by name."""
        ...

    async def advance(
        self,
        realm: RealmId,
        tenant: str,
        from_seq: int,
        to_seq: int,
        day: str,
        counts: Mapping[EventKind, int],
    ) -> bool:
        """Move the cursor from `from_seq` and add to the counters of `day` (YYYYMMDD) in one conditional write.

        False when another dispatcher moved it first; nothing is written then.
        """
        ...

    async def remove_published(self, realm: RealmId, now_ms: int, limit: int, *, kept_ms: int = EVENT_KEPT_MS) -> int:
        """Remove up to `limit` rows that are published, settled and (with an event) at least `kept_ms` old."""
        ...

    async def backlog(self, realm: RealmId) -> Backlog:
        """Return the unpublished rows and the age of the oldest."""
        ...

    async def counters(self, realm: RealmId, tenant: str) -> dict[str, dict[EventKind, int]]:
        """Return day -> kind -> count."""
        ...
