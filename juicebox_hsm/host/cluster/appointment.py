"""Who should lead: which groups to act on, and whom to ask in which order (manager.md 3, 4).

Hysteresis: a leaderless group is acted on when somebody announced it, when every member answered and none leads, or
when two reads at least a second apart agree. One lost status reply therefore never starts a duel, and a leader that is
stepping down has a moment to finish what it has in flight.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from juicebox_hsm.host.cluster.view import ClusterView, GroupKey, GroupView, Member, hsm_work
from juicebox_hsm.ids import HsmId
from juicebox_hsm.wire.rpc import GroupRole, Refusal, Refused, StepdownOrder

CONFIRM_AFTER_S: Final = 1.0


def leaderless_since(before: Mapping[GroupKey, float], view: ClusterView, now_s: float) -> dict[GroupKey, float]:
    """Return since when each group that nobody leads has been seen so; `before` is what the last read returned.

    A group that has ended needs no leader: its members forget it by themselves.
    """
    leaderless = (key for key, group in view.groups.items() if group.leader is None and not group.has_ended)
    return {key: before.get(key, now_s) for key in leaderless}


def orphans(
    view: ClusterView, since: Mapping[GroupKey, float], announced: Collection[GroupKey], now_s: float
) -> list[GroupView]:
    """Return the groups to act on at `now_s` (monotonic), by realm and id; `since` as `leaderless_since` has it."""
    found = []
    for key, seen_s in sorted(since.items()):
        group = view.groups[key]
        confirmed = now_s - seen_s >= CONFIRM_AFTER_S
        finishing = any(member.info.role.name is GroupRole.STEPPING_DOWN for member in group.members)
        certain = (group.is_complete or key in announced) and not finishing
        if confirmed or certain:
            found.append(group)
    return found


def served(announced: Collection[GroupKey], view: ClusterView) -> set[GroupKey]:
    """Return the announced groups that somebody leads by now: their announcement has served."""
    return {key for key in announced if key in view.groups and view.groups[key].leader is not None}


def still_leaderless(seen: GroupView, fresh: ClusterView) -> GroupView | None:
    """Return what to appoint a leader for after looking again, None when somebody leads; silence changes nothing."""
    again = fresh.groups.get(seen.key)
    if again is None:
        return seen
    return again if again.leader is None else None


def is_led(group: GroupView, reported: int) -> bool:
    """Tell whether a member that answered leads, although the leadership that began at `reported` is gone.

    An older leadership counts if it wrote where the reported one began, or if nobody captured anything it did not
    write: then it beat the reported one, or that one wrote nothing (record 0018). One that was beaten does not.
    """
    captured = max((member.captured_index or 0 for member in group.members), default=0)
    unbeaten = min(reported, captured)
    return any(
        member.leads and (member.starting >= reported or member.written_index >= unbeaten) for member in group.members
    )


def candidates(
    view: ClusterView,
    group: GroupView,
    *,
    exclude: HsmId | None = None,
    drained: Collection[HsmId] = (),
    extra_work: Mapping[HsmId, int] | None = None,
) -> list[Member]:
    """Order the members that answered: undrained first, least work, freshest capture, lowest id.

    An HSM of which there is a copy is not among them. The order is total, so two managers agree. An exclusion that
    would leave nobody is dropped. `extra_work` is what this pass gave away already, so that several orphans do not all
    go to one idle HSM.
    """
    single = [member for member in group.members if member.hsm not in view.copied]
    members = [member for member in single if member.hsm != exclude] or single
    extra = extra_work or {}

    def order(member: Member) -> tuple[bool, int, bool, int, bytes]:
        hsm = view.hsms.get(member.hsm)
        work = (0 if hsm is None else hsm_work(view, hsm)) + extra.get(member.hsm, 0)
        captured = member.captured_index
        return (member.hsm in drained, work, captured is None, -(captured or 0), member.hsm)

    return sorted(members, key=order)


def urls_to_ask(group: GroupView, before: Sequence[str]) -> tuple[str, ...]:
    """Return the agents to ask about a group; a member that is silent now stays known for as long as its group is."""
    seen = {member.url for member in group.members}
    room = max(0, len(group.configuration) - len(seen))
    kept = [url for url in before if url not in seen][-room:] if room else []
    return tuple(sorted([*seen, *kept]))


def resolve(view: ClusterView, order: StepdownOrder) -> list[GroupView] | Refused:
    """Return the groups that a hand-over is about, by realm and id; each has a leader."""
    if order.hsm is not None:
        if not any(hsm == order.hsm for hsm in view.hsms):
            silent = [agent for agent in view.agents if agent.status is None]
            detail = f"{len(silent)} agents did not answer" if silent else ""
            return Refused(Refusal.RPC_ERROR if silent else Refusal.INVALID_HSM, detail=detail)
        return view.led_by(order.hsm) or Refused(Refusal.NOT_LEADER)
    realm, wanted = order.realm or b"", order.group or b""
    if realm not in view.realms:
        return Refused(Refusal.INVALID_REALM)
    group = view.group(realm, wanted)
    if group is None:
        return Refused(Refusal.INVALID_GROUP)
    return [group] if group.leader is not None else Refused(Refusal.NOT_LEADER)
