"""Keep tenants' events between commit and publication (agent.md 11; storage.md 2.7; decision record 0009).

Each (realm, tenant) has one dense sequence, appended like a log: the row of a batch is written only if its key is free,
right after the last event of the last row. Several leaders share it without a lock: who loses reads the tail again and
renumbers. A lost answer is resolved by comparing macs with what stands under the key, so no event is numbered twice.

Removed events leave a mark that keeps the row's key taken for a week (own: without it a writer that slept between
reading the tail and writing could number events as if those after it had never been, and they would never be
published). Cursor and counters are one row and one conditional write, whose condition is the id of the write before it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import trio

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import (
    AnyValueEquals,
    KeyRange,
    Mutation,
    Row,
    RowExists,
    RowSet,
    Selection,
    SetCell,
)
from juicebox_hsm.adapters.bigtable.outbox_removal import Removal
from juicebox_hsm.adapters.bigtable.outbox_rows import (
    COUNTERS,
    EVENTS,
    PUBLISHED,
    WRITE_ID,
    Cursor,
    counter_qualifier,
    decode_cursor,
    encode_counts,
    encode_event,
    number,
)
from juicebox_hsm.adapters.bigtable.outbox_table import OutboxTable
from juicebox_hsm.adapters.bigtable.retry import CallAttempts
from juicebox_hsm.adapters.bigtable.settled import Settled
from juicebox_hsm.adapters.bigtable.table import Endpoint
from juicebox_hsm.errors import check
from juicebox_hsm.host.events import (
    EVENT_KEPT_MS,
    TENANT_BYTES_MAX,
    Backlog,
    EventKind,
    NewEvent,
    OutboxEvent,
    TenantCursor,
)
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.ports.errors import StoreAmbiguous, StoreInvalid, StoreUnavailable

ROW_EVENTS_MAX: Final = 100
CONFLICTS_MAX: Final = 1_000
"""Lost races of one batch; each means that another writer got on."""
TAIL_S: Final = 3_600.0
"""How long a remembered tail is believed; marks on removed rows last a week."""
FIXED_TIME: Final = 0
"""Time of cells that are overwritten in place."""
TENANTS_PER_READ: Final = 1_000

_NEWEST: Final = Selection(family=EVENTS, cells_per_row=1)
_NAMES: Final = Selection(cells_per_row=1, strip_values=True)


class _Tenant:
    """What this process knows of one tenant's sequence; the lock serialises its own writers."""

    __slots__ = ("cursor", "lock", "tail", "tail_at")

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.tail = 0
        self.tail_at: float | None = None
        self.cursor: Cursor | None = None


class BigtableOutbox:
    """`ports.EventOutbox` on one instance."""

    def __init__(self, endpoint: Endpoint, settled: Settled) -> None:
        self._table = OutboxTable(endpoint)
        self._settled = settled
        self._removal = Removal(self._table)
        self._tenants: dict[tuple[RealmId, str], _Tenant] = {}

    def _tenant(self, realm: RealmId, tenant: str) -> _Tenant:
        known = self._tenants.get((realm, tenant))
        if known is None:
            known = self._tenants[realm, tenant] = _Tenant()
        return known

    # --- recording -------------------------------------------------------------------------------

    async def record(
        self, realm: RealmId, events: Sequence[NewEvent], settled: Mapping[GroupId, int]
    ) -> dict[str, int]:
        """Append events to their tenants' sequences, then raise settled indexes; not cancelled half-way.

        With events, the settled indexes follow within a quarter of a second. Raises `StoreUnavailable` only if no
        event was written, else `StoreAmbiguous`: repeating the call could then number an event twice.
        """
        by_tenant: dict[str, list[NewEvent]] = defaultdict(list)
        for event in events:
            by_tenant[event.tenant].append(event)
        tails: dict[str, int] = {}
        with trio.CancelScope(shield=True), self._table.of(realm).budget():
            for tenant, own in by_tenant.items():
                for at in range(0, len(own), ROW_EVENTS_MAX):
                    try:
                        tails[tenant] = await self._append(realm, tenant, own[at : at + ROW_EVENTS_MAX])
                    except (StoreUnavailable, StoreInvalid) as error:
                        if not tails:
                            raise
                        raise StoreAmbiguous(f"some events are written, others not: {error}") from None
            if settled:
                await self._settled.raise_to(realm, settled, lazily=bool(events))
        return tails

    async def _append(self, realm: RealmId, tenant: str, events: Sequence[NewEvent]) -> int:
        """Append up to 100 events of one tenant as one row; return the new tail."""
        known, name = self._tenant(realm, tenant), keys.check_tenant(tenant)
        async with known.lock:
            for _ in range(CONFLICTS_MAX):
                if known.tail_at is None or trio.current_time() - known.tail_at > TAIL_S:
                    await self._learn_tail(realm, name, known)
                first = known.tail + 1
                known.tail_at = None
                if await self._write(realm, name, first, events):
                    tail = first + len(events) - 1
                    self._note_tail(known, max(tail, known.tail))
                    return tail
            raise StoreUnavailable(f"lost {CONFLICTS_MAX} races for the outbox of tenant {tenant}")

    def _note_tail(self, known: _Tenant, tail: int) -> None:
        known.tail = tail
        known.tail_at = trio.current_time()

    async def _learn_tail(self, realm: RealmId, tenant: bytes, known: _Tenant) -> None:
        self._note_tail(known, await self._table.read_tail(realm, tenant))

    async def _write(self, realm: RealmId, tenant: bytes, first: int, events: Sequence[NewEvent]) -> bool:
        """Write a row if its key is free; False if another writer was there. Raises `StoreAmbiguous`."""
        key = keys.event_key(tenant, first)
        cells = [
            SetCell(EVENTS, keys.downward(first + place), encode_event(first + place, event))
            for place, event in enumerate(events)
        ]
        attempts = self._table.of(realm).attempts("record events")
        in_doubt = False
        while True:
            try:
                if not await self._table.of(realm).check_and_mutate(key, RowExists(), if_not=cells):
                    return True
                return in_doubt and await self._is_ours(realm, key, cells)
            except StoreAmbiguous as error:
                in_doubt = True
                if await self._is_ours(realm, key, cells):
                    return True
                if attempts.exhausted():
                    raise StoreAmbiguous(f"events not seen to be written: {error}") from None
                await attempts.pause()
            except StoreUnavailable:
                if in_doubt:
                    raise StoreAmbiguous("events refused while an earlier attempt is in doubt") from None
                raise

    async def _is_ours(self, realm: RealmId, key: bytes, cells: Sequence[SetCell]) -> bool:
        """Tell whether the row holds what we tried to write: events carry macs, so nobody else's are equal."""
        try:
            row = await self._table.of(realm).read_row(key, Selection(family=EVENTS))
        except (StoreUnavailable, StoreInvalid) as error:
            raise StoreAmbiguous(f"events of unknown outcome, and the outbox cannot be read: {error}") from None
        stored = {} if row is None else {cell.qualifier: cell.value for cell in row.cells}
        return all(stored.get(cell.qualifier) == cell.value for cell in cells)

    async def settled(self, realm: RealmId, group: GroupId) -> int:
        """Return the group's settled index, 0 when never written."""
        return await self._settled.read(realm, group)

    # --- reading ---------------------------------------------------------------------------------

    async def read(self, realm: RealmId, tenant: str, after_seq: int, limit: int) -> list[OutboxEvent]:
        """Return up to `limit` events with seq > after_seq in order; removed ones in between are skipped."""
        name = keys.check_tenant(tenant)
        tail = await self._table.read_tail(realm, name)
        found: list[OutboxEvent] = []
        while after_seq < tail and len(found) < limit:
            newest = min(tail, after_seq + max(limit, ROW_EVENTS_MAX))
            found += await self._table.read_events(realm, tenant, after_seq + 1, newest)
            after_seq = newest
        return found[:limit]

    async def cursors(self, realm: RealmId) -> list[TenantCursor]:
        """Return every tenant with rows, by name: one read for those known, one or two per newly met tenant."""
        known = {tenant.encode(): state.tail for (of, tenant), state in self._tenants.items() if of == realm}
        found: dict[bytes, TenantCursor] = {}
        names = sorted(known)
        for at in range(0, len(names), TENANTS_PER_READ):
            found |= await self._read_cursors(realm, {name: known[name] for name in names[at : at + TENANTS_PER_READ]})
        new = await self._find_tenants(realm, names)
        found |= await self._read_cursors(realm, dict.fromkeys(new, 0))
        return [found[name] for name in sorted(found)]

    async def _read_cursors(self, realm: RealmId, known: Mapping[bytes, int]) -> dict[bytes, TenantCursor]:
        """Read the rows above known tails and the cursor rows; a tail of 0 is unknown."""
        if not known:
            return {}
        ranges: list[KeyRange] = []
        tails: dict[bytes, int] = {}
        for name, tail in known.items():
            tails[name] = tail or await self._table.read_tail(realm, name)
            ranges.append(keys.event_range(name, keys.TOP, tails[name] + 1))
        rows = await self._table.of(realm).read_rows(
            RowSet([keys.cursor_key(name) for name in known], ranges), selection=_NEWEST
        )
        published: dict[bytes, int] = {}
        for row in rows:
            name = keys.tenant_of(row.key)
            if row.key == keys.cursor_key(name):
                published[name] = number(row.cells[0].value) if row.cells[0].qualifier == PUBLISHED else 0
            else:
                tails[name] = max(tails[name], keys.upward(row.cells[0].qualifier))
        for name, tail in tails.items():
            state = self._tenant(realm, name.decode())
            state.tail = max(state.tail, tail)  # a writer's own tail: learnt anew only where it is older
        return {name: TenantCursor(name.decode(), published.get(name, 0), tail) for name, tail in tails.items() if tail}

    async def _find_tenants(self, realm: RealmId, known: Sequence[bytes]) -> list[bytes]:
        """Return tenants with rows that are not in `known` (sorted), by reading the gaps between known ones."""
        found: list[bytes] = []
        for at in range(0, len(known) + 1, TENANTS_PER_READ):
            part = known[at : at + TENANTS_PER_READ]
            start = b"\x20" if at == 0 else keys.after_tenant(known[at - 1])
            end = keys.event_key(known[at + TENANTS_PER_READ], keys.TOP) if at + TENANTS_PER_READ < len(known) else None
            gaps = _gaps(start, part, end or b"\xff" * (TENANT_BYTES_MAX + 16))
            while gaps:
                rows = await self._table.of(realm).read_rows(RowSet(ranges=gaps), limit=1, selection=_NAMES)
                if not rows:
                    break
                name = keys.tenant_of(rows[0].key)
                found.append(name)
                passed = keys.after_tenant(name)
                gaps = [rest for gap in gaps if (rest := gap.after(passed)) is not None]
        return found

    async def backlog(self, realm: RealmId) -> Backlog:
        """Return the unpublished rows and the time of the oldest; one read per tenant that has some."""
        waiting = [cursor for cursor in await self.cursors(realm) if cursor.published < cursor.tail]
        rows = sum(cursor.tail - cursor.published for cursor in waiting)
        times: list[int] = []
        for cursor in waiting:
            oldest = await self._table.read_events(realm, cursor.tenant, cursor.published + 1, cursor.published + 1)
            times += [event.new.when_ms for event in oldest]
        return Backlog(rows, min(times, default=None))

    # --- publishing ------------------------------------------------------------------------------

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
        known, name = self._tenant(realm, tenant), keys.check_tenant(tenant)
        if to_seq > known.tail and to_seq > await self._table.read_tail(realm, name):
            return False
        attempts = self._table.of(realm).attempts("advance a cursor")
        cursor, known.cursor = known.cursor, None
        while True:
            if cursor is None:
                cursor = decode_cursor(await self._read_cursor(realm, name))
            if cursor.published != from_seq:
                return False
            moved = _moved(cursor, to_seq, day, counts)
            if await self._put_cursor(realm, name, cursor, moved, day, attempts):
                known.cursor = moved
                return True
            cursor = None  # changed by another, who may have left `published` alone: look again
            if attempts.exhausted():
                raise StoreUnavailable(f"the cursor of tenant {tenant} keeps changing")

    async def _read_cursor(self, realm: RealmId, tenant: bytes) -> Row | None:
        return await self._table.of(realm).read_row(keys.cursor_key(tenant), Selection(cells_per_column=1))

    async def _put_cursor(
        self, realm: RealmId, tenant: bytes, before: Cursor, after: Cursor, day: str, attempts: CallAttempts
    ) -> bool:
        """Write a cursor over the one it was made from; False if that is not there any more."""
        key = keys.cursor_key(tenant)
        mutations: list[Mutation] = [
            SetCell(EVENTS, PUBLISHED, after.published.to_bytes(8, "big"), FIXED_TIME),
            SetCell(EVENTS, WRITE_ID, after.write_id, FIXED_TIME),
        ]
        if day in after.counters:
            counts = encode_counts(after.counters[day])
            mutations.append(SetCell(COUNTERS, counter_qualifier(day), counts, FIXED_TIME))
        table = self._table.of(realm)
        in_doubt = False
        while True:
            try:
                if before.write_id:
                    ours = AnyValueEquals(before.write_id)
                    is_moved = await table.check_and_mutate(key, ours, if_match=mutations)
                else:
                    is_moved = not await table.check_and_mutate(key, RowExists(), if_not=mutations)
                if is_moved or not in_doubt:
                    return is_moved
                return decode_cursor(await self._read_cursor(realm, tenant)).write_id == after.write_id
            except StoreAmbiguous as error:
                in_doubt = True
                stands = decode_cursor(await self._read_cursor(realm, tenant)).write_id
                if stands != before.write_id:
                    return stands == after.write_id
                if attempts.exhausted():
                    raise StoreUnavailable(f"the cursor was not seen to move: {error}") from None
                await attempts.pause()  # the same write id again: a late first attempt is recognised as ours

    async def remove_published(self, realm: RealmId, now_ms: int, limit: int, *, kept_ms: int = EVENT_KEPT_MS) -> int:
        """Remove up to `limit` published and settled events, those with a body `kept_ms` after it."""
        settled = await self._settled.all(realm)
        removed = 0
        for cursor in await self.cursors(realm):
            if removed >= limit:
                break
            if cursor.published:
                removed += await self._removal.remove(realm, cursor, settled, now_ms - kept_ms, limit - removed)
        return removed

    async def counters(self, realm: RealmId, tenant: str) -> dict[str, dict[EventKind, int]]:
        """Return day -> kind -> count."""
        cursor = decode_cursor(await self._read_cursor(realm, keys.check_tenant(tenant)))
        return {
            day: {EventKind(kind): count for kind, count in sorted(counts.items())}
            for day, counts in sorted(cursor.counters.items())
            if counts
        }


def _moved(cursor: Cursor, to_seq: int, day: str, counts: Mapping[EventKind, int]) -> Cursor:
    """Return the cursor after an advance, under a fresh write id."""
    counters = dict(cursor.counters)
    added = {kind.value: count for kind, count in counts.items() if count}
    if added:
        before = cursor.counters.get(day, {})
        counters[day] = {kind: before.get(kind, 0) + added.get(kind, 0) for kind in before.keys() | added.keys()}
    return replace(cursor, published=to_seq, write_id=os.urandom(16), counters=counters)


def _gaps(start: bytes, known: Sequence[bytes], end: bytes) -> list[KeyRange]:
    """Return the key ranges from `start` to before `end` in which no known tenant has rows."""
    gaps = []
    for name in known:
        gaps.append(KeyRange(start, keys.event_key(name, keys.TOP), end_open=True))
        start = keys.after_tenant(name)
    gaps.append(KeyRange(start, end, end_open=True))
    return [gap for gap in gaps if not gap.is_empty]
