"""Tenant events: rows on their way into the outbox, and the dispatcher that publishes them (agent.md 11).

Which rows, and when, is the leadership's decision (`juicebox_hsm.host.leadership`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import trio

from juicebox_hsm.adapters.clock.retrying import retrying
from juicebox_hsm.adapters.observation.logging import bind_context
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.leases import LEASE_MS, StandingLeases
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.events import EVENT_KEPT_MS, AccountingEvent, NewEvent, OutboxEvent, TenantCursor
from juicebox_hsm.host.outbox import Unpublished, unpublished
from juicebox_hsm.host.readiness import Trouble
from juicebox_hsm.host.services import Lease
from juicebox_hsm.ids import GroupId, RealmId

if TYPE_CHECKING:
    from roles.agent.context import Agent

RENEW_S: Final = LEASE_MS / 1000 - 1.0
"""A dispatcher renews when less than a second is left."""
ASK_AGAIN_S: Final = 1.0
"""Between two looks at a lease that another agent holds."""
PAGE_EVENTS: Final = 1000
REMOVE_ROWS: Final = 5000
LATE_MS: Final = 3_600_000
"""Own: events published within this time of their own keep the usual date of removal, which has this much to spare."""


async def record_events(
    agent: Agent, realm: RealmId, events: Sequence[NewEvent], settled: Mapping[GroupId, int]
) -> None:
    """Write rows and settled indexes with the store's retry profile; raises `RealmError` when exhausted."""

    async def record() -> dict[str, int]:
        return await agent.store.outbox.record(realm, events, settled)

    tails = await retrying(record, on_retry=lambda _: agent.metrics.count("agent.outbox.retry"))
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
            note_unpublished(agent, unpublished(backlog, agent.now_ms()))


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


class BusTrouble(RealmError):
    """Events could not be published; the store is not to blame."""


class Dispatcher:
    """Publishes outbox rows in order per tenant: bus, accounting, then cursor and counters in one conditional write.

    The embedded bus serves the rows themselves, so there moving the cursor is all of it. One dispatcher per realm holds
    the lease; two at once only repeat events, which keep their sequence numbers, and accounting, whose higher number
    counts: a dispatcher that was held up by the bus and overtaken writes what is older than what is there.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._lease: Lease | None = None
        self._standing = StandingLeases()
        self._renew_s = self._ask_again_s = 0.0
        self._kept_ms = agent.config.event_kept_ms
        self._noted: set[RealmId] = set()

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
        waiting = [cursor for cursor in await agent.store.outbox.cursors(realm) if cursor.published < cursor.tail]
        moved = 0
        trouble: RealmError | None = None
        for cursor in waiting:
            try:
                moved += await self._dispatch_tenant(realm, cursor)
            except RealmError as error:
                if trouble is None or not isinstance(error, BusTrouble):
                    trouble = error
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
        for day, rows in by_day(page):
            accounting = [
                AccountingEvent(tenant, row.new.record_id, row.seq, row.new.when_ms, row.new.accounting == "registered")
                for row in rows
                if row.new.accounting is not None
            ]
            if accounting:
                await agent.store.accounting.write(realm, accounting)
                agent.metrics.gauge("agent.accounting.batch_size", len(accounting))
            counts = Counter(row.new.kind for row in rows)
            if not await agent.store.outbox.advance(realm, tenant, published, rows[-1].seq, day, counts):
                return published
            published = rows[-1].seq
        return published

    async def _hand_over(self, realm: RealmId, tenant: str, events: Sequence[OutboxEvent]) -> None:
        """Give events to the bus, if there is one. Raises `BusTrouble`."""
        agent = self._agent
        if agent.store.bus is None:
            return
        began_ns = time.perf_counter_ns()
        try:
            await agent.store.bus.publish(realm, tenant, events)
        except RealmError as error:
            if error.retryable:
                agent.metrics.count("pubsub.publish_msg.exhausted_errors")
            else:
                agent.metrics.count("pubsub.publish_msg.fatal_errors")
            raise BusTrouble(str(error)) from error
        agent.metrics.timing("pubsub.publish_msg.time", time.perf_counter_ns() - began_ns)

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
        """Put off the removal of events that are published late: readers have their time from now, not from then."""
        now_ms = self._agent.now_ms()
        if now_ms - oldest_ms < LATE_MS:
            return
        kept = await self._read_late(realm)
        if kept is not None and now_ms < kept[1] + self._kept_ms:
            oldest_ms = min(oldest_ms, kept[0])
        await self._agent.store.settings.put(_late_name(realm), f"{oldest_ms} {now_ms}".encode())

    async def _removal_ms(self, realm: RealmId) -> int:
        """Return the time by which the age of events is judged."""
        now_ms = self._agent.now_ms()
        kept = await self._read_late(realm)
        if kept is None:
            return now_ms - LATE_MS
        oldest_ms, published_ms = kept
        if now_ms < published_ms + self._kept_ms:
            return min(now_ms - LATE_MS, oldest_ms + self._kept_ms - 1)
        await self._agent.store.settings.remove(_late_name(realm))
        return now_ms - LATE_MS

    async def _read_late(self, realm: RealmId) -> tuple[int, int] | None:
        """Return (time of the oldest event that was published late, when), None when there is none."""
        value = await self._agent.store.settings.get(_late_name(realm))
        if value is None:
            return None
        oldest_ms, published_ms = value.split()
        return int(oldest_ms), int(published_ms)

    async def _hold_lease(self, realm: RealmId) -> bool:
        """Obtain or renew `<realm>-outbox`. When is due is said by the monotonic clock: the other one may be set."""
        leases, now_ms = self._agent.store.leases, self._agent.now_ms()
        name, sent = f"{realm.hex()}-outbox", trio.current_time()
        if self._lease is not None and self._lease.name == name:
            if sent < self._renew_s:
                return True
            self._lease = await leases.extend(self._lease, now_ms, LEASE_MS)
            self._renew_s = sent + RENEW_S
        if (self._lease is None or self._lease.name != name) and sent >= self._ask_again_s:
            self._standing.look(await leases.list(), trio.current_time())
            at_ms = self._standing.obtain_ms(name, now_ms, trio.current_time())
            self._lease = None
            if at_ms is not None:
                self._lease = await leases.obtain(name, self._agent.config.name, at_ms, LEASE_MS)
            self._renew_s = sent + RENEW_S
            if self._lease is None:
                self._ask_again_s = sent + ASK_AGAIN_S
        return self._lease is not None and self._lease.name == name

    async def release(self) -> None:
        """Give the lease back."""
        lease, self._lease = self._lease, None
        if lease is not None:
            await self._agent.store.leases.terminate(lease)


def kept_name(realm: RealmId) -> str:
    """Return the setting that says how long events stay, in ms; without it they stay 7 days."""
    return f"outbox/kept/{realm.hex()}"


def _late_name(realm: RealmId) -> str:
    """Return the setting that remembers late publication."""
    return f"outbox/late/{realm.hex()}"


def by_day(page: list[OutboxEvent]) -> Iterator[tuple[str, list[OutboxEvent]]]:
    """Split a page into runs of rows of one UTC day, in order."""
    run: list[OutboxEvent] = []
    run_day = ""
    for row in page:
        day = datetime.fromtimestamp(row.new.when_ms / 1000, UTC).strftime("%Y%m%d")
        if run and day != run_day:
            yield run_day, run
            run = []
        run_day = day
        run.append(row)
    if run:
        yield run_day, run
