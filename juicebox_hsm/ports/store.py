"""All ports of one opened store."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.accounting import Accounting
from juicebox_hsm.ports.audit import AuditTrail
from juicebox_hsm.ports.discovery import Discovery
from juicebox_hsm.ports.event_bus import EventBus
from juicebox_hsm.ports.event_outbox import EventOutbox
from juicebox_hsm.ports.leases import Leases
from juicebox_hsm.ports.log_store import LogStore
from juicebox_hsm.ports.node_store import NodeStore
from juicebox_hsm.ports.settings import Settings
from juicebox_hsm.ports.table_stats import TableStats
from juicebox_hsm.ports.tenant_config import TenantConfig


@dataclass(frozen=True, slots=True)
class Store:
    """All ports of one opened store, and how to create what a realm needs."""

    log: LogStore
    nodes: NodeStore
    outbox: EventOutbox
    accounting: Accounting
    discovery: Discovery
    leases: Leases
    settings: Settings
    tenants: TenantConfig
    realms: RealmStore
    audit: AuditTrail
    description: str = field(default="")
    stats: TableStats | None = None
    bus: EventBus | None = None
    is_new: bool = False
    """Whether opening made it."""


class RealmStore(Protocol):
    """Creation of shared and per-realm tables; both are idempotent."""

    async def create_shared(self) -> None:
        """Create discovery, leases, tenants, settings and the audit trail."""
        ...

    async def create_realm(self, realm: RealmId) -> None:
        """Create the log, nodes, users and outbox of a realm."""
        ...

    async def list_realms(self) -> list[RealmId]:
        """Return the realms that have tables here."""
        ...
