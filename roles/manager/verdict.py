"""Judge a cluster's health from what its services say: pure, for command line and status page (operator-tools.md 2).

A *problem* needs somebody to act; *advice* is
worth knowing and needs nobody now. Reports are claims of one moment: a verdict may be wrong for a second around a
change of leadership, and looking again tells.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from juicebox_hsm.adapters.tls.certificate_end import ending, from_unix_ms
from juicebox_hsm.host.cluster.ranges import show_range
from juicebox_hsm.host.cluster.view import ClusterView, GroupKey, GroupView, Member
from juicebox_hsm.ids import HsmId, OwnedRange, uncovered
from juicebox_hsm.wire.rpc import Direction
from roles.manager.reasons import reason_of

OUTBOX_ROWS_WARN: Final = 100_000  # 1 % of the bound at which clients are refused (agent.md 11)
OUTBOX_AGE_WARN_S: Final = 60.0
TRANSFER_AGE_WARN_S: Final = 60.0  # operator-tools.md 2
LAG_WARN: Final = 1000  # entries; beyond it a member is no candidate to lead (manager.md 3.1)
MEMBERS_ADVISED: Final = 3
OWN_CERTIFICATE: Final = "the operator's certificate"


@dataclass(frozen=True, slots=True)
class ManagerReport:
    """What one manager said.

    `pending` maps a group to the age in s of the transfer this manager sees pending there. `certificate_end` is that
    of its cluster certificate, None when it told none.
    """

    url: str
    error: str = ""
    version: str = ""
    pending: Mapping[GroupKey, float] = field(default_factory=dict)
    certificate_end: dt.datetime | None = None


@dataclass(frozen=True, slots=True)
class BalancerReport:
    """What one load balancer showed: the end of its certificate, and of `/readyz` the reasons, none when it is ready.

    `warnings` are what its `/readyz` says besides, ready or not.
    """

    url: str
    error: str = ""
    version: str = ""
    not_after: dt.datetime | None = None
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything a verdict is made from. `own_certificate_end` is that of the judging operator, if there is one."""

    view: ClusterView
    managers: tuple[ManagerReport, ...]
    balancers: tuple[BalancerReport, ...]
    now: dt.datetime
    drained: frozenset[HsmId] = frozenset()
    rebalancing_paused: bool = False
    own_certificate_end: dt.datetime | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line each."""

    problems: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def is_healthy(self) -> bool:
        """Tell whether nobody needs to act."""
        return not self.problems


def judge(evidence: Evidence) -> Verdict:
    """Return all problems and advice, agents first, then managers, balancers, realms and groups."""
    view = evidence.view
    problems = [
        *_agent_problems(view, evidence.now),
        *_manager_problems(evidence),
        *_balancer_problems(evidence),
        *_version_problems(evidence),
    ]
    for realm in view.realms:
        for group in view.groups_of(realm):
            problems += _group_problems(evidence, group)
        owned = [group.owned_range for group in view.groups_of(realm) if group.owned_range is not None]
        problems += [f"realm {realm.hex()}: nobody serves {show_range(gap)}" for gap in uncovered(owned)]
        problems += [f"realm {realm.hex()}: two groups claim {show_range(part)}" for part in _overlaps(owned)]
    return Verdict(tuple(problems), tuple(_advice(evidence)))


def verdict_json(evidence: Evidence, verdict: Verdict) -> dict[str, object]:
    """Return the document of `cluster status --json` and `/status.json`."""
    view = evidence.view
    return {
        "ok": verdict.is_healthy,
        "problems": list(verdict.problems),
        "advice": list(verdict.advice),
        "reasons": [
            *({"code": reason_of(line), "severity": "problem", "text": line} for line in verdict.problems),
            *({"code": reason_of(line), "severity": "advice", "text": line} for line in verdict.advice),
        ],
        "agents": len(view.agents),
        "hsms": len(view.hsms),
        "managers": len(evidence.managers),
        "load_balancers": len(evidence.balancers),
        "realms": len(view.realms),
        "groups": len(view.groups),
    }


def _agent_problems(view: ClusterView, now: dt.datetime) -> Iterator[str]:
    if not view.agents:
        yield "no agent in discovery"
    for agent in view.agents:
        status = agent.status
        if status is None:
            yield f"agent {agent.url} does not answer: {agent.error}"
            continue
        if status.hsm is None:
            yield f"agent {agent.url}: its HSM does not answer"
        outbox = status.outbox
        if outbox is not None and outbox.warning:
            yield f"agent {agent.url}: outbox: {outbox.warning}"
        elif outbox is not None and (outbox.backlog > OUTBOX_ROWS_WARN or outbox.oldest_s > OUTBOX_AGE_WARN_S):
            yield f"agent {agent.url}: {outbox.backlog} unpublished events, the oldest {outbox.oldest_s:.0f} s"
        end = from_unix_ms(status.certificate_end_ms)
        yield from _certificate(f"agent {agent.url}: its cluster certificate", end, now)


def _manager_problems(evidence: Evidence) -> Iterator[str]:
    if not evidence.managers:
        yield "no cluster manager in discovery: nobody appoints leaders"
    elif len(evidence.managers) == 1:
        yield "only one cluster manager: when it fails, nobody appoints leaders; run at least two"
    for manager in evidence.managers:
        if manager.error:
            yield f"manager {manager.url} does not answer: {manager.error}"
        whose = f"manager {manager.url}: its cluster certificate"
        yield from _certificate(whose, manager.certificate_end, evidence.now)


def _balancer_problems(evidence: Evidence) -> Iterator[str]:
    if not evidence.balancers:
        yield "no load balancer in discovery: clients cannot reach the realm"
    for balancer in evidence.balancers:
        if balancer.error:
            yield f"load balancer {balancer.url} does not answer: {balancer.error}"
        for reason in balancer.reasons:
            yield f"load balancer {balancer.url} is not ready: {reason}"
        for warning in balancer.warnings:
            yield f"load balancer {balancer.url}: {warning}"
        yield from _certificate(f"load balancer {balancer.url}: its certificate", balancer.not_after, evidence.now)
    yield from _certificate(OWN_CERTIFICATE, evidence.own_certificate_end, evidence.now)


def _certificate(whose: str, end: dt.datetime | None, now: dt.datetime) -> Iterator[str]:
    told = ending(end, now)
    if told:
        yield f"{whose} {told}"


def _version_problems(evidence: Evidence) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for agent in evidence.view.agents:
        if agent.status is not None:
            found.setdefault(agent.status.build, []).append("agent")
    for manager in evidence.managers:
        found.setdefault(manager.version, []).append("manager")
    for balancer in evidence.balancers:
        found.setdefault(balancer.version, []).append("load balancer")
    found.pop("", None)  # did not answer
    if len(found) > 1:
        parts = [
            f"{version} ({', '.join(_counted(roles.count(role), role) for role in dict.fromkeys(roles))})"
            for version, roles in sorted(found.items())
        ]
        yield f"services run different versions: {', '.join(parts)}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _group_problems(evidence: Evidence, group: GroupView) -> Iterator[str]:
    name = _name(group)
    missing = [hsm.hex() for hsm in group.configuration if group.member(hsm) is None]
    if 2 * len(group.members) <= len(group.configuration):
        yield f"{name}: fewer than a majority of members answer; down: {', '.join(missing)}"
    elif missing:
        yield f"{name}: members down: {', '.join(missing)}"
    if _is_too_small(evidence.view, group):
        yield f"{name}: {_tolerance(group)}; make an odd one of {MEMBERS_ADVISED} or more HSMs and move the range there"
    if group.leader is None:
        yield f"{name}: nobody leads"
    pending = describe_transfer(group)
    if pending:
        age_s = transfer_age_s(evidence, group)
        if age_s is None:
            yield f"{name}: {pending}; no manager answers to finish it"
        elif age_s > TRANSFER_AGE_WARN_S:
            yield f"{name}: {pending} for {age_s:.0f} s"


def _is_too_small(view: ClusterView, group: GroupView) -> bool:
    """Tell whether a group that serves has one member or an even number, though the realm has HSMs for a better one."""
    others = {hsm for other in view.groups_of(group.realm) for hsm in other.configuration}
    hsms = others | {hsm.id for hsm in view.hsms.values() if hsm.realm == group.realm}
    size = len(group.configuration)
    return group.owned_range is not None and len(hsms) >= MEMBERS_ADVISED and (size == 1 or size % 2 == 0)


def _tolerance(group: GroupView) -> str:
    size = len(group.configuration)
    return f"serves with {_counted(size, 'member')} and tolerates {(size - 1) // 2} lost ones"


def _name(group: GroupView) -> str:
    return f"realm {group.realm.hex()} group {group.id.hex()}"


def describe_transfer(group: GroupView) -> str:
    """Return the pending transfer of a group in words, "" when there is none."""
    leader = group.leader
    marker = None if leader is None or leader.info.leader is None else leader.info.leader.transferring
    if marker is None:
        return ""
    way = "from" if marker.direction is Direction.IN else "to"
    return f"transfer {way} {marker.peer.hex()} is pending since index {marker.at}"


def transfer_age_s(evidence: Evidence, group: GroupView) -> float | None:
    """Return how long managers have seen a transfer pending at a group: 0.0 if none has yet, None without managers."""
    answering = [manager for manager in evidence.managers if not manager.error]
    return max((manager.pending.get(group.key, 0.0) for manager in answering), default=None)


def _overlaps(owned: list[OwnedRange]) -> Iterator[OwnedRange]:
    """Yield what two ranges share; a deposed leader that has not noticed may cause it for a moment."""
    parts = sorted(owned, key=lambda part: (part.start, part.end))
    for number, low in enumerate(parts):
        for high in parts[number + 1 :]:
            if low.overlaps(high):
                yield OwnedRange(high.start, min(low.end, high.end))


def lag(group: GroupView, member: Member) -> int | None:
    """Return how many entries a member's capture is behind its leader's, None without a leader."""
    leader = group.leader
    if leader is None or leader.captured_index is None:
        return None
    return max(0, leader.captured_index - (member.captured_index or 0))


def _advice(evidence: Evidence) -> Iterator[str]:
    if len(evidence.balancers) == 1:
        yield "only one load balancer: when it fails, clients cannot reach the realm"
    for hsm in sorted(evidence.drained):
        yield f"HSM {hsm.hex()} is drained; let it lead again with `cluster undrain`"
    if evidence.rebalancing_paused:
        yield "periodic rebalancing is paused; resume it with `cluster rebalance --resume`"
    for group in (group for _, group in sorted(evidence.view.groups.items())):
        is_small = group.owned_range is not None and len(group.configuration) < MEMBERS_ADVISED
        if is_small and not _is_too_small(evidence.view, group):
            yield f"{_name(group)}: {_tolerance(group)}"
        for member in group.members:
            behind = lag(group, member)
            if behind is not None and behind >= LAG_WARN:
                yield f"{_name(group)}: member {member.hsm.hex()} is {behind} entries behind"
        pending = describe_transfer(group)
        if pending and (transfer_age_s(evidence, group) or 0) <= TRANSFER_AGE_WARN_S:
            yield f"{_name(group)}: {pending}"
