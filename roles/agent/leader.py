"""Leadership: running its lanes, taking it on request, leaving it, and handing it over (agent.md 9, 13).

There is no self-election: an agent leads when a manager says so or when it created the group. Several leaders may
exist at once; the conditional append on the log decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.candidacy import Obstacle, ObstacleCode, judge_refusal, judge_tail, pause_before_again
from juicebox_hsm.host.group import GroupState
from juicebox_hsm.host.leadership.events import Inherited
from juicebox_hsm.host.leadership.machine import Leadership
from juicebox_hsm.hsm.messages import BecomeLeader, RoleOk
from juicebox_hsm.ports.errors import StoreDamaged
from juicebox_hsm.wire.methods import LEADER_STEPDOWN
from juicebox_hsm.wire.rpc import (
    BecomeLeaderCall,
    DamageKind,
    Done,
    GroupCall,
    Refusal,
    Refused,
    StepdownOrder,
    SteppedDown,
    StoreDamage,
)
from roles.agent.append import produce
from roles.agent.commit import commit_loop
from roles.agent.compact import keep_house, leave_house
from roles.agent.outbox import learn_tails
from roles.agent.replicate import push_to_member

if TYPE_CHECKING:
    from roles.agent.context import Agent

HAND_OVER_TIMEOUT_S = 10.0
DRAIN_POLL_S = 0.02

_REFUSALS: Final = {
    ObstacleCode.LOG_NOT_READ: (Refusal.NO_STORE, ""),
    ObstacleCode.LOG_EMPTY: (Refusal.INVALID_GROUP, "the log is empty"),
    ObstacleCode.LOG_SHORTER: (Refusal.FUTURE_INDEX, ""),
    ObstacleCode.LOG_LONGER: (Refusal.STALE_INDEX, ""),
    ObstacleCode.CATCHING_UP: (Refusal.NOT_CAPTURED, ""),
    ObstacleCode.FAR_BEHIND: (Refusal.NOT_CAPTURED, "too far behind the log"),
    ObstacleCode.STEPPING_DOWN: (Refusal.STEPDOWN_IN_PROGRESS, ""),
    ObstacleCode.INVALID_REALM: (Refusal.INVALID_REALM, ""),
    ObstacleCode.INVALID_GROUP: (Refusal.INVALID_GROUP, ""),
    ObstacleCode.LOG_DAMAGED: (Refusal.STORE_DAMAGED, "the last entry of the log is damaged; run `store check`"),
    ObstacleCode.STOPPING: (Refusal.TIMEOUT, "this agent is stopping"),
}
"""The refusal on the wire, and words for a person."""


async def lead(agent: Agent, group: GroupState, leader: Leadership) -> None:
    """Run the lanes of one leadership until it ends.

    Producing and committing end by themselves (an append or a record in flight is never cancelled); the others are
    cancelled after them.
    """
    driver = agent.drivers[leader]
    await learn_tails(agent, group.realm)
    async with trio.open_nursery() as helpers:
        helpers.start_soon(keep_house, agent, driver)
        for member in driver.members:
            helpers.start_soon(push_to_member, agent, driver, member)
        async with trio.open_nursery() as workers:
            workers.start_soon(produce, agent, driver)
            workers.start_soon(commit_loop, agent, driver)
        helpers.cancel_scope.cancel()
    await leave_house(agent, driver)


async def handle_become_leader(agent: Agent, body: BecomeLeaderCall) -> Done | Refused:
    """Lead a group from the end of its log, within 5 s (agent.md 9)."""
    if agent.hsm_id is None:
        return Refused(Refusal.NO_HSM)
    group = agent.groups.find(body.realm, body.group)
    if isinstance(group, Refusal):
        return Refused(group)
    if agent.peers.copies:
        return Refused(Refusal.HSM_TWICE, detail=f"this HSM also runs at {', '.join(agent.peers.copies)}")
    if agent.stopping:
        return _refused(Obstacle(ObstacleCode.STOPPING))
    deadline = trio.current_time() + agent.timings.become_leader_s
    attempt = 0
    while True:
        attempt += 1
        agent.follower(group).wake.set()
        obstacle = await _try_to_lead(agent, group, body.last)
        if obstacle is None:
            return Done()
        pause_s = pause_before_again(obstacle, attempt, deadline - trio.current_time())
        if pause_s is None:
            return _refused(obstacle)
        await trio.sleep(pause_s)


async def _try_to_lead(agent: Agent, group: GroupState, asked_last: int | None) -> Obstacle | None:
    """Try once; None on success."""
    began = trio.current_time()
    try:
        last = await agent.store.log.read_last(group.realm, group.group)
    except StoreDamaged:
        return Obstacle(ObstacleCode.LOG_DAMAGED)
    except RealmError as error:
        agent.log.warning("log tail not read", group=group.group.hex(), error=str(error))
        return Obstacle(ObstacleCode.LOG_NOT_READ)
    read = trio.current_time()
    agent.metrics.timing("agent.handle_become_leader.read_log_entry", int((read - began) * 1e9))
    obstacle = judge_tail(last, asked_last, group.position)
    if obstacle is not None or last is None:
        return obstacle
    async with agent.follower(group).lock:  # an HSM that forgets the group is asked for nothing meanwhile
        if group.has_left:
            return Obstacle(ObstacleCode.INVALID_GROUP)
        reply = await agent.hsm.send(BecomeLeader(group.realm, group.group, last))
        agent.metrics.timing("agent.handle_become_leader.hsm_request", int((trio.current_time() - read) * 1e9))
        if isinstance(reply, RoleOk):
            agent.adopt(group, reply.role)
            agent.tell(group, Inherited(last))
            # the HSM persisted its captures; only PersistState signs them
            agent.persister.request()
            return None
    obstacle = judge_refusal(reply, last)
    if obstacle.code is ObstacleCode.LOG_DAMAGED:
        agent.note_damage(StoreDamage(DamageKind.LOG, f"of entry {last.index}", group.group))
    return obstacle


def _refused(obstacle: Obstacle) -> Refused:
    refusal, detail = _REFUSALS[obstacle.code]
    return Refused(refusal, index=obstacle.index, detail=detail)


async def handle_stepdown(agent: Agent, body: GroupCall) -> SteppedDown | Refused:
    """Leave leadership in order: what was begun is still committed and answered (agent.md 9)."""
    group = agent.groups.find(body.realm, body.group)
    if isinstance(group, Refusal):
        return Refused(group)
    driver = agent.driver_of(group)
    done = None if driver is None else await driver.leave(by_others=True)
    return Refused(Refusal.NOT_LEADER) if done is None else SteppedDown(done.last)


async def hand_over(agent: Agent) -> None:
    """Leave every leadership at shutdown: through a manager without a gap, else by ourselves; wait for the end."""
    if agent.hsm_id is not None and _leads(agent):
        for url in agent.peers.manager_urls:
            order = StepdownOrder(hsm=agent.hsm_id)
            try:
                reply = await agent.rpc.call(url, LEADER_STEPDOWN, order, timeout_s=HAND_OVER_TIMEOUT_S)
            except RealmError as error:
                agent.log.warning("manager did not take leadership over", url=url, error=str(error))
                continue
            if isinstance(reply, Done):
                break
            agent.log.warning("manager refused to take leadership over", url=url, answer=str(reply))
    for group in agent.groups:
        driver = agent.driver_of(group)
        if driver is not None and group.is_leader:
            await driver.leave(by_others=False)
    # a leadership's lanes end after its rows are written and its answers are out
    while agent.leaderships:  # noqa: ASYNC110 - the end of several tasks, and of those that begin meanwhile
        await trio.sleep(DRAIN_POLL_S)


def _leads(agent: Agent) -> bool:
    return any(group.leader is not None for group in agent.groups)
