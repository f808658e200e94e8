"""A service compares its own clock and says so."""

from __future__ import annotations

import trio
import trio.testing

from juicebox_hsm.adapters.observation.metrics import Metrics
from roles.clock import OwnClock
from tests.unit.lb.harness import LbRecorder


async def test_a_wrong_clock_is_told_once_and_its_end(autojump_clock: trio.testing.MockClock) -> None:
    """One line when it begins to matter and one when it ends; the gauge has the offset all the time."""
    ahead_ms = 0
    metrics, log = Metrics(), LbRecorder()

    def now_ms() -> int:
        return round(trio.current_time() * 1000)

    clock = OwnClock(lambda: now_ms() + ahead_ms, metrics, log)
    offset = metrics.gauge_of("clock.offset")

    def look() -> float:
        for url in ("tls://a", "tls://b"):
            clock.heard(url, now_ms(), trio.current_time())
        clock.heard("tls://of-an-older-version", None, trio.current_time())
        clock.look()
        return clock.off_s

    assert look() == clock.outvoted_s == 0
    ahead_ms = 1_500_000
    assert look() == look() == offset.value == 1500
    assert clock.outvoted_s == 1500
    begun, ended = "this machine's clock is off, set it", "this machine's clock agrees with the others' again"
    assert [event for _, event in log.lines] == [begun]
    ahead_ms = -1_500_000
    assert look() == offset.value == -1500
    ahead_ms = 1_000
    assert look() == 0
    assert offset.value == 1
    assert [event for _, event in log.lines] == [begun, ended]


async def test_one_other_clock_does_not_outvote_ours(autojump_clock: trio.testing.MockClock) -> None:
    """A balancer with a single agent warns and stays ready: the wrong clock may be the agent's."""
    clock = OwnClock(lambda: 1_500_000, Metrics(), LbRecorder())
    clock.heard("tls://a", 0, trio.current_time())
    clock.look()
    assert clock.off_s
    assert not clock.outvoted_s
