"""The committing lane's work: asking the HSM to commit, and writing rows before answers (agent.md 8, 11)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.leadership.effects import AskCommit, Long, StepDown, WriteOutbox
from juicebox_hsm.host.leadership.events import CommitAnswered, Lane, OutboxFailed, OutboxWritten, SteppedDown
from juicebox_hsm.hsm.messages import Commit, CommitOk, NotLeader
from roles.agent.outbox import record_events

if TYPE_CHECKING:
    from roles.agent.context import Agent
    from roles.agent.driver import Driver


async def commit_loop(agent: Agent, driver: Driver) -> None:
    """Commit whenever new captures may allow it, until the leadership ends."""
    await driver.run_lane(Lane.COMMIT, partial(_carry_out, agent))


async def _carry_out(agent: Agent, driver: Driver, effect: Long) -> Long | None:
    match effect:
        case AskCommit():
            return await _ask(agent, driver, effect)
        case WriteOutbox():
            return await _write(agent, driver, effect)
        case StepDown():
            await driver.step_down(effect)
            return driver.step(SteppedDown())
        case _:
            raise TypeError(f"not of the committing lane: {effect}")


async def _ask(agent: Agent, driver: Driver, effect: AskCommit) -> Long | None:
    group = driver.group
    reply = await agent.hsm.send(Commit(group.realm, group.group, effect.captures))
    if isinstance(reply, CommitOk):
        agent.metrics.gauge("agent.commit.log.index", reply.committed)
    elif not isinstance(reply, NotLeader):
        agent.metrics.count("agent.commit.no_quorum")
    return driver.step(CommitAnswered(reply))


async def _write(agent: Agent, driver: Driver, effect: WriteOutbox) -> Long | None:
    group = driver.group
    driver.enter("outbox", (event.index for event in effect.events))
    settled = {} if effect.settled is None else {group.group: effect.settled}
    try:
        # As with the append, a cancelled write is an unknown one; the retry profile bounds it to 30 s.
        with trio.CancelScope(shield=True):
            await record_events(agent, group.realm, effect.events, settled, on_retry=driver.store_failed)
    except RealmError as error:
        agent.metrics.count("agent.outbox.given_up")
        return driver.step(OutboxFailed(str(error)))
    driver.store_works()
    return driver.step(OutboxWritten())
