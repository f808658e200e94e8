"""What `juicebox-hsm store check` and `store gc` do on an instance (operator-tools.md 5; ADR 0017)."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

import trio

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.backend import DEFAULT_TUNING, Instance, Tuning, reach
from juicebox_hsm.adapters.bigtable.check_logs import LogCheck
from juicebox_hsm.adapters.bigtable.check_outbox import OutboxCheck
from juicebox_hsm.adapters.bigtable.check_trees import Looked, TreeCheck
from juicebox_hsm.adapters.bigtable.cluster import SELF_TEST, SETTINGS
from juicebox_hsm.adapters.bigtable.codec import DeleteRow, SetCell
from juicebox_hsm.adapters.bigtable.deletion import DeferredDeletion
from juicebox_hsm.adapters.bigtable.garbage import MICROS, Collection
from juicebox_hsm.adapters.bigtable.log import BigtableLog
from juicebox_hsm.adapters.bigtable.log_reads import LogReads
from juicebox_hsm.adapters.bigtable.nodes import TreeNodes
from juicebox_hsm.adapters.bigtable.outbox import BigtableOutbox
from juicebox_hsm.adapters.bigtable.realms import BigtableRealms
from juicebox_hsm.adapters.bigtable.retry import NoSuchTable
from juicebox_hsm.adapters.bigtable.settled import Settled
from juicebox_hsm.adapters.bigtable.table import Table
from juicebox_hsm.adapters.stores.check import SLICES, Checkpoint, Progress, Report, check_ranges
from juicebox_hsm.consensus.macs import Macs
from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.errors import StoreInvalid, StoreUnavailable

RANGES_ATTEMPTS_MAX: Final = 20
"""Readings of all tails while a range moves between two groups."""
RANGES_PAUSE_S: Final = 0.5
YOUNG_S: Final = 60.0
"""Unneeded nodes younger than this are not counted as garbage: they may be of an append under way."""


@asynccontextmanager
async def open_upkeep(url: str, tuning: Tuning = DEFAULT_TUNING) -> AsyncIterator[Upkeep]:
    """Open the instance that a `bigtable:` URL names. Raises `LocalError` and `StoreUnavailable`."""
    async with reach(url.partition(":")[2], tuning) as instance, trio.open_nursery() as nursery:
        instance.keep(nursery)
        yield Upkeep(instance)
        nursery.cancel_scope.cancel()


class Upkeep:
    """Checks and cleans one instance beside running agents."""

    def __init__(self, instance: Instance) -> None:
        endpoint = self._endpoint = instance.endpoint
        nodes = TreeNodes(endpoint)
        self._log = BigtableLog(LogReads(endpoint), nodes, DeferredDeletion(nodes), instance.metrics)
        self._outbox = BigtableOutbox(endpoint, Settled(endpoint))
        self._realms = BigtableRealms(endpoint, instance.admin)

    async def check(self, macs: Mapping[RealmId, Macs], progress: Progress, checkpoint: Checkpoint) -> Report:
        """Verify all realms; with a `checkpoint` of a stopped check go on with the trees where it was.

        Raises `StoreUnavailable`, and `LocalError` if the checkpoint cannot be kept.
        """
        report = Report()
        for realm in await self._realms.list_realms():
            report.realms += 1
            try:
                await self._check_realm(realm, macs.get(realm), report, progress, checkpoint)
            except NoSuchTable as error:
                report.add(f"realm {realm.hex()}", f"a table is missing: {error}")
        report.take(checkpoint.trees)
        return report

    async def _check_realm(
        self, realm: RealmId, macs: Macs | None, report: Report, progress: Progress, checkpoint: Checkpoint
    ) -> None:
        await LogCheck(self._endpoint, self._log, realm, macs).check(report, progress)
        trees = TreeCheck(self._endpoint, self._log, realm)
        await self._check_ranges(realm, trees, report)
        oldest = await self._now_micros() - int(YOUNG_S * MICROS)

        def count_garbage(looked: Looked) -> None:
            checkpoint.trees.garbage += sum(
                key not in looked.needed and row.cells[0].timestamp < oldest for key, row in looked.part.rows.items()
            )

        for number in range(SLICES):
            if checkpoint.is_done(realm, number):
                continue
            progress(f"trees of realm {realm.hex()[:8]}", number, SLICES)
            await trees.slice(number, checkpoint.trees, count_garbage)
            checkpoint.done(realm, number)
        tenants = [cursor.tenant for cursor in await self._outbox.cursors(realm)]
        await OutboxCheck(self._endpoint, realm).check(tenants, report, progress)

    async def _check_ranges(self, realm: RealmId, trees: TreeCheck, report: Report) -> None:
        """Check that every record has one owner. Tails are read one by one: a range on the move is looked at again."""
        for _ in range(RANGES_ATTEMPTS_MAX):
            attempt = Report()
            before = await trees.tails()
            check_ranges(realm, before, attempt)
            if not attempt.findings:
                return
            await trio.sleep(RANGES_PAUSE_S)
            if await trees.tails() == before:
                break
        report.take(attempt)

    async def collect(self, rate: int, age_s: float, progress: Progress) -> list[str]:
        """Remove unneeded tree nodes written more than `age_s` ago, at most `rate` rows a second; return a report.

        Raises `StoreUnavailable`, and `StoreInvalid` before anything is removed under a tree that is damaged.
        """
        lines = []
        for realm in await self._realms.list_realms():
            offset = await self._now_micros() - int(trio.current_time() * MICROS)
            collection = Collection(
                Table(self._endpoint, keys.realm_tables(realm)[1]),
                TreeCheck(self._endpoint, self._log, realm),
                realm,
                rate,
                age_s,
                offset,
            )
            done = await collection.run(progress)
            line = f"realm {realm.hex()}: {done.needed:,} tree nodes in use, {done.removed:,} unneeded ones removed"
            line += f", {done.young:,} are too young to go"
            lines.append(line + (f"; {done.left_out} parts left out while a range moved" if done.left_out else ""))
        return lines

    async def _now_micros(self) -> int:
        """Return the service's time, by which cells are dated: our clock may differ."""
        table, key = Table(self._endpoint, SETTINGS), SELF_TEST + os.urandom(8).hex().encode()
        await table.mutate_row(key, (SetCell("f", b"v", b"time"),))
        row = await table.read_row(key)
        await table.mutate_row(key, (DeleteRow(),))
        if row is None:
            raise StoreUnavailable("a row that was just written is not there")
        if row.cells[0].timestamp <= 0:
            raise StoreInvalid("the service does not date what is written")
        return row.cells[0].timestamp
