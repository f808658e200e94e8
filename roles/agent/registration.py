"""Registration in discovery, and the answers of the probes (agent.md 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from juicebox_hsm.adapters.observation import build_info
from juicebox_hsm.adapters.tls.certificate_end import to_unix_ms
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.readiness import (
    CopyAt,
    DamageMet,
    OwnClockOff,
    Plain,
    Readiness,
    Reason,
    Trouble,
    of_certificate,
    of_groups,
    of_outbox,
)
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ports.errors import store_code
from roles.agent.service import hsm_status
from roles.shell import Entry

if TYPE_CHECKING:
    from roles.agent.context import Agent


async def register(agent: Agent, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Keep our registration alive until `withdraw`; reports started after the first success."""
    entry = entry_of(agent)

    def succeeded() -> None:
        agent.clear_trouble(Code.REGISTRATION)
        if not agent.registered:
            agent.registered = True
            agent.log.info("registered", url=entry.url)
            task_status.started()

    def failed(error: RealmError) -> None:
        agent.note_trouble(Code.REGISTRATION, error)

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


async def readyz(agent: Agent) -> Readiness:
    """Judge: ready is who is registered, whose HSM and store answer and who is not in trouble."""
    reasons: list[Reason] = [*agent.troubles, *(CopyAt(url) for url in agent.peers.copies)]
    reasons += [DamageMet(damage) for damage in agent.damages.lately(trio.current_time())]
    reasons += of_groups(agent.groups, trio.current_time())
    if not agent.registered:
        reasons.append(Plain(Code.NOT_REGISTERED))
    if agent.stopping:
        reasons.append(Plain(Code.STOPPING))
    if await hsm_status(agent) is None:
        reasons.append(Plain(Code.HSM_SILENT))
    try:
        await agent.store.discovery.list(ServiceKind.AGENT)
    except RealmError as error:
        reasons.append(Trouble(store_code(error), str(error)))
    warnings = [*of_outbox(agent.unpublished, agent.set_aside), *agent.bus_trouble]
    if agent.clock.off_s:
        warnings.append(OwnClockOff(agent.clock.off_s))
    warnings += of_certificate(to_unix_ms(agent.config.certificate_end()), agent.now_ms())
    return Readiness(tuple(reasons), tuple(warnings))
