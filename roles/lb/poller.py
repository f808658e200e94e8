"""Keeps the routing table fresh: one polling task per agent, one for discovery (load-balancer.md 8.2, 8.3).

Every answer changes only that agent's slice, so one hung agent delays nobody. What an answer or its absence means is
decided in `host.routing`.
"""

from __future__ import annotations

import random
from typing import Final

import trio

from juicebox_hsm.adapters.observation.logging import outside_context
from juicebox_hsm.adapters.observation.tracing import Traces, active
from juicebox_hsm.adapters.rpc import RpcError, RpcUnreachable
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.retry import FOREVER_S, RetryProfile
from juicebox_hsm.host.routing import STALE_S, AgentClaims, RoutingTable, build_table
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ports.discovery import Discovery
from juicebox_hsm.ports.observation import Log, Meter
from juicebox_hsm.ports.rpc import RpcCaller
from juicebox_hsm.wire.methods import AGENT_STATUS
from juicebox_hsm.wire.rpc import Empty, PeerRole
from roles.clock import OwnClock

POLL_S: Final = 0.1
POLL_JITTER: Final = 0.2
BACKOFF_S_MAX: Final = 2.0
DISCOVERY_S: Final = 1.0
FORCED_EVERY_S: Final = 0.05
"""Forced refreshes start at most this often (load-balancer.md 8.3)."""

FORCED_S_MAX: Final = 0.5
"""A forced refresh waits no longer for slow agents (own: official clients lose patience after some 75 ms anyway)."""

POLL_TIMEOUT_S: Final = STALE_S
"""Longest wait for an answer; whoever takes longer has lost its routes anyway."""

_EMPTY: Final = Empty()


class _Agent:
    """One agent of discovery: what it claims, its polling task's scope, and whether its silence was told."""

    __slots__ = ("claims", "scope", "warned")

    def __init__(self, url: str, now_s: float) -> None:
        self.claims = AgentClaims(url, now_s)
        self.scope = trio.CancelScope()
        self.warned = False


class Poller:
    """The routing table's keeper. `run` must be running; `table` is always a complete, immutable table."""

    def __init__(
        self,
        rpc: RpcCaller,
        discovery: Discovery,
        *,
        rng: random.Random,
        metrics: Meter,
        log: Log,
        traces: Traces | None = None,
        clock: OwnClock | None = None,
        poll_s: float = POLL_S,
    ) -> None:
        """`poll_s` is the mean pause between two looks at an agent that answers."""
        self._pauses = RetryProfile(poll_s, BACKOFF_S_MAX, None, FOREVER_S, POLL_JITTER)
        self._traces = traces
        self._clock = clock
        self.table = RoutingTable()
        self._rpc = rpc
        self._discovery = discovery
        self._rng = rng
        self._metrics = metrics
        self._log = log
        self._agents: dict[str, _Agent] = {}
        self._changed = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._forced: trio.Event | None = None
        self._forced_at = -FORCED_EVERY_S

    async def run(
        self, first_s: float = FORCED_S_MAX, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Poll until cancelled; reports started when all agents were asked once, after `first_s` at the latest."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await self._refresh(trio.Event(), first_s)
            task_status.started()
            while True:
                await trio.sleep(DISCOVERY_S)
                await self._discover()

    async def wait_changed(self) -> None:
        """Return when a new table was published after this call."""
        await self._changed.wait()

    async def refresh(self) -> None:
        """Ask discovery and all agents now. Concurrent callers share one refresh; slow agents are not waited for."""
        forced = self._begin_refresh()
        if forced is not None:
            await forced.wait()

    async def look_for_change(self) -> None:
        """Return when a new table was published after this call; agents are asked more often until then.

        Somebody waits for the end of a hand-over or a move. All who wait share refreshes at the pace of forced ones.
        """
        changed = self._changed
        while not changed.is_set():
            with trio.move_on_after(FORCED_EVERY_S):
                await changed.wait()
                return
            self._begin_refresh()

    def _begin_refresh(self) -> trio.Event | None:
        """Return the end of the refresh that runs, begun if none does; None before `run`."""
        if self._forced is None and self._nursery is not None:
            self._forced = trio.Event()
            outside_context(self._nursery.start_soon, self._refresh, self._forced, FORCED_S_MAX)
        return self._forced

    async def _refresh(self, done: trio.Event, patience_s: float) -> None:
        try:
            await trio.sleep(max(0.0, self._forced_at + FORCED_EVERY_S - trio.current_time()))
            self._forced_at = began = trio.current_time()
            span = None if self._traces is None else self._traces.background("refresh")
            with trio.move_on_after(patience_s):
                await self._discover()  # outside of the span: the polls it begins go on for ever
                with active(span):
                    async with trio.open_nursery() as nursery:
                        for agent in list(self._agents.values()):
                            nursery.start_soon(self._ask, agent)
            self._metrics.timing("load_balancer.refresh.time.ns", int((trio.current_time() - began) * 1e9))
        finally:
            self._forced = None
            done.set()

    async def _discover(self) -> None:
        try:
            found = await self._discovery.list(ServiceKind.AGENT)
        except RealmError as error:
            self._log.warning("cannot read discovery; known agents stay in use", error=str(error))
            return
        urls = {entry.url for entry in found}
        for url in sorted(urls - self._agents.keys()):
            agent = self._agents[url] = _Agent(url, trio.current_time())
            if self._nursery is not None:
                self._nursery.start_soon(self._poll_forever, agent)
        for url in sorted(self._agents.keys() - urls):
            agent = self._agents.pop(url)
            agent.scope.cancel()
            self._publish()

    async def _poll_forever(self, agent: _Agent) -> None:
        failed = 0
        with agent.scope:
            while True:
                await trio.sleep(self._pauses.delay_s(failed + 1, self._rng.random()))
                failed = 0 if await self._ask(agent) else failed + 1

    async def _ask(self, agent: _Agent) -> bool:
        """Poll an agent once; False when it did not answer."""
        claims = agent.claims
        poll, asked = claims.ask(), trio.current_time()
        try:
            status = await self._rpc.call(
                claims.url, AGENT_STATUS, _EMPTY, timeout_s=POLL_TIMEOUT_S, server=PeerRole.AGENT
            )
        except RpcError as error:
            is_unreachable = isinstance(error, RpcUnreachable)
            contested = self.table.contested
            if claims.missed(poll, trio.current_time(), is_unreachable=is_unreachable, contested=contested):
                self._publish(agent)
            if not agent.warned:
                agent.warned = True
                self._log.warning("agent does not answer", agent=claims.url, error=str(error))
            return False
        agent.warned = False
        if self._clock is not None:
            self._clock.heard(claims.url, status.now_ms, asked)
        if claims.heard(poll, status, trio.current_time(), contested=self.table.contested):
            self._publish(agent)
        return True

    def _publish(self, asked: _Agent | None = None) -> None:
        """Swap the table, unless it was `asked` that changed and discovery no longer knows it."""
        if asked is not None and self._agents.get(asked.claims.url) is not asked:
            return
        slices = (agent.claims.slice for agent in self._agents.values())
        self.table = build_table(slices, self.table, trio.current_time())
        self._metrics.gauge("load_balancer.routes", self.table.route_count)
        self._metrics.gauge("load_balancer.stalled_routes", self.table.stalled_count)
        self._metrics.gauge("load_balancer.unrouted_ranges", self.table.gap_count)
        changed, self._changed = self._changed, trio.Event()
        changed.set()
