"""Contract of the dispatcher on any store: what two at once leave behind is exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.host.events import EVENT_KEPT_MS, EventKind, NewEvent, OutboxEvent
from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.store import Store
from roles.agent import outbox
from roles.agent.outbox import Dispatcher
from roles.agent.outside import AgentConfig
from tests.emulator.contract import Backend
from tests.emulator.realm_data import REALM, event

DAY_MS = 86_400_000
NOW_MS = 1_700_000_000_000


class Clock:
    """A clock to set."""

    def __init__(self) -> None:
        self.ms = NOW_MS

    def __call__(self) -> int:
        return self.ms


def dispatcher(store: Store, clock: Clock, name: str = "one", event_kept_ms: int = EVENT_KEPT_MS) -> Dispatcher:
    """Return a dispatcher of an agent that has nothing else."""
    config = AgentConfig(name, "tls://none", "test", event_kept_ms=event_kept_ms)
    agent = SimpleNamespace(store=store, now_ms=clock, metrics=Metrics(), config=config)
    return Dispatcher(cast("Any", agent))


def made(number: int, kind: EventKind, tenant: str = "acme", when_ms: int = NOW_MS) -> NewEvent:
    """Return an event as agents write it, of one of seven records."""
    accounting = {EventKind.REGISTER2: "registered", EventKind.DELETE: "deleted"}.get(kind)
    body: dict[str, str | int] | None = {"event": kind.value} if kind is not EventKind.RECOVER1 else None
    new = event(number, tenant, kind, body=body, when_ms=when_ms)
    return replace(new, accounting=accounting, record_id=event(number % 7).record_id)


class SlowBus:
    """A bus that takes its time: a page is handed over once `go` is set."""

    def __init__(self) -> None:
        self.entered = trio.Event()
        self.go = trio.Event()

    async def publish(self, realm: RealmId, tenant: str, rows: Sequence[OutboxEvent]) -> None:
        """Wait."""
        self.entered.set()
        await self.go.wait()


class DispatchContract:
    """Two dispatchers of one realm on two handles of its store."""

    async def test_exact_under_two_dispatchers(
        self, store: Store, backend: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two dispatchers that both believe they hold the lease count every row once and leave true accounting."""
        monkeypatch.setattr(outbox, "PAGE_EVENTS", 7)

        async def believe(self: Dispatcher, realm: RealmId) -> bool:
            await trio.lowlevel.checkpoint()
            return True

        monkeypatch.setattr(Dispatcher, "_hold_lease", believe)
        kinds = [EventKind.REGISTER2, EventKind.RECOVER1, EventKind.RECOVER2, EventKind.DELETE, EventKind.UNKNOWN]
        written = [
            made(number, kinds[number % 5], "ab"[number % 2], NOW_MS + number * DAY_MS // 100)
            for number in range(1, 301)
        ]
        clock = Clock()
        clock.ms = NOW_MS + 4 * DAY_MS
        async with backend.open() as second, trio.open_nursery() as nursery:
            done = False

            async def run(own: Store) -> None:
                worker = dispatcher(own, clock)
                while not done or any(each.published < each.tail for each in await own.outbox.cursors(REALM)):
                    await worker.dispatch(REALM)
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(run, store)
            nursery.start_soon(run, second)
            for at in range(0, 300, 10):
                await store.outbox.record(REALM, written[at : at + 10], {})
            done = True
        for tenant in "ab":
            own = [new for new in written if new.tenant == tenant]
            counted = await store.outbox.counters(REALM, tenant)
            assert {kind: sum(day.get(kind, 0) for day in counted.values()) for kind in kinds} == {
                kind: sum(new.kind is kind for new in own) for kind in kinds
            }
            assert len(counted) == 4, "each day of the events has its own counters"
        last: dict[tuple[str, bytes], bool] = {}
        for new in written:
            if new.accounting is not None:
                last[new.tenant, new.record_id] = new.accounting == "registered"
        after = (NOW_MS // DAY_MS + 5) * DAY_MS
        users = await store.accounting.count_users(REALM, after, after + DAY_MS)
        assert users == {
            tenant: count for tenant in "ab" if (count := sum(on for (owner, _), on in last.items() if owner == tenant))
        }

    async def test_a_dispatcher_that_was_overtaken(self, store: Store, backend: Backend) -> None:
        """A dispatcher whose page the bus held up until another published it, and what came after, changes nothing:
        the deletion that followed stays the last word, and every event is counted once."""
        clock, slow, quick = Clock(), SlowBus(), SlowBus()
        quick.go.set()
        registered, deleted = made(7, EventKind.REGISTER2), made(14, EventKind.DELETE)
        assert registered.record_id == deleted.record_id
        await store.outbox.record(REALM, [registered], {})
        async with backend.open() as other:
            stale = dispatcher(replace(store, bus=cast("Any", slow)), clock)
            second = dispatcher(replace(other, bus=cast("Any", quick)), clock, "two")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stale.dispatch, REALM)
                await slow.entered.wait()
                for lease in await store.leases.list():  # as if it had not been renewed
                    await store.leases.terminate(lease)
                await second.dispatch(REALM)
                await other.outbox.record(REALM, [deleted], {})
                await second.dispatch(REALM)
                slow.go.set()
        after = (NOW_MS // DAY_MS + 1) * DAY_MS
        assert await store.accounting.count_users(REALM, after, after + DAY_MS) == {}
        counted = await store.outbox.counters(REALM, "acme")
        assert list(counted.values()) == [{EventKind.REGISTER2: 1, EventKind.DELETE: 1}]
