"""Leadership: taking it on request, leaving it, and handing it over at shutdown (agent.md 9, 13).

There is no self-election: an agent leads when a manager says so or when it created the group. Several leaders may
exist at once; the conditional append on the log decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.errors import RealmError, check
from juicebox_hsm.hsm.messages import BecomeLeader, NotCaptured, Outcome, RoleOk
from juicebox_hsm.wire.methods import LEADER_STEPDOWN
from juicebox_hsm.wire.rpc import BecomeLeaderCall, Done, GroupCall, Refusal, Refused, StepdownOrder, SteppedDown
from roles.agent.append import produce
from roles.agent.commit import commit_loop
from roles.agent.compact import keep_house
from roles.agent.outbox import learn_tails, settle
from roles.agent.replicate import prepare_members, push_to_member
from roles.agent.state import UNCOMMITTED_MAX, GroupState, LeaderState
from roles.agent.watch import LogRefused

if TYPE_CHECKING:
    from roles.agent.context import Agent

TRAILING_CAPTURE_MAX = UNCOMMITTED_MAX
"""A candidate this close behind the log's end is waited for; further behind it is refused at once."""
POLL_FIRST_S = 0.002
POLL_MAX_S = 0.05
HAND_OVER_TIMEOUT_S = 10.0
DRAIN_POLL_S = 0.02


async def lead(agent: Agent, group: GroupState, leader: LeaderState) -> None:
    """Run the tasks of one leadership until it ends.

    Producer and committer end by themselves (an append or a record in flight is never cancelled); the others are
    cancelled after them.
    """
    members = prepare_members(agent, group, leader)
    await learn_tails(agent, group.realm)
    async with trio.open_nursery() as helpers:
        helpers.start_soon(keep_house, agent, group, leader)
        for member in members:
            helpers.start_soon(push_to_member, agent, group, leader, member)
        async with trio.open_nursery() as workers:
            workers.start_soon(produce, agent, group, leader)
            workers.start_soon(commit_loop, agent, group, leader)
        helpers.cancel_scope.cancel()
    try:
        await settle(agent, group, leader)
    except RealmError as error:
        # the next leader finds the rows by their sequence numbers; it only searches longer
        agent.log.warning("settled index not written", group=group.group.hex(), error=str(error))


async def handle_become_leader(agent: Agent, body: BecomeLeaderCall) -> Done | Refused:
    """Lead a group from the end of its log, within 5 s (agent.md 9)."""
    if agent.hsm_id is None:
        return Refused(Refusal.NO_HSM)
    group = agent.groups.find(body.realm, body.group)
    if isinstance(group, Refusal):
        return Refused(group)
    if agent.stopping:
        return Refused(Refusal.TIMEOUT, detail="this agent is stopping")
    deadline = trio.current_time() + agent.timings.become_leader_s
    pause_s = POLL_FIRST_S
    while True:
        agent.follower(group).wake.set()
        refused = await _try_to_lead(agent, group, body.last)
        if refused is None:
            return Done()
        if refused.outcome not in (Refusal.FUTURE_INDEX, Refusal.NOT_CAPTURED, Refusal.NO_STORE) or refused.detail:
            return refused
        if trio.current_time() + pause_s >= deadline:
            return refused
        await trio.sleep(pause_s)
        pause_s = min(2 * pause_s, POLL_MAX_S)


async def _try_to_lead(agent: Agent, group: GroupState, asked_last: int | None) -> Refused | None:
    """Try once; None on success. Refusals without `detail` may pass and are tried again."""
    began = trio.current_time()
    try:
        last = await agent.store.log.read_last(group.realm, group.group)
    except RealmError as error:
        agent.log.warning("log tail not read", group=group.group.hex(), error=str(error))
        return Refused(Refusal.NO_STORE)
    read = trio.current_time()
    agent.metrics.timing("agent.handle_become_leader.read_log_entry", int((read - began) * 1e9))
    if last is None:
        return Refused(Refusal.INVALID_GROUP, detail="the log is empty")
    if asked_last is not None and last.index < asked_last:
        return Refused(Refusal.FUTURE_INDEX, index=last.index)
    if asked_last is not None and last.index > asked_last:
        return Refused(Refusal.STALE_INDEX, index=last.index)
    if group.position <= last.index:
        return _behind(group.position - 1, last)
    reply = await agent.hsm.send(BecomeLeader(group.realm, group.group, last))
    agent.metrics.timing("agent.handle_become_leader.hsm_request", int((trio.current_time() - read) * 1e9))
    match reply:
        case RoleOk(role=role):
            agent.adopt(group, role)
            if group.leader is not None:
                group.leader.inherit(last)
            # the HSM persisted its captures; only PersistState signs them
            agent.persister.request()
            return None
        case NotCaptured(have=have):
            return _behind(have or 0, last)
        case Outcome.STEPDOWN_IN_PROGRESS:
            return Refused(Refusal.STEPDOWN_IN_PROGRESS)
        case Outcome.INVALID_REALM:
            return Refused(Refusal.INVALID_REALM)
        case Outcome.INVALID_GROUP:
            return Refused(Refusal.INVALID_GROUP)
        case Outcome.INVALID_MAC:
            raise LogRefused(f"group {group.group.hex()}: the HSM refuses the MAC of stored entry {last.index}")
    check(condition=False, must_hold="BecomeLeader answers as specified")
    return None


def _behind(have: int, last: LogEntry) -> Refused:
    near = have + TRAILING_CAPTURE_MAX >= last.index
    return Refused(Refusal.NOT_CAPTURED, index=have or None, detail="" if near else "too far behind the log")


async def handle_stepdown(agent: Agent, body: GroupCall) -> SteppedDown | Refused:
    """Leave leadership in order: what was begun is still committed and answered (agent.md 9)."""
    group = agent.groups.find(body.realm, body.group)
    if isinstance(group, Refusal):
        return Refused(group)
    leader = group.leader
    if leader is None:
        return Refused(Refusal.NOT_LEADER)
    leader.asked_to_leave = True
    done = await agent.step_down(group, force=False, why="asked to")
    if done is None:
        return Refused(Refusal.NOT_LEADER)
    leader.work.set()
    return SteppedDown(done.last)


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
        if group.is_leader:
            await agent.step_down(group, force=False, why="shutting down")
    while _leads(agent) or agent.releasing or agent.leaderships:  # noqa: ASYNC110 - three conditions, three owners
        await trio.sleep(DRAIN_POLL_S)


def _leads(agent: Agent) -> bool:
    return any(group.leader is not None for group in agent.groups)
