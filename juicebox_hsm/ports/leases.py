"""The port to advisory leases (manager.md 1.2)."""

from __future__ import annotations

from typing import Protocol

from juicebox_hsm.host.services import Lease


class Leases(Protocol):
    """Advisory leases (manager.md 1.2): they save duplicated work, correctness never depends on them."""

    async def obtain(self, name: str, owner: str, now_ms: int, length_ms: int) -> Lease | None:
        """Obtain the lease unless somebody's expiry is at or after now."""
        ...

    async def extend(self, lease: Lease, now_ms: int, length_ms: int) -> Lease | None:
        """Extend a lease that is still ours; None when it is not."""
        ...

    async def terminate(self, lease: Lease) -> None:
        """Give the lease back if it is still ours."""
        ...

    async def list(self) -> list[Lease]:
        """Return all rows, expired ones too, sorted by name."""
        ...
