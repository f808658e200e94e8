"""The watchdog: the HSM leads and the agent does not know (agent.md 13).

The exclusion of a captured index of 1 or less keeps realm and group creation in progress out of suspicion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from juicebox_hsm.consensus.types import Leader
from juicebox_hsm.hsm.messages import Status, StatusOk
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.ports.errors import HsmGone

if TYPE_CHECKING:
    from roles.agent.context import Agent

TRIGGERED: Final = "Agent watchdog triggered"  # operator-tools.md 9.2; existing monitors look for it
WATCHDOG_CHECKS: Final = 5
STEP_DOWN_AT: Final = 3
"""After this many suspect checks the HSM is asked to step down; if that does not help the agent ends."""


def suspects(agent: Agent, status: StatusOk) -> list[tuple[RealmId, GroupId]]:
    """Return the groups the HSM leads, has captured beyond 1 in, and the agent has no leader state for."""
    if status.realm is None:
        return []
    found = []
    for reported in status.realm.groups:
        group = agent.groups.get(status.realm.id, reported.id)
        captured = 0 if reported.captured is None else reported.captured[0]
        if isinstance(reported.role.role, Leader) and captured > 1 and (group is None or group.leader is None):
            found.append((status.realm.id, reported.id))
    return found


async def watchdog(agent: Agent) -> None:
    """Check every second; five suspect checks in a row end the process (exit 75)."""
    bad: dict[tuple[RealmId, GroupId], int] = {}
    while True:
        await trio.sleep(agent.timings.watchdog_s)
        status = await agent.hsm.send(Status())
        if not isinstance(status, StatusOk):
            continue
        bad = {key: bad.get(key, 0) + 1 for key in suspects(agent, status)}
        for (realm, group_id), times in bad.items():
            agent.log.error(
                "the HSM leads a group unknown to the agent", realm=realm.hex(), group=group_id.hex(), checks=times
            )
            if times >= WATCHDOG_CHECKS:
                reason = f"HSM and agent disagree about group {group_id.hex()} for {times} checks"
                agent.metrics.count("agent.watchdog.crash")
                agent.metrics.event(TRIGGERED, reason)
                raise HsmGone(reason)
            group = agent.groups.get(realm, group_id)
            if times >= STEP_DOWN_AT and group is not None:
                await agent.step_down(group, force=True, why="watchdog")
