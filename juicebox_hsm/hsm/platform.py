"""What the core needs from the outside: entropy, NVRAM, a clock's start value and the realm keys (hardware.md 2)."""

from __future__ import annotations

from typing import Protocol

from juicebox_hsm.hsm.keys import RealmKeys


class Platform(Protocol):
    """One HSM's platform. How fresh and how secret these are decides what the realm may promise."""

    @property
    def keys(self) -> RealmKeys:
        """Return the realm keys, the same on every HSM of the realm."""
        ...

    @property
    def clock_start(self) -> int:
        """Return the first role clock value of this start, greater than any of an earlier life (H5)."""
        ...

    def random(self, size: int) -> bytes:
        """Return `size` uniformly random bytes."""
        ...

    def nvram_read(self) -> bytes:
        """Return the last completely written content, at most 4000 bytes; empty at the very first start."""
        ...

    def nvram_write(self, content: bytes) -> None:
        """Make `content` durable, wholly or not at all, before returning. Any exception poisons the HSM (H6)."""
        ...
