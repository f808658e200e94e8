"""The port to the registry of services."""

from __future__ import annotations

from typing import Protocol

from juicebox_hsm.host.services import ServiceAddress, ServiceKind


class Discovery(Protocol):
    """Where services are.

    Nobody's clock decides who is there: an entry stays until its service leaves, or somebody forgets it who watched it
    (`host.cluster.registrations`). `registered_ms` is the registrant's own time and serves to tell renewals apart.
    """

    async def register(self, kind: ServiceKind, url: str, now_ms: int) -> None:
        """Write or renew a registration."""
        ...

    async def deregister(self, kind: ServiceKind, url: str) -> None:
        """Remove a registration; absent is fine."""
        ...

    async def forget(self, address: ServiceAddress) -> None:
        """Remove a registration unless it was renewed since it was read; absent is fine."""
        ...

    async def list(self, kind: ServiceKind | None = None) -> list[ServiceAddress]:
        """Return all registrations sorted by kind and URL."""
        ...
