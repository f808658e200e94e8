"""How long clients' requests take at an agent, as a mean of the last minute: for people who look, not for rules."""

from __future__ import annotations

from juicebox_hsm.host.leadership.state import RateMeter


class LatencyMeter:
    """The mean time of what ended in the last 60 whole seconds. Times are in s on a monotonic clock."""

    __slots__ = ("_ended", "_spent_us")

    def __init__(self) -> None:
        self._ended = RateMeter()
        self._spent_us = RateMeter()

    def add(self, now_s: float, took_s: float) -> None:
        """Count something that ended at `now_s` and took so long."""
        self._ended.add(now_s, 1)
        self._spent_us.add(now_s, round(took_s * 1e6))

    def mean_ms(self, now_s: float) -> float | None:
        """Return the mean in ms, None when nothing ended."""
        ended = self._ended.per_second(now_s)
        return self._spent_us.per_second(now_s) / ended / 1000 if ended else None
