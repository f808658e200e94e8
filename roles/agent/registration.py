"""Registration in discovery, and the answers of the probes (agent.md 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from juicebox_hsm.adapters.observation import build_info
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.services import ServiceKind
from roles.agent import stalls
from roles.agent.service import hsm_status
from roles.shell import Entry
from roles.words import clock_off

if TYPE_CHECKING:
    from roles.agent.context import Agent


async def register(agent: Agent, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Keep our registration alive until `withdraw`; reports started after the first success."""
    entry = entry_of(agent)

    def succeeded() -> None:
        agent.clear_trouble("registration")
        if not agent.registered:
            agent.registered = True
            agent.log.info("registered", url=entry.url)
            task_status.started()

    def failed(error: RealmError) -> None:
        agent.note_trouble("registration", error)

    timings = agent.timings
    with agent.registering:
        await entry.keep(timings.register_retry_s, succeeded=succeeded, failed=failed, renew_s=timings.register_s)


async def withdraw(agent: Agent) -> None:
    """Leave discovery for good; the caller bounds the wait."""
    agent.registering.cancel()
    await entry_of(agent).withdraw()


def entry_of(agent: Agent) -> Entry:
    """Return the agent's entry in discovery, at the address others reach it at."""
    return Entry(agent.store.discovery, ServiceKind.AGENT, agent.config.url, agent.now_ms, agent.log)


async def livez(agent: Agent) -> tuple[bool, str]:
    """Answer 200 once registered and while the HSM answers live."""
    if not agent.registered or agent.hsm_id is None:
        return False, f"not yet registered\n{agent.config.build}"
    if await hsm_status(agent) is None:
        return False, f"the HSM does not answer\n{agent.config.build}"
    return True, f"hsm id: {agent.hsm_id.hex()}\n{build_info.block(absent='(none)')}"


async def readyz(agent: Agent) -> tuple[bool, str]:
    """Answer 200 when registered, HSM and store answer and nothing is in trouble; warnings do not count."""
    reasons = [f"{what}: {why}" for what, why in sorted(agent.troubles.items())]
    reasons += [
        f"hsm_twice: our HSM also runs at {url}: one of the two is a copy, which must be stopped for good"
        for url in agent.peers.copies
    ]
    reasons += stalls.reasons(agent.groups, trio.current_time())
    if not agent.registered:
        reasons.append("not yet registered")
    if agent.stopping:
        reasons.append("stopping")
    if await hsm_status(agent) is None:
        reasons.append("the HSM does not answer")
    try:
        await agent.store.discovery.list(ServiceKind.AGENT)
    except RealmError as error:
        reasons.append(f"store: {error}")
    lines = reasons or ["ready"]
    if agent.outbox_warning:
        lines.append(f"warning: {agent.outbox_warning}")
    if agent.bus_warning:
        lines.append(f"warning: events are not published: {agent.bus_warning}")
    if agent.clock.off_s:
        lines.append(f"warning: this machine's clock is {clock_off(agent.clock.off_s)}")
    return not reasons, "\n".join(lines)
