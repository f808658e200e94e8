"""What the agents tell each other of their tenants' requests, and the tenants' rates (agent.md 12).

The rules are `juicebox_hsm.host.admission`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.wire.methods import RATE_STATE
from juicebox_hsm.wire.rpc import Empty, RateState

if TYPE_CHECKING:
    from roles.agent.context import Agent

GOSSIP_TIMEOUT_S: Final = 0.5
TIDY_S: Final = 1.0
FIRST_READ_RETRY_S: Final = 0.2
"""Until the limits are known no client is served, so they are asked for more often than later."""


async def gossip(agent: Agent) -> None:
    """Poll every other agent's `rate/state` for ever: often while there is traffic, seldom while there is none."""
    heard_any = False

    async def ask(url: str) -> None:
        nonlocal heard_any
        try:
            reply = await agent.rpc.call(url, RATE_STATE, Empty(), timeout_s=GOSSIP_TIMEOUT_S)
        except RealmError:
            agent.metrics.count("agent.rate_limiter.state_update", result="unreachable")
            return
        agent.metrics.count("agent.rate_limiter.state_update", result="ok")
        if isinstance(reply, RateState) and agent.limiters.absorb(url, reply.tenants, trio.current_time()):
            heard_any = True

    tidy_at = trio.current_time()
    while True:
        busy = heard_any or agent.limiters.any_active(trio.current_time())
        await trio.sleep(agent.timings.gossip_s if busy else agent.timings.gossip_idle_s)
        urls = agent.peers.agent_urls
        heard_any = False
        if urls:
            async with trio.open_nursery() as nursery:
                for url in urls:
                    nursery.start_soon(ask, url)
        if trio.current_time() >= tidy_at:
            agent.limiters.tidy(trio.current_time())
            tidy_at = trio.current_time() + TIDY_S


async def refresh_tenants(agent: Agent) -> int:
    """Read the tenants' limits once and apply them; returns how many there are. Raises `RealmError`."""
    limits = await agent.store.tenants.list()
    agent.limiters.configure({tenant: entry.capacity_ops_per_s for tenant, entry in limits.items()})
    return len(limits)


async def keep_tenants(agent: Agent) -> None:
    """Re-read the tenants' limits every 5 s; trouble is retried at the same pace, sooner if they were never read."""
    while True:
        await trio.sleep(agent.timings.tenants_refresh_s if agent.limiters.is_configured else FIRST_READ_RETRY_S)
        try:
            await refresh_tenants(agent)
        except RealmError as error:
            agent.metrics.count("agent.tenants.failed")
            agent.log.warning("tenant limits not read", error=str(error))
