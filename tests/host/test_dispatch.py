"""How tenant events leave: runs of a day, how long they stay, whose lease it is, which trouble is told."""

from __future__ import annotations

import datetime as dt

from hypothesis import example, given
from hypothesis import strategies as st

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.leases import LEASE_MS
from juicebox_hsm.host.dispatch import (
    ASK_AGAIN_S,
    LATE_MS,
    BusTrouble,
    Due,
    Late,
    Stuck,
    Tenure,
    day_runs,
    graver,
    late_with,
    removal_ms,
    utc_day,
    waiting,
)
from juicebox_hsm.host.events import AccountingEvent, EventKind, NewEvent, OutboxEvent, TenantCursor
from juicebox_hsm.host.services import Lease
from juicebox_hsm.ids import GroupId, RealmId, RecordId

DAY_MS = 86_400_000
KEPT_MS = 7 * DAY_MS
GROUP, RECORD = GroupId(b"g" * 16), RecordId(bytes(32))


def row(seq: int, when_ms: int, accounting: str | None = None) -> OutboxEvent:
    new = NewEvent("acme", GROUP, seq, bytes(32), RECORD, "u", EventKind.DELETE, None, accounting, when_ms)
    return OutboxEvent(seq, new)


@given(st.datetimes(min_value=dt.datetime(1970, 1, 1), max_value=dt.datetime(9999, 12, 31)))  # noqa: DTZ001 - UTC below
@example(dt.datetime(2000, 2, 29, 23, 59, 59, 999_000))  # noqa: DTZ001 - UTC below
@example(dt.datetime(2100, 3, 1))  # noqa: DTZ001 - UTC below
def test_days_are_those_of_the_calendar(moment: dt.datetime) -> None:
    """The day of every moment is the one that the standard library says."""
    utc = moment.replace(tzinfo=dt.UTC, microsecond=moment.microsecond // 1000 * 1000)
    assert utc_day(round(utc.timestamp() * 1000)) == utc.strftime("%Y%m%d").rjust(8, "0")


def test_counters_are_cut_at_midnight() -> None:
    """Rows of one cursor move belong to one UTC day; order is kept even if clocks went back."""
    midnight = 1_700_006_400_000
    rows = [row(1, midnight - 1), row(2, midnight), row(3, midnight + 1, "registered"), row(4, midnight - 1)]
    runs = list(day_runs("acme", rows))
    assert [(run.day, run.through) for run in runs] == [("20231114", 1), ("20231115", 3), ("20231114", 4)]
    assert [run.counts for run in runs] == [{EventKind.DELETE: 1}, {EventKind.DELETE: 2}, {EventKind.DELETE: 1}]
    assert [list(run.accounting) for run in runs] == [
        [],
        [AccountingEvent("acme", RECORD, 3, midnight + 1, registered=True)],
        [],
    ]
    assert list(day_runs("acme", [])) == []


def test_trouble_with_the_store_is_told_before_the_buss() -> None:
    """A round tells one trouble: its last with the store, or its last with the bus if the store was well."""
    bus, later_bus, store, later_store = BusTrouble("a"), BusTrouble("b"), RealmError("c"), RealmError("d")
    assert graver(None, bus) is bus
    assert graver(store, bus) is store
    assert graver(bus, store) is store
    assert graver(store, later_store) is later_store
    assert graver(graver(None, bus), later_bus) is bus, "of one kind the first with the bus stands"
    assert waiting([TenantCursor("a", 3, 3), TenantCursor("b", 2, 3)]) == [TenantCursor("b", 2, 3)]


def test_a_tenant_is_stuck_until_its_events_move() -> None:
    """Whoever moves them; that somebody else tries, or nothing is done, ends nothing. Realms do not mix."""
    one, other = RealmId(b"r" * 16), RealmId(b"s" * 16)
    stuck = Stuck()
    assert not stuck
    stuck.failed(one, TenantCursor("a", 2, 3))
    stuck.look(other, [])
    stuck.look(one, [TenantCursor("a", 2, 9), TenantCursor("b", 1, 1)])
    assert stuck, "more waits, and nothing has moved"
    stuck.look(one, [TenantCursor("a", 3, 9)])
    assert not stuck
    stuck.failed(one, TenantCursor("a", 3, 9))
    stuck.look(one, [TenantCursor("a", 9, 9)])
    assert not stuck


def test_late_events_keep_readers_their_time() -> None:
    """Events published late stay as long after publication as others; later ones never shorten it."""
    now_ms = 100 * DAY_MS
    assert late_with(None, now_ms - LATE_MS + 1, now_ms, KEPT_MS) is None
    first = late_with(None, now_ms - 10 * DAY_MS, now_ms, KEPT_MS)
    assert first == Late(now_ms - 10 * DAY_MS, now_ms)
    assert Late.decode(first.encode()) == first
    assert Late.decode(None) is None
    again_ms = now_ms + DAY_MS
    assert late_with(first, again_ms - 2 * DAY_MS, again_ms, KEPT_MS) == Late(first.oldest_ms, again_ms)
    assert removal_ms(None, now_ms, KEPT_MS) == now_ms - LATE_MS
    last_ms = now_ms + KEPT_MS - 1
    assert removal_ms(first, last_ms, KEPT_MS) - KEPT_MS < first.oldest_ms, "its events are not old enough yet"
    over_ms = now_ms + KEPT_MS
    assert removal_ms(first, over_ms, KEPT_MS) == over_ms - LATE_MS
    fresh = late_with(first, over_ms - 2 * DAY_MS, over_ms, KEPT_MS)
    assert fresh == Late(over_ms - 2 * DAY_MS, over_ms), "what is over no longer counts"


@given(st.lists(st.tuples(st.floats(0.0, 1.0), st.booleans()), max_size=30))
def test_a_lease_is_relied_on_while_it_stands(steps: list[tuple[float, bool]]) -> None:
    """Whatever the store answers and when, nothing is published later than a lease's time after the last grant."""
    tenure, now_s, granted_s = Tenure(), 0.0, float("-inf")
    lease = Lease("r-outbox", "a", "0" * 32, 0)
    for passed_s, grants in steps:
        now_s += passed_s
        for _ in range(3):
            match tenure.due(lease.name, now_s):
                case Due.HELD:
                    assert now_s < granted_s + LEASE_MS / 1000
                    break
                case Due.LATER:
                    assert tenure.lease is None
                    break
                case Due.EXTEND:
                    tenure.extended(lease if grants else None, now_s)
                case Due.OBTAIN:
                    tenure.obtained(lease if grants else None, now_s)
            granted_s = now_s if grants else granted_s


def test_a_refused_lease_is_asked_for_again_a_second_later() -> None:
    """Another's lease costs the store a look a second; a lost one is asked for at once; another realm's is none."""
    tenure = Tenure()
    lease = Lease("r-outbox", "a", "0" * 32, 0)
    assert tenure.due("r-outbox", 5.0) is Due.OBTAIN
    tenure.obtained(None, 5.0)
    assert tenure.due("r-outbox", 5.0 + ASK_AGAIN_S - 0.1) is Due.LATER
    assert tenure.due("r-outbox", 5.0 + ASK_AGAIN_S) is Due.OBTAIN
    tenure.obtained(lease, 6.0)
    assert tenure.due("r-outbox", 6.1) is Due.HELD
    assert tenure.due("other-outbox", 6.1) is Due.OBTAIN
    assert tenure.due("r-outbox", 8.0) is Due.EXTEND
    tenure.extended(None, 8.0)
    assert tenure.due("r-outbox", 8.0) is Due.OBTAIN
    tenure.obtained(lease, 8.0)
    assert tenure.given_back() == lease
    assert tenure.given_back() is None
