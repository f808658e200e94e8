"""Whether a service is ready, and what it warns of, as the service itself judges it: codes with their facts.

A *reason* keeps it from being ready: whoever can should ask another one. A *warning* is something that somebody has to
see to although it serves. `/readyz` shows both as lines that `roles.words` makes, and names their codes beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from juicebox_hsm.host.certificates import is_due, is_valid
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.group import Groups
from juicebox_hsm.host.outbox import Unpublished
from juicebox_hsm.host.routing import RoutingTable
from juicebox_hsm.host.served_realms import ServedRealms
from juicebox_hsm.ids import GroupId, OwnedRange, RealmId, uncovered
from juicebox_hsm.wire.rpc import LogBehind, StoreDamage

REASONS: Final = "x-reasons"
WARNINGS: Final = "x-warnings"

REFRESHES_MISSED_MAX: Final = 10
"""Secrets that could not be read again for so many refresh intervals may hold keys that were revoked since."""


@dataclass(frozen=True, slots=True)
class Plain:
    """A reason that its code says in full."""

    code: Code


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something that fails and is tried again: `said` is what store or network said, `group` the one it is about."""

    code: Code
    said: str
    group: GroupId | None = None


@dataclass(frozen=True, slots=True)
class OtherStore:
    """The store lacks what our HSM captured in these logs: it is older, empty or another one."""

    logs: tuple[LogBehind, ...]
    code: ClassVar[Code] = Code.ANOTHER_STORE
    group: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class CopyAt:
    """Our HSM also answers at `url`."""

    url: str
    code: ClassVar[Code] = Code.HSM_TWICE


@dataclass(frozen=True, slots=True)
class DamageMet:
    """Something damaged was lately met in the store."""

    told: StoreDamage
    code: ClassVar[Code] = Code.STORE_DAMAGED


@dataclass(frozen=True, slots=True)
class Stalled:
    """A group cannot commit, since `alive` of its `members` answer its leader, or the store fails (`lacks_store`).
    That one says for how long already.

    A balancer names the realm instead, as it knows several.
    """

    group: GroupId
    range: OwnedRange | None
    alive: int
    members: int
    stalled_s: float | None = None
    realm: RealmId | None = None
    lacks_store: bool = False
    code: ClassVar[Code] = Code.CANNOT_COMMIT


@dataclass(frozen=True, slots=True)
class OfRealm:
    """A reason against serving a realm."""

    code: Code
    realm: RealmId


@dataclass(frozen=True, slots=True)
class Unserved:
    """Nobody leads the group of this part of a realm."""

    realm: RealmId
    range: OwnedRange
    code: ClassVar[Code] = Code.RANGE_UNSERVED


@dataclass(frozen=True, slots=True)
class SecretsOld:
    """The secrets were read `age_s` ago, which is too long."""

    age_s: float
    code: ClassVar[Code] = Code.SECRETS_STALE


@dataclass(frozen=True, slots=True)
class OwnClockOff:
    """Our clock is `ahead_s` ahead of the others', or behind when negative; `refuses`: so tokens are judged wrongly."""

    ahead_s: float
    refuses: bool = False
    code: ClassVar[Code] = Code.CLOCK


@dataclass(frozen=True, slots=True)
class OwnCertificateEnds:
    """Our cluster certificate ends, or ended, at `end_ms` (Unix ms), seen at `now_ms`."""

    end_ms: int
    now_ms: int
    code: ClassVar[Code] = Code.CERTIFICATE


@dataclass(frozen=True, slots=True)
class ShownCertificateNotValid:
    """No client accepts the certificate that we show: it is valid from `from_ms` to `end_ms` (Unix ms) only."""

    from_ms: int
    end_ms: int
    now_ms: int
    code: ClassVar[Code] = Code.CERTIFICATE_NOT_VALID


@dataclass(frozen=True, slots=True)
class EventsWait:
    """So many tenant events wait for publication that somebody should look."""

    waiting: Unpublished
    code: ClassVar[Code] = Code.OUTBOX


@dataclass(frozen=True, slots=True)
class EventsSetAside:
    """So many tenant events could not be recorded and are lost."""

    count: int
    code: ClassVar[Code] = Code.EVENTS_SET_ASIDE


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """The service did not say within `within_s` whether it is ready."""

    within_s: float
    code: ClassVar[Code] = Code.NO_ANSWER


Reason = (
    Plain
    | Trouble
    | OtherStore
    | CopyAt
    | DamageMet
    | Stalled
    | OfRealm
    | Unserved
    | SecretsOld
    | OwnClockOff
    | OwnCertificateEnds
    | ShownCertificateNotValid
    | EventsWait
    | EventsSetAside
    | NoAnswer
)


@dataclass(frozen=True, slots=True)
class Readiness:
    """Why a service is not ready, nothing when it is, and what it warns of, ready or not."""

    reasons: tuple[Reason, ...] = ()
    warnings: tuple[Reason, ...] = ()

    @property
    def is_ready(self) -> bool:
        """Tell whether clients and others should ask this service."""
        return not self.reasons


def code_headers(found: Readiness) -> dict[str, str]:
    """Return the headers of `/readyz` that name what its lines say: codes in their order, separated by commas."""
    told = {REASONS: found.reasons, WARNINGS: found.warnings}
    return {name: ",".join(reason.code.word for reason in listed) for name, listed in told.items() if listed}


class Troubles:
    """What is being tried again, one for each code and group."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, GroupId | None], Trouble | OtherStore] = {}

    def note(self, trouble: Trouble | OtherStore) -> bool:
        """Keep what happened last; tell whether this trouble is new."""
        key = (trouble.code.word, trouble.group)
        is_new = key not in self._held
        self._held[key] = trouble
        return is_new

    def clear(self, code: Code, group: GroupId | None = None) -> bool:
        """Forget trouble that is over; tell whether there was any."""
        return self._held.pop((code.word, group), None) is not None

    def __iter__(self) -> Iterator[Trouble | OtherStore]:
        """Go through them by code and group."""
        return iter([held for _, held in sorted(self._held.items(), key=lambda item: (item[0][0], item[0][1] or b""))])

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._held)


def of_groups(groups: Groups, now_s: float) -> Iterator[Reason]:
    """Yield what is wrong with the groups that an agent leads."""
    for group in groups:
        leader = group.leader
        if leader is None:
            continue
        last = leader.last_appended
        owned = None if last is None or last.partition is None else last.partition.range
        quorum = leader.quorum(now_s)
        if quorum.stalled_s is not None:
            lacks_store = quorum.lacks_store
            yield Stalled(group.group, owned, quorum.alive, quorum.members, quorum.stalled_s, lacks_store=lacks_store)


def of_outbox(waiting: Unpublished, set_aside: int) -> tuple[Reason, ...]:
    """Return what an agent warns of its outbox."""
    wait = (EventsWait(waiting),) if waiting.is_long else ()
    return (*wait, *((EventsSetAside(set_aside),) if set_aside else ()))


def of_certificate(end_ms: int | None, now_ms: int) -> tuple[Reason, ...]:
    """Return the warning of a cluster certificate that ends soon, nothing without one."""
    return (OwnCertificateEnds(end_ms, now_ms),) if end_ms is not None and is_due(end_ms, now_ms) else ()


def of_shown_certificate(from_ms: int, end_ms: int, now_ms: int) -> tuple[Reason, ...]:
    """Return the reason against a service whose clients see a certificate that is not valid now."""
    return () if is_valid(from_ms, end_ms, now_ms) else (ShownCertificateNotValid(from_ms, end_ms, now_ms),)


def of_secrets(age_s: float, refresh_s: float) -> tuple[Reason, ...]:
    """Return the reason against secrets that were read too long ago, by the interval at which they are read."""
    return (SecretsOld(age_s),) if age_s > REFRESHES_MISSED_MAX * refresh_s else ()


def of_routes(table: RoutingTable, served: ServedRealms) -> list[Reason]:
    """Return why a balancer can serve no realm in full, nothing as soon as it can serve one."""
    if not table.realms:
        return [Plain(Code.NO_REALMS)]
    reasons: list[Reason] = []
    for realm in sorted(table.realms):
        found = [*_unserved(table, realm)]
        if realm in served.refused:
            found.append(OfRealm(Code.RECORD_ID_KEY, realm))
        elif realm not in served.allowed:
            found.append(OfRealm(Code.RECORD_ID_KEY_UNCHECKED, realm))
        if not found:
            return []
        reasons += found
    return reasons


def _unserved(table: RoutingTable, realm: RealmId) -> Iterator[Reason]:
    """Yield why parts of a realm are not served: their leaders cannot commit, or there are none."""
    stalled = dict.fromkeys(route for gap in table.gaps(realm) for route in table.stalled_in(realm, gap))
    for route in stalled:
        if route.stall is not None:
            stall = route.stall
            yield Stalled(
                route.group, route.range, stall.alive, stall.members, realm=realm, lacks_store=stall.lacks_store
            )
    known = [route.range for route in (*table.realms[realm], *stalled)]
    for gap in uncovered(known):
        yield Unserved(realm, gap)
