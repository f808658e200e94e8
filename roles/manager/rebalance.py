"""Spread leadership evenly: the carry-out of one move (manager.md 5)."""

from __future__ import annotations

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.balance import (
    AskToLead,
    AskToLeave,
    Move,
    carry_out,
    is_settled,
    is_worthwhile,
    leaves_a_leader,
    loads,
    next_move,
)
from juicebox_hsm.host.cluster.leases import group_lease
from juicebox_hsm.host.cluster.settings import PAUSED, moved_setting
from juicebox_hsm.host.cluster.view import ClusterView, GroupKey, name_of
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.wire.rpc import Rebalanced, Refusal, Refused
from roles.manager.appointment import Appointer
from roles.manager.assign import appoint, read_drained
from roles.manager.context import ManagerContext
from roles.manager.leases import LeaseBusy, LeaseLost, management_lease
from roles.manager.stepdown import step_down
from roles.survey.overview import read_overview
from roles.words import describe_loads


async def rebalance(context: ManagerContext, appointer: Appointer, *, periodic: bool = False) -> Rebalanced | Refused:
    """Make at most one move. The periodic pass honours the pause switch and the hysteresis."""
    try:
        if periodic and await context.store.settings.get(PAUSED) is not None:
            return Rebalanced()
        view = await read_overview(context.store, context.rpc)
        hsms = loads(view, await read_drained(context))
        for hsm in hsms:
            context.meter.gauge("manager.workload", hsm.work, hsm=hsm.hsm.hex())
        move = next_move(hsms)
        if move is None or (periodic and not (is_worthwhile(hsms, move) and await _is_settled(context, move.key))):
            return Rebalanced()
        context.log.info("rebalancing", workloads=describe_loads(hsms, move))
        async with management_lease(context, group_lease(move.key)):
            outcome = await _carry_out(context, view, move)
            if isinstance(outcome, Rebalanced):
                await _remember_move(context, move.key)
    except LeaseBusy:
        return Refused(Refusal.BUSY, detail=name_of(move.key) if move else "")
    except LeaseLost as error:
        return Refused(Refusal.BUSY, detail=str(error))
    except StoreUnavailable as error:
        return Refused(Refusal.NO_STORE, detail=str(error))
    if isinstance(outcome, Refused):
        context.log.warning("rebalancing failed", group=name_of(move.key), outcome=outcome.outcome.value)
        if outcome.outcome is Refusal.LEADERSHIP_TRANSFER_FAILED:
            await _appointment_pass(context, appointer)
    else:
        context.meter.count("manager.rebalance.moves")
        context.log.info("rebalanced", group=name_of(move.key), hsm=move.destination.hex())
    return outcome


async def _is_settled(context: ManagerContext, key: GroupKey) -> bool:
    """Tell whether the group may move again. Raises `StoreUnavailable`."""
    return is_settled(await context.store.settings.get(moved_setting(key)), context.now_ms())


async def _remember_move(context: ManagerContext, key: GroupKey) -> None:
    """Tell the other managers, before the lease lets them at the group. The move itself stands, come what may."""
    try:
        await context.store.settings.put(moved_setting(key), str(context.now_ms()).encode())
    except RealmError as error:
        context.log.warning("move not remembered, it may be followed by another", group=name_of(key), error=str(error))


async def _carry_out(context: ManagerContext, view: ClusterView, move: Move) -> Rebalanced | Refused:
    """Make the calls that the rules ask for, and return what they conclude."""
    group = view.groups[move.key]
    members = {member.hsm: member for member in group.members}
    if not {move.source, move.destination} <= members.keys():
        return Refused(Refusal.STEP_DOWN_FAILED, detail="members changed")
    steps = carry_out(move)
    step = next(steps)
    while True:
        match step:
            case AskToLeave():
                answer: int | Refused | str = await step_down(context, group, members[move.source])
            case AskToLead(hsm, last):
                answer = await appoint(context, group, members[hsm], last)
        try:
            step = steps.send(answer)
        except StopIteration as end:
            outcome: Rebalanced | Refused = end.value
            break
    if leaves_a_leader(outcome):
        context.state.announced.discard(move.key)
    return outcome


async def _appointment_pass(context: ManagerContext, appointer: Appointer) -> None:
    """Give the group to anybody; the periodic pass would do so too, a little later."""
    try:
        await appointer.run_pass()
    except RealmError as error:
        context.log.warning("appointment pass failed", error=str(error))
