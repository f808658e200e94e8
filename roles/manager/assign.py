"""Choose and appoint a leader for one group (manager.md 3.1)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.view import LEADER_WORK, ClusterView, GroupView, Member, hsm_work
from juicebox_hsm.ids import HsmId
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.wire.rpc import AGENT_METHODS, BecomeLeaderCall, Done, Refused
from roles.manager.context import ManagerContext, text

BECOME_LEADER_TIMEOUT_S: Final = 7.0  # the agent itself waits up to 5 s for the last entry
BECOME_LEADER: Final = AGENT_METHODS["become_leader"]
DRAIN_PREFIX: Final = "drain/"


async def drained_hsms(context: ManagerContext) -> frozenset[HsmId]:
    """Return the HSMs operators took out of service; none when the settings cannot be read."""
    try:
        names = await context.store.settings.list(DRAIN_PREFIX)
    except StoreUnavailable:
        return frozenset()
    drained = set()
    for name in names:
        try:
            drained.add(HsmId(bytes.fromhex(name.removeprefix(DRAIN_PREFIX))))
        except ValueError:
            context.log.warning("setting is not an HSM id", setting=name)
    return frozenset(drained)


def candidates(
    view: ClusterView,
    group: GroupView,
    *,
    exclude: HsmId | None = None,
    drained: Collection[HsmId] = (),
    extra_work: Mapping[HsmId, int] | None = None,
) -> list[Member]:
    """Order the members that answered: undrained first, least work, freshest capture, lowest id.

    The order is total, so two managers agree. An exclusion that would leave nobody is dropped.
    """
    members = [member for member in group.members if member.hsm != exclude] or list(group.members)
    extra = extra_work or {}

    def order(member: Member) -> tuple[bool, int, bool, int, bytes]:
        hsm = view.hsms.get(member.hsm)
        work = (0 if hsm is None else hsm_work(view, hsm)) + extra.get(member.hsm, 0)
        captured = member.captured_index
        return (member.hsm in drained, work, captured is None, -(captured or 0), member.hsm)

    return sorted(members, key=order)


async def appoint(context: ManagerContext, group: GroupView, member: Member, last: int | None) -> str:
    """Ask one member to lead. Return "" on success, else the reason."""
    body = BecomeLeaderCall(realm=group.realm, group=group.id, last=last)
    try:
        reply = await context.rpc.call(member.url, BECOME_LEADER, body, timeout_s=BECOME_LEADER_TIMEOUT_S)
    except RealmError as error:
        return str(error) or type(error).__name__
    match reply:
        case Done():
            return ""
        case Refused(outcome=outcome, index=index):
            return outcome.value if index is None else f"{outcome.value} at {index}"
        case _:
            return f"unexpected reply {type(reply).__name__}"


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
    drained = await drained_hsms(context)
    ordered = candidates(view, group, exclude=exclude, drained=drained, extra_work=extra)
    if context.faults.now.reversed_candidates:
        ordered.reverse()
    for member in ordered:
        extra[member.hsm] = extra.get(member.hsm, 0) + LEADER_WORK
        context.log.info("appointing leader", group=text(group.key), hsm=member.hsm.hex(), last=last)
        reason = await appoint(context, group, member, last)
        if not reason:
            context.state.announced.discard(group.key)
            context.meter.count("manager.leader.assigned", realm=group.realm.hex(), group=group.id.hex())
            context.log.info("leader appointed", group=text(group.key), hsm=member.hsm.hex())
            return member.hsm
        extra[member.hsm] -= LEADER_WORK
        context.log.warning("candidate refused", group=text(group.key), hsm=member.hsm.hex(), reason=reason)
    context.meter.count("manager.leader.failed", realm=group.realm.hex(), group=group.id.hex())
    context.log.warning("no candidate took the leadership", group=text(group.key))
    return None
