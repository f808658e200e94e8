"""Pauses between passes, survival of failing ones, new agents."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ports.errors import StoreUnavailable
from roles.manager.loops import Pacer, run_loop, watch_services
from tests.host.cluster.agents import three
from tests.unit.manager.fakes import FakeDiscovery, make_context


async def test_passes_come_quickly_and_settle(autojump_clock: trio.testing.MockClock) -> None:
    """After a start the pauses double from 0.1 s up to the interval, and start over when something changes."""
    pacer = Pacer(2.0)
    waited = []
    for _ in range(7):
        begun = trio.current_time()
        await pacer.pause()
        waited.append(round(trio.current_time() - begun, 3))
    assert waited == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    async with trio.open_nursery() as nursery:
        begun = trio.current_time()
        nursery.start_soon(pacer.pause)
        await trio.sleep(0.5)
        pacer.hurry()
    assert trio.current_time() - begun == pytest.approx(0.6)
    begun = trio.current_time()
    await pacer.pause()
    assert trio.current_time() - begun == pytest.approx(0.1)


async def test_steady_interval(autojump_clock: trio.testing.MockClock) -> None:
    """A loop may also keep one interval from the start."""
    pacer = Pacer(60.0, 60.0)
    for number in (1, 2):
        await pacer.pause()
        assert trio.current_time() == pytest.approx(60.0 * number)


async def test_a_failing_pass_does_not_end_the_loop(autojump_clock: trio.testing.MockClock) -> None:
    """Store trouble is counted and shown, and the next pass runs."""
    context = make_context([])
    passes = 0

    async def work() -> None:
        nonlocal passes
        passes += 1
        if passes < 3:
            raise StoreUnavailable("down")

    with trio.move_on_after(1.7):
        await run_loop(context, "test", Pacer(0.5), work)
    assert passes >= 4
    assert context.state.loops["test"].error == ""
    assert 'manager_loop_errors_total{loop="test"} 2' in context.meter.render()  # type: ignore[attr-defined]


async def test_a_bug_ends_the_loop(autojump_clock: trio.testing.MockClock) -> None:
    """What nobody expected is not swallowed: the process must end."""

    async def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run_loop(make_context([]), "test", Pacer(0.5), work)


async def test_new_agents_are_noticed(autojump_clock: trio.testing.MockClock) -> None:
    """Every change of the set of agents is told once, soon while young and within a second later."""
    context = make_context(three())
    discovery = context.store.discovery
    assert isinstance(discovery, FakeDiscovery)
    told: list[float] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_services, context, lambda: told.append(trio.current_time()))
        await trio.sleep(5)
        assert len(told) == 1
        discovery.rows[ServiceKind.AGENT, "tls://new"] = 0
        await trio.sleep(0.15)
        assert len(told) == 2
        await trio.sleep(60)
        begun = trio.current_time()
        del discovery.rows[ServiceKind.AGENT, "tls://new"]
        await trio.sleep(1.1)
        assert len(told) == 3
        assert told[2] - begun <= 1.0
        nursery.cancel_scope.cancel()


async def test_only_who_was_watched_for_21_minutes_is_forgotten(autojump_clock: trio.testing.MockClock) -> None:
    """A service that renews stays whatever its clock says; one that does not is forgotten, not before its time."""
    context = make_context(three())
    discovery = context.store.discovery
    assert isinstance(discovery, FakeDiscovery)
    dead, living = (ServiceKind.LOAD_BALANCER, "https://dead"), (ServiceKind.AGENT, "tls://living")
    discovery.rows = {dead: 2**42, living: 0}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_services, context, lambda: None)
        for minute in range(21):
            await trio.sleep(60)
            assert dead in discovery.rows
            discovery.rows[living] = -minute
        await trio.sleep(2)
        assert discovery.rows == {living: -20}
        nursery.cancel_scope.cancel()
