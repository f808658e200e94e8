"""Lost leaders: tell the managers of those that `juicebox_hsm.host.liveness` reports (agent.md 7, manager.md 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.group import GroupState
from juicebox_hsm.wire.methods import LEADER_LOST
from juicebox_hsm.wire.rpc import LeaderLost

if TYPE_CHECKING:
    from roles.agent.context import Agent

HINT_TIMEOUT_S: Final = 0.5


async def report_lost_leaders(agent: Agent) -> None:
    """Look at every group every `leader_look_s` and send the hints that are due."""
    while True:
        await trio.sleep(agent.timings.leader_look_s)
        if not agent.registered or agent.stopping:
            continue
        now = trio.current_time()
        agent.leaders.registered(now)
        for group in agent.groups:
            if group.end is not None:
                continue  # nobody needs to lead it any more
            starting = agent.leaders.hint((group.realm, group.group), now, leads=group.leader is not None)
            if starting is not None:
                _tell_managers(agent, group, starting)


def _tell_managers(agent: Agent, group: GroupState, starting: int) -> None:
    agent.metrics.count("agent.leader_lost")
    agent.log.info("no leader heard", realm=group.realm.hex(), group=group.group.hex(), starting=starting)
    body = LeaderLost(group.realm, group.group, starting)
    for url in agent.peers.manager_urls:
        agent.nursery.start_soon(_tell, agent, url, body)


async def _tell(agent: Agent, url: str, body: LeaderLost) -> None:
    try:
        await agent.rpc.call(url, LEADER_LOST, body, timeout_s=HINT_TIMEOUT_S)
    except RealmError:
        agent.metrics.count("agent.leader_lost.undelivered")
