"""The committing lane's work: asking the HSM to commit, and writing rows before answers (agent.md 8, 11)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.leadership.effects import AskCommit, Long, StepDown, WriteOutbox
from juicebox_hsm.host.leadership.events import CommitAnswered, Lane, OutboxFailed, OutboxWritten, SteppedDown
from juicebox_hsm.hsm.messages import Commit, CommitOk, NotLeader
from roles.agent.outbox import record_events

if TYPE_CHECKING:
    from roles.agent.driver import Driver


async def commit_loop(driver: Driver) -> None:
    """Commit whenever new captures may allow it, until the leadership ends."""
    await driver.run_lane(Lane.COMMIT, _carry_out)


async def _carry_out(driver: Driver, effect: Long) -> Long | None:
    match effect:
        case AskCommit():
            return await _ask(driver, effect)
        case WriteOutbox():
            return await _write(driver, effect)
        case StepDown():
            await driver.step_down(effect)
            return driver.step(SteppedDown())
        case _:
            raise TypeError(f"not of the committing lane: {effect}")


async def _ask(driver: Driver, effect: AskCommit) -> Long | None:
    agent, group = driver.agent, driver.group
    reply = await agent.hsm.send(Commit(group.realm, group.group, effect.captures))
    if isinstance(reply, CommitOk):
        agent.metrics.gauge("agent.commit.log.index", reply.committed)
    elif not isinstance(reply, NotLeader):
        agent.metrics.count("agent.commit.no_quorum")
    return driver.step(CommitAnswered(reply))


async def _write(driver: Driver, effect: WriteOutbox) -> Long | None:
    agent, group = driver.agent, driver.group
    settled = {} if effect.settled is None else {group.group: effect.settled}
    try:
        # As with the append, a cancelled write is an unknown one; the retry profile bounds it to 30 s.
        with trio.CancelScope(shield=True):
            await record_events(agent, group.realm, effect.events, settled)
    except RealmError as error:
        agent.metrics.count("agent.outbox.given_up")
        return driver.step(OutboxFailed(str(error)))
    return driver.step(OutboxWritten())
