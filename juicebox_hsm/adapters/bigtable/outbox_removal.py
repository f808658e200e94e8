"""Remove published events from the outbox (storage.md 2.7).

Sequences are read forward in windows, because rows cannot be scanned from the oldest end. Where reading goes on is
remembered per tenant, and kept with the cursor as a hint for the next process: everything up to it is gone. Events of
a group that is not settled so far are remembered one by one; those with a body wait for their time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import DeleteColumn, Mutation, Selection, SetCell
from juicebox_hsm.adapters.bigtable.outbox_rows import EVENTS, REMOVED, REMOVED_BELOW, decode_cursor
from juicebox_hsm.adapters.bigtable.outbox_table import OutboxTable
from juicebox_hsm.host.events import OutboxEvent, TenantCursor
from juicebox_hsm.ids import GroupId, RealmId

WINDOW: Final = 1_000
WINDOWS_MAX: Final = 8
"""Windows read per tenant and call; the rest comes next time."""
UNSETTLED_MAX: Final = 10_000
"""Unsettled events remembered per tenant; beyond that reading stops until their groups settle."""
HINT_EVERY: Final = 1_000
"""Events after which the hint is written again."""

_MARK: Final[tuple[Mutation, ...]] = (DeleteColumn(REMOVED, b"t"), SetCell(REMOVED, b"t", b""))


@dataclass(frozen=True, slots=True)
class _Unsettled:
    group: GroupId
    index: int
    key: bytes


class _Place:
    """How far one tenant's sequence was cleaned.

    Up to `read` (exclusive) every event was looked at: it is gone, `unsettled`, or waits for its time.
    `aged_from` is where the oldest event that waits may be, `aged_when_ms` its time.
    """

    __slots__ = ("aged_from", "aged_when_ms", "hint", "read", "unsettled")

    def __init__(self, start: int) -> None:
        self.hint = start
        self.read = start
        self.aged_from = start
        self.aged_when_ms = 0
        self.unsettled: dict[int, _Unsettled] = {}


class Removal:
    """The cleaning of all tenants' sequences."""

    def __init__(self, table: OutboxTable) -> None:
        self._table = table
        self._places: dict[tuple[RealmId, str], _Place] = {}

    async def remove(
        self, realm: RealmId, cursor: TenantCursor, settled: Mapping[GroupId, int], before_ms: int, limit: int
    ) -> int:
        """Remove up to `limit` of a tenant's events at or below its cursor; the newest event always stays.

        Those with a body go if they are of `before_ms` or earlier.
        """
        place = self._places.get((realm, cursor.tenant))
        if place is None:
            start = await self._read_hint(realm, cursor.tenant)
            place = self._places[realm, cursor.tenant] = _Place(start + 1)
        end = min(cursor.published, cursor.tail - 1)
        gone = [(seq, late.key) for seq, late in place.unsettled.items() if late.index <= settled.get(late.group, 0)][
            :limit
        ]
        await self._remove(realm, gone)
        for seq, _ in gone:
            del place.unsettled[seq]
        removed = len(gone)
        removed += await self._remove_bare(realm, cursor.tenant, place, settled, end, limit - removed)
        removed += await self._remove_aged(realm, cursor.tenant, place, settled, before_ms, limit - removed)
        await self._write_hint(realm, cursor.tenant, place)
        return removed

    async def _read_hint(self, realm: RealmId, tenant: str) -> int:
        key = keys.cursor_key(keys.check_tenant(tenant))
        row = await self._table.of(realm).read_row(key, Selection(family=EVENTS, cells_per_column=1))
        return decode_cursor(row).removed_below

    async def _write_hint(self, realm: RealmId, tenant: str, place: _Place) -> None:
        """Keep for the next process up to where everything is gone."""
        below = min(place.read, place.aged_from, min(place.unsettled, default=place.read)) - 1
        if below < place.hint + HINT_EVERY:
            return
        place.hint = below
        cell = SetCell(EVENTS, REMOVED_BELOW, below.to_bytes(8, "big"), 0)
        await self._table.of(realm).mutate_row(keys.cursor_key(keys.check_tenant(tenant)), (cell,))

    async def _remove_bare(
        self, realm: RealmId, tenant: str, place: _Place, settled: Mapping[GroupId, int], end: int, limit: int
    ) -> int:
        """Look at events for the first time and remove those without a body."""
        removed = 0
        for _ in range(WINDOWS_MAX):
            if place.read > end or removed >= limit or len(place.unsettled) > UNSETTLED_MAX:
                break
            newest = min(end, place.read + WINDOW - 1)
            gone: list[tuple[int, bytes]] = []
            for event, key in await self._table.read_stored(realm, tenant, place.read, newest):
                if event.new.event is not None:
                    continue
                if not _is_settled(event, settled):
                    place.unsettled[event.seq] = _Unsettled(event.new.group, event.new.index, key)
                elif removed + len(gone) < limit:
                    gone.append((event.seq, key))
                else:
                    newest = event.seq - 1
                    break
            await self._remove(realm, gone)
            removed += len(gone)
            place.read = newest + 1
        return removed

    async def _remove_aged(
        self, realm: RealmId, tenant: str, place: _Place, settled: Mapping[GroupId, int], before_ms: int, limit: int
    ) -> int:
        """Remove events with a body that are older than `before_ms`, from the oldest to the first that is too young."""
        removed = 0
        for _ in range(WINDOWS_MAX):
            if before_ms < place.aged_when_ms or place.aged_from >= place.read or removed >= limit:
                break
            newest = min(place.read - 1, place.aged_from + WINDOW - 1)
            gone: list[tuple[int, bytes]] = []
            for event, key in await self._table.read_stored(realm, tenant, place.aged_from, newest):
                if event.new.event is None or event.seq in place.unsettled:
                    continue
                if event.new.when_ms > before_ms:
                    place.aged_when_ms = event.new.when_ms
                    newest = event.seq - 1
                    break
                if not _is_settled(event, settled):
                    place.unsettled[event.seq] = _Unsettled(event.new.group, event.new.index, key)
                elif removed + len(gone) < limit:
                    gone.append((event.seq, key))
                else:
                    newest = event.seq - 1
                    break
            await self._remove(realm, gone)
            removed += len(gone)
            place.aged_from = newest + 1
        return removed

    async def _remove(self, realm: RealmId, gone: list[tuple[int, bytes]]) -> None:
        """Remove events, leaving a mark on each of their rows."""
        rows: dict[bytes, list[Mutation]] = defaultdict(list)
        for seq, key in gone:
            rows[key].append(DeleteColumn(EVENTS, keys.downward(seq)))
        await self._table.of(realm).mutate_rows([(key, (*own, *_MARK)) for key, own in rows.items()])


def _is_settled(event: OutboxEvent, settled: Mapping[GroupId, int]) -> bool:
    return event.new.index <= settled.get(event.new.group, 0)
