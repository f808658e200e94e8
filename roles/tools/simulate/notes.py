"""What a simulated run leaves behind: coverage counters, and a trace whose digest names the run (simulation.md 4).

The trace is made of lines that the seed alone decides: virtual times, names, methods and outcomes. Nothing in it may
come from the real clock, from object addresses or from an order that hashing decides.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable
from typing import Final

LINES_KEPT: Final = 400
"""Lines kept for the report of a failure; a replay keeps all."""


class Notes:
    """The trace and the counters of one run. `now` is the virtual time in seconds."""

    def __init__(self, now: Callable[[], float], *, keeps_all: bool = False) -> None:
        self._now = now
        self._digest = hashlib.sha256()
        self.lines: deque[str] = deque(maxlen=None if keeps_all else LINES_KEPT)
        self.counts: Counter[str] = Counter()
        self._closed = False

    def tell(self, text: str) -> None:
        """Add one line to the trace, with the time before it."""
        if self._closed:
            return
        line = f"{self._now():.6f} {text}"
        self._digest.update(line.encode())
        self._digest.update(b"\n")
        self.lines.append(line)

    def close(self) -> None:
        """End the trace: what still happens while the run is taken apart does not belong to it."""
        self._closed = True

    def count(self, name: str) -> None:
        """Count one occurrence of what a batch of runs must have seen."""
        self.counts[name] += 1

    @property
    def digest(self) -> str:
        """Return the trace's digest so far, as 16 hex digits: enough to tell runs apart, short enough to compare."""
        return self._digest.hexdigest()[:16]
