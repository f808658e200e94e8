"""Whose wall clock is off (decision record 0031): each is compared with what most others say, never with one other.

Whoever asks a service for its status learns its clock to half the time of the answer. What he keeps is how far it is
ahead of his own *monotonic* clock: such readings can be compared with each other however his wall clock is set
meanwhile, and his own wall clock is one reading among them.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

DAY_MS: Final = 86_400_000
OFF_MS: Final = 5_000
"""Own: synchronised clocks are within milliseconds, and what we compare with a wall clock tolerates seconds."""
KEPT_S: Final = 60.0
"""Own: how long a service that no longer answers has a say; the slowest askers ask every 10 s."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How far a wall clock is ahead of the reader's monotonic clock, give or take `slack_ms`."""

    ahead_ms: int
    slack_ms: int = 0


def read_clock(told_ms: int, asked_s: float, answered_s: float) -> Reading:
    """Return the reading of a clock that said `told_ms` (Unix time) between two moments of the monotonic clock."""
    return Reading(told_ms - round((asked_s + answered_s) * 500), round((answered_s - asked_s) * 500))


def offset_ms(reading: Reading, everybody: Collection[Reading]) -> int:
    """Return how far a clock is ahead of the middle of all, itself among them; two that differ are both off."""
    return reading.ahead_ms - round(statistics.median(each.ahead_ms for each in everybody))


def is_off(reading: Reading, everybody: Collection[Reading]) -> bool:
    """Tell whether somebody should set this clock."""
    return abs(offset_ms(reading, everybody)) > OFF_MS + reading.slack_ms


_WITNESSES: Final = 2
"""Clocks that must agree that a time has come before anything is destroyed for its age (own)."""

VOTES_MIN: Final = 3
"""Fewer clocks cannot say which of them is wrong."""


class Clocks:
    """What one service knows of the others' clocks. Times are in s on its monotonic clock."""

    def __init__(self) -> None:
        self._others: dict[str, tuple[Reading, float]] = {}

    def heard(self, url: str, reading: Reading, now_s: float) -> None:
        """Take what the service at `url` said."""
        self._others[url] = (reading, now_s)

    def everybody(self, own: Reading, now_s: float) -> list[Reading]:
        """Return all readings that count at `now_s`, our own first."""
        self._others = {url: heard for url, heard in self._others.items() if now_s - heard[1] <= KEPT_S}
        return [own, *(reading for reading, _ in self._others.values())]


def past_ms(own_ms: int, told_ms: Collection[int]) -> int:
    """Return by what time things may be removed for their age: no later than two clocks have seen it, if there are two.

    `told_ms` are the times that services wrote when they registered last, which they do every minute, our own among
    them. One clock that is days ahead, ours or another's, then removes nothing before its time; one that stands back
    only puts removal off.
    """
    if len(told_ms) < _WITNESSES:
        return own_ms
    return min(own_ms, sorted(told_ms)[-_WITNESSES])
