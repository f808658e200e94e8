"""The port to the registry of services."""

from __future__ import annotations

from typing import Protocol

from juicebox_hsm.host.services import ServiceAddress, ServiceKind


class Discovery(Protocol):
    """Where services are. Entries older than 21 minutes are not returned and are removed."""

    async def register(self, kind: ServiceKind, url: str, now_ms: int) -> None:
        """Write or renew a registration."""
        ...

    async def deregister(self, kind: ServiceKind, url: str) -> None:
        """Remove a registration; absent is fine."""
        ...

    async def list(self, now_ms: int, kind: ServiceKind | None = None) -> list[ServiceAddress]:
        """Return unexpired registrations sorted by kind and URL."""
        ...
