"""Judge a cluster's health from what its services say, for the command line and the status page (operator-tools.md 2).

Reports are claims of one moment: a verdict may be wrong for a second around a change of leadership, and looking again
tells. Moments are Unix ms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from juicebox_hsm.host.certificates import is_due, moment_ms, remaining_days
from juicebox_hsm.host.clocks import Reading, is_off, offset_ms
from juicebox_hsm.host.cluster.balance import TRAILING_ENTRIES_MAX
from juicebox_hsm.host.cluster.findings import (
    AnotherStore,
    CannotCommit,
    Certificate,
    CertificateEnds,
    ClockOff,
    Damaged,
    Drained,
    Fact,
    FewMembers,
    Finding,
    HsmTwice,
    MemberBehind,
    Moving,
    OfGroup,
    OfRange,
    OfService,
    OutboxLate,
    TransferPending,
    VersionsDiffer,
)
from juicebox_hsm.host.cluster.view import ClusterView, GroupKey, GroupView, Member
from juicebox_hsm.host.codes import Code, Severity, code_of
from juicebox_hsm.host.outbox import Unpublished
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ids import GroupId, HsmId, OwnedRange, uncovered
from juicebox_hsm.wire.rpc import StoreDamage

TRANSFER_AGE_WARN_S: Final = 60.0  # operator-tools.md 2
MEMBERS_ADVISED: Final = 3


@dataclass(frozen=True, slots=True)
class ManagerReport:
    """What one manager said.

    `pending` maps a group to the age in s of the transfer this manager sees pending there. `certificate_end_ms` is that
    of its cluster certificate, None when it told none. `clock` is its wall clock as the asker read it.
    """

    url: str
    error: str = ""
    version: str = ""
    pending: Mapping[GroupKey, float] = field(default_factory=dict)
    certificate_end_ms: int | None = None
    clock: Reading | None = None
    name: str = ""
    uptime_s: float | None = None


@dataclass(frozen=True, slots=True)
class BalancerReport:
    """What one load balancer showed: the end of its certificate, and of `/readyz` the reasons, none when it is ready.

    `warnings` are what its `/readyz` says besides, ready or not. Each line has the code that the balancer gives it.
    """

    url: str
    error: str = ""
    version: str = ""
    certificate_end_ms: int | None = None
    reasons: tuple[tuple[Code, str], ...] = ()
    warnings: tuple[tuple[Code, str], ...] = ()
    name: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything a verdict is made from. `own_...` are those of whoever judges, if there are any."""

    view: ClusterView
    managers: tuple[ManagerReport, ...]
    balancers: tuple[BalancerReport, ...]
    now_ms: int
    drained: frozenset[HsmId] = frozenset()
    rebalancing_paused: bool = False
    own_certificate_end_ms: int | None = None
    own_clock: Reading | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found: problems first, then advice."""

    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Return what somebody has to see to: agents first, then managers, balancers, realms and groups."""
        return tuple(found for found in self.findings if found.code.severity is Severity.PROBLEM)

    @property
    def advice(self) -> tuple[Finding, ...]:
        """Return what is worth knowing."""
        return tuple(found for found in self.findings if found.code.severity is Severity.ADVICE)

    @property
    def is_healthy(self) -> bool:
        """Tell whether nobody needs to act."""
        return not self.problems


def judge(evidence: Evidence) -> Verdict:
    """Return everything that is wrong or worth knowing."""
    view = evidence.view
    problems = [
        *_agent_problems(view, evidence.now_ms),
        *_manager_problems(evidence),
        *_balancer_problems(evidence),
        *_clock_problems(evidence),
        *_version_problems(evidence),
        *_damages(view),
    ]
    for realm in view.realms:
        for group in view.groups_of(realm):
            problems += _group_problems(evidence, group)
        owned = [group.owned_range for group in view.groups_of(realm) if group.owned_range is not None]
        problems += [OfRange(Code.RANGE_UNSERVED, realm, gap) for gap in uncovered(owned)]
        problems += [OfRange(Code.RANGE_CLAIMED_TWICE, realm, part) for part in _overlaps(owned)]
    return Verdict((*problems, *_advice(evidence)))


def _agent_problems(view: ClusterView, now_ms: int) -> Iterator[Finding]:
    if not view.agents:
        yield Fact(Code.NO_AGENT)
    for hsm, urls in view.copied.items():
        yield HsmTwice(hsm, urls)
    for agent in view.agents:
        status = agent.status
        if status is None:
            yield OfService(Code.AGENT_SILENT, agent.url, agent.error)
            continue
        if status.hsm is None:
            yield OfService(Code.HSM_SILENT, agent.url)
        for behind in status.logs_behind:
            yield AnotherStore(agent.url, behind)
        for told in status.troubles:
            yield OfService(Code.AGENT_NOT_READY, agent.url, told.text, because=code_of(told.code))
        outbox = status.outbox
        if outbox is not None and outbox.warning:
            yield OfService(Code.OUTBOX, agent.url, outbox.warning)
        elif outbox is not None and Unpublished(outbox.backlog, outbox.oldest_s).is_long:
            yield OutboxLate(agent.url, outbox.backlog, outbox.oldest_s)
        yield from _certificate(Certificate.AGENT, agent.url, moment_ms(status.certificate_end_ms), now_ms)


def _manager_problems(evidence: Evidence) -> Iterator[Finding]:
    if not evidence.managers:
        yield Fact(Code.NO_MANAGER)
    elif len(evidence.managers) == 1:
        yield Fact(Code.ONE_MANAGER)
    for manager in evidence.managers:
        if manager.error:
            yield OfService(Code.MANAGER_SILENT, manager.url, manager.error)
        yield from _certificate(Certificate.MANAGER, manager.url, manager.certificate_end_ms, evidence.now_ms)


def _balancer_problems(evidence: Evidence) -> Iterator[Finding]:
    if not evidence.balancers:
        yield Fact(Code.NO_LOAD_BALANCER)
    for balancer in evidence.balancers:
        if balancer.error:
            yield OfService(Code.LOAD_BALANCER_SILENT, balancer.url, balancer.error)
        for code, reason in balancer.reasons:
            yield OfService(Code.LOAD_BALANCER_NOT_READY, balancer.url, reason, because=code)
        for code, warning in balancer.warnings:
            yield OfService(code, balancer.url, warning)
        yield from _certificate(Certificate.LOAD_BALANCER, balancer.url, balancer.certificate_end_ms, evidence.now_ms)
    yield from _certificate(Certificate.OPERATOR, "", evidence.own_certificate_end_ms, evidence.now_ms)


def _certificate(whose: Certificate, url: str, end_ms: int | None, now_ms: int) -> Iterator[Finding]:
    if end_ms is not None and is_due(end_ms, now_ms):
        yield CertificateEnds(whose, url, end_ms, remaining_days(end_ms, now_ms))


def _clock_problems(evidence: Evidence) -> Iterator[Finding]:
    """Compare all clocks; load balancers compare theirs themselves and warn."""
    everybody = readings(evidence)
    for kind, url, reading in _clocks(evidence):
        if is_off(reading, everybody):
            yield ClockOff(kind, url, offset_ms(reading, everybody) / 1000)


def _clocks(evidence: Evidence) -> Iterator[tuple[ServiceKind | None, str, Reading]]:
    """Yield whose clock could be read, by kind and address, and how far ahead it is."""
    told: list[tuple[ServiceKind | None, str, Reading | None]] = [
        *((ServiceKind.AGENT, agent.url, agent.clock) for agent in evidence.view.agents),
        *((ServiceKind.MANAGER, manager.url, manager.clock) for manager in evidence.managers),
        (None, "", evidence.own_clock),
    ]
    for kind, url, reading in told:
        if reading is not None:
            yield kind, url, reading


def readings(evidence: Evidence) -> list[Reading]:
    """Return what every clock showed that could be read."""
    return [reading for _, _, reading in _clocks(evidence)]


def clock_offset_s(evidence: Evidence, reading: Reading | None) -> float | None:
    """Return how far a clock is ahead of what most say, None for one that nobody could read."""
    return None if reading is None else offset_ms(reading, readings(evidence)) / 1000


def _damages(view: ClusterView) -> Iterator[Finding]:
    """Yield each damaged place once: all agents read the same store."""
    met: dict[StoreDamage, str] = {}
    for agent in view.agents:
        for damage in () if agent.status is None else agent.status.damages:
            met.setdefault(damage, agent.url)
    for damage, url in met.items():
        yield Damaged(url, damage)


def _version_problems(evidence: Evidence) -> Iterator[Finding]:
    found: dict[str, dict[ServiceKind, int]] = {}

    def count(version: str, kind: ServiceKind) -> None:
        if version:  # it answered
            kinds = found.setdefault(version, {})
            kinds[kind] = kinds.get(kind, 0) + 1

    for agent in evidence.view.agents:
        if agent.status is not None:
            count(agent.status.build, ServiceKind.AGENT)
    for manager in evidence.managers:
        count(manager.version, ServiceKind.MANAGER)
    for balancer in evidence.balancers:
        count(balancer.version, ServiceKind.LOAD_BALANCER)
    if len(found) > 1:
        yield VersionsDiffer(tuple((version, tuple(kinds.items())) for version, kinds in sorted(found.items())))


def _group_problems(evidence: Evidence, group: GroupView) -> Iterator[Finding]:
    if group.has_ended:
        return
    missing = tuple(hsm for hsm in group.configuration if group.member(hsm) is None)
    if 2 * len(group.members) <= len(group.configuration):
        yield OfGroup(Code.NO_MAJORITY, group.key, missing)
    elif missing:
        yield OfGroup(Code.MEMBERS_DOWN, group.key, missing)
    leader = group.leader
    told = None if leader is None else leader.agent
    if leader is not None and told is not None and told.stalled_s is not None:
        alive, size = told.members_alive or 0, len(group.configuration)
        yield CannotCommit(group.key, group.owned_range, leader.url, alive, size, told.stalled_s, told.lacks_store)
    if _is_too_small(evidence.view, group):
        yield FewMembers(Code.TOO_FEW_MEMBERS, group.key, len(group.configuration))
    if leader is None:
        yield OfGroup(Code.LEADERLESS, group.key)
    moving = moving_of(group)
    if moving is not None:
        age_s = transfer_age_s(evidence, group)
        if age_s is None or age_s > TRANSFER_AGE_WARN_S:
            yield TransferPending(Code.TRANSFER_STUCK, group.key, moving, age_s)


def _is_too_small(view: ClusterView, group: GroupView) -> bool:
    """Tell whether a group that serves has one member or an even number, though the realm has HSMs for a better one."""
    others = {hsm for other in view.groups_of(group.realm) for hsm in other.configuration}
    hsms = others | {hsm.id for hsm in view.hsms.values() if hsm.realm == group.realm}
    size = len(group.configuration)
    return group.owned_range is not None and len(hsms) >= MEMBERS_ADVISED and (size == 1 or size % 2 == 0)


def cannot_commit(group: GroupView) -> bool:
    """Tell whether a group's clients are refused for want of a majority, by what its members or its leader say."""
    told = None if group.leader is None else group.leader.agent
    return group.losses_tolerated < 0 or (told is not None and told.stalled_s is not None)


def moving_of(group: GroupView) -> Moving | None:
    """Return the pending transfer of a group."""
    leader = group.leader
    marker = None if leader is None or leader.info.leader is None else leader.info.leader.transferring
    return None if marker is None else Moving(marker.direction, GroupId(marker.peer), marker.at)


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


def _advice(evidence: Evidence) -> Iterator[Finding]:
    if len(evidence.balancers) == 1:
        yield Fact(Code.ONE_LOAD_BALANCER)
    for hsm in sorted(evidence.drained):
        yield Drained(hsm)
    if evidence.rebalancing_paused:
        yield Fact(Code.REBALANCING_PAUSED)
    for group in (group for _, group in sorted(evidence.view.groups.items())):
        if group.has_ended:
            yield OfGroup(Code.GROUP_ENDED, group.key, tuple(member.hsm for member in group.members))
            continue
        size = len(group.configuration)
        if group.owned_range is not None and size < MEMBERS_ADVISED and not _is_too_small(evidence.view, group):
            yield FewMembers(Code.FEW_MEMBERS, group.key, size)
        for member in group.members:
            behind = lag(group, member)
            if behind is not None and behind >= TRAILING_ENTRIES_MAX:
                yield MemberBehind(group.key, member.hsm, behind)
        moving = moving_of(group)
        age_s = transfer_age_s(evidence, group)
        if moving is not None and (age_s or 0) <= TRANSFER_AGE_WARN_S:
            yield TransferPending(Code.TRANSFER_PENDING, group.key, moving, age_s)
