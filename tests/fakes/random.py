"""A deterministic stream of "random" bytes: SHA-256(seed || be8(counter)), as in client-protocol.md 19.10."""

from __future__ import annotations

import hashlib


class SeededRandom:
    """Callable like `Random`; the same seed gives the same bytes, consumed in order."""

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self._counter = 0
        self._buffer = b""

    def __call__(self, size: int) -> bytes:
        """Return the next `size` bytes of the stream."""
        while len(self._buffer) < size:
            self._buffer += hashlib.sha256(self._seed + self._counter.to_bytes(8, "big")).digest()
            self._counter += 1
        drawn, self._buffer = self._buffer[:size], self._buffer[size:]
        return drawn
