"""How often and how long something is tried again (agent.md 15, storage.md 6). Waiting is `adapters.clock`'s."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

GROWTHS_MAX: Final = 500
"""Beyond this the cap holds in any case; the power stays a number that a float can hold."""


@dataclass(frozen=True, slots=True)
class RetryProfile:
    """Pauses that grow by `factor` from `first_s` to `cap_s`, each varied by up to the fraction `spread` of it.

    `attempts_max` None means no bound on the number. `total_s` bounds the time from the first attempt's begin to the
    last one's: an attempt begun in time is not cut short.
    """

    first_s: float = 0.01
    cap_s: float = 2.0
    attempts_max: int | None = 50
    total_s: float = 30.0
    spread: float = 0.0
    factor: float = 2.0

    def delay_s(self, attempt: int, draw: float = 0.5) -> float:
        """Return the pause after failed attempt number `attempt` (from 1); `draw` in [0, 1) places it in the spread."""
        pause_s = min(self.cap_s, self.first_s * self.factor ** min(attempt - 1, GROWTHS_MAX))
        return pause_s * (1.0 + self.spread * (2.0 * draw - 1.0))

    def exhausted(self, attempt: int, elapsed_s: float) -> bool:
        """Tell whether failed attempt number `attempt` was the last one allowed."""
        return (self.attempts_max is not None and attempt >= self.attempts_max) or elapsed_s >= self.total_s


FOREVER_S: Final = float("inf")
"""For what is tried until somebody else ends it."""

STORE_RETRY: Final = RetryProfile()
HSM_RETRY: Final = RetryProfile(first_s=0.001, cap_s=1.0, attempts_max=None, total_s=60.0)
