"""Tenant events: rows on their way into the outbox, and the dispatcher that publishes them (agent.md 11).

Which rows, and when, is the leadership's decision (`juicebox_hsm.host.leadership`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import trio

from juicebox_hsm.adapters.clock.retrying import retrying
from juicebox_hsm.adapters.observation.logging import bind_context
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.clocks import past_ms
from juicebox_hsm.host.cluster.leases import LEASE_MS, StandingLeases
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.dispatch import (
    BusTrouble,
    Due,
    Late,
    Stuck,
    Tenure,
    day_runs,
    graver,
    kept_name,
    late_name,
    late_with,
    lease_name,
    removal_ms,
    waiting,
)
from juicebox_hsm.host.events import EVENT_KEPT_MS, NewEvent, OutboxEvent, TenantCursor
from juicebox_hsm.host.outbox import Unpublished, unpublished
from juicebox_hsm.host.readiness import Trouble
from juicebox_hsm.ids import GroupId, RealmId

if TYPE_CHECKING:
    from roles.agent.context import Agent

PAGE_EVENTS: Final = 1000
REMOVE_ROWS: Final = 5000
TOLD_S: Final = 60.0
"""Between two looks at the times that services registered with; they renew as often."""
BUS_SLOW_S: Final = 5.0
"""A publication of a page that takes longer is told (own): nothing is silent for ten seconds."""


async def record_events(
    agent: Agent,
    realm: RealmId,
    events: Sequence[NewEvent],
    settled: Mapping[GroupId, int],
    *,
    on_retry: Callable[[RealmError], None] | None = None,
) -> None:
    """Write rows and settled indexes with the store's retry profile; raises `RealmError` when exhausted."""

    def retried(error: RealmError) -> None:
        agent.metrics.count("agent.outbox.retry")
        if on_retry is not None:
            on_retry(error)

    async def record() -> dict[str, int]:
        return await agent.store.outbox.record(realm, events, settled)

    tails = await retrying(record, on_retry=retried)
    for tenant, tail in tails.items():
        if tail > agent.outbox_tails.get(tenant, 0):
            agent.outbox_tails[tenant] = tail


async def learn_tails(agent: Agent, realm: RealmId) -> None:
    """Read each tenant's outbox tail, so that hints need not begin at 1. Trouble only costs a longer search later."""
    try:
        cursors = await agent.store.outbox.cursors(realm)
    except RealmError as error:
        agent.log.warning("outbox cursors not read", error=str(error))
        return
    for cursor in cursors:
        if cursor.tail > agent.outbox_tails.get(cursor.tenant, 0):
            agent.outbox_tails[cursor.tenant] = cursor.tail


# --- dispatcher ----------------------------------------------------------------------------------------


async def watch_backlog(agent: Agent) -> None:
    """Keep the backlog figures, the warning and the bound up to date."""
    while True:
        await trio.sleep(agent.timings.backlog_s)
        for realm in agent.groups.realms:
            try:
                backlog = await agent.store.outbox.backlog(realm)
            except RealmError as error:
                agent.note_trouble(Code.OUTBOX_UNREADABLE, error)
                continue
            agent.clear_trouble(Code.OUTBOX_UNREADABLE)
            note_unpublished(agent, unpublished(backlog, agent.now_ms() - round(agent.clock.off_s * 1000)))


def note_unpublished(agent: Agent, waiting: Unpublished) -> None:
    """Adopt the figures of what waits, by which requests are refused, and log when somebody should look."""
    before, agent.unpublished = agent.unpublished, waiting
    agent.metrics.gauge("agent.outbox.backlog", waiting.rows)
    agent.metrics.gauge("agent.outbox.oldest_age", waiting.oldest_s)
    if waiting.is_long and not before.is_long:
        agent.log.warning("outbox backlog", rows=waiting.rows, oldest_s=waiting.oldest_s)


def note_set_aside(agent: Agent, group: GroupId, indexes: Sequence[int]) -> None:
    """Say which log entries an earlier leader took for a tenant whose name no row can carry; their events are lost."""
    agent.set_aside += len(indexes)
    agent.metrics.count("agent.outbox.set_aside", len(indexes))
    agent.log.error(
        "tenant events that cannot be recorded are set aside",
        group=group.hex(),
        count=len(indexes),
        first_index=indexes[0],
        last_index=indexes[-1],
    )


class Dispatcher:
    """Publishes outbox rows in order per tenant: bus, accounting, then cursor and counters in one conditional write.

    The embedded bus serves the rows themselves, so there moving the cursor is all of it. One dispatcher per realm holds
    the lease; two at once only repeat events, which keep their sequence numbers, and accounting, whose higher number
    counts: a dispatcher that was held up by the bus and overtaken writes what is older than what is there.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._tenure = Tenure()
        self._stuck = Stuck()
        self._standing = StandingLeases()
        self._kept_ms = agent.config.event_kept_ms
        self._noted: set[RealmId] = set()
        self._told_ms: list[int] = []
        self._told_until_s = -math.inf

    async def run(self) -> None:
        """Dispatch for ever; trouble makes the backlog grow and nothing else."""
        agent = self._agent
        timings = agent.timings
        while True:
            moved = 0
            for realm in agent.groups.realms:
                bind_context(realm=realm.hex())
                try:
                    moved += await self.dispatch(realm)
                except BusTrouble as error:
                    self._note_bus(str(error))
                except RealmError as error:
                    agent.note_trouble(Code.EVENTS_NOT_DISPATCHED, error)
                else:
                    if not self._stuck:
                        self._note_bus("")
                    agent.clear_trouble(Code.EVENTS_NOT_DISPATCHED)
            await trio.sleep(timings.dispatch_s if moved else timings.dispatch_idle_s)

    def _note_bus(self, why: str) -> None:
        """Keep the warning about the bus; it makes no agent unready, because clients do not need the bus."""
        if why and not self._agent.bus_trouble:
            self._agent.log.warning("events not published; they wait in the outbox", reason=why)
        elif self._agent.bus_trouble and not why:
            self._agent.log.info("events are published again")
        self._agent.bus_trouble = (Trouble(Code.BUS, why),) if why else ()

    async def dispatch(self, realm: RealmId) -> int:
        """Do one round for `realm` if there is work and the lease is ours; returns how many rows were published.

        Trouble with one tenant, say its topic, holds up no other; the last trouble is raised when the round is over.
        """
        agent = self._agent
        moved = 0
        trouble: RealmError | None = None
        cursors = await agent.store.outbox.cursors(realm)
        self._stuck.look(realm, cursors)
        for cursor in waiting(cursors):
            try:
                moved += await self._dispatch_tenant(realm, cursor)
            except RealmError as error:
                trouble = graver(trouble, error)
                if isinstance(error, BusTrouble):
                    self._stuck.failed(realm, cursor)
        if moved:
            await self._note_kept(realm)
            await agent.store.outbox.remove_published(
                realm, await self._removal_ms(realm), REMOVE_ROWS, kept_ms=self._kept_ms
            )
        if trouble is not None:
            raise trouble
        return moved

    async def _dispatch_tenant(self, realm: RealmId, cursor: TenantCursor) -> int:
        """Publish what waits for one tenant, page by page; returns how many rows."""
        outbox = self._agent.store.outbox
        published = cursor.published
        while published < cursor.tail and await self._hold_lease(realm):
            page = await outbox.read(realm, cursor.tenant, published, PAGE_EVENTS)
            if not page:
                break
            advanced = await self._publish(realm, cursor.tenant, published, page)
            if advanced == published:
                break
            published = advanced
        return published - cursor.published

    async def _publish(self, realm: RealmId, tenant: str, published: int, page: list[OutboxEvent]) -> int:
        """Hand events to the bus, then account and advance over `page`, day by day; returns the new cursor."""
        agent = self._agent
        events = [row for row in page if row.new.event is not None]
        if events:
            await self._keep_late(realm, min(row.new.when_ms for row in events))
            await self._hand_over(realm, tenant, events)
        for run in day_runs(tenant, page):
            if run.accounting:
                await agent.store.accounting.write(realm, run.accounting)
                agent.metrics.gauge("agent.accounting.batch_size", len(run.accounting))
            if not await agent.store.outbox.advance(realm, tenant, published, run.through, run.day, run.counts):
                return published
            published = run.through
        return published

    async def _hand_over(self, realm: RealmId, tenant: str, events: Sequence[OutboxEvent]) -> None:
        """Give events to the bus, if there is one. Raises `BusTrouble`."""
        agent = self._agent
        if agent.store.bus is None:
            return
        began_ns = time.perf_counter_ns()
        failure: RealmError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_of_slow_bus)
            try:
                await agent.store.bus.publish(realm, tenant, events)
            except RealmError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            if failure.retryable:
                agent.metrics.count("pubsub.publish_msg.exhausted_errors")
            else:
                agent.metrics.count("pubsub.publish_msg.fatal_errors")
            raise BusTrouble(str(failure)) from failure
        agent.metrics.timing("pubsub.publish_msg.time", time.perf_counter_ns() - began_ns)

    async def _tell_of_slow_bus(self) -> None:
        """Warn of a bus that does not answer long before a publication is given up, which takes half a minute."""
        await trio.sleep(BUS_SLOW_S)
        self._note_bus(f"no answer of the bus within {BUS_SLOW_S:.0f} s")

    async def _note_kept(self, realm: RealmId) -> None:
        """Say in the store, once per process, how long events stay: `store gc` must not remove them earlier."""
        if realm in self._noted:
            return
        settings, name = self._agent.store.settings, kept_name(realm)
        kept = str(self._kept_ms).encode()
        if (await settings.get(name) or str(EVENT_KEPT_MS).encode()) != kept:
            await settings.put(name, kept)
        self._noted.add(realm)

    async def _keep_late(self, realm: RealmId, oldest_ms: int) -> None:
        """Put off the removal of events that are published late."""
        now_ms = self._agent.now_ms()
        if late_with(None, oldest_ms, now_ms, self._kept_ms) is None:
            return  # in time, as nearly always: nothing need be read
        late = late_with(await self._read_late(realm), oldest_ms, now_ms, self._kept_ms)
        if late is not None:
            await self._agent.store.settings.put(late_name(realm), late.encode())

    async def _removal_ms(self, realm: RealmId) -> int:
        """Return the time by which the age of events is judged; forgets late publication that is over."""
        now_ms = await self._past_ms()
        late = await self._read_late(realm)
        if late is not None and not late.counts_at(now_ms, self._kept_ms):
            await self._agent.store.settings.remove(late_name(realm))
        return removal_ms(late, now_ms, self._kept_ms)

    async def _past_ms(self) -> int:
        """Return the time that has come by two clocks: ours alone could be days ahead, and what it removes is gone."""
        now_s = trio.current_time()
        if now_s >= self._told_until_s:
            entries = await self._agent.store.discovery.list()
            self._told_ms = [entry.registered_ms for entry in entries]
            self._told_until_s = now_s + TOLD_S
        return past_ms(self._agent.now_ms(), self._told_ms)

    async def _read_late(self, realm: RealmId) -> Late | None:
        return Late.decode(await self._agent.store.settings.get(late_name(realm)))

    async def _hold_lease(self, realm: RealmId) -> bool:
        """Obtain or renew the dispatcher's lease; tell whether it is ours."""
        leases, name, sent = self._agent.store.leases, lease_name(realm), trio.current_time()
        while True:
            now_ms = self._agent.now_ms()
            match self._tenure.due(name, sent):
                case Due.HELD:
                    return True
                case Due.LATER:
                    return False
                case Due.EXTEND:
                    held = self._tenure.lease
                    extended = None if held is None else await leases.extend(held, now_ms, LEASE_MS)
                    self._tenure.extended(extended, sent)
                case Due.OBTAIN:
                    self._standing.look(await leases.list(), trio.current_time())
                    at_ms = self._standing.obtain_ms(name, now_ms, trio.current_time())
                    owner = self._agent.config.name
                    lease = None if at_ms is None else await leases.obtain(name, owner, at_ms, LEASE_MS)
                    self._tenure.obtained(lease, sent)

    async def release(self) -> None:
        """Give the lease back."""
        lease = self._tenure.given_back()
        if lease is not None:
            await self._agent.store.leases.terminate(lease)
