"""How recorded tenant events leave: which are handed over together, how long they stay, and who does it (agent.md 11).

One agent of a realm holds the dispatcher's lease. For each tenant it hands events to the bus in their order, writes
what they mean for accounting, and moves the cursor over them; what was published is removed when its time is over.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.clocks import DAY_MS
from juicebox_hsm.host.cluster.leases import LEASE_MS
from juicebox_hsm.host.events import AccountingEvent, EventKind, OutboxEvent, TenantCursor
from juicebox_hsm.host.services import Lease
from juicebox_hsm.ids import RealmId

LATE_MS: Final = 3_600_000
"""Own: events published within this time of their own keep the usual date of removal, which has this much to spare."""
RENEW_S: Final = LEASE_MS / 1000 - 1.0
"""The lease is renewed when less than a second of it is left."""
ASK_AGAIN_S: Final = 1.0
"""Between two looks at a lease that another agent holds."""


def kept_name(realm: RealmId) -> str:
    """Return the setting that says how long events stay, in ms; without it they stay 7 days."""
    return f"outbox/kept/{realm.hex()}"


def late_name(realm: RealmId) -> str:
    """Return the setting that remembers late publication."""
    return f"outbox/late/{realm.hex()}"


def lease_name(realm: RealmId) -> str:
    """Return the name of the lease that the realm's dispatcher holds."""
    return f"{realm.hex()}-outbox"


class BusTrouble(RealmError):
    """Events could not be published; the store is not to blame."""


def graver(one: RealmError | None, other: RealmError) -> RealmError:
    """Return which trouble of a round is told: the last one, but one with the store before one with the bus."""
    return one if one is not None and isinstance(other, BusTrouble) else other


def waiting(cursors: Iterable[TenantCursor]) -> list[TenantCursor]:
    """Return the tenants with something to publish."""
    return [cursor for cursor in cursors if cursor.published < cursor.tail]


class Stuck:
    """Tenants whose events the bus would not take. Each is told of until its events have moved, whoever moved them.

    A publication may take longer than the lease, so another agent is likely to have it by the time it has failed: that
    we do nothing then does not mean that all is well.
    """

    def __init__(self) -> None:
        self._published: dict[tuple[RealmId, str], int] = {}

    def failed(self, realm: RealmId, cursor: TenantCursor) -> None:
        """Note that the bus took nothing behind this cursor."""
        self._published[realm, cursor.tenant] = cursor.published

    def look(self, realm: RealmId, cursors: Iterable[TenantCursor]) -> None:
        """Forget the tenants of a realm whose events have moved, or all did."""
        still = {(realm, cursor.tenant): cursor.published for cursor in waiting(cursors)}
        self._published = {
            key: published
            for key, published in self._published.items()
            if key[0] != realm or still.get(key) == published
        }

    def __bool__(self) -> bool:
        """Tell whether there are any."""
        return bool(self._published)


@dataclass(frozen=True, slots=True)
class DayRun:
    """Rows of one tenant and one UTC day (`YYYYMMDD`), over which the cursor moves at once, up to `through`."""

    day: str
    through: int
    accounting: Sequence[AccountingEvent]
    counts: Mapping[EventKind, int]


def utc_day(when_ms: int) -> str:
    """Return the UTC day of a moment (Unix ms) as `YYYYMMDD`.

    Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`: years begin in March, so
    that the leap day is their last, and 400 of them have 146,097 days.
    """
    days = when_ms // DAY_MS + 719_468
    era, day_of_era = divmod(days, 146_097)
    year_of_era = (day_of_era - day_of_era // 1460 + day_of_era // 36_524 - day_of_era // 146_096) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    march_month = (5 * day_of_year + 2) // 153
    day = day_of_year - (153 * march_month + 2) // 5 + 1
    month = march_month + 3 if march_month < 10 else march_month - 9
    year = year_of_era + 400 * era + (month <= 2)
    return f"{year:04}{month:02}{day:02}"


def day_runs(tenant: str, page: Iterable[OutboxEvent]) -> Iterator[DayRun]:
    """Split a page into runs of rows of one UTC day, in order, also if a clock went back in between."""
    rows: list[OutboxEvent] = []
    day = ""
    for row in page:
        own = utc_day(row.new.when_ms)
        if rows and own != day:
            yield _run(tenant, day, rows)
            rows = []
        day = own
        rows.append(row)
    if rows:
        yield _run(tenant, day, rows)


def _run(tenant: str, day: str, rows: Sequence[OutboxEvent]) -> DayRun:
    accounting = [
        AccountingEvent(tenant, row.new.record_id, row.seq, row.new.when_ms, row.new.accounting == "registered")
        for row in rows
        if row.new.accounting is not None
    ]
    return DayRun(day, rows[-1].seq, accounting, Counter(row.new.kind for row in rows))


# --- how long events stay ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Late:
    """Events were published late: the oldest was of `oldest_ms`, the last at `published_ms` (Unix ms)."""

    oldest_ms: int
    published_ms: int

    @staticmethod
    def decode(value: bytes | None) -> Late | None:
        """Read the setting, None when there is none."""
        return None if value is None else Late(*map(int, value.split()))

    def encode(self) -> bytes:
        """Return the setting's value."""
        return f"{self.oldest_ms} {self.published_ms}".encode()

    def counts_at(self, now_ms: int, kept_ms: int) -> bool:
        """Tell whether readers still have time that late publication gave them."""
        return now_ms < self.published_ms + kept_ms


def late_with(known: Late | None, oldest_ms: int, now_ms: int, kept_ms: int) -> Late | None:
    """Return what to remember when events, the oldest of `oldest_ms`, are published now; None when in time.

    Readers have their time from now, not from then.
    """
    if now_ms - oldest_ms < LATE_MS:
        return None
    if known is not None and known.counts_at(now_ms, kept_ms):
        oldest_ms = min(oldest_ms, known.oldest_ms)
    return Late(oldest_ms, now_ms)


def removal_ms(known: Late | None, now_ms: int, kept_ms: int) -> int:
    """Return the time by which the age of events is judged."""
    if known is not None and known.counts_at(now_ms, kept_ms):
        return min(now_ms - LATE_MS, known.oldest_ms + kept_ms - 1)
    return now_ms - LATE_MS


# --- who does it ---------------------------------------------------------------------------------------


class Due(enum.Enum):
    """What is to be done about the lease before a page is published."""

    HELD = enum.auto()
    EXTEND = enum.auto()
    OBTAIN = enum.auto()
    LATER = enum.auto()
    """Another agent holds it, or did a moment ago."""


class Tenure:
    """The lease as its dispatcher sees it. Moments are in s on a monotonic clock: the other one may be set."""

    def __init__(self) -> None:
        self.lease: Lease | None = None
        self._renew_s = self._ask_again_s = 0.0

    def due(self, name: str, now_s: float) -> Due:
        """Tell what is due for the lease `name`."""
        if self.lease is not None and self.lease.name == name:
            return Due.HELD if now_s < self._renew_s else Due.EXTEND
        return Due.OBTAIN if now_s >= self._ask_again_s else Due.LATER

    def extended(self, lease: Lease | None, sent_s: float) -> None:
        """Take the answer to an extension asked for at `sent_s`; None when the lease was lost."""
        self.lease = lease
        self._renew_s = sent_s + RENEW_S

    def obtained(self, lease: Lease | None, sent_s: float) -> None:
        """Take the answer to the wish for the lease; None when another holds it."""
        self.extended(lease, sent_s)
        if lease is None:
            self._ask_again_s = sent_s + ASK_AGAIN_S

    def given_back(self) -> Lease | None:
        """Let go of the lease; returns it if there was one."""
        lease, self.lease = self.lease, None
        return lease
