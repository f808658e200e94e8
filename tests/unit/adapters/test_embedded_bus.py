"""The embedded bus: redelivery, order per user, and bounds, on a clock of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import trio
import trio.testing

from juicebox_hsm.adapters.stores import embedded_bus
from juicebox_hsm.adapters.stores.embedded_bus import REDELIVER_S, EmbeddedBus
from juicebox_hsm.host.events import OutboxEvent
from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.ports.event_bus import BusEvent
from tests.emulator.realm_data import REALM, event


class Published:
    """A store's published rows in memory."""

    def __init__(self, users: Sequence[int]) -> None:
        made = [event(seq, body={"event": "deleted"}) for seq in range(1, len(users) + 1)]
        self.rows = {
            seq: OutboxEvent(seq, replace(new, user=f"{user:064x}"))
            for (seq, new), user in zip(enumerate(made, 1), users, strict=True)
        }
        self.reads = 0
        self.broken = False

    async def unacknowledged(self, realm: RealmId, tenant: str, after_seq: int, limit: int) -> list[OutboxEvent]:
        """Return what is left."""
        await trio.lowlevel.checkpoint()
        self.reads += 1
        return [row for seq, row in sorted(self.rows.items()) if seq > after_seq][:limit]

    async def mark_acknowledged(self, realm: RealmId, tenant: str, seqs: Sequence[int]) -> None:
        """Take rows away."""
        await trio.lowlevel.checkpoint()
        if self.broken:
            raise StoreUnavailable("asked for")
        for seq in seqs:
            self.rows.pop(seq, None)


async def _pull(bus: EmbeddedBus, limit: int = 100, wait_s: float = 0) -> list[BusEvent]:
    return await bus.pull(REALM, "acme", limit, wait_s)


def _seqs(events: list[BusEvent]) -> list[int]:
    return [each.seq for each in events]


async def test_redelivers_what_is_not_acknowledged(autojump_clock: trio.testing.MockClock) -> None:
    """After 10 s, not before, an event comes again with what followed it for its user, in order."""
    bus = EmbeddedBus(Published([1, 2, 1]))
    first = await _pull(bus, 2)
    await bus.acknowledge(REALM, "acme", [first[1].ack])
    await trio.sleep(REDELIVER_S - 0.1)
    assert await _pull(bus) == []
    await trio.sleep(0.2)
    again = await _pull(bus)
    assert _seqs(again) == [1, 3]
    assert again[0].id == first[0].id


async def test_a_late_acknowledgement_counts(autojump_clock: trio.testing.MockClock) -> None:
    """An acknowledgement of an earlier delivery of the event ends it, also after its time."""
    bus = EmbeddedBus(Published([1]))
    (first,) = await _pull(bus)
    await trio.sleep(REDELIVER_S + 1)
    assert _seqs(await _pull(bus)) == [1]
    await bus.acknowledge(REALM, "acme", [first.ack])
    await trio.sleep(REDELIVER_S + 1)
    assert await _pull(bus) == []


async def test_a_failed_acknowledgement_keeps_the_delivery(autojump_clock: trio.testing.MockClock) -> None:
    """When the store refuses, the event is still out and comes again later."""
    published = Published([1])
    bus = EmbeddedBus(published)
    (first,) = await _pull(bus)
    published.broken = True
    with pytest.raises(StoreUnavailable):
        await bus.acknowledge(REALM, "acme", [first.ack])
    assert await _pull(bus) == []
    await trio.sleep(REDELIVER_S + 1)
    assert _seqs(await _pull(bus)) == [1]


async def test_concurrent_pulls_share_the_events(autojump_clock: trio.testing.MockClock) -> None:
    """Pulls at the same time never get the same delivery."""
    bus = EmbeddedBus(Published(range(60)))
    pages: list[list[int]] = []

    async def one() -> None:
        pages.append(_seqs(await _pull(bus, 7)))

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(one)
    assert sorted(seq for page in pages for seq in page) == list(range(1, 57))


async def test_waiting_ends_with_redelivery(autojump_clock: trio.testing.MockClock) -> None:
    """A waiting pull gets an event whose delivery expires meanwhile, and otherwise nothing when its time is over."""
    bus = EmbeddedBus(Published([1]))
    await _pull(bus)
    began = trio.current_time()
    assert _seqs(await _pull(bus, wait_s=20)) == [1]
    assert REDELIVER_S <= trio.current_time() - began <= REDELIVER_S + embedded_bus.POLL_MAX_S
    began = trio.current_time()
    assert await _pull(bus, wait_s=3) == []
    assert trio.current_time() - began == pytest.approx(3)


async def test_bounds(autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events out are bounded, and one busy user's rows are looked at only so far."""
    monkeypatch.setattr(embedded_bus, "OUT_MAX", 5)
    bus = EmbeddedBus(Published(range(20)))
    assert len(await _pull(bus)) == 5
    assert await _pull(bus) == []
    busy = Published([1] * 2000 + [2])
    monkeypatch.setattr(embedded_bus, "SCANNED_MAX", 512)
    bus = EmbeddedBus(busy)
    await _pull(bus, 1)
    busy.reads = 0
    assert await _pull(bus) == []
    assert busy.reads == 2


async def test_forgets_the_oldest_tenant(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tenants remembered are bounded; a forgotten one gets its events early again, never none."""
    monkeypatch.setattr(embedded_bus, "TENANTS_MAX", 2)
    bus = EmbeddedBus(Published([1]))
    for tenant in ("a", "b", "c"):
        assert _seqs(await bus.pull(REALM, tenant, 1, 0)) == [1]
    assert _seqs(await bus.pull(REALM, "a", 1, 0)) == [1]
    assert await bus.pull(REALM, "c", 1, 0) == []
