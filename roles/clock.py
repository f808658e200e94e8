"""Compare a service's wall clock with those of the services it asks anyway, and tell when it is off."""

from __future__ import annotations

from collections.abc import Callable

import trio

from juicebox_hsm.host.clocks import VOTES_MIN, Clocks, Reading, is_off, offset_ms, read_clock
from juicebox_hsm.ports.observation import Log, Meter
from roles.words import clock_off


class OwnClock:
    """A service's own clock. `now_ms` is its Unix time in ms; `off_s` is how far it is ahead, 0 while it is right.

    `outvoted_s` is the same, but 0 also while there are too few clocks to say that it is ours that is wrong.
    """

    def __init__(self, now_ms: Callable[[], int], meter: Meter, log: Log) -> None:
        self._now_ms = now_ms
        self._meter = meter
        self._log = log
        self._clocks = Clocks()
        self.off_s = 0.0
        self.outvoted_s = 0.0

    def heard(self, url: str, told_ms: int | None, asked_s: float) -> None:
        """Take the time that a service answered with, if it did; older ones tell none. `asked_s` is Trio's."""
        if told_ms is not None:
            now_s = trio.current_time()
            self._clocks.heard(url, read_clock(told_ms, asked_s, now_s), now_s)

    def read(self, url: str, reading: Reading | None) -> None:
        """Take a reading that somebody else has just made."""
        if reading is not None:
            self._clocks.heard(url, reading, trio.current_time())

    def look(self) -> None:
        """Compare, report the offset, and log when it begins to matter and when it ends."""
        now_s = trio.current_time()
        own = read_clock(self._now_ms(), now_s, now_s)
        everybody = self._clocks.everybody(own, now_s)
        offset_s = offset_ms(own, everybody) / 1000
        self._meter.gauge("clock.offset", offset_s)
        was_off, self.off_s = self.off_s != 0.0, offset_s if is_off(own, everybody) else 0.0
        self.outvoted_s = self.off_s if len(everybody) >= VOTES_MIN else 0.0
        if self.off_s and not was_off:
            self._log.warning("this machine's clock is off, set it", clock=clock_off(self.off_s))
        elif was_off and not self.off_s:
            self._log.info("this machine's clock agrees with the others' again")
