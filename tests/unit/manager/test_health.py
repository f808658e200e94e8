"""The verdict as metrics: what alerts look at, without anybody asking."""

from __future__ import annotations

import math

import trio
from trio.testing import MockClock

from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.host.cluster.verdict import Evidence
from juicebox_hsm.ids import FULL_RANGE
from juicebox_hsm.ports.errors import StoreUnavailable
from roles.manager.health import LOOK_S_MAX, PAUSE_S, tell_groups, tell_health
from tests.host.cluster.agents import REALM, group, three, view_of

GROUP = {"realm": REALM.hex(), "group": group(1).hex()}


def _evidence(down: int = 0) -> Evidence:
    """Return a group of three, led by the first, of which the last ones do not answer."""
    agents = three()
    agents[0].lead(group(1), FULL_RANGE)
    for agent in agents[3 - down :]:
        agent.down = True
    return Evidence(view_of(agents), (), (), 0)


def _group(metrics: Metrics, what: str) -> float:
    return metrics.gauge_of(f"cluster.group.{what}", **GROUP).value


def _reason(metrics: Metrics, code: str) -> float:
    return metrics.gauge_of("cluster.reason", code=code, severity="problem").value


def test_losses_tolerated() -> None:
    """Of three members one may be lost; without a majority the number is negative; who leads is seen."""
    metrics = Metrics()
    told = []
    for down in range(4):
        tell_groups(metrics, _evidence(down))
        names = ("members", "members_alive", "losses_tolerated", "led")
        told.append(tuple(_group(metrics, name) for name in names) if down < 3 else metrics.render().count("group="))
    assert told == [(3, 3, 1, 1), (3, 2, 0, 1), (3, 1, -1, 1), 0]


async def test_reasons_begin_and_end(mock_clock: MockClock) -> None:
    """A code is 1 while the verdict has it and 0 after; one that never held is absent."""
    mock_clock.autojump_threshold = 0
    metrics, down = Metrics(), 2

    async def look() -> Evidence:
        await trio.lowlevel.checkpoint()
        return _evidence(down)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell_health, metrics, look)
        await trio.sleep(PAUSE_S / 2)
        assert _reason(metrics, "no-majority") == 1
        assert 'code="members-down"' not in metrics.render()
        down = 1
        await trio.sleep(PAUSE_S)
        assert (_reason(metrics, "no-majority"), _reason(metrics, "members-down")) == (0, 1)
        nursery.cancel_scope.cancel()


async def test_who_cannot_look_says_so(mock_clock: MockClock) -> None:
    """While the store is down or hangs, the last verdict stays and its age grows; then it is young again."""
    mock_clock.autojump_threshold = 0
    metrics, trouble = Metrics(), ""

    async def look() -> Evidence:
        await trio.lowlevel.checkpoint()
        if trouble == "down":
            raise StoreUnavailable("gone")
        if trouble == "hangs":
            await trio.sleep(math.inf)
        return _evidence(2)

    def age_s() -> float:
        return metrics.gauge_of("cluster.verdict_age").value

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell_health, metrics, look)
        await trio.sleep(1)
        assert age_s() == 0
        for kind in ("down", "hangs"):
            trouble = kind
            await trio.sleep(60)
            assert age_s() > 60 - PAUSE_S - LOOK_S_MAX
            assert _reason(metrics, "no-majority") == 1
        trouble = ""
        await trio.sleep(PAUSE_S + LOOK_S_MAX)
        assert age_s() == 0
        nursery.cancel_scope.cancel()
