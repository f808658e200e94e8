"""The dispatcher on a real store: fair to tenants, kind to late readers (two at once: tests/emulator)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import trio

from juicebox_hsm.adapters.observation.logging import get_logger
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.stores.embedded_bus import EmbeddedBus
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.dispatch import LATE_MS, BusTrouble, kept_name
from juicebox_hsm.host.events import EVENT_KEPT_MS, EventKind, OutboxEvent
from juicebox_hsm.host.readiness import Trouble
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.ports.store import Store
from roles.agent.outbox import Dispatcher
from roles.agent.outside import AgentConfig
from tests.emulator.contract_dispatch import DAY_MS, NOW_MS, Clock, dispatcher, made
from tests.emulator.realm_data import GROUP, REALM
from tests.patience import HANGS_S


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    """Open a store with one realm."""
    async with open_store(f"sqlite:{tmp_path / 'realm.db'}") as opened:
        await opened.realms.create_shared()
        await opened.realms.create_realm(REALM)
        yield opened


async def test_one_tenant_in_trouble_holds_up_no_other(store: Store) -> None:
    """When the bus refuses one tenant's events the others' still go out, and the trouble is raised."""

    class Bus:
        published: ClassVar[list[str]] = []

        async def publish(self, realm: RealmId, tenant: str, rows: Sequence[OutboxEvent]) -> None:
            await trio.lowlevel.checkpoint()
            if tenant == "a":
                raise StoreUnavailable("no such topic")
            self.published.extend(f"{tenant}{row.seq}" for row in rows)

    await store.outbox.record(REALM, [made(1, EventKind.DELETE, "a"), made(2, EventKind.DELETE, "b")], {})
    worker = dispatcher(replace(store, bus=cast("Any", Bus())), Clock())
    with pytest.raises(BusTrouble):
        await worker.dispatch(REALM)
    assert Bus.published == ["b1"]
    assert {each.tenant: each.published for each in await store.outbox.cursors(REALM)} == {"a": 0, "b": 1}


async def test_events_stay_7_days_after_publication(store: Store) -> None:
    """An event published ten days late is kept seven days from then; one published in time, seven days and a bit."""
    clock = Clock()
    worker = dispatcher(store, clock)

    async def tick(days: float, number: int, when_ms: int | None = None) -> list[int]:
        """Set the clock, publish another event, return which log indexes are left."""
        clock.ms = NOW_MS + int(days * DAY_MS)
        new = made(number, EventKind.DELETE, when_ms=clock.ms if when_ms is None else when_ms)
        await store.outbox.record(REALM, [new], {GROUP: 1000})
        await worker.dispatch(REALM)
        return [row.new.index for row in await store.outbox.read(REALM, "acme", 0, 100)]

    assert await tick(0, 1) == [1]
    assert await tick(7, 2) == [1, 2]
    assert await tick(7 + LATE_MS / DAY_MS, 3) == [2, 3]
    assert await tick(20, 4, when_ms=NOW_MS + 10 * DAY_MS) == [4]
    assert await tick(20.1, 5, when_ms=NOW_MS + 9 * DAY_MS) == [4, 5]
    assert await tick(27, 6) == [4, 5, 6]
    assert clock.ms < NOW_MS + int(20.1 * DAY_MS) + EVENT_KEPT_MS
    assert await tick(27.2, 7) == [6, 7]


async def test_a_clock_that_is_ahead_removes_nothing(store: Store) -> None:
    """A dispatcher whose clock is 30 days ahead keeps what is young by others', until they say so too."""
    clock = Clock()
    for url in ("tls://one", "tls://two"):
        await store.discovery.register(ServiceKind.AGENT, url, NOW_MS)

    async def left(number: int) -> list[int]:
        worker = dispatcher(store, clock)  # reads the others' times anew
        await store.outbox.record(REALM, [made(number, EventKind.DELETE, when_ms=clock.ms)], {GROUP: 1000})
        await worker.dispatch(REALM)
        await worker.release()
        return [row.new.index for row in await store.outbox.read(REALM, "acme", 0, 100)]

    assert await left(1) == [1]
    clock.ms = NOW_MS + 30 * DAY_MS
    await store.discovery.register(ServiceKind.AGENT, "tls://one", clock.ms)  # that is us
    assert await left(2) == [1, 2]
    await store.discovery.register(ServiceKind.AGENT, "tls://two", clock.ms)
    assert await left(3) == [2, 3]


async def test_events_stay_as_long_as_told(store: Store) -> None:
    """With a retention of 20 days events stay 20 days after publication, in time or late, and the store says so."""
    clock = Clock()
    worker = dispatcher(store, clock, event_kept_ms=20 * DAY_MS)

    async def tick(days: float, number: int, when_ms: int | None = None) -> list[int]:
        clock.ms = NOW_MS + int(days * DAY_MS)
        new = made(number, EventKind.DELETE, when_ms=clock.ms if when_ms is None else when_ms)
        await store.outbox.record(REALM, [new], {GROUP: 1000})
        await worker.dispatch(REALM)
        return [row.new.index for row in await store.outbox.read(REALM, "acme", 0, 100)]

    assert await tick(0, 1) == [1]
    assert await tick(20, 2) == [1, 2]
    assert await tick(20 + LATE_MS / DAY_MS, 3) == [2, 3]
    assert await tick(50, 4, when_ms=NOW_MS + 22 * DAY_MS) == [4]
    assert await tick(69, 5) == [4, 5]
    assert await tick(70.1, 6) == [5, 6]
    assert await store.settings.get(kept_name(REALM)) == str(20 * DAY_MS).encode()
    await worker.release()
    worker = dispatcher(store, clock)
    await tick(70.2, 7)
    assert await store.settings.get(kept_name(REALM)) == str(EVENT_KEPT_MS).encode(), "another setting replaces it"


class BrokenBus(EmbeddedBus):
    """A bus that is down for one tenant, until told otherwise."""

    down = True

    async def publish(self, realm: RealmId, tenant: str, rows: Sequence[OutboxEvent]) -> None:
        """Fail, or do what the embedded bus does."""
        await trio.lowlevel.checkpoint()
        if self.down and tenant == "a":
            raise StoreUnavailable("pubsub Publish: UNAVAILABLE")


_looks: list[RealmId] = []


async def _is_not_ours(_dispatcher: Dispatcher, realm: RealmId) -> bool:
    """Find the lease with another agent."""
    await trio.lowlevel.checkpoint()
    _looks.append(realm)
    return False


async def test_a_bus_that_is_down_is_a_warning(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the bus fails rows wait and readiness warns, other tenants go on; afterwards all is published."""
    bus = BrokenBus(cast("Any", None))
    agent = SimpleNamespace(
        store=replace(store, bus=bus),
        now_ms=Clock(),
        metrics=Metrics(),
        config=AgentConfig("one", "tls://none", "test"),
        log=get_logger("test"),
        groups=SimpleNamespace(realms=[REALM]),
        timings=SimpleNamespace(dispatch_s=0.001, dispatch_idle_s=0.001),
        bus_trouble=(),
        clear_trouble=lambda code: None,
        note_trouble=lambda code, error: pytest.fail(f"{code}: {error}"),
    )
    for tenant in "ab":
        await store.outbox.record(REALM, [made(1, EventKind.RECOVER2, tenant)], {})

    async def published(wanted: dict[str, int]) -> bool:
        while {each.tenant: each.published for each in await store.outbox.cursors(REALM)} != wanted:  # noqa: ASYNC110 - no event tells
            await trio.sleep(0.001)
        return True

    with trio.fail_after(HANGS_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Dispatcher(cast("Any", agent)).run)
            assert await published({"a": 0, "b": 1})
            while not agent.bus_trouble:  # noqa: ASYNC110 - the dispatcher tells nobody
                await trio.sleep(0.001)
            assert agent.bus_trouble == (Trouble(Code.BUS, "pubsub Publish: UNAVAILABLE"),)
            assert agent.metrics.counter("pubsub.publish_msg.exhausted_errors").value > 0
            with monkeypatch.context() as another:
                another.setattr(Dispatcher, "_hold_lease", _is_not_ours)
                rounds = len(_looks)
                while len(_looks) < rounds + 5:  # noqa: ASYNC110 - same
                    await trio.sleep(0.001)
                assert agent.bus_trouble, "who has lost the lease knows no better"
            bus.down = False
            assert await published({"a": 1, "b": 1})
            while agent.bus_trouble:  # noqa: ASYNC110 - same
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
