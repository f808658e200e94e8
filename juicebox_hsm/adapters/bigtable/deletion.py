"""Delete tree nodes some time after an append removed them, so that slow readers finish (storage.md 4.3).

Each removal names the *instance* that was current when the append was made: if the same node is written again
meanwhile (a range split off and merged back), the new write has another id and stays. What cannot be deleted is
garbage, harmless, for `store gc` to find.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Final

import trio

from juicebox_hsm.adapters.bigtable.codec import DeleteColumn
from juicebox_hsm.adapters.bigtable.nodes import TreeNodes
from juicebox_hsm.adapters.observation.logging import get_logger
from juicebox_hsm.errors import RealmError
from juicebox_hsm.ids import RealmId

DELAY_S: Final = 5.0
KEYS_PER_REQUEST: Final = 1_024
KEYS_WAITING_MAX: Final = 200_000
"""Nodes waiting, 5 s of about 2,000 mutations/s (own; the bound is on nodes because batches differ in size)."""

_log = get_logger("bigtable.deletion")

Removal = tuple[bytes, bytes]  # row key, instance id


class DeferredDeletion:
    """A queue of removals and the one task that carries them out."""

    def __init__(self, nodes: TreeNodes, delay_s: float = DELAY_S) -> None:
        self._nodes = nodes
        self._delay_s = delay_s
        self._queue: deque[tuple[float, RealmId, Sequence[Removal]]] = deque()
        self.waiting = 0
        """Writes that are still to be deleted."""
        self._work = trio.Event()
        self._is_closing = False
        self._drained = trio.Event()
        self.leaked = 0

    def schedule(self, realm: RealmId, removals: Sequence[Removal]) -> None:
        """Delete these writes after the delay; beyond the bound they are left behind and counted."""
        if not removals:
            return
        if self._is_closing or self.waiting + len(removals) > KEYS_WAITING_MAX:
            self._leak(len(removals), "the queue is full or closing")
            return
        self.waiting += len(removals)
        self._queue.append((trio.current_time() + self._delay_s, realm, removals))
        self._work.set()

    def _leak(self, count: int, why: str) -> None:
        self.leaked += count
        _log.warning("obsolete tree nodes left in the store", count=count, why=why)

    async def run(self) -> None:
        """Delete what becomes due, until `close` was called and the queue is empty."""
        while not (self._is_closing and not self._queue):
            if not self._queue:
                self._work = trio.Event()
                await self._work.wait()
                continue
            await trio.sleep_until(self._queue[0][0])
            await self._delete(self._due())
        self._drained.set()

    def _due(self) -> dict[RealmId, list[Removal]]:
        """Take what is due, up to one request's worth of the oldest."""
        now = trio.current_time()
        due: dict[RealmId, list[Removal]] = defaultdict(list)
        count = 0
        while self._queue and self._queue[0][0] <= now and count < KEYS_PER_REQUEST:
            _, realm, removals = self._queue.popleft()
            due[realm] += removals
            count += len(removals)
        self.waiting -= count
        return due

    async def _delete(self, due: dict[RealmId, list[Removal]]) -> None:
        for realm, removals in due.items():
            rows = [(key, (DeleteColumn("f", instance),)) for key, instance in removals]
            try:
                await self._nodes.table(realm).mutate_rows(rows)
            except RealmError as error:
                self._leak(len(removals), str(error))
                continue
            for key, instance in removals:
                self._nodes.forget(key, instance)

    def close(self) -> None:
        """Take no more; `run` ends once everything queued is done, delays included."""
        self._is_closing = True
        self._work.set()

    async def drained(self) -> None:
        """Wait until everything queued is done."""
        await self._drained.wait()
