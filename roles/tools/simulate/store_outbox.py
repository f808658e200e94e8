"""Tenant events and accounting of the simulated store: `ports.EventOutbox`, `Accounting`, `PublishedEvents`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from juicebox_hsm.errors import LocalError, check
from juicebox_hsm.host.clocks import DAY_MS
from juicebox_hsm.host.events import (
    EVENT_KEPT_MS,
    AccountingEvent,
    Backlog,
    EventKind,
    NewEvent,
    OutboxEvent,
    TenantCursor,
)
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.ports.errors import StoreAmbiguous, StoreUnavailable
from roles.tools.simulate.store_data import GroupLog, RealmData, TenantRows
from roles.tools.simulate.store_gate import SETTLED_LATE_S, Gate

NO_GROUP: Final = GroupLog()
NO_TENANT: Final = TenantRows()


class SimulatedOutbox:
    """`ports.EventOutbox` for one process."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def record(
        self, realm: RealmId, events: Sequence[NewEvent], settled: Mapping[GroupId, int]
    ) -> dict[str, int]:
        """Append events to their tenants' sequences, then raise settled indexes.

        An unknown outcome is `StoreAmbiguous`: of several tenants' events some may be written. A late write of one
        tenant's events fails when others came first, as a row that is written only if its key is free.
        """
        by_tenant: dict[str, list[NewEvent]] = {}
        for event in events:
            by_tenant.setdefault(event.tenant, []).append(event)
        settled = dict(settled)
        data = self._gate.data
        known = {tenant: data.realm(realm).tenant(tenant).tail for tenant in by_tenant}
        tails: dict[str, int] = {}

        def writer(tenant: str, expected_tail: int | None) -> Callable[[], int]:
            return lambda: data.record(realm, tenant, by_tenant[tenant], expected_tail)

        try:
            for tenant in by_tenant:
                tails[tenant] = await self._gate.write(
                    "record", writer(tenant, None), unseen=StoreAmbiguous, late=writer(tenant, known[tenant])
                )
            await self._settle(realm, settled, lazily=bool(events))
        except StoreUnavailable as error:
            if not tails:
                raise
            raise StoreAmbiguous(f"some events are written, others not: {error}") from None
        return tails

    async def _settle(self, realm: RealmId, settled: Mapping[GroupId, int], *, lazily: bool) -> None:
        """Raise settled indexes, or have them raised in a moment if the process lives."""
        data = self._gate.data

        def raise_if_alive() -> None:
            if not self._gate.is_closed:
                data.raise_settled(realm, settled)

        if settled and self._gate.lazy_settled and lazily:
            data.later(SETTLED_LATE_S, raise_if_alive)
        elif settled:
            await self._gate.write("settle", lambda: data.raise_settled(realm, settled))

    async def settled(self, realm: RealmId, group: GroupId) -> int:
        """Return the group's settled index, 0 when never written."""
        data = self._gate.data
        return await self._gate.read("settled", lambda: data.realm(realm).groups.get(group, NO_GROUP).settled)

    async def read(self, realm: RealmId, tenant: str, after_seq: int, limit: int) -> list[OutboxEvent]:
        """Return up to `limit` events with seq > after_seq in order."""

        def read() -> list[OutboxEvent]:
            rows = self._gate.data.realm(realm).tenants.get(tenant, NO_TENANT).rows
            return [row for seq, row in rows.items() if seq > after_seq][:limit]

        return await self._gate.read("outbox_read", read)

    async def cursors(self, realm: RealmId) -> list[TenantCursor]:
        """Return every tenant that ever had an event, by name."""

        def read() -> list[TenantCursor]:
            tenants = self._gate.data.realm(realm).tenants
            return [
                TenantCursor(name, rows.published, rows.tail) for name, rows in sorted(tenants.items()) if rows.tail
            ]

        return await self._gate.read("cursors", read)

    async def advance(
        self,
        realm: RealmId,
        tenant: str,
        from_seq: int,
        to_seq: int,
        day: str,
        counts: Mapping[EventKind, int],
    ) -> bool:
        """Move the cursor and add to the day's counters, unless another dispatcher moved the cursor first."""
        check(from_seq <= to_seq, "a cursor only moves forward")
        counts = dict(counts)

        def write() -> bool:
            rows = self._gate.data.realm(realm).tenants.get(tenant, NO_TENANT)
            if rows is NO_TENANT or rows.published != from_seq or rows.tail < to_seq:
                return False
            rows.published = to_seq
            for kind, count in counts.items():
                if count:
                    of_day = rows.counters.setdefault(day, {})
                    of_day[kind] = of_day.get(kind, 0) + count
            return True

        return await self._gate.write("advance", write)

    async def remove_published(self, realm: RealmId, now_ms: int, limit: int, *, kept_ms: int = EVENT_KEPT_MS) -> int:
        """Remove up to `limit` published and settled rows, those with an event `kept_ms` after it."""

        def write() -> int:
            data = self._gate.data.realm(realm)
            removed = 0
            for _, rows in sorted(data.tenants.items()):
                gone = _removable(data, rows, now_ms - kept_ms)[: limit - removed]
                removed += len(gone)
                for seq in gone:
                    del rows.rows[seq]
                    rows.acknowledged.discard(seq)
            return removed

        return await self._gate.write("remove_published", write)

    async def backlog(self, realm: RealmId) -> Backlog:
        """Return the unpublished rows and the age of the oldest."""

        def read() -> Backlog:
            waiting = [rows for rows in self._gate.data.realm(realm).tenants.values() if rows.tail > rows.published]
            return Backlog(
                sum(rows.tail - rows.published for rows in waiting),
                min((rows.rows[rows.published + 1].new.when_ms for rows in waiting), default=None),
            )

        return await self._gate.read("backlog", read)

    async def counters(self, realm: RealmId, tenant: str) -> dict[str, dict[EventKind, int]]:
        """Return day -> kind -> count."""

        def read() -> dict[str, dict[EventKind, int]]:
            counters = self._gate.data.realm(realm).tenants.get(tenant, NO_TENANT).counters
            return {day: dict(kinds) for day, kinds in sorted(counters.items())}

        return await self._gate.read("counters", read)


def _removable(data: RealmData, rows: TenantRows, event_before_ms: int) -> list[int]:
    return [
        seq
        for seq, row in rows.rows.items()
        if seq <= rows.published
        and row.new.index <= data.groups.get(row.new.group, NO_GROUP).settled
        and (row.new.event is None or row.new.when_ms <= event_before_ms)
    ]


class SimulatedPublished:
    """`event_bus.PublishedEvents` for one process."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def unacknowledged(self, realm: RealmId, tenant: str, after_seq: int, limit: int) -> list[OutboxEvent]:
        """Return published rows with an event that nobody acknowledged."""

        def read() -> list[OutboxEvent]:
            rows = self._gate.data.realm(realm).tenants.get(tenant, NO_TENANT)
            return [
                row
                for seq, row in rows.rows.items()
                if after_seq < seq <= rows.published and row.new.event is not None and seq not in rows.acknowledged
            ][:limit]

        return await self._gate.read("unacknowledged", read)

    async def mark_acknowledged(self, realm: RealmId, tenant: str, seqs: Sequence[int]) -> None:
        """Mark published rows with an event; others are passed over."""
        seqs = list(seqs)

        def write() -> None:
            rows = self._gate.data.realm(realm).tenants.get(tenant, NO_TENANT)
            for seq in seqs:
                if seq in rows.rows and seq <= rows.published and rows.rows[seq].new.event is not None:
                    rows.acknowledged.add(seq)

        await self._gate.write("mark_acknowledged", write)


class SimulatedAccounting:
    """`ports.Accounting` for one process."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def write(self, realm: RealmId, events: Sequence[AccountingEvent]) -> None:
        """Write events; of one record and UTC day the one with the highest `seq` counts."""
        events = list(events)

        def write() -> None:
            users = self._gate.data.realm(realm).users
            for event in events:
                key = (event.tenant, event.record, event.when_ms // DAY_MS)
                if key not in users or event.seq >= users[key][0]:
                    users[key] = (event.seq, event.registered)

        await self._gate.write("accounting", write)

    async def count_users(self, realm: RealmId, start_ms: int, end_ms: int) -> dict[str, int]:
        """Return tenant -> users with a secret at any time in [start, end), whole UTC days."""
        if start_ms % DAY_MS or end_ms % DAY_MS or not 0 <= start_ms < end_ms:
            raise LocalError(f"the period {start_ms}..{end_ms} ms is not one or more whole UTC days")

        def read() -> dict[str, int]:
            newest: dict[tuple[str, bytes], tuple[int, bool]] = {}
            for (tenant, record, day), (_, registered) in self._gate.data.realm(realm).users.items():
                if day < end_ms // DAY_MS and day >= newest.get((tenant, record), (-1, False))[0]:
                    newest[tenant, record] = (day, registered)
            found: dict[str, int] = {}
            for (tenant, _), (day, registered) in newest.items():
                if registered or day >= start_ms // DAY_MS:
                    found[tenant] = found.get(tenant, 0) + 1
            return dict(sorted(found.items()))

        return await self._gate.read("count_users", read)
