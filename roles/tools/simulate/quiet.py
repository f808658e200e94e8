"""What the world sees when it has been quiet for half a minute: the judge's `Quiet` (simulation.md 3.5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.wire.methods import AGENT_STATUS
from juicebox_hsm.wire.rpc import AgentStatus, Empty
from roles.tools.simulate.judge import Quiet
from roles.tools.simulate.world import World
from roles.words import own_sentence, store_damaged

STATUS_S: Final = 2.0
QUEUED_MAX: Final = 16
"""What may be under way at a quiet moment: a heartbeat, a poll, a page of events."""
UNCOMPACTED_MAX: Final = 200
"""Rows of a log that wait for compaction, which comes every second where something is committed."""


async def look_around(world: World, failed: Sequence[str]) -> Quiet:
    """Ask everybody how they are."""
    statuses: dict[str, AgentStatus] = {}
    complaints: list[str] = []
    for agent in world.agents:
        try:
            reply = await world.operator.session.rpc.call(agent.url, AGENT_STATUS, Empty(), timeout_s=STATUS_S)
        except RealmError as error:
            complaints.append(f"{agent.name}: {error}")
            continue
        statuses[agent.url] = reply
        if agent.agent is not None:
            complaints += [f"{agent.name}: {own_sentence(trouble)}" for trouble in agent.agent.troubles]
            damages = agent.agent.damages.lately(trio.current_time())
            complaints += [f"{agent.name}: {store_damaged(damage)}" for damage in damages]
    complaints += [f"{process.name} is down" for process in world.processes if not process.is_up]
    return Quiet(statuses=statuses, failed=failed, complaints=complaints, died=world.deaths, sizes=_sizes(world))


def _sizes(world: World) -> dict[str, tuple[int, int]]:
    """Return what queues and maps hold, with their bounds at a quiet moment."""
    sizes: dict[str, tuple[int, int]] = {}
    for agent in world.agents:
        if agent.agent is None:
            continue
        for group in agent.agent.groups:
            name = f"{agent.name} group {group.group.hex()[:8]}"
            leader = group.leader
            if leader is not None:
                shown = leader.snapshot(trio.current_time())
                sizes[f"{name} queue"] = (shown.queued, QUEUED_MAX)
                sizes[f"{name} requests"] = (shown.waiting, QUEUED_MAX)
                sizes[f"{name} releasing"] = (shown.releasing, QUEUED_MAX)
                sizes[f"{name} uncommitted"] = (shown.uncommitted, QUEUED_MAX)
                sizes[f"{name} uncompacted"] = (shown.uncompacted_rows, UNCOMPACTED_MAX)
    return sizes
