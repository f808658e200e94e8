"""A tenant's auditor: pulls events through the realm's bus, acknowledges most of them, and must get all in order.

It stands in the place of the tenant log's HTTP side, whose processes share the store with the agents and keep in memory
which events are out; it is killed, paused and cut off like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.event_bus import BusEvent
from roles.tools.simulate.keyring import TENANTS
from roles.tools.simulate.processes import Process
from roles.tools.simulate.scheduling import Life
from roles.tools.simulate.store_data import TenantRows
from roles.tools.simulate.surroundings import Surroundings

PAGE_EVENTS: Final = 20
WAIT_S: Final = 5.0
RETRY_S: Final = 0.5
FORGETS_RATE: Final = 0.05
"""Share of events that are not acknowledged, so that they come again."""


class Ledger:
    """What a tenant's auditor has seen; outlives the process that pulls."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self._seen: dict[int, BusEvent] = {}
        self._newest: dict[str, int] = {}
        self.repeats = 0

    def take(self, events: Iterable[BusEvent]) -> str:
        """Take in a page; return what is wrong with it, "" if nothing is.

        A user's events come in order of their numbers: what comes for the first time is newer than all of that user's.
        """
        for event in events:
            before = self._seen.get(event.seq)
            if before is not None:
                self.repeats += 1
                if (before.ref, before.user, dict(before.body)) != (event.ref, event.user, dict(event.body)):
                    return f"event {event.seq} of {self.tenant} comes again as another one"
                continue
            newest = self._newest.get(event.user, 0)
            if event.seq < newest:
                return f"event {event.seq} of {self.tenant} comes after {newest} of the same user"
            self._newest[event.user] = event.seq
            self._seen[event.seq] = event
        return ""

    def missing(self, rows: TenantRows) -> list[int]:
        """Return the numbers of events that were published and never came."""
        there = (row for seq, row in rows.rows.items() if seq <= rows.published and row.new.event is not None)
        return [row.seq for row in there if row.seq not in self._seen]


class AuditorProcess(Process):
    """Pulls every tenant's events for ever."""

    def __init__(self, world: Surroundings, name: str) -> None:
        super().__init__(world, name)
        self.ledgers = {tenant: Ledger(tenant) for tenant in TENANTS}

    async def run(self, nursery: trio.Nursery, life: Life) -> None:  # noqa: ARG002 - as all processes
        """Serve until told to stop."""
        for tenant in TENANTS:
            nursery.start_soon(self._pull, tenant)
        await self.stop_asked.wait()

    async def _pull(self, tenant: str) -> None:
        bus, world, ledger = self.view.store.bus, self.world, self.ledgers[tenant]
        while True:
            realm: RealmId = world.realm
            events: list[BusEvent] = []
            try:
                events = await bus.pull(realm, tenant, PAGE_EVENTS, WAIT_S) if realm else []
                if problem := ledger.take(events):
                    world.broken("audit", problem)
                forgets = FORGETS_RATE if world.is_troubled else 0.0
                kept = [event.ack for event in events if self.chance.random() >= forgets]
                if kept:
                    await bus.acknowledge(realm, tenant, kept)
                world.notes.count("audit.page" if events else "audit.nothing")
            except RealmError as error:
                world.notes.count(f"audit.{type(error).__name__}")
                await trio.sleep(RETRY_S)
            if not events:
                await trio.sleep(RETRY_S)
