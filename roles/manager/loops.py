"""The manager's background work: discovery, appointments, transfers, rebalancing (manager.md 1.1, 3-6).

A failing pass is counted and logged, and the loop goes on: expected trouble never ends the process.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from juicebox_hsm.adapters.observation.tracing import active
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.registrations import Registrations
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.wire.rpc import LoopRun
from roles.manager.appointment import Appointer
from roles.manager.context import ManagerContext
from roles.manager.rebalance import rebalance
from roles.manager.recovery import Recovery

DISCOVERY_POLL_S: Final = 1.0
DISCOVERY_POLL_YOUNG_S: Final = 0.1
YOUNG_S: Final = 10.0
FIRST_PAUSE_S: Final = 0.1


async def watch_services(
    context: ManagerContext, changed: Callable[[], None], young_s: float = DISCOVERY_POLL_YOUNG_S
) -> None:
    """Watch discovery, every `young_s` while this process is young.

    Calls `changed` when the set of agents changes, and forgets services that stopped to renew their entry.
    """
    registrations = Registrations()
    young_until = trio.current_time() + YOUNG_S
    known: list[str] | None = None
    while True:
        try:
            found = await context.store.discovery.list()
            for address in registrations.look(found, trio.current_time()):
                await context.store.discovery.forget(address)
                context.log.info("service forgotten, it stopped to renew its entry", url=address.url)
                await context.note("forget", kind=address.kind.name.lower(), url=address.url)
        except RealmError as error:
            context.log.warning("discovery not readable", error=str(error))
        else:
            agents = [address.url for address in found if address.kind is ServiceKind.AGENT]
            if agents != known:
                known = agents
                changed()
        await trio.sleep(young_s if trio.current_time() < young_until else DISCOVERY_POLL_S)


class Pacer:
    """Pauses between passes: short after something changed, doubling up to the interval."""

    def __init__(self, interval_s: float, first_s: float = FIRST_PAUSE_S) -> None:
        self._interval_s = interval_s
        self._pause_s = min(first_s, interval_s)
        self._changed = trio.Event()

    def hurry(self) -> None:
        """Make the next passes come soon."""
        self._pause_s = min(FIRST_PAUSE_S, self._interval_s)
        self._changed.set()

    async def pause(self) -> None:
        """Wait before the next pass; a change cuts the wait to the shortest one."""
        wait_s = self._pause_s
        self._pause_s = min(self._pause_s * 2, self._interval_s)
        with trio.move_on_after(wait_s):
            await self._changed.wait()
            await trio.sleep(min(FIRST_PAUSE_S, self._interval_s))
        self._changed = trio.Event()


async def run_loop(context: ManagerContext, name: str, pacer: Pacer, work: Callable[[], Awaitable[object]]) -> None:
    """Run `work` for ever with pauses between; only `RealmError`s are survived."""
    while True:
        await pacer.pause()
        begun_ns = time.perf_counter_ns()
        problem = ""
        span = None if context.traces is None else context.traces.background(f"pass {name}")
        try:
            with active(span):
                await work()
        except RealmError as error:
            problem = str(error) or type(error).__name__
            context.meter.count("manager.loop.errors", loop=name)
            context.log.warning("pass failed", loop=name, error=problem)
        elapsed_ns = time.perf_counter_ns() - begun_ns
        context.meter.timing("manager.loop.time.ns", elapsed_ns, loop=name)
        context.state.loops[name] = LoopRun(name, context.now_ms(), elapsed_ns // 1_000_000, problem)


async def run_loops(
    context: ManagerContext,
    appointer: Appointer,
    *,
    interval_s: float,
    rebalance_interval_s: float,
    young_s: float = DISCOVERY_POLL_YOUNG_S,
) -> None:
    """Run all background passes until cancelled; times in seconds, for `young_s` see `watch_services`."""
    leaders, transfers = Pacer(interval_s), Pacer(interval_s)

    async def spread() -> None:
        await rebalance(context, appointer, periodic=True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_services, context, leaders.hurry, young_s)
        nursery.start_soon(run_loop, context, "leaders", leaders, appointer.run_pass)
        nursery.start_soon(run_loop, context, "transfers", transfers, Recovery(context, nursery).run_pass)
        nursery.start_soon(run_loop, context, "rebalance", Pacer(rebalance_interval_s, rebalance_interval_s), spread)
