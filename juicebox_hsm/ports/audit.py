"""The port to the audit trail: who changed what, when, and with what result (record 0035)."""

from __future__ import annotations

from typing import Protocol

from juicebox_hsm.host.audit import AuditEntry


class AuditTrail(Protocol):
    """Entries that are added and never changed or removed; there is no operation for either."""

    async def add(self, entry: AuditEntry) -> None:
        """Add an entry; returns when it is durable. Of one change and phase the first entry stands.

        So a repeat, after an answer that was lost, changes nothing.
        """
        ...

    async def read(self, since_ms: int, entries_max: int) -> list[AuditEntry]:
        """Return the newest `entries_max` entries of `since_ms` (Unix ms) and later, oldest first."""
        ...
