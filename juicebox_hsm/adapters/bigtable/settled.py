"""Keep each group's settled index, which only rises (agent.md 11; storage.md 2.7).

The index is also the cell's time, in milliseconds: the newest cell is then the highest index, whoever writes last, and
raising needs no condition. Writes that accompany events are gathered for a quarter of a second: a settled index that
lags behind costs a new leader a longer look, never an event.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Final

import trio

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import DeleteColumn, Mutation, RowSet, Selection, SetCell
from juicebox_hsm.adapters.bigtable.outbox_rows import EVENTS, SETTLED, number
from juicebox_hsm.adapters.bigtable.table import Endpoint, Table
from juicebox_hsm.adapters.observation.logging import get_logger
from juicebox_hsm.errors import RealmError
from juicebox_hsm.ids import GroupId, RealmId

LAZY_S: Final = 0.25
INDEX_MAX: Final = 2**53 - 1
"""Highest index that fits a timestamp; far above what a group ever reaches."""

_NEWEST: Final = Selection(family=EVENTS, cells_per_column=1)
_log = get_logger("bigtable.outbox")


class Settled:
    """The settled indexes of all groups, with those not written yet."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._waiting: dict[RealmId, dict[GroupId, int]] = defaultdict(dict)
        self._work = trio.Event()
        self._flushing = trio.Lock()

    def _table(self, realm: RealmId) -> Table:
        return Table(self._endpoint, keys.realm_tables(realm)[3])

    async def raise_to(self, realm: RealmId, settled: Mapping[GroupId, int], *, lazily: bool) -> None:
        """Raise indexes, at once or within a quarter of a second."""
        waiting = self._waiting[realm]
        for group, index in settled.items():
            waiting[group] = max(index, waiting.get(group, 0))
        if lazily:
            self._work.set()
        else:
            await self._flush(realm)

    async def _flush(self, realm: RealmId) -> None:
        """Write what waits; what cannot be written waits on. Raises `StoreUnavailable`."""
        async with self._flushing:
            waiting = self._waiting[realm]
            taken = {group: index for group, index in waiting.items() if index}
            await self._table(realm).mutate_rows(
                [(keys.settled_key(group), _raise(index)) for group, index in taken.items()]
            )
            for group, index in taken.items():
                if waiting[group] == index:
                    del waiting[group]

    async def run(self) -> None:
        """Write what was raised lazily, for ever."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            await trio.sleep(LAZY_S)
            await self.flush_all()

    async def flush_all(self) -> None:
        """Write all that waits; failures are logged and tried again with the next."""
        for realm in list(self._waiting):
            try:
                await self._flush(realm)
            except RealmError as error:
                _log.warning("settled indexes not written", realm=realm.hex(), error=str(error))
                self._work.set()

    async def read(self, realm: RealmId, group: GroupId) -> int:
        """Return a group's index, 0 when never written; our own waiting ones count."""
        row = await self._table(realm).read_row(keys.settled_key(group), _NEWEST)
        return max(number(row.cells[0].value) if row else 0, self._waiting[realm].get(group, 0))

    async def all(self, realm: RealmId) -> dict[GroupId, int]:
        """Return the indexes of all groups, after writing our own waiting ones."""
        await self._flush(realm)
        rows = await self._table(realm).read_rows(RowSet(ranges=(keys.settled_range(),)), selection=_NEWEST)
        return {GroupId(row.key[1:]): number(row.cells[0].value) for row in rows}


def _raise(index: int) -> tuple[Mutation, ...]:
    """Return what raises a settled index: older cells go, a higher one stays the newest."""
    micros = min(index, INDEX_MAX) * 1000
    return (DeleteColumn(EVENTS, SETTLED, before=micros), SetCell(EVENTS, SETTLED, index.to_bytes(8, "big"), micros))
