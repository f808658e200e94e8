"""Hand leadership over on request, without a gap that clients notice (manager.md 4)."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Final

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.appointment import resolve
from juicebox_hsm.host.cluster.leases import group_lease
from juicebox_hsm.host.cluster.view import GroupView, Member, name_of
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.wire.methods import STEPDOWN
from juicebox_hsm.wire.rpc import Done, GroupCall, Refusal, Refused, StepdownOrder, SteppedDown
from roles.manager.assign import assign
from roles.manager.context import ManagerContext
from roles.manager.leases import LeaseBusy, LeaseLost, management_lease
from roles.survey.overview import IDS_TIMEOUT_S, STEPDOWN_STATUS_TIMEOUT_S, ask_agents, read_overview

STEPDOWN_TIMEOUT_S: Final = 10.0  # the leader finishes what it has in flight first


async def hand_over(context: ManagerContext, order: StepdownOrder) -> Done | Refused:
    """Carry out a `leader_stepdown`: `Done` only when every group has a new leader."""
    try:
        view = await read_overview(context.store, context.rpc, IDS_TIMEOUT_S)
    except StoreUnavailable as error:
        return Refused(Refusal.NO_STORE, detail=str(error))
    resolved = resolve(view, order)
    if isinstance(resolved, Refused):
        return resolved
    busy = ""
    try:
        async with AsyncExitStack() as stack:
            for group in resolved:  # sorted: two hand-overs cannot wait for each other
                busy = name_of(group.key)
                await stack.enter_async_context(management_lease(context, group_lease(group.key)))
            return await _hand_over_all(context, resolved)
    except LeaseBusy:
        return Refused(Refusal.BUSY, detail=busy)
    except LeaseLost as error:
        return Refused(Refusal.BUSY, detail=str(error))
    except StoreUnavailable as error:
        return Refused(Refusal.NO_STORE, detail=str(error))


async def step_down(context: ManagerContext, group: GroupView, leader: Member) -> int | Refused:
    """Ask a leader to step down; return its last index. The group counts as leaderless from here on."""
    context.log.info("stepping down", group=name_of(group.key), hsm=leader.hsm.hex())
    context.state.announced.add(group.key)
    try:
        reply = await context.rpc.call(
            leader.url, STEPDOWN, GroupCall(group.realm, group.id), timeout_s=STEPDOWN_TIMEOUT_S
        )
    except RealmError as error:
        return Refused(Refusal.RPC_ERROR, detail=f"{leader.url}: {error}")
    match reply:
        case SteppedDown(last=last):
            return last
        case Refused():
            return reply


async def _hand_over_all(context: ManagerContext, groups: list[GroupView]) -> Done | Refused:
    """Hand over each group in turn; a failure is reported at the end, the rest is done all the same."""
    outcome: Done | Refused = Done()
    for group in groups:
        leader = group.leader
        if leader is None:
            continue
        last = await step_down(context, group, leader)
        if isinstance(last, Refused):
            outcome = last
            continue
        urls = {member.url for member in group.members} | set(context.state.urls.get(group.key, ()))
        view = await ask_agents(context.rpc, urls, STEPDOWN_STATUS_TIMEOUT_S)
        fresh = view.groups.get(group.key, group)
        if await assign(context, view, fresh, exclude=leader.hsm, last=last) is None:
            outcome = Refused(Refusal.LEADERSHIP_TRANSFER_FAILED, detail=name_of(group.key))
    context.log.info("hand-over ended", groups=[name_of(group.key) for group in groups], outcome=type(outcome).__name__)
    return outcome
