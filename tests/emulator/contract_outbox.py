"""Contract of the store's ports: outbox and accounting."""

from __future__ import annotations

from collections.abc import Mapping

import trio

from juicebox_hsm.host.events import AccountingEvent, Backlog, EventKind, OutboxEvent, TenantCursor
from juicebox_hsm.ids import RecordId
from juicebox_hsm.ports.store import Store
from tests.emulator.contract import Backend
from tests.emulator.realm_data import GROUP, OTHER_GROUP, REALM, event

DAY_MS = 86_400_000
NOW_MS = 1_700_000_000_000
BODY: Mapping[str, str | int] = {"event": "guess_used", "num_guesses": 5, "guess_count": 1}


class OutboxContract:
    """`ports.EventOutbox`."""

    async def test_sequences_are_dense_per_tenant(self, store: Store) -> None:
        """Each tenant's events are numbered 1, 2, 3 in the order recorded, whatever other tenants do."""
        tails = await store.outbox.record(REALM, [event(1), event(2, "b"), event(3)], {})
        assert tails == {"acme": 2, "b": 1}
        assert await store.outbox.record(REALM, [event(4, body=dict(BODY))], {}) == {"acme": 3}
        assert await store.outbox.read(REALM, "acme", 0, 10) == [
            OutboxEvent(1, event(1)),
            OutboxEvent(2, event(3)),
            OutboxEvent(3, event(4, body=dict(BODY))),
        ]
        assert [row.seq for row in await store.outbox.read(REALM, "acme", 1, 1)] == [2]
        assert await store.outbox.read(REALM, "acme", 3, 10) == []
        assert await store.outbox.read(REALM, "unknown", 0, 10) == []
        assert await store.outbox.cursors(REALM) == [TenantCursor("acme", 0, 3), TenantCursor("b", 0, 1)]

    async def test_concurrent_records_stay_dense(self, backend: Backend, store: Store) -> None:
        """Two writers with many tasks each leave no gap and no duplicate, and each learns its true tail."""
        tails: list[int] = []

        async def write(writer: Store, number: int) -> None:
            events = [event(number * 10 + at) for at in range(1 + number % 3)]
            tails.append((await writer.outbox.record(REALM, events, {}))["acme"])

        async with backend.open() as second, trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(write, (store, second)[number % 2], number)
        rows = await store.outbox.read(REALM, "acme", 0, 1000)
        assert [row.seq for row in rows] == list(range(1, 121))
        assert len({row.new.index for row in rows}) == 120
        assert len(set(tails)) == 60
        assert max(tails) == 120

    async def test_settled_only_rises(self, store: Store) -> None:
        """A settled index is per group, starts at 0 and never goes back."""
        assert await store.outbox.settled(REALM, GROUP) == 0
        assert await store.outbox.record(REALM, [], {GROUP: 5, OTHER_GROUP: 2}) == {}
        await store.outbox.record(REALM, [event(6)], {GROUP: 3})
        assert await store.outbox.settled(REALM, GROUP) == 5
        assert await store.outbox.settled(REALM, OTHER_GROUP) == 2

    async def test_advance_counts_exactly_once(self, store: Store) -> None:
        """The cursor moves only from where it is, and the counters only with it."""
        await store.outbox.record(REALM, [event(number) for number in range(1, 6)], {})
        counts = {EventKind.RECOVER2: 2, EventKind.UNKNOWN: 1}
        assert await store.outbox.advance(REALM, "acme", 0, 3, "20231114", counts)
        assert not await store.outbox.advance(REALM, "acme", 0, 3, "20231114", counts)
        assert not await store.outbox.advance(REALM, "acme", 2, 4, "20231114", counts)
        assert not await store.outbox.advance(REALM, "nobody", 0, 1, "20231114", counts)
        assert await store.outbox.advance(REALM, "acme", 3, 5, "20231114", {EventKind.RECOVER2: 2})
        assert await store.outbox.advance(REALM, "acme", 5, 5, "20231115", {EventKind.DELETE: 1})
        assert await store.outbox.cursors(REALM) == [TenantCursor("acme", 5, 5)]
        assert await store.outbox.counters(REALM, "acme") == {
            "20231114": {EventKind.RECOVER2: 4, EventKind.UNKNOWN: 1},
            "20231115": {EventKind.DELETE: 1},
        }
        assert await store.outbox.counters(REALM, "nobody") == {}

    async def test_racing_dispatchers(self, backend: Backend, store: Store) -> None:
        """Of two dispatchers that advance over the same rows one wins, so billing counts each request once."""
        await store.outbox.record(REALM, [event(number) for number in range(1, 11)], {})
        moved: list[bool] = []

        async def dispatch(own: Store) -> None:
            for at in range(10):
                won = await own.outbox.advance(REALM, "acme", at, at + 1, "20231114", {EventKind.RECOVER2: 1})
                moved.append(won)

        async with backend.open() as second, trio.open_nursery() as nursery:
            nursery.start_soon(dispatch, store)
            nursery.start_soon(dispatch, second)
        assert sum(moved) == 10
        assert await store.outbox.counters(REALM, "acme") == {"20231114": {EventKind.RECOVER2: 10}}

    async def test_backlog(self, store: Store) -> None:
        """The backlog counts unpublished rows of all tenants and knows the oldest."""
        assert await store.outbox.backlog(REALM) == Backlog(0, None)
        await store.outbox.record(REALM, [event(1, when_ms=500), event(2, when_ms=400), event(3, "b", when_ms=450)], {})
        assert await store.outbox.backlog(REALM) == Backlog(3, 450)
        await store.outbox.advance(REALM, "b", 0, 1, "20231114", {})
        assert await store.outbox.backlog(REALM) == Backlog(2, 500)
        await store.outbox.advance(REALM, "acme", 0, 2, "20231114", {})
        assert await store.outbox.backlog(REALM) == Backlog(0, None)

    async def test_removal(self, store: Store) -> None:
        """Only published and settled rows go, those with an event after 7 days; the sequence goes on after them."""
        rows = [
            event(1, when_ms=NOW_MS),
            event(2, body=dict(BODY), when_ms=NOW_MS),
            event(3, when_ms=NOW_MS),
            event(4, when_ms=NOW_MS),
            event(5, when_ms=NOW_MS),
        ]
        await store.outbox.record(REALM, rows, {})
        assert await store.outbox.remove_published(REALM, NOW_MS, 100) == 0, "nothing is published"
        await store.outbox.advance(REALM, "acme", 0, 3, "20231114", {})
        assert await store.outbox.remove_published(REALM, NOW_MS, 100) == 0, "nothing is settled"
        await store.outbox.record(REALM, [], {GROUP: 2})
        assert await store.outbox.remove_published(REALM, NOW_MS + 7 * DAY_MS - 1, 100) == 1
        assert [row.seq for row in await store.outbox.read(REALM, "acme", 0, 9)] == [2, 3, 4, 5]
        await store.outbox.record(REALM, [], {GROUP: 5})
        assert await store.outbox.remove_published(REALM, NOW_MS + 7 * DAY_MS, 1) == 1
        assert await store.outbox.remove_published(REALM, NOW_MS + 7 * DAY_MS, 100) == 1
        assert [row.seq for row in await store.outbox.read(REALM, "acme", 0, 9)] == [4, 5]
        assert await store.outbox.record(REALM, [event(6)], {}) == {"acme": 6}

    async def test_removal_by_any_age(self, store: Store) -> None:
        """Rows with an event stay as long as the caller says, also when it says less the next time."""
        rows = [event(number, body=dict(BODY), when_ms=NOW_MS + number * DAY_MS) for number in range(4)]
        await store.outbox.record(REALM, [*rows, event(9, when_ms=NOW_MS)], {GROUP: 9})
        await store.outbox.advance(REALM, "acme", 0, 5, "20231114", {})
        now_ms = NOW_MS + 31 * DAY_MS
        for kept_days, left in ((40, [1, 2, 3, 4]), (31, [2, 3, 4]), (40, [2, 3, 4]), (29, [4]), (7, [])):
            await store.outbox.remove_published(REALM, now_ms, 100, kept_ms=kept_days * DAY_MS)
            assert [row.seq for row in await store.outbox.read(REALM, "acme", 0, 9) if row.seq < 5] == left

    async def test_removal_spares_an_unsettled_group(self, store: Store) -> None:
        """A group that lags behind keeps its own rows without holding up those of others."""
        await store.outbox.record(
            REALM, [event(1, group=OTHER_GROUP), event(2), event(3, group=OTHER_GROUP)], {GROUP: 9}
        )
        await store.outbox.record(REALM, [event(4)], {})
        await store.outbox.advance(REALM, "acme", 0, 4, "20231114", {})
        await store.outbox.remove_published(REALM, NOW_MS, 100)
        left = [row.new.index for row in await store.outbox.read(REALM, "acme", 0, 9)]
        assert left[:2] == [1, 3]
        assert 2 not in left


class AccountingContract:
    """`ports.Accounting`."""

    async def test_counts_across_days(self, store: Store) -> None:
        """A user counts if registered at any time of the period: before and kept, within, or deleted within."""
        day = 19_000 * DAY_MS

        def at(days: float) -> int:
            return day + int(days * DAY_MS)

        before, within, deleted_before, deleted_within, after = (RecordId(bytes([n]) * 32) for n in range(5))
        await store.accounting.write(
            REALM,
            [
                AccountingEvent("t", before, 1, at(-50), True),
                AccountingEvent("t", deleted_before, 2, at(-9), True),
                AccountingEvent("t", deleted_within, 3, at(-9), True),
                AccountingEvent("t", deleted_before, 4, at(-1), False),
                AccountingEvent("t", deleted_within, 5, at(0.1), False),
                AccountingEvent("t", within, 6, at(1.5), True),
                AccountingEvent("t", after, 7, at(2), True),
                AccountingEvent("u", after, 1, at(1), True),
            ],
        )
        assert await store.accounting.count_users(REALM, at(0), at(2)) == {"t": 3, "u": 1}
        assert await store.accounting.count_users(REALM, at(2), at(3)) == {"t": 3, "u": 1}
        assert await store.accounting.count_users(REALM, at(-100), at(-60)) == {}

    async def test_the_last_event_of_a_day_counts(self, store: Store) -> None:
        """Of several events of one record and day the highest number decides, in whatever order and however often
        they are written: clocks of different agents, repeats and late writers change nothing."""
        day, record = 19_000 * DAY_MS, RecordId(b"\x01" * 32)
        turn = DAY_MS - 1
        events = [
            AccountingEvent("t", record, seq, day + 9_000 - place * 1_000, place % 2 == 0)
            for place, seq in enumerate((1, 7, 8, turn, turn + 1, turn + 5, 3 * turn, 2**40))
        ]
        for last in range(1, len(events) + 1):
            for order in (events[:last], events[last - 1 :: -1], events[:last:2], [events[0]]):
                for event_ in order:
                    await store.accounting.write(REALM, [event_])
                await store.accounting.write(REALM, order)
            users = {"t": 1} if events[last - 1].registered else {}
            assert await store.accounting.count_users(REALM, day + DAY_MS, day + 2 * DAY_MS) == users
            assert await store.accounting.count_users(REALM, day, day + DAY_MS) == {"t": 1}
            assert await store.accounting.count_users(REALM, day - DAY_MS, day) == {}
