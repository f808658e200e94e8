"""The port to small shared facts (storage.md 2.8)."""

from __future__ import annotations

from typing import Protocol


class Settings(Protocol):
    """Small shared facts by name (storage.md 2.8)."""

    async def get(self, name: str) -> bytes | None:
        """Return the value, if set."""
        ...

    async def claim(self, name: str, value: bytes) -> bytes:
        """Set the value if absent; return the value that stands afterwards."""
        ...

    async def put(self, name: str, value: bytes) -> None:
        """Set or replace the value."""
        ...

    async def remove(self, name: str) -> None:
        """Remove the value; absent is fine."""
        ...

    async def list(self, prefix: str) -> dict[str, bytes]:
        """Return name -> value for names with the prefix."""
        ...
