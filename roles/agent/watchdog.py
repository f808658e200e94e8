"""The watchdog's driver: it looks once a second and does what `juicebox_hsm.host.watchdog` says (agent.md 13)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from juicebox_hsm.host.watchdog import Remedy, Suspicion, Watchdog
from juicebox_hsm.hsm.messages import Status, StatusOk
from juicebox_hsm.ports.errors import HsmGone

if TYPE_CHECKING:
    from roles.agent.context import Agent

TRIGGERED: Final = "Agent watchdog triggered"  # operator-tools.md 9.2; existing monitors look for it


async def watchdog(agent: Agent) -> None:
    """Look every second; raises `HsmGone`, which ends the process (exit 75), over a disagreement that lasts."""
    dog = Watchdog()
    while True:
        await trio.sleep(agent.timings.watchdog_s)
        status = await agent.hsm.send(Status())
        if isinstance(status, StatusOk):
            for suspicion in dog.look(agent.groups, status):
                await _act(agent, suspicion)


async def _act(agent: Agent, found: Suspicion) -> None:
    group, checks = found.group.hex(), found.checks
    agent.log.error("the HSM leads a group unknown to the agent", realm=found.realm.hex(), group=group, checks=checks)
    match found.remedy:
        case Remedy.END:
            reason = f"HSM and agent disagree about group {group} for {checks} checks"
            agent.metrics.count("agent.watchdog.crash")
            agent.metrics.event(TRIGGERED, reason)
            raise HsmGone(reason)
        case Remedy.STEP_DOWN:
            known = agent.groups.get(found.realm, found.group)
            if known is not None:
                await agent.step_down(known, force=True, why="watchdog")
        case Remedy.WAIT:
            pass
