"""Contract of the tenants' event bus: what a tenant sees of published events."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from juicebox_hsm.host.events import EventKind, NewEvent
from juicebox_hsm.ports.event_bus import BusEvent, EventBus, InvalidAcks
from juicebox_hsm.ports.store import Store
from tests.emulator.contract import Backend
from tests.emulator.realm_data import GROUP, REALM, event
from tests.patience import HANGS_S

PULL_S = 5.0
GUESS: dict[str, str | int] = {"event": "guess_used", "num_guesses": 5, "guess_count": 1}


def _bus(store: Store) -> EventBus:
    assert store.bus is not None
    return store.bus


def user_event(number: int, user: int, tenant: str = "acme") -> NewEvent:
    """Return an event of one of several users."""
    made = event(number, tenant, body=dict(GUESS))
    return NewEvent(
        made.tenant, made.group, made.index, made.mac, made.record_id, f"{user:064x}", made.kind, made.event,
        made.accounting, made.when_ms,
    )  # fmt: skip


async def publish(store: Store, events: list[NewEvent], tenant: str = "acme") -> None:
    """Record events and publish all of the tenant's rows, as the dispatcher does."""
    await store.outbox.record(REALM, events, {})
    cursor = next(each for each in await store.outbox.cursors(REALM) if each.tenant == tenant)
    rows = await store.outbox.read(REALM, tenant, cursor.published, 1000)
    await _bus(store).publish(REALM, tenant, [row for row in rows if row.new.event is not None])
    counts = {EventKind.RECOVER2: len(rows)}
    assert await store.outbox.advance(REALM, tenant, cursor.published, cursor.tail, "20231114", counts)


async def pull(store: Store, count: int, tenant: str = "acme") -> list[BusEvent]:
    """Pull until `count` events came; a bus may answer with fewer than asked for."""
    found: list[BusEvent] = []
    while len(found) < count:
        page = await _bus(store).pull(REALM, tenant, count - len(found), PULL_S)
        assert page, "the bus holds back events"
        found += page
    return found


class BusContract:
    """`event_bus.EventBus`.

    `orders_users` tells whether events of different users come in sequence order, too, which nobody is promised.
    """

    orders_users = True
    redelivery_s = 0.0  # how long another reader waits for what is out

    def seqs(self, events: list[BusEvent]) -> list[int]:
        """Return sequence numbers in the order of delivery as far as the bus keeps it."""
        found = [each.seq for each in events]
        return found if self.orders_users else sorted(found)

    async def test_only_published_events_with_a_body(self, store: Store) -> None:
        """Rows without an event and rows that wait for the dispatcher are not delivered; the fields are the row's."""
        await publish(store, [event(1), event(2, body=dict(GUESS)), event(3)])
        await store.outbox.record(REALM, [event(4, body={"event": "deleted"})], {})
        (only,) = await pull(store, 1)
        assert (only.seq, only.ref, only.user) == (2, f"{GROUP.hex()}:2", f"{2:064x}")
        assert dict(only.body) == GUESS
        assert only.when_ms == 1_700_000_000_000
        assert await _bus(store).pull(REALM, "acme", 10, 0) == []
        assert await _bus(store).pull(REALM, "nobody", 10, 0) == []

    async def test_in_order_and_no_more_than_asked(self, store: Store) -> None:
        """Events come page by page, each once while its delivery is out, in sequence order where that is kept."""
        await publish(store, [user_event(number, number) for number in range(1, 8)])
        first, second = await pull(store, 3), await pull(store, 4)
        assert self.seqs(first + second) == list(range(1, 8))
        assert len({each.id for each in first + second}) == 7

    async def test_a_user_is_out_once(self, store: Store) -> None:
        """While an event of a user waits for its acknowledgement later ones of that user stay, others go on."""
        await publish(store, [user_event(1, 1), user_event(2, 2), user_event(3, 1), user_event(4, 3)])
        assert self.seqs(await pull(store, 2)) == [1, 2]
        assert [each.seq for each in await _bus(store).pull(REALM, "acme", 10, 0)] == [4]

    async def test_acknowledged_events_are_gone(self, backend: Backend, store: Store) -> None:
        """An acknowledged event does not come again, also after a restart; it lets its user's next one through."""
        await publish(store, [user_event(1, 1), user_event(2, 1)])
        (first,) = await pull(store, 1)
        await _bus(store).acknowledge(REALM, "acme", [first.ack])
        await _bus(store).acknowledge(REALM, "acme", [first.ack])
        assert [each.seq for each in await pull(store, 1)] == [2]
        async with backend.open() as again:
            page = await _bus(again).pull(REALM, "acme", 1, self.redelivery_s + PULL_S)
            assert [each.seq for each in page] == [2]

    async def test_tenants_are_apart(self, store: Store) -> None:
        """A tenant sees and acknowledges only its own events; a foreign or invented acknowledgement takes nothing."""
        await publish(store, [user_event(1, 1)])
        await publish(store, [user_event(2, 1, "other")], "other")
        (own,) = await pull(store, 1)
        (foreign,) = await pull(store, 1, "other")
        assert own.body == foreign.body
        for acks in ([own.ack, foreign.ack], ["x"], ["\u00e9"], [""]):
            with pytest.raises(InvalidAcks):
                await _bus(store).acknowledge(REALM, "acme", acks)
        await _bus(store).acknowledge(REALM, "acme", [])

    async def test_waits_for_an_event(self, store: Store) -> None:
        """A pull of an empty bus ends with the next published event, long before its time is over."""
        await publish(store, [event(1)])
        got: list[BusEvent] = []

        async def wait() -> None:
            got.extend(await _bus(store).pull(REALM, "acme", 5, HANGS_S))

        with trio.fail_after(HANGS_S - 1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked(0.05)
                await publish(store, [event(2, body=dict(GUESS))])
        assert [each.seq for each in got] == [2]
