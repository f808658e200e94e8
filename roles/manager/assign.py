"""Choose and appoint a leader for one group (manager.md 3.1)."""

from __future__ import annotations

from typing import Final

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.appointment import candidates
from juicebox_hsm.host.cluster.settings import DRAIN_PREFIX, drained_hsms
from juicebox_hsm.host.cluster.view import LEADER_WORK, ClusterView, GroupView, Member, name_of
from juicebox_hsm.ids import HsmId
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.wire.methods import BECOME_LEADER
from juicebox_hsm.wire.rpc import BecomeLeaderCall, Done, Refused
from roles.manager.context import ManagerContext

BECOME_LEADER_TIMEOUT_S: Final = 7.0  # the agent itself waits up to 5 s for the last entry


async def read_drained(context: ManagerContext) -> frozenset[HsmId]:
    """Return the HSMs operators took out of service; none when the settings cannot be read."""
    try:
        names = await context.store.settings.list(DRAIN_PREFIX)
    except StoreUnavailable:
        return frozenset()
    drained = drained_hsms(names)
    if len(drained) < len(names):
        context.log.warning("a setting is not an HSM id", settings=sorted(names))
    return drained


async def appoint(context: ManagerContext, group: GroupView, member: Member, last: int | None) -> str:
    """Ask one member to lead. Return "" on success, else the reason."""
    body = BecomeLeaderCall(realm=group.realm, group=group.id, last=last)
    try:
        reply = await context.rpc.call(member.url, BECOME_LEADER, body, timeout_s=BECOME_LEADER_TIMEOUT_S)
    except RealmError as error:
        return str(error) or type(error).__name__
    match reply:
        case Done():
            await context.note("appoint", realm=group.realm.hex(), group=group.id.hex(), hsm=member.hsm.hex())
            return ""
        case Refused():
            return str(reply)


async def assign(
    context: ManagerContext,
    view: ClusterView,
    group: GroupView,
    *,
    exclude: HsmId | None = None,
    last: int | None = None,
    extra_work: dict[HsmId, int] | None = None,
) -> HsmId | None:
    """Ask the candidates in turn; return the HSM that leads now, or None when all refused.

    The caller holds the group's lease. `last` is the final index of a leader that just stepped down, when known.
    `extra_work` collects work given away in this pass, so that several orphans do not all go to one idle HSM.
    """
    extra = {} if extra_work is None else extra_work
    drained = await read_drained(context)
    ordered = candidates(view, group, exclude=exclude, drained=drained, extra_work=extra)
    if context.faults.now.reversed_candidates:
        ordered.reverse()
    for member in ordered:
        extra[member.hsm] = extra.get(member.hsm, 0) + LEADER_WORK
        context.log.info("appointing leader", group=name_of(group.key), hsm=member.hsm.hex(), last=last)
        reason = await appoint(context, group, member, last)
        if not reason:
            context.state.announced.discard(group.key)
            context.meter.count("manager.leader.assigned", realm=group.realm.hex(), group=group.id.hex())
            context.log.info("leader appointed", group=name_of(group.key), hsm=member.hsm.hex())
            return member.hsm
        extra[member.hsm] -= LEADER_WORK
        context.log.warning("candidate refused", group=name_of(group.key), hsm=member.hsm.hex(), reason=reason)
    context.meter.count("manager.leader.failed", realm=group.realm.hex(), group=group.id.hex())
    context.log.warning("no candidate took the leadership", group=name_of(group.key))
    return None
