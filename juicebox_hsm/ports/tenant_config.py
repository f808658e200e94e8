"""The port to tenants' limits (storage.md 2.6)."""

from __future__ import annotations

from typing import Protocol

from juicebox_hsm.host.services import TenantLimits


class TenantConfig(Protocol):
    """Tenants' limits (storage.md 2.6)."""

    async def list(self) -> dict[str, TenantLimits]:
        """Return all configured tenants."""
        ...

    async def put(self, tenant: str, limits: TenantLimits) -> None:
        """Set or replace a tenant's configuration."""
        ...

    async def remove(self, tenant: str) -> None:
        """Remove a tenant's configuration; absent is fine."""
        ...
