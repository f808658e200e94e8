"""What the rules of `juicebox_hsm.host` find and decide, in words for people: tools, status page, probes and logs.

The only place where sentences are made of codes. Nothing reads them again.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Final

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.host.certificates import remaining_days
from juicebox_hsm.host.cluster.balance import HsmLoad, Move
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
from juicebox_hsm.host.cluster.ranges import show_range
from juicebox_hsm.host.cluster.verdict import MEMBERS_ADVISED
from juicebox_hsm.host.cluster.view import GroupKey, name_of
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.readiness import (
    CopyAt,
    DamageMet,
    EventsSetAside,
    EventsWait,
    NoAnswer,
    OfRealm,
    OtherStore,
    OwnCertificateEnds,
    OwnClockOff,
    Plain,
    Readiness,
    Reason,
    SecretsOld,
    ShownCertificateNotValid,
    Stalled,
    Trouble,
    Unserved,
)
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ids import GroupId, OwnedRange
from juicebox_hsm.wire.rpc import Direction, LogBehind, RpcCode, RunningTransfer, StoreDamage

WARNING: Final = "warning: "
"""What the line of a warning in `/readyz` begins with."""

_FACTS: Final = {
    Code.NO_AGENT: "no agent in discovery",
    Code.NO_MANAGER: "no cluster manager in discovery: nobody appoints leaders",
    Code.ONE_MANAGER: "only one cluster manager: when it fails, nobody appoints leaders; run at least two",
    Code.NO_LOAD_BALANCER: "no load balancer in discovery: clients cannot reach the realm",
    Code.ONE_LOAD_BALANCER: "only one load balancer: when it fails, clients cannot reach the realm",
    Code.REBALANCING_PAUSED: "periodic rebalancing is paused; resume it with `cluster rebalance --resume`",
}
_OF_SERVICES: Final = {
    Code.AGENT_SILENT: "agent {url} does not answer: {said}",
    Code.AGENT_NOT_READY: "agent {url} is not ready: {said}",
    Code.HSM_SILENT: "agent {url}: its HSM does not answer",
    Code.OUTBOX: "agent {url}: outbox: {said}",
    Code.MANAGER_SILENT: "manager {url} does not answer: {said}",
    Code.LOAD_BALANCER_SILENT: "load balancer {url} does not answer: {said}",
    Code.LOAD_BALANCER_NOT_READY: "load balancer {url} is not ready: {said}",
}
_A_WARNING: Final = "load balancer {url}: {said}"
_CERTIFICATES: Final = {
    Certificate.AGENT: "agent {url}: its cluster certificate",
    Certificate.MANAGER: "manager {url}: its cluster certificate",
    Certificate.LOAD_BALANCER: "load balancer {url}: its certificate",
    Certificate.OPERATOR: "the operator's certificate",
}
_OF_RANGES: Final = {
    Code.RANGE_UNSERVED: "nobody serves {range}",
    Code.RANGE_CLAIMED_TWICE: "two groups claim {range}",
}
_OF_GROUPS: Final = {
    Code.NO_MAJORITY: "fewer than a majority of members answer; down: {missing}",
    Code.MEMBERS_DOWN: "members down: {missing}",
    Code.LEADERLESS: "nobody leads",
    Code.GROUP_ENDED: "has been retired; members that have not forgotten it yet: {missing}",
}
EXIT_CODES: Final = {
    ExitCode.OK: "stopped in order",
    ExitCode.USAGE: "wrong usage",
    ExitCode.UNAVAILABLE: (
        "something it needs is not there yet: the store, a file, an address, a name, the lock of its predecessor, "
        "a matching key pair"
    ),
    ExitCode.INTERNAL: "a broken invariant or unexpected error; the last line on stderr is a JSON report",
    ExitCode.HSM: "the HSM is lost or its NVRAM could not be read or written",
    ExitCode.CONFIG: "wrong configuration: somebody has to change something first",
}
"""What the exit codes of services mean, for the guide and the command reference."""

_OWN: Final = {
    Code.NOT_REGISTERED: "not yet registered with service discovery",
    Code.STOPPING: "shutting down",
    Code.HSM_SILENT: "the HSM does not answer",
    Code.NO_REALMS: "no realms",
}
_TROUBLES: Final = {
    Code.STORE: "store",
    Code.STORE_REPLACED: "store",
    Code.REGISTRATION: "registration",
    Code.DISCOVERY: "discovery",
    Code.LOG_NOT_FOLLOWED: "log",
    Code.COMPACTION: "compaction",
    Code.GROUP_NOT_LEFT: "leaving an ended group",
    Code.OUTBOX_UNREADABLE: "outbox backlog",
    Code.EVENTS_NOT_DISPATCHED: "outbox dispatch",
    Code.BUS: "events are not published",
}
_OF_REALMS: Final = {
    Code.RECORD_ID_KEY: "used with another record-id key",
    Code.RECORD_ID_KEY_UNCHECKED: "record-id key not checked yet",
}
RPC_FAILURES: Final = {
    RpcCode.UNKNOWN_METHOD: "it runs a version that does not know this order",
    RpcCode.BAD_REQUEST: "it does not understand this order: it runs another version",
    RpcCode.FORBIDDEN: "it does not take this order from the role of our certificate",
    RpcCode.OVERLOADED: "it has too much to do",
    RpcCode.SHUTTING_DOWN: "it is shutting down",
    RpcCode.DEADLINE_EXCEEDED: "no answer in time",
    RpcCode.HANDLER_FAILED: "it failed inside; its log says why",
}
"""What it means that the other side gave up a call."""
_KINDS: Final = {
    ServiceKind.AGENT: "agent",
    ServiceKind.MANAGER: "manager",
    ServiceKind.LOAD_BALANCER: "load balancer",
}


def sentence(found: Finding) -> str:
    """Return a finding as one line."""
    match found:
        case Fact(code=code):
            return _FACTS[code]
        case OfService(code=code, url=url, said=said):
            return _OF_SERVICES.get(code, _A_WARNING).format(url=url, said=said)
        case HsmTwice(hsm=hsm, urls=urls):
            return (
                f"HSM {hsm.hex()} runs at {' and at '.join(urls)}: one is a copy. Stop it for good and destroy its "
                "directory; until then neither is ready or made a leader"
            )
        case OutboxLate(url=url, backlog=backlog, oldest_s=oldest_s):
            return f"agent {url}: {backlog} unpublished events, the oldest {oldest_s:.0f} s"
        case CertificateEnds(whose=whose, url=url):
            return f"{_CERTIFICATES[whose].format(url=url)} {_ends(found.end_ms, found.remaining_days)}"
        case ClockOff(kind=kind, url=url, ahead_s=ahead_s):
            return f"{f'{_KINDS[kind]} {url}: its' if kind else 'your'} clock is {clock_off(ahead_s)}"
        case AnotherStore(url=url, told=behind):
            return f"agent {url}: {log_behind(behind)}"
        case VersionsDiffer(running=running):
            parts = [
                f"{version} ({', '.join(counted(count, _KINDS[kind]) for kind, count in kinds)})"
                for version, kinds in running
            ]
            return f"services run different versions: {', '.join(parts)}"
        case OfRange(code=code, realm=realm, range=part):
            return f"realm {realm.hex()}: {_OF_RANGES[code].format(range=show_range(part))}"
        case Damaged(url=url, told=damage):
            return f"{store_damaged(damage)} (met by agent {url})"
        case OfGroup(code=code, group=group, missing=missing):
            told = _OF_GROUPS[code].format(missing=", ".join(hsm.hex() for hsm in missing))
            return f"{_group(group)}: {told}"
        case CannotCommit(group=group, range=part):
            return (
                f"{_group(group)}{'' if part is None else f' ({show_range(part)})'}: cannot commit for "
                f"{found.stalled_s:.0f} s, {_why_stalled(found)} {found.url}; "
                f"clients are refused until {'it works' if found.lacks_store else 'a majority is back'}"
            )
        case _:
            return _of_members(found)


def _of_members(found: FewMembers | TransferPending | MemberBehind | Drained) -> str:
    match found:
        case FewMembers(code=code, group=group, size=size):
            told = f"{_group(group)}: serves with {counted(size, 'member')} and tolerates {found.tolerated} lost ones"
            if code is not Code.TOO_FEW_MEMBERS:
                return told
            return f"{told}; make an odd one of {MEMBERS_ADVISED} or more HSMs and move the range there"
        case TransferPending(group=group, moving=moving, age_s=age_s):
            told = f"{_group(group)}: {transfer(moving)}"
            if found.code is not Code.TRANSFER_STUCK:
                return told
            return f"{told}; no manager answers to finish it" if age_s is None else f"{told} for {age_s:.0f} s"
        case MemberBehind(group=group, hsm=hsm, entries=entries):
            return f"{_group(group)}: member {hsm.hex()} is {entries} entries behind"
        case Drained(hsm=hsm):
            return f"HSM {hsm.hex()} is drained; let it lead again with `cluster undrain`"


def readiness_text(found: Readiness) -> str:
    """Return what `/readyz` shows, a line for each reason and warning."""
    lines = [own_sentence(reason) for reason in found.reasons] or ["ready"]
    return "".join(f"{line}\n" for line in [*lines, *(f"{WARNING}{own_sentence(one)}" for one in found.warnings)])


def own_sentence(found: Reason) -> str:
    """Return what a service says of itself, as one line."""
    match found:
        case Plain(code=code):
            return _OWN[code]
        case Trouble(code=code, said=said, group=group):
            return f"{_TROUBLES[code]}{'' if group is None else f' {group.hex()}'}: {said}"
        case OtherStore(logs=logs):
            return f"another store: {'; '.join(log_behind(each) for each in logs)}"
        case CopyAt(url=url):
            return f"hsm_twice: our HSM also runs at {url}: one of the two is a copy, which must be stopped for good"
        case SecretsOld(age_s=age_s):
            return f"secrets stale for {age_s:.0f}s"
        case OwnClockOff(ahead_s=ahead_s, refuses=refuses):
            return f"its clock is {clock_off(ahead_s)}{': good tokens may be refused' if refuses else ''}"
        case OwnCertificateEnds(end_ms=end_ms, now_ms=now_ms):
            return f"the cluster certificate {_ends(end_ms, remaining_days(end_ms, now_ms))}"
        case ShownCertificateNotValid():
            return not_valid("the certificate that clients see", found.from_ms, found.end_ms, found.now_ms)
        case EventsWait(waiting=waiting):
            return f"{waiting.rows} tenant events wait for publication, the oldest for {waiting.oldest_s:.0f} s"
        case EventsSetAside(count=count):
            return f"{count} tenant events had names no row can carry and were set aside (see the agent's log)"
        case NoAnswer(within_s=within_s):
            return f"no answer within {within_s} s"
        case _:
            return _of_served(found)


def _of_served(found: DamageMet | Stalled | OfRealm | Unserved) -> str:
    match found:
        case DamageMet(told=damage):
            return store_damaged(damage)
        case Stalled(group=group, range=part, stalled_s=stalled_s, realm=realm):
            told = f"{'' if realm is None else f'realm {realm.hex()}: '}{_ranged(group, part)} cannot commit"
            lasting = "" if stalled_s is None else f" for {stalled_s:.0f} s"
            return f"{told}{lasting}: {_why_stalled(found)}"
        case OfRealm(code=code, realm=realm):
            return f"realm {realm.hex()}: {_OF_REALMS[code]}"
        case Unserved(realm=realm, range=part):
            return f"realm {realm.hex()}: no leader for {show_range(part)}"


def _why_stalled(found: CannotCommit | Stalled) -> str:
    if found.lacks_store:
        return "the store fails its leader"
    return f"{found.alive} of {found.members} members answer its leader"


def _ranged(group: GroupId, part: OwnedRange | None) -> str:
    return f"group {group.hex()} ({'no range' if part is None else show_range(part)})"


def _group(key: GroupKey) -> str:
    return f"realm {key[0].hex()} group {key[1].hex()}"


def store_damaged(told: StoreDamage) -> str:
    """Return what is damaged in a store, and what to do."""
    of = f" of group {told.group.hex()}" if told.group else ""
    return f"the {told.kind.value} {told.place}{of} is damaged or missing; run `store check`"


def log_behind(told: LogBehind) -> str:
    """Return why a store cannot be the one that an HSM knows."""
    if told.last == told.captured:
        what = f"has another entry at index {told.last} than its HSM captured"
    else:
        ends = f"ends at index {told.last}" if told.last else "is empty"
        what = f"{ends}, its HSM captured index {told.captured}"
    return f"the log of group {told.group.hex()} {what}: an older or another store; see `store check --hsm-dir`"


def clock_off(ahead_s: float) -> str:
    """Return how far a clock is off."""
    return f"{abs(ahead_s):,.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the others'"


def counted(count: int, what: str) -> str:
    """Return a number of things, `1 group` or `2 groups`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def moment(unix_ms: int) -> dt.datetime:
    """Return a moment (UTC) for printing."""
    return dt.datetime.fromtimestamp(unix_ms / 1000, dt.UTC)


def _ends(end_ms: int, days: float) -> str:
    day = f"{moment(end_ms):%Y-%m-%d}"
    return f"ended on {day}" if days <= 0 else f"ends on {day}, in {days:.0f} days"


def not_valid(what: str, from_ms: int, end_ms: int, now_ms: int) -> str:
    """Return why a certificate that is not valid cannot be used now."""
    if now_ms < from_ms:
        return f"{what} is not valid before {moment(from_ms):%Y-%m-%d %H:%M} UTC"
    return f"{what} ended on {moment(end_ms):%Y-%m-%d %H:%M} UTC"


def transfer(moving: Moving) -> str:
    """Return a pending transfer in words."""
    way = "from" if moving.direction is Direction.IN else "to"
    return f"transfer {way} {moving.peer.hex()} is pending since index {moving.at}"


def how_far(running: RunningTransfer) -> str:
    """Return how far a running transfer is."""
    return f"{running.step.value}, attempt {running.attempt}, {running.age_s:.1f} s"


def describe_loads(hsms: Sequence[HsmLoad], move: Move | None) -> str:
    """Return the workloads as text, one HSM a line, marking what moves and where."""
    lines = []
    for hsm in sorted(hsms, key=lambda load: (load.work, load.hsm)):
        mark = " [destination]" if move is not None and move.destination == hsm.hsm else ""
        lines.append(f"{hsm.hsm.hex()} work {hsm.work}{' drained' if hsm.drained else ''}{mark}")
        for group in hsm.groups:
            moving = " [moving]" if move is not None and (move.key, move.source) == (group.key, hsm.hsm) else ""
            lines.append(f"  {name_of(group.key)} work {group.work}{' leader' if group.leads else ''}{moving}")
    return "\n".join(lines)
