"""What a verdict found: a code and the facts that go with it, of which `roles.words` makes a sentence.

Texts in a finding are what a service or the network said. They are shown and never read.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

from juicebox_hsm.host.cluster.view import GroupKey
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ids import GroupId, HsmId, OwnedRange, RealmId
from juicebox_hsm.wire.rpc import Direction, LogBehind, StoreDamage


class Certificate(enum.Enum):
    """Whose certificate it is."""

    AGENT = "agent"
    MANAGER = "manager"
    LOAD_BALANCER = "load balancer"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Fact:
    """A reason about the cluster as a whole: the code says it all."""

    code: Code


@dataclass(frozen=True, slots=True)
class OfService:
    """A reason about the service at `url`; `said` is what it said itself, or why it could not be asked.

    Of one that says that it is not ready, `because` is the code of its own reason.
    """

    code: Code
    url: str
    said: str = ""
    because: Code | None = None


@dataclass(frozen=True, slots=True)
class HsmTwice:
    """One HSM answers at all of these addresses, from different processes: all but one run a copy."""

    hsm: HsmId
    urls: tuple[str, ...]
    code: ClassVar[Code] = Code.HSM_TWICE


@dataclass(frozen=True, slots=True)
class OutboxLate:
    """An agent's events do not leave: `backlog` of them, the oldest waiting for `oldest_s`."""

    url: str
    backlog: int
    oldest_s: float
    code: ClassVar[Code] = Code.OUTBOX


@dataclass(frozen=True, slots=True)
class CertificateEnds:
    """A certificate ends soon, or ended, at `end_ms`; `remaining_days` is negative then. No `url`: the operator's."""

    whose: Certificate
    url: str
    end_ms: int
    remaining_days: float
    code: ClassVar[Code] = Code.CERTIFICATE


@dataclass(frozen=True, slots=True)
class AnotherStore:
    """The store cannot be the one that an agent's HSM knows: it lacks what that HSM captured."""

    url: str
    told: LogBehind
    code: ClassVar[Code] = Code.ANOTHER_STORE


@dataclass(frozen=True, slots=True)
class ClockOff:
    """A wall clock is `ahead_s` ahead of most others, or behind when negative. No `kind`: that of whoever judges."""

    kind: ServiceKind | None
    url: str
    ahead_s: float
    code: ClassVar[Code] = Code.CLOCK


@dataclass(frozen=True, slots=True)
class VersionsDiffer:
    """Services run different versions: for each, by name, how many of which kind run it."""

    running: tuple[tuple[str, tuple[tuple[ServiceKind, int], ...]], ...]
    code: ClassVar[Code] = Code.VERSIONS


@dataclass(frozen=True, slots=True)
class OfRange:
    """A reason about a part of a realm's key space."""

    code: Code
    realm: RealmId
    range: OwnedRange


@dataclass(frozen=True, slots=True)
class Damaged:
    """Something in the store is damaged; the agent at `url` met it, others may have."""

    url: str
    told: StoreDamage
    code: ClassVar[Code] = Code.STORE_DAMAGED


@dataclass(frozen=True, slots=True)
class OfGroup:
    """A reason about a group; `missing` are members that do not answer, of an ended group those that still know it."""

    code: Code
    group: GroupKey
    missing: tuple[HsmId, ...] = ()


@dataclass(frozen=True, slots=True)
class CannotCommit:
    """The leader at `url` says that it could not commit for `stalled_s`: `alive` of its group's `members` answer it.

    `lacks_store`: because the store fails.
    """

    group: GroupKey
    range: OwnedRange | None
    url: str
    alive: int
    members: int
    stalled_s: float
    lacks_store: bool = False
    code: ClassVar[Code] = Code.CANNOT_COMMIT


@dataclass(frozen=True, slots=True)
class FewMembers:
    """A group serves with `size` members: more would be wise, or are to be had (`TOO_FEW_MEMBERS`)."""

    code: Code
    group: GroupKey
    size: int

    @property
    def tolerated(self) -> int:
        """Return how many members may be lost."""
        return (self.size - 1) // 2


@dataclass(frozen=True, slots=True)
class Moving:
    """A pending transfer of a group as its leader shows it: from or to `peer`, since index `at`."""

    direction: Direction
    peer: GroupId
    at: int


@dataclass(frozen=True, slots=True)
class TransferPending:
    """A transfer is not finished; `age_s` is how long managers have seen it, None if no manager answers."""

    code: Code
    group: GroupKey
    moving: Moving
    age_s: float | None


@dataclass(frozen=True, slots=True)
class MemberBehind:
    """A member is too many entries behind its leader to take over."""

    group: GroupKey
    hsm: HsmId
    entries: int
    code: ClassVar[Code] = Code.MEMBER_BEHIND


@dataclass(frozen=True, slots=True)
class Drained:
    """An operator took an HSM out of leadership."""

    hsm: HsmId
    code: ClassVar[Code] = Code.HSM_DRAINED


Finding = (
    Fact
    | OfService
    | HsmTwice
    | OutboxLate
    | CertificateEnds
    | AnotherStore
    | Damaged
    | ClockOff
    | VersionsDiffer
    | OfRange
    | OfGroup
    | CannotCommit
    | FewMembers
    | TransferPending
    | MemberBehind
    | Drained
)
