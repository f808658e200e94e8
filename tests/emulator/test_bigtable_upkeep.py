"""Check, clean and count an instance: silent on a good one, each planted fault is found, only garbage goes."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner, Result

from juicebox_hsm.adapters.bigtable import check_trees, keys
from juicebox_hsm.adapters.bigtable.check_trees import node_place
from juicebox_hsm.adapters.bigtable.codec import DeleteColumn, DeleteRow, Row, SetCell
from juicebox_hsm.adapters.bigtable.log import FRESH_S
from juicebox_hsm.adapters.bigtable.nodes import TreeNodes
from juicebox_hsm.adapters.bigtable.table import Table
from juicebox_hsm.adapters.bigtable.upkeep import Upkeep, open_upkeep
from juicebox_hsm.adapters.stores.check import SLICES, Checkpoint, Report
from juicebox_hsm.consensus.types import Partition, TransferringOut
from juicebox_hsm.host.events import AccountingEvent, EventKind
from juicebox_hsm.ids import FULL_RANGE, RealmId, RecordId
from juicebox_hsm.merkle.kernel import row_key
from juicebox_hsm.ports.errors import StoreInvalid, StoreUnavailable
from juicebox_hsm.ports.store import Store
from roles.cli import cli
from tests.emulator.bigtable_backend import BigtableBackend
from tests.emulator.realm_data import (
    GROUP,
    OTHER_GROUP,
    REALM,
    Grown,
    append,
    certificate,
    entry,
    event,
    random_record,
)
from tests.merkle_model import codec as merkle_codec

RECORDS = 60


def quiet(phase: str, done: int, whole: int) -> None:
    """Show nothing."""


@dataclass
class Filled:
    """An instance with a log of several rows, a tree, a certificate and an outbox that is published in part."""

    backend: BigtableBackend
    store: Store
    upkeep: Upkeep
    grown: Grown

    def table(self, number: int) -> Table:
        """Return the realm's log (0), merkle (1), users (2) or outbox (3) table."""
        return Table(self.upkeep._endpoint, keys.realm_tables(REALM)[number])

    async def rows(self, number: int) -> list[Row]:
        """Return all rows of a table."""
        return [row async for page in self.table(number).scan(keys.whole_table()) for row in page]

    async def check(self, checkpoint: Checkpoint | None = None) -> Report:
        """Check the instance."""
        return await self.upkeep.check({}, quiet, checkpoint or Checkpoint())


async def fill(store: Store) -> Grown:
    """Write what `Filled` says."""
    rng = random.Random(5)
    await store.realms.create_shared()
    await store.realms.create_realm(REALM)
    grown = await Grown.start(store)
    for _ in range(RECORDS // 5):
        await grown.write({random_record(rng): rng.randbytes(40) for _ in range(5)})
    rows = await store.log.list_rows(REALM, GROUP, 4)
    await store.log.write_certificate(REALM, GROUP, certificate(6))
    await store.log.compact(REALM, GROUP, rows)
    body: dict[str, str | int] = {"event": "deleted"}
    await store.outbox.record(REALM, [event(n, body=body if n % 2 else None) for n in range(1, 11)], {GROUP: 10})
    await store.outbox.advance(REALM, "acme", 0, 6, "20231114", {EventKind.RECOVER2: 6})
    await store.outbox.remove_published(REALM, 0, 100)
    return grown


@pytest.fixture
async def filled(bigtable_emulator: str) -> AsyncIterator[Filled]:
    """Fill an instance; obsolete nodes of its trees are deleted at once."""
    backend = BigtableBackend(bigtable_emulator)
    async with backend.open() as store:
        grown = await fill(store)
        async with open_upkeep("bigtable:" + backend.rest) as upkeep:
            yield Filled(backend, store, upkeep, grown)


async def test_a_good_instance_has_no_findings(filled: Filled) -> None:
    """Nothing is wrong with what the store wrote, everything was looked at, and the log's end is told."""
    report = await filled.check()
    assert report.findings == []
    assert (report.realms, report.groups, report.records) == (1, 1, len(filled.grown.values))
    assert report.entries == 1 + RECORDS // 5 - 3
    assert report.events == 7
    assert [(tail.group, tail.last) for tail in report.tails] == [(GROUP, 13)]


async def test_divided_parts_find_the_same(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part with too many rows is divided, down to what cannot be; nothing is counted twice or left out."""
    whole = await filled.check()
    monkeypatch.setattr(check_trees, "PART_ROWS_MAX", 40)
    divided = await filled.check()
    assert divided.findings == []
    assert (divided.nodes, divided.records) == (whole.nodes, whole.records)


async def _leaf(filled: Filled) -> Row:
    return next(row for row in await filled.rows(1) if node_place(row.key)[1] == 256)


async def _alter_leaf(filled: Filled) -> str:
    row = await _leaf(filled)
    cell = row.cells[0]
    value = cell.value[:-1] + bytes((cell.value[-1] ^ 1,))
    await filled.table(1).mutate_row(row.key, (SetCell("f", cell.qualifier, value, cell.timestamp),))
    record, _ = node_place(row.key)
    return f"record {record.to_bytes(32, 'big').hex()} was altered"


async def _remove_leaf(filled: Filled) -> str:
    row = await _leaf(filled)
    await filled.table(1).mutate_row(row.key, (DeleteRow(),))
    return "is missing"


async def _remove_root(filled: Filled) -> str:
    await filled.table(1).mutate_row(row_key(b"", 0, filled.grown.tree.root), (DeleteRow(),))
    return "root node"


async def _remove_log_row(filled: Filled) -> str:
    await filled.table(0).mutate_row(keys.log_key(GROUP, 8), (DeleteRow(),))
    return "entries 6 to 8 are missing: the commit certificate"


async def _remove_log_end(filled: Filled) -> str:
    rows = [(keys.log_key(GROUP, index), (DeleteRow(),)) for index in range(9, 14)]
    await filled.table(0).mutate_rows(rows)
    return "entries 9 to 10 are missing"


async def _garble_log_row(filled: Filled) -> str:
    await filled.table(0).mutate_row(keys.log_key(GROUP, 9), (SetCell("f", keys.downward(9), b"\x00"),))
    return "is damaged"


async def _remove_certificate(filled: Filled) -> str:
    await filled.table(0).mutate_row(keys.certificate_key(GROUP, 6), (DeleteRow(),))
    return "entries 1 to 3 are missing and there is no commit certificate"


async def _remove_log(filled: Filled) -> str:
    await filled.table(0).mutate_rows([(row.key, (DeleteRow(),)) for row in await filled.rows(0)])
    return "no group owns the records"


async def _remove_event(filled: Filled) -> str:
    rows = await filled.rows(3)
    key = next(row.key for row in rows if any(cell.qualifier == keys.downward(8) for cell in row.cells))
    await filled.table(3).mutate_row(key, (DeleteColumn("f", keys.downward(8)),))
    return "events 8 to 8 are missing from the outbox"


async def _garble_event(filled: Filled) -> str:
    rows = await filled.rows(3)
    key = next(row.key for row in rows if any(cell.qualifier == keys.downward(8) for cell in row.cells))
    await filled.table(3).mutate_row(key, (SetCell("f", keys.downward(8), b"\xff"),))
    return "the event 8 of tenant acme is damaged"


async def _move_cursor(filled: Filled) -> str:
    value = (7).to_bytes(8, "big")
    await filled.table(3).mutate_row(keys.cursor_key(b"acme"), (SetCell("f", b"p", value, 0),))
    return "the counters tell 6 requests, the cursor 7"


@pytest.mark.parametrize(
    "plant",
    [
        _alter_leaf,
        _remove_leaf,
        _remove_root,
        _remove_log_row,
        _remove_log_end,
        _garble_log_row,
        _remove_certificate,
        _remove_log,
        _remove_event,
        _garble_event,
        _move_cursor,
    ],
)
async def test_planted_faults_are_found(filled: Filled, plant: Callable[[Filled], Awaitable[str]]) -> None:
    """Each fault is found and said where it is."""
    says = await plant(filled)
    findings = (await filled.check()).findings
    assert [line for line in findings if says in line], findings


async def test_a_stopped_check_goes_on(filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices that were done are not looked at again; what they gave is kept."""
    whole = await filled.check()
    monkeypatch.setattr(check_trees, "PART_ROWS_MAX", whole.nodes - 1)
    checkpoint = Checkpoint(tmp_path / "position", "x")

    def stop(phase: str, done: int, number: int) -> None:
        if phase.startswith("trees") and done == SLICES // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await filled.upkeep.check({}, stop, checkpoint)
    resumed = Checkpoint(tmp_path / "position", "x")
    assert resumed.is_resumed
    assert 0 < resumed.trees.records < whole.records
    report = await filled.check(resumed)
    assert (report.findings, report.records, report.nodes) == ([], whole.records, whole.nodes)


async def _leave_garbage(filled: Filled) -> int:
    """Write nodes that no tree needs, as an agent killed before their deletion leaves them; return how many."""
    rng = random.Random(9)
    adds = []
    for number in range(30):
        record = rng.randbytes(32)
        leaf = merkle_codec.Leaf(rng.randbytes(40)).encode()
        adds.append((row_key(record, 256, bytes([number]) * 32), leaf))
    await filled.store.nodes.write(REALM, adds)  # type: ignore[attr-defined]  # the back end's own
    return len(adds)


async def test_garbage_goes_and_nothing_else(filled: Filled) -> None:
    """Unneeded nodes are removed once they are old enough; all records can be read afterwards."""
    left = await _leave_garbage(filled)
    before = len(await filled.rows(1))
    (line,) = await filled.upkeep.collect(1_000_000, 3600.0, quiet)
    assert "0 unneeded ones removed" in line
    assert f"{left} are too young to go" in line
    assert len(await filled.rows(1)) == before
    (line,) = await filled.upkeep.collect(1_000_000, -60.0, quiet)
    assert f"{left} unneeded ones removed, 0 are too young" in line
    assert len(await filled.rows(1)) == before - left
    assert (await filled.check()).findings == []
    async with filled.backend.open() as fresh:
        filled.grown.store = fresh
        await filled.grown.check()


async def test_a_write_made_again_stays(filled: Filled) -> None:
    """Of a node that was written again only the writes that were seen go: here a needed row keeps all of its cells."""
    row = await _leaf(filled)
    await filled.table(1).mutate_row(row.key, (SetCell("f", b"\x99" * 24, row.cells[0].value),))
    await filled.upkeep.collect(1_000_000, -60.0, quiet)
    found = await filled.table(1).read_row(row.key)
    assert found is not None
    assert len(found.cells) == 2


async def test_nothing_goes_while_a_range_has_no_owner(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    """A range that no tail owns might be on its way: its nodes are not garbage, and the operator is told."""
    await _leave_garbage(filled)
    before = len(await filled.rows(1))
    filled.grown.index += 1
    await append(filled.store, [entry(filled.grown.index)])
    monkeypatch.setattr("juicebox_hsm.adapters.bigtable.garbage.COVERED_S", 0.05)
    with pytest.raises(StoreUnavailable, match="no group owns the records"):
        await filled.upkeep.collect(1_000_000, -60.0, quiet)
    assert len(await filled.rows(1)) == before


async def test_a_range_on_its_way_is_not_garbage(filled: Filled) -> None:
    """A tree that one group gave away and the other has not taken is needed; once taken and lost it is a finding."""
    moved = Partition(FULL_RANGE, filled.grown.tree.root)
    filled.grown.index += 1
    at = filled.grown.index
    out = entry(at)
    giving = type(out)(at, None, TransferringOut(OTHER_GROUP, moved, at), out.prev_mac, out.entry_mac, out.hsm)
    await append(filled.store, [giving])
    assert (await filled.check()).findings == []
    (line,) = await filled.upkeep.collect(1_000_000, -60.0, quiet)
    assert " 0 unneeded ones removed" in line
    await append(filled.store, [entry(1)], OTHER_GROUP)
    assert (await filled.check()).findings == []


async def test_a_damaged_tree_stops_the_removal(filled: Filled) -> None:
    """What a damaged node leads to cannot be known, so nothing more is removed."""
    await _leave_garbage(filled)
    await _remove_root(filled)
    before = len(await filled.rows(1))
    with pytest.raises(StoreInvalid, match="store check"):
        await filled.upkeep.collect(1_000_000, -60.0, quiet)
    assert len(await filled.rows(1)) == before


async def test_a_busy_realm_is_checked_and_cleaned(filled: Filled) -> None:
    """While records change and obsolete nodes are deleted, the check has no findings and no record is lost."""
    rng = random.Random(3)

    async def write() -> None:
        while True:
            await filled.grown.write({random_record(rng): rng.randbytes(40)})
            await trio.sleep(0.02)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        report = await filled.check()
        await filled.upkeep.collect(1_000_000, 5.0, quiet)
        nursery.cancel_scope.cancel()
    assert report.findings == []
    async with filled.backend.open() as fresh:
        filled.grown.store = fresh
        await filled.grown.check()


async def test_a_slept_append_writes_its_nodes_again(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    """An append whose nodes are no longer young, and may be gone, writes them again before its row."""
    slept = [0.0]
    monkeypatch.setattr("juicebox_hsm.adapters.bigtable.log.time.clock_gettime", lambda _: slept[0])
    table = filled.table(1)
    original = TreeNodes.write

    async def sleep_and_lose(
        nodes: TreeNodes, realm: RealmId, adds: Sequence[tuple[bytes, bytes]]
    ) -> dict[bytes, tuple[bytes, bytes]]:
        stored = await original(nodes, realm, adds)
        if slept[0] == 0.0:
            slept[0] = FRESH_S + 1
            await table.mutate_rows([(key, (DeleteRow(),)) for key, _ in adds])
        return stored

    monkeypatch.setattr(TreeNodes, "write", sleep_and_lose)
    await filled.grown.write({RecordId(b"\x42" * 32): b"slept"})
    assert (await filled.check()).findings == []


async def test_figures(filled: Filled) -> None:
    """Logs, trees and accounting are counted: rows, tombstones, nodes by kind, times, tenants."""
    stats = filled.store.stats
    assert stats is not None
    (log,) = await stats.log(REALM)
    assert (log.group, log.first_index, log.last_index, log.rows, log.entries) == (GROUP, 4, 13, 10, 10)
    assert (log.tombstones, log.expired_tombstones) == (3, 0)
    tree = await stats.tree(REALM, 5)
    assert tree.leaves >= len(filled.grown.values)
    assert tree.roots >= 1
    assert tree.rows == tree.leaves + tree.interior + tree.roots
    assert len(tree.prefixes) == 5
    assert all(prefix.oldest_ms is not None for prefix in tree.prefixes)
    day = 86_400_000
    await filled.store.accounting.write(
        REALM,
        [
            AccountingEvent("acme", RecordId(bytes(32)), 1, day * 5, registered=True),
            AccountingEvent("acme", RecordId(b"\x01" * 32), 2, day * 6, registered=True),
        ],
    )
    (users,) = await stats.users(REALM)
    assert (users.tenant, users.rows, users.records) == ("acme", 2, 2)


async def test_as_typed(filled: Filled) -> None:
    """The commands work on an instance: totals and exit 0, a fault and exit 5, figures, a report of what went."""

    async def run(*arguments: str) -> Result:
        return await trio.to_thread.run_sync(CliRunner().invoke, cli, [*arguments])

    store = ("--store", f"bigtable:{filled.backend.rest}")
    good = await run("store", "check", *store)
    assert (good.exit_code, good.stdout.splitlines()[-1]) == (0, "no findings"), good.output
    cleaned = await run("store", "gc", *store, "--older-than", "10m")
    assert cleaned.exit_code == 0, cleaned.output
    assert "0 unneeded ones removed" in cleaned.output
    refused = await run("store", "gc", *store, "--older-than", "1m")
    assert (refused.exit_code, "at least 5m" in refused.output) == (2, True)
    figures = await run("cluster", "table-stats", "log", REALM.hex(), *store, "--json")
    assert json.loads(figures.stdout)["groups"][0]["tombstones"] == 3, figures.output
    await _remove_event(filled)
    bad = await run("store", "check", *store, "--json")
    assert bad.exit_code == 5
    assert len(json.loads(bad.stdout)["findings"]) == 1
