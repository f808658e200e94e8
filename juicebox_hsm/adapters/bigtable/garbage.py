"""Remove tree nodes that no tree needs: what waited for deletion when a process was killed (storage.md 4.3; ADR 0017).

Beside running agents, so three things must be sure before a row goes. No tree needs it: trees are walked from the tails
of *all* groups' logs, which together must own the whole key space, as a range that one group's tail gave away and
another's has not taken yet would look like garbage. It is not about to be needed: nodes are written before their entry
is appended, so young rows stay, and an append whose nodes are older than a minute writes them again (`log`). Nobody
still reads it: rows go some seconds after they were found unneeded. Only the writes that were seen go; the same node
written again meanwhile has another instance id and stays.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

import trio

from juicebox_hsm.adapters.bigtable.check_trees import Looked, TreeCheck
from juicebox_hsm.adapters.bigtable.codec import DeleteColumn, Mutation
from juicebox_hsm.adapters.bigtable.table import Table
from juicebox_hsm.adapters.stores.check import SLICES, Progress, Report
from juicebox_hsm.ids import RealmId, uncovered
from juicebox_hsm.ports.errors import StoreInvalid, StoreUnavailable

READERS_S: Final = 10.0
"""How long a row stays after it was found unneeded; agents' own deletions wait 5 s."""
BATCH_ROWS: Final = 500
COVERED_S: Final = 60.0
"""How long to wait for a range that is on its way between two groups."""
COVERED_PAUSE_S: Final = 0.5
MICROS: Final = 1_000_000


@dataclass(slots=True)
class Collected:
    """What one realm's collection did.

    `needed` nodes, rows `removed`, unneeded ones that are too `young`, and parts left out because a range was on its
    way between two groups.
    """

    needed: int = 0
    removed: int = 0
    young: int = 0
    left_out: int = 0


class Collection:
    """One pass over a realm's nodes; `offset_micros` is the service's time less Trio's clock.

    At most `rate` rows a second are removed.
    """

    def __init__(
        self, table: Table, check: TreeCheck, realm: RealmId, rate: int, age_s: float, offset_micros: int
    ) -> None:
        self._table = table
        self._check = check
        self._realm = realm
        self._rate = rate
        self._age_micros = int(age_s * MICROS)
        self._offset_micros = offset_micros
        self._due: deque[tuple[float, bytes, tuple[Mutation, ...]]] = deque()
        self._report = Report()
        self.result = Collected()

    async def run(self, progress: Progress) -> Collected:
        """Look at every slice and remove what nothing needs. Raises `StoreInvalid` when a tree is damaged."""
        await self._whole_key_space()
        for number in range(SLICES):
            progress(f"nodes of realm {self._realm.hex()[:8]}", number, SLICES)
            await self._check.slice(number, self._report, self._note)
            await self._remove(trio.current_time())
        while self._due:
            await trio.sleep_until(self._due[0][0])
            await self._remove(trio.current_time())
        return self.result

    async def _whole_key_space(self) -> None:
        """Wait until the tails own every record: else a range on its way would be taken for garbage."""
        with trio.move_on_after(COVERED_S):
            while True:
                gaps = uncovered(tree.partition.range for tree in await self._check.trees())
                if not gaps:
                    return
                await trio.sleep(COVERED_PAUSE_S)
        raise StoreUnavailable(
            f"realm {self._realm.hex()}: no group owns the records from {gaps[0].start.hex()} on; nothing is removed"
        )

    def _note(self, looked: Looked) -> None:
        """Put what may go on the list; nothing, by an error, once a tree is known to be damaged."""
        if self._report.findings:
            raise StoreInvalid(f"nothing more is removed: {self._report.findings[0]}; run `juicebox-hsm store check`")
        if uncovered(tree.partition.range for tree in looked.trees):
            self.result.left_out += 1
            return
        due_s, oldest = (
            trio.current_time() + READERS_S,
            int(trio.current_time() * MICROS) + self._offset_micros - self._age_micros,
        )
        for key, row in looked.part.rows.items():
            if key in looked.needed:
                self.result.needed += 1
                continue
            old = tuple(DeleteColumn("f", cell.qualifier) for cell in row.cells if cell.timestamp < oldest)
            if old:
                self._due.append((due_s, key, old))
            if len(old) < len(row.cells):
                self.result.young += 1

    async def _remove(self, now_s: float) -> None:
        """Remove what is due, no faster than the rate."""
        while self._due and self._due[0][0] <= now_s:
            batch: list[tuple[bytes, tuple[Mutation, ...]]] = []
            while self._due and self._due[0][0] <= now_s and len(batch) < min(BATCH_ROWS, self._rate):
                _, key, mutations = self._due.popleft()
                batch.append((key, mutations))
            await self._table.mutate_rows(batch)
            self.result.removed += len(batch)
            await trio.sleep(len(batch) / self._rate)
