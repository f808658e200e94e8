"""What only the Bigtable back end can get wrong: unknown outcomes, tombstones, late deletions (storage.md part C)."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from juicebox_hsm.adapters.bigtable import keys, outbox_removal
from juicebox_hsm.adapters.bigtable import outbox as outbox_module
from juicebox_hsm.adapters.bigtable.backend import open_bigtable, parse_address
from juicebox_hsm.adapters.bigtable.codec import DeleteRow, RowSet, Selection, SetCell
from juicebox_hsm.adapters.bigtable.log import BigtableLog
from juicebox_hsm.adapters.bigtable.log_rows import TOMBSTONE_CELL
from juicebox_hsm.adapters.bigtable.nodes import UPPER_BITS, TreeNodes
from juicebox_hsm.adapters.bigtable.outbox import BigtableOutbox
from juicebox_hsm.adapters.bigtable.published import BigtablePublished
from juicebox_hsm.adapters.bigtable.table import Endpoint, Table
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.stores.node_tuning import NodeTuning
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.consensus.types import Partition
from juicebox_hsm.errors import InvariantViolation, LocalError
from juicebox_hsm.host.events import EventKind, TenantCursor
from juicebox_hsm.host.log import AppendOutcome, Compacted, LogRow
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ids import RecordId
from juicebox_hsm.merkle.walk import Lost
from juicebox_hsm.ports.errors import StoreAmbiguous, StoreDamaged, StoreInvalid, StoreUnavailable
from juicebox_hsm.ports.store import Store
from tests.emulator.bigtable_backend import BigtableBackend, Faults
from tests.emulator.realm_data import (
    GROUP,
    OTHER_GROUP,
    REALM,
    Grown,
    append,
    batch,
    certificate,
    entry,
    event,
    intent,
)
from tests.patience import HANGS_S

pytestmark = pytest.mark.emulator
APPENDED, CONFLICT = AppendOutcome.APPENDED, AppendOutcome.CONFLICT
CHECK = "CheckAndMutateRow"
NOW_MS = 1_700_000_000_000
WEEK_MS = 7 * 86_400_000


@pytest.fixture
def backend(bigtable_emulator: str) -> BigtableBackend:
    """Name an instance that has no tables yet."""
    return BigtableBackend(bigtable_emulator)


@pytest.fixture
def faults() -> Faults:
    """Let nothing go wrong unless told."""
    return Faults()


@pytest.fixture
async def store(backend: BigtableBackend, faults: Faults) -> AsyncIterator[Store]:
    """Open a store through a transport that can be told to fail."""
    async with backend.open_with(faults) as opened:
        await opened.realms.create_shared()
        await opened.realms.create_realm(REALM)
        yield opened


def log_table(store: Store) -> Table:
    """Return the log's table."""
    assert isinstance(store.log, BigtableLog)
    return store.log._table(REALM)


def outbox_table(store: Store) -> Table:
    """Return the outbox's table."""
    assert isinstance(store.outbox, BigtableOutbox)
    return store.outbox._table.of(REALM)


def outbox_endpoint(store: Store) -> Endpoint:
    """Return the endpoint that a store uses."""
    assert isinstance(store.outbox, BigtableOutbox)
    return store.outbox._table._endpoint


def tree(store: Store) -> TreeNodes:
    """Return the tree nodes."""
    assert isinstance(store.nodes, TreeNodes)
    return store.nodes


# --- appends of unknown outcome ------------------------------------------------------------------------


async def test_append_whose_answer_is_lost(store: Store, faults: Faults) -> None:
    """A batch that landed is reported as appended though the answer never came; it is written once."""
    for first, last in ((1, 2), (3, 3), (4, 9)):
        faults.lose_answer.append(CHECK)
        before = faults.count(CHECK)
        assert await append(store, batch(first, last)) is APPENDED
        assert faults.count(CHECK) == before + 1
    assert await store.log.read_from(REALM, GROUP, 1, 100) == batch(1, 9)


async def test_append_whose_request_is_lost(store: Store, faults: Faults) -> None:
    """A batch that never arrived is tried again, also as the first of a log."""
    for first, last in ((1, 2), (3, 4)):
        faults.lose_request += [CHECK, CHECK]
        assert await append(store, batch(first, last)) is APPENDED
        assert not faults.lose_request
    assert await store.log.read_from(REALM, GROUP, 1, 100) == batch(1, 4)


async def test_append_that_lands_between_two_attempts(backend: BigtableBackend, store: Store, faults: Faults) -> None:
    """A first attempt that is carried out late, after it was looked for, is recognised by the second."""
    await append(store, batch(1, 3))
    faults.lose_request.append(CHECK)
    async with backend.open() as late:

        async def land() -> None:
            assert await append(late, batch(4, 5)) is APPENDED

        faults.lose_answer.append("ReadRows")  # the look that finds nothing; its answer comes after the landing
        faults.between = land
        assert await append(store, batch(4, 5)) is APPENDED
    assert await store.log.read_from(REALM, GROUP, 1, 100) == batch(1, 5)


async def test_append_lost_against_another_leader(backend: BigtableBackend, store: Store, faults: Faults) -> None:
    """After a lost request another leader's batch, at the same or an overlapping index, is a conflict."""
    async with backend.open() as other:
        for first, theirs, ours in ((1, 2, 2), (3, 3, 5)):

            async def overtake(first: int = first, theirs: int = theirs) -> None:
                assert await append(other, batch(first, theirs)) is APPENDED

            # the request is lost; before the log is looked at the other leader writes
            faults.lose_request.append(CHECK)
            faults.lose_answer.append("ReadRows")
            faults.between = overtake
            assert await append(store, [entry(first, 7, 0), *batch(first + 1, ours, 7)]) is CONFLICT
    assert await store.log.read_from(REALM, GROUP, 1, 100) == batch(1, 3)


async def test_append_with_a_rival_on_top(backend: BigtableBackend, store: Store, faults: Faults) -> None:
    """Our row landed, the answer was lost, another leader built on it: conflict is safe, and the log is whole."""
    await append(store, batch(1, 2))
    async with backend.open() as other:

        async def overtake() -> None:
            assert await append(other, batch(5, 6)) is APPENDED

        faults.lose_answer.append(CHECK)
        faults.between = overtake
        assert await append(store, batch(3, 4)) is CONFLICT
    assert await store.log.read_from(REALM, GROUP, 1, 100) == batch(1, 6)
    assert await append(store, batch(7, 7)) is APPENDED, "the tail is learnt anew"


@pytest.mark.parametrize("lost", ["lose_answer", "lose_request"])
async def test_append_of_unknown_outcome(store: Store, faults: Faults, lost: str) -> None:
    """When the log cannot be read after a lost answer the outcome is unknown, and said to be."""
    await append(store, batch(1, 1))
    getattr(faults, lost).append(CHECK)

    faults.dead.add("ReadRows")
    with pytest.raises(StoreAmbiguous, match="cannot be read"):
        await append(store, batch(2, 3))
    faults.dead.clear()
    if lost == "lose_answer":
        assert await append(store, batch(2, 3)) is CONFLICT, "the caller must not assume; the tail moved"
        assert await append(store, batch(4, 4)) is APPENDED
    else:
        assert await append(store, batch(2, 3)) is APPENDED


async def test_append_to_a_store_that_is_away(store: Store, faults: Faults) -> None:
    """Failures before the conditional write say that nothing happened; endless ones of the write itself do not."""
    await append(store, batch(1, 1))
    grown = await Grown.start(store, group=OTHER_GROUP)
    proof = (await store.nodes.read_proofs(REALM, grown.partition, [RecordId(b"\x01" * 32)]))[0]
    assert isinstance(proof, bytes)
    _, delta = grown.tree.update(proof, b"value")
    faults.dead.add("MutateRows")
    with pytest.raises(StoreUnavailable):
        await append(store, [entry(2, partition=grown.partition)], OTHER_GROUP, delta)
    assert await store.log.read_last(REALM, OTHER_GROUP) == entry(1, partition=await start_of(store))
    faults.dead = {CHECK}
    with pytest.raises(StoreAmbiguous, match="not seen"):
        await append(store, batch(2, 2))
    faults.dead.clear()
    assert await append(store, batch(2, 2)) is APPENDED


async def start_of(store: Store) -> Partition | None:
    """Return the partition of the other group's first entry."""
    read = await store.log.read_from(REALM, OTHER_GROUP, 1, 1)
    assert isinstance(read, list)
    return read[0].partition


async def test_append_is_not_cancelled_half_way(store: Store) -> None:
    """A cancelled task finishes its append first: what it learns is true."""
    outcomes = []
    with trio.CancelScope() as scope:
        scope.cancel()
        outcomes.append(await append(store, batch(1, 3)))
    assert outcomes == [APPENDED]
    assert await store.log.read_last(REALM, GROUP) == entry(3)


async def test_a_batch_must_be_chained(store: Store) -> None:
    """Batches with holes, wrong macs, no or too many entries are mistakes of ours, not conflicts."""
    for wrong in ([], [entry(1), entry(3)], [entry(1), entry(2, previous_salt=5)], batch(1, 101)):
        with pytest.raises(InvariantViolation):
            await append(store, wrong)
    with pytest.raises(InvariantViolation):
        await store.log.append(REALM, GROUP, batch(1, 2), [None], b"\x01\x50" + bytes(8))


# --- tombstones ----------------------------------------------------------------------------------------


async def test_a_tombstone_at_the_end_is_read_again(store: Store, faults: Faults) -> None:
    """A scan that chose a row just before it was compacted looks again and finds the row after it."""
    await append(store, batch(1, 2))
    table = log_table(store)
    await table.mutate_row(keys.log_key(GROUP, 3), (TOMBSTONE_CELL,))

    reads = faults.count("ReadRows")

    async def mend() -> None:
        while faults.count("ReadRows") < reads + 2:
            await trio.lowlevel.checkpoint()
        await table.mutate_row(keys.log_key(GROUP, 3), (DeleteRow(),))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(mend)
        assert await store.log.read_last(REALM, GROUP) == entry(2)
    assert faults.count("ReadRows") > reads + 1


async def test_reading_over_gaps_and_tombstones(store: Store) -> None:
    """Tombstones and rows that are gone altogether read as Compacted, from whatever index."""
    for first in range(1, 10, 2):
        await append(store, batch(first, first + 1))
    table = log_table(store)
    rows = await store.log.list_rows(REALM, GROUP, 9)
    await store.log.compact(REALM, GROUP, rows[:3])
    await table.mutate_row(keys.log_key(GROUP, 1), (DeleteRow(),))  # garbage collection took the oldest
    for index in (1, 2, 3, 6):
        assert await store.log.read_from(REALM, GROUP, index, 10) == Compacted(index)
    assert await store.log.read_from(REALM, GROUP, 7, 10) == batch(7, 10)
    assert await store.log.read_from(REALM, GROUP, 8, 10) == batch(8, 10)
    await table.mutate_row(keys.log_key(GROUP, 3), (DeleteRow(),))
    await table.mutate_row(keys.log_key(GROUP, 5), (DeleteRow(),))
    assert await store.log.read_from(REALM, GROUP, 4, 10) == Compacted(4)
    assert await append(store, batch(1, 2)) is CONFLICT, "even when the tombstone of the first row is gone"


async def test_an_old_leader_collides_with_a_tombstone(backend: BigtableBackend, store: Store) -> None:
    """A leader that believes in an outdated tail cannot write into compacted rows: their keys stay taken."""
    await append(store, batch(1, 2))
    async with backend.open() as old:
        assert await append(old, batch(3, 3)) is APPENDED  # `old` remembers 3 as the tail
        for index in range(4, 8):
            assert await append(store, batch(index, index)) is APPENDED
        await store.log.compact(REALM, GROUP, await store.log.list_rows(REALM, GROUP, 7))
        assert await append(old, batch(4, 6, salt=0)) is CONFLICT
    assert await store.log.read_from(REALM, GROUP, 7, 10) == batch(7, 7)


async def test_compaction_leaves_tombstones_alone(store: Store, faults: Faults) -> None:
    """Compacting twice writes nothing the second time: a rewritten tombstone would live a week longer."""
    for index in range(1, 6):
        await append(store, batch(index, index))
    rows = await store.log.list_rows(REALM, GROUP, 5)
    await store.log.compact(REALM, GROUP, rows)
    stones = await log_table(store).read_rows(RowSet(ranges=(keys.log_range(GROUP, 4, 1),)))
    again = [LogRow(row.first_index, is_tombstone=True) for row in rows]
    written = faults.count("MutateRows")
    await store.log.compact(REALM, GROUP, again)
    assert faults.count("MutateRows") == written
    assert await log_table(store).read_rows(RowSet(ranges=(keys.log_range(GROUP, 4, 1),))) == stones
    assert await store.log.list_rows(REALM, GROUP, 5) == []


async def test_the_newest_row_is_never_compacted(store: Store) -> None:
    """Appends are compared with the newest row, so it stays, whatever the caller asks."""
    await append(store, batch(1, 2))
    await append(store, batch(3, 4))
    await store.log.compact(REALM, GROUP, [LogRow(1, is_tombstone=False), LogRow(3, is_tombstone=False)])
    assert await store.log.read_last(REALM, GROUP) == entry(4)
    await store.log.compact(REALM, OTHER_GROUP, [LogRow(1, is_tombstone=False)])
    assert await store.log.read_last(REALM, OTHER_GROUP) is None


async def test_listing_stops_at_a_page_of_tombstones(store: Store, faults: Faults) -> None:
    """A log with a long compacted past is listed in time of its live part."""
    for index in range(1, 331):
        await append(store, batch(index, index))
    await store.log.compact(REALM, GROUP, await store.log.list_rows(REALM, GROUP, 301))
    before = faults.count("ReadRows")
    rows = await store.log.list_rows(REALM, GROUP, 331)
    assert [row.first_index for row in rows if not row.is_tombstone] == list(range(301, 331))
    assert rows[0] == LogRow(301, is_tombstone=False)
    assert faults.count("ReadRows") - before == 2


async def test_a_follower_at_the_end_reads_once(store: Store, faults: Faults) -> None:
    """Who has read up to the end pays one scan per question, also when there is something new."""
    await append(store, batch(1, 5))
    assert await store.log.read_from(REALM, GROUP, 2, 100) == batch(2, 5)
    before = faults.count("ReadRows")
    assert await store.log.read_from(REALM, GROUP, 6, 100) == []
    assert faults.count("ReadRows") == before + 1
    await append(store, batch(6, 9))
    before = faults.count("ReadRows")
    assert await store.log.read_from(REALM, GROUP, 6, 100) == batch(6, 9)
    assert faults.count("ReadRows") == before + 1


async def test_damaged_rows_are_named(store: Store) -> None:
    """A log row that is not ours is reported, not crashed on."""
    await append(store, batch(1, 2), intents=[intent(1), None])
    table = log_table(store)
    for value in (b"", b"\xff\xff", b"\xa0"):
        await table.mutate_row(keys.log_key(GROUP, 3), (DeleteRow(), SetCell("f", keys.downward(3), value)))
        with pytest.raises(StoreDamaged, match="log row of entry 3"):
            await store.log.read_last(REALM, GROUP)
    await store.log.write_certificate(REALM, GROUP, certificate(5))
    await table.mutate_row(keys.certificate_key(GROUP, 5), (DeleteRow(), SetCell("f", b"c", b"x")))
    with pytest.raises(StoreDamaged, match="commit certificate at index 5"):
        await store.log.read_certificate(REALM, GROUP)


# --- tree nodes ----------------------------------------------------------------------------------------


async def node_rows(store: Store) -> dict[bytes, list[bytes]]:
    """Return row key -> instance ids of all stored nodes."""
    rows = await tree(store).table(REALM).read_rows(RowSet(ranges=(keys.whole_table(),)))
    return {row.key: [cell.qualifier for cell in row.cells] for row in rows}


async def test_late_deletion_spares_what_was_written_again(backend: BigtableBackend) -> None:
    """Add a; add b, remove a; add a, remove b, with deletions that come late: a stays, b goes."""
    one, two = b"1" * 40, b"2" * 40
    faults = Faults()
    record = RecordId(b"\x77" * 32)
    async with backend.open_with(faults, deletion_delay_s=0.2) as store:
        await store.realms.create_realm(REALM)
        grown = await Grown.start(store)
        for value in (one, two, one):
            await grown.write({record: value})
        assert len(await node_rows(store)) == 5, "empty root, and root and leaf of both values"
    async with backend.open() as store:
        left = await node_rows(store)
        assert len(left) == 2
        assert all(len(instances) == 1 for instances in left.values())
        grown.store = store
        await grown.check()


async def test_removed_nodes_are_readable_for_a_while(backend: BigtableBackend) -> None:
    """A reader with the former root finishes while the deletion waits, and gets no proof after it."""
    record = RecordId(b"\x77" * 32)
    async with backend.open_with(Faults(), deletion_delay_s=0.3) as store, backend.open() as reader:
        await store.realms.create_realm(REALM)
        grown = await Grown.start(store)
        await grown.write({record: b"old"})
        before = await grown.write({record: b"new"})
        proof = (await reader.nodes.read_proofs(REALM, before, [record]))[0]
        assert isinstance(proof, bytes)
        assert b"old" in proof
        with trio.fail_after(HANGS_S):
            while len(await node_rows(store)) > 2:
                pass
        tree(reader).cache.__init__(100)  # type: ignore[misc] # forget, as another process would
        assert await reader.nodes.read_proofs(REALM, before, [record]) == [Lost(0, before.root_hash)]
        await grown.check()


async def test_removal_without_a_remembered_instance(backend: BigtableBackend) -> None:
    """A writer whose cache is empty reads which write it removes; a node that is gone already is skipped."""
    rng = random.Random(3)
    record = RecordId(rng.randbytes(32))
    async with backend.open() as store:
        await store.realms.create_realm(REALM)
        grown = await Grown.start(store)
        await grown.write({record: b"a"})
        proof = (await store.nodes.read_proofs(REALM, grown.partition, [record]))[0]
    async with backend.open() as store:
        grown.store = store
        assert isinstance(proof, bytes)
        _, delta = grown.tree.update(proof, b"b")
        leaf = max(await node_rows(store), key=len)
        await tree(store).table(REALM).mutate_row(leaf, (DeleteRow(),))
        await grown.commit(delta)
        grown.values[record] = b"b"
    async with backend.open() as store:
        grown.store = store
        await grown.check()
        assert len(await node_rows(store)) == 2


async def test_an_abandoned_append_removes_nothing(backend: BigtableBackend, store: Store) -> None:
    """An append that conflicts leaves the tree it wanted to change whole."""
    record = RecordId(b"\x10" * 32)
    grown = await Grown.start(store)
    await grown.write({record: b"value"})
    proof = (await store.nodes.read_proofs(REALM, grown.partition, [record]))[0]
    assert isinstance(proof, bytes)
    _, delta = grown.tree.update(proof, b"other")
    async with backend.open() as rival:
        await append(rival, [entry(3, 1, 0)])
    assert await append(store, [entry(3, 0)], delta=delta) is CONFLICT
    await trio.sleep(0.1)
    async with backend.open() as reader:
        last = await reader.log.read_from(REALM, GROUP, 2, 1)
        assert isinstance(last, list)
        assert last[0].partition is not None
        assert (await reader.nodes.read_proofs(REALM, last[0].partition, [record]))[0] is not None


async def test_cache_smaller_than_a_path(backend: BigtableBackend, bigtable_emulator: str) -> None:
    """Proofs are right, only slow, when not even one path fits the cache."""
    async with backend.open() as store:
        await store.realms.create_realm(REALM)
        grown, rng = await Grown.start(store), random.Random(4)
        await grown.write({RecordId(rng.randbytes(32)): b"v" for _ in range(60)})
    async with open_bigtable(backend.rest, node_tuning=NodeTuning(cache_nodes=2), tuning=backend.tuning) as small:
        grown.store = small
        await grown.check()


async def test_parts_of_operations_are_measured(backend: BigtableBackend) -> None:
    """An append's rows and its log row alone have time and errors of their own."""
    metrics = Metrics()
    async with open_bigtable(backend.rest, tuning=backend.tuning, metrics=metrics) as store:
        await store.realms.create_shared()
        await store.realms.create_realm(REALM)
        await Grown.start(store)
        for name in ("append_inner", "log_append"):
            assert metrics.timer(f"store_client.{name}.time", result="ok").count == 1


async def test_many_cold_paths_are_few_requests(backend: BigtableBackend) -> None:
    """A batch of unknown paths costs one request per 8 and one per upper level; a known one none."""
    async with backend.open() as store:
        await store.realms.create_realm(REALM)
        grown, rng = await Grown.start(store), random.Random(4)
        await grown.write({RecordId(rng.randbytes(32)): b"v" for _ in range(40)})
    faults = Faults()
    async with backend.open_with(faults) as cold:
        grown.store = cold
        before = faults.count("ReadRows")
        await grown.check()
        cost = faults.count("ReadRows") - before
        assert 5 <= cost <= 5 + UPPER_BITS
        await grown.check()
        assert faults.count("ReadRows") - before == cost


async def test_large_reads_are_limited(backend: BigtableBackend, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """While as many large reads run as there are permits, the next waits, and is refused as busy in the end."""
    grown = await Grown.start(store)
    await grown.write({RecordId(bytes([n]) * 32): b"value" for n in range(20)})
    monkeypatch.setattr("juicebox_hsm.adapters.bigtable.nodes.LARGE_READ_WAIT_S", 0.05)
    narrow = NodeTuning(large_read_permits=3, large_read_ranges=1)
    async with open_bigtable(backend.rest, node_tuning=narrow, tuning=backend.tuning) as cold:
        nodes = tree(cold)
        holders = [object() for _ in range(3)]
        for holder in holders:
            nodes._large_reads.acquire_on_behalf_of_nowait(holder)
        with pytest.raises(StoreUnavailable, match="busy"):
            await cold.nodes.read_proofs(REALM, grown.partition, [RecordId(b"\x10" * 32)])
        with pytest.raises(StoreUnavailable, match="busy"):
            await cold.nodes.read_proofs(REALM, grown.partition, [RecordId(bytes([n]) * 32) for n in range(20)])
        nodes._large_reads.release_on_behalf_of(holders[0])
        assert (await cold.nodes.read_proofs(REALM, grown.partition, [RecordId(b"\x10" * 32)]))[0] is not None


# --- outbox --------------------------------------------------------------------------------------------


async def test_events_whose_answer_is_lost(store: Store, faults: Faults) -> None:
    """Events keep one number each, whether the request or the answer was lost, for new and known tenants."""
    for number in range(1, 9):
        (faults.lose_answer if number % 2 else faults.lose_request).append(CHECK)
        assert await store.outbox.record(REALM, [event(2 * number), event(2 * number + 1)], {}) == {"acme": 2 * number}
    rows = await store.outbox.read(REALM, "acme", 0, 100)
    assert [row.new.index for row in rows] == list(range(2, 18))


async def test_events_lost_against_another_writer(backend: BigtableBackend, store: Store, faults: Faults) -> None:
    """Who loses the race for a number takes the next; with its request lost it does not take the rival's row for its
    own."""
    await store.outbox.record(REALM, [event(1)], {})
    async with backend.open() as other:
        assert await other.outbox.record(REALM, [event(2)], {}) == {"acme": 2}
        assert await store.outbox.record(REALM, [event(3)], {}) == {"acme": 3}
        assert await other.outbox.record(REALM, [event(4)], {}) == {"acme": 4}
        faults.lose_request.append(CHECK)
        assert await store.outbox.record(REALM, [event(5)], {}) == {"acme": 5}
    rows = await store.outbox.read(REALM, "acme", 0, 100)
    assert [row.new.index for row in rows] == [1, 2, 3, 4, 5]


async def test_events_of_unknown_outcome(store: Store, faults: Faults) -> None:
    """A record that may have happened is never called harmless to repeat, nor one of which a part happened."""
    await store.outbox.record(REALM, [event(1)], {})
    faults.lose_answer.append(CHECK)
    faults.dead.add("ReadRows")
    with pytest.raises(StoreAmbiguous):
        await store.outbox.record(REALM, [event(2)], {})
    faults.dead = {CHECK}
    with pytest.raises(StoreAmbiguous):
        await store.outbox.record(REALM, [event(3)], {})
    faults.dead.clear()
    assert await store.outbox.record(REALM, [event(3)], {}) == {"acme": 3}
    faults.between = lambda: faults.dead.add("ReadRows")
    faults.lose_answer.append("ReadRows")  # of the second tenant's tail, after the first tenant's row is written
    with pytest.raises(StoreAmbiguous, match="some events"):
        await store.outbox.record(REALM, [event(4), event(5, "other")], {})
    faults.dead.clear()
    rows = await store.outbox.read(REALM, "acme", 0, 100)
    assert [row.new.index for row in rows] == [1, 2, 3, 4]
    faults.dead.add("ReadRows")
    with pytest.raises(StoreUnavailable):
        await store.outbox.record(REALM, [event(6, "fresh")], {})


async def test_removed_rows_keep_their_numbers_taken(backend: BigtableBackend, store: Store) -> None:
    """A writer that slept since before others recorded, published and removed events does not use numbers again."""
    async with backend.open() as sleeper:
        assert await sleeper.outbox.record(REALM, [event(1)], {}) == {"acme": 1}
        for number in range(2, 8):
            await store.outbox.record(REALM, [event(number)], {})
        assert await store.outbox.advance(REALM, "acme", 0, 7, "20231114", {})
        await store.outbox.record(REALM, [], {GROUP: 7})
        assert await store.outbox.remove_published(REALM, NOW_MS, 100) == 6
        assert await store.outbox.cursors(REALM) == [TenantCursor("acme", 7, 7)]
        assert await sleeper.outbox.record(REALM, [event(8)], {}) == {"acme": 8}
    assert [row.seq for row in await store.outbox.read(REALM, "acme", 0, 100)] == [7, 8]


async def test_a_cursor_whose_answer_is_lost_counts_once(store: Store, faults: Faults) -> None:
    """Counters are exact whatever is lost on the way there or back."""
    await store.outbox.record(REALM, [event(number) for number in range(1, 21)], {})
    for at in range(20):
        rules = (faults.lose_answer, faults.lose_request, [])[at % 3]
        rules.append(CHECK)
        assert await store.outbox.advance(REALM, "acme", at, at + 1, "20231114", {EventKind.RECOVER2: 1})
    assert await store.outbox.counters(REALM, "acme") == {"20231114": {EventKind.RECOVER2: 20}}


async def test_a_cursor_moved_by_another_meanwhile(backend: BigtableBackend, store: Store, faults: Faults) -> None:
    """A dispatcher whose answer was lost learns that another went on, and its rows were counted once."""
    await store.outbox.record(REALM, [event(number) for number in range(1, 4)], {})
    counts = {EventKind.RECOVER2: 1}
    async with backend.open() as other:

        async def go_on() -> None:
            assert await other.outbox.advance(REALM, "acme", 1, 2, "20231114", counts)

        faults.lose_answer.append(CHECK)
        faults.between = go_on
        assert not await store.outbox.advance(REALM, "acme", 0, 1, "20231114", counts)
    assert await store.outbox.advance(REALM, "acme", 2, 3, "20231114", counts)
    assert await store.outbox.counters(REALM, "acme") == {"20231114": {EventKind.RECOVER2: 3}}


async def test_cursors_of_many_tenants(backend: BigtableBackend, store: Store, faults: Faults) -> None:
    """Tenants are found wherever they sort, new ones too, in two reads when all are known."""
    names = [f"t{number:02}" for number in (5, 1, 9, 3)] + ["t05x", "a", "z\u00e9"]
    for place, name in enumerate(names):
        await store.outbox.record(REALM, [event(n, name) for n in range(1, place + 2)], {GROUP: 3})
    expected = [TenantCursor(name, 0, names.index(name) + 1) for name in sorted(names)]
    async with backend.open_with(faults) as other:
        for _ in range(2):
            before = faults.count("ReadRows")
            assert await other.outbox.cursors(REALM) == expected
        assert faults.count("ReadRows") - before == 2
        await store.outbox.record(REALM, [event(9, "t04"), event(10, "t05")], {})
        found = {cursor.tenant: cursor.tail for cursor in await other.outbox.cursors(REALM)}
        assert found["t04"] == 1
        assert found["t05"] == 2


async def test_removal_goes_on_after_a_restart(backend: BigtableBackend, store: Store, faults: Faults) -> None:
    """Thousands of published events go in bounded slices; the next process does not begin at the first one again."""
    body: dict[str, str | int] = {"event": "registered"}
    for at in range(0, 3000, 100):
        rows = [event(at + n, body=body if n == 50 else None, when_ms=NOW_MS) for n in range(1, 101)]
        await store.outbox.record(REALM, rows, {})
    assert await store.outbox.advance(REALM, "acme", 0, 3000, "20231114", {})
    await store.outbox.record(REALM, [], {GROUP: 3000})
    removed = [await store.outbox.remove_published(REALM, NOW_MS, 700) for _ in range(6)]
    assert removed == [700, 700, 700, 700, 169, 0], "all but 30 with a body and the newest"
    assert await store.outbox.remove_published(REALM, NOW_MS + WEEK_MS, 10_000) == 30
    assert [row.seq for row in await store.outbox.read(REALM, "acme", 0, 5000)] == [3000]
    async with backend.open() as other:
        await other.outbox.record(REALM, [event(3001)], {})
        hint = await outbox_table(other).read_row(keys.cursor_key(b"acme"), Selection(family="f", qualifier=b"r"))
        assert hint is not None
        assert int.from_bytes(hint.cells[0].value, "big") == 2999


async def test_a_group_that_never_settles_fills_no_memory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsettled events are remembered up to a bound; there cleaning stops reading, and goes on once they settle."""
    monkeypatch.setattr(outbox_removal, "UNSETTLED_MAX", 10)
    monkeypatch.setattr(outbox_removal, "WINDOW", 4)
    for at in range(0, 60, 10):
        rows = [event(at + n, group=OTHER_GROUP, when_ms=NOW_MS) for n in range(1, 11)]
        await store.outbox.record(REALM, rows, {})
    assert await store.outbox.advance(REALM, "acme", 0, 60, "20231114", {})
    assert isinstance(store.outbox, BigtableOutbox)
    for _ in range(3):
        assert await store.outbox.remove_published(REALM, NOW_MS, 100) == 0
        assert len(store.outbox._removal._places[REALM, "acme"].unsettled) == 12, "one window beyond the bound"
    await store.outbox.record(REALM, [], {OTHER_GROUP: 60})
    assert sum([await store.outbox.remove_published(REALM, NOW_MS, 100) for _ in range(9)]) == 59
    assert not store.outbox._removal._places[REALM, "acme"].unsettled


async def test_a_race_that_is_always_lost_ends(
    backend: BigtableBackend, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that another is ahead of each time gives up after so many, with nothing written; later it goes on."""
    monkeypatch.setattr(outbox_module, "CONFLICTS_MAX", 4)
    learn = BigtableOutbox._learn_tail
    async with backend.open() as rival:
        taken = itertools.count(100)

        async def learn_too_late(self: BigtableOutbox, *place: Any) -> None:
            await learn(self, *place)
            if self is store.outbox:
                await rival.outbox.record(REALM, [event(next(taken))], {})

        monkeypatch.setattr(BigtableOutbox, "_learn_tail", learn_too_late)
        with pytest.raises(StoreUnavailable, match="lost 4 races"):
            await store.outbox.record(REALM, [event(1)], {})
        monkeypatch.setattr(BigtableOutbox, "_learn_tail", learn)
        assert await store.outbox.record(REALM, [event(1)], {}) == {"acme": 5}
    assert [row.new.index for row in await store.outbox.read(REALM, "acme", 0, 9)] == [100, 101, 102, 103, 1]


async def test_tenant_names_that_no_row_can_carry(store: Store) -> None:
    """Names with control characters, empty or too long ones are refused before anything is written."""
    for name in ("", "a\x00b", "a\x01", "x" * 257):
        with pytest.raises(LocalError, match="tenant name"):
            await store.outbox.record(REALM, [event(1, name)], {})


async def test_acknowledgements_are_found_and_cleaned_up(
    backend: BigtableBackend, store: Store, faults: Faults
) -> None:
    """Thousands of acknowledged events cost no reads later, here and in the next process; gaps stay deliverable."""
    published = BigtablePublished(outbox_endpoint(store))
    body: dict[str, str | int] = {"event": "registered"}
    for at in range(0, 3000, 100):
        await store.outbox.record(REALM, [event(at + n, body=body) for n in range(1, 101)], {})
    assert await store.outbox.advance(REALM, "acme", 0, 2900, "20231114", {})
    await published.mark_acknowledged(REALM, "acme", [*range(1, 2700), *range(2710, 2800), 2950, 5000])
    left = await published.unacknowledged(REALM, "acme", 0, 5000)
    assert [row.seq for row in left] == [*range(2700, 2710), *range(2800, 2901)]
    assert [row.seq for row in await published.unacknowledged(REALM, "acme", 2703, 5)] == list(range(2704, 2709))
    before = faults.count("ReadRows")
    again = BigtablePublished(outbox_endpoint(store))
    assert [row.seq for row in await again.unacknowledged(REALM, "acme", 0, 1)] == [2700]
    assert faults.count("ReadRows") - before == 3
    assert await store.outbox.advance(REALM, "acme", 2900, 3000, "20231114", {})
    late = await again.unacknowledged(REALM, "acme", 2899, 5000)
    assert [row.seq for row in late] == list(range(2900, 3001)), "what was not published could not be acknowledged"
    blocks = await outbox_table(store).read_rows(RowSet(ranges=(keys.acknowledged_range(b"acme", 100),)))
    assert len(blocks) == 1
    assert [cursor.tail for cursor in await store.outbox.cursors(REALM)] == [3000]


# --- cluster facts -------------------------------------------------------------------------------------


async def test_leases_whose_answer_is_lost(store: Store, faults: Faults) -> None:
    """A lease that was granted or extended is ours although the answer was lost; a lost request says try again."""
    faults.lose_answer.append(CHECK)
    lease = await store.leases.obtain("name", "me", 1_000, 3_000)
    assert lease is not None
    assert await store.leases.list() == [lease]
    faults.lose_answer.append(CHECK)
    extended = await store.leases.extend(lease, 2_000, 3_000)
    assert extended is not None
    assert await store.leases.list() == [extended]
    faults.lose_request.append(CHECK)
    with pytest.raises(StoreUnavailable):
        await store.leases.extend(extended, 2_500, 3_000)
    faults.lose_answer.append(CHECK)
    await store.leases.terminate(extended)
    assert await store.leases.list() == []
    faults.lose_request.append(CHECK)
    with pytest.raises(StoreUnavailable):
        await store.leases.obtain("name", "me", 1_000, 3_000)


async def test_claims_whose_answer_is_lost(store: Store, faults: Faults) -> None:
    """A claimed setting is what stands, whatever was lost."""
    for name, rules in (("a", faults.lose_answer), ("b", faults.lose_request)):
        rules.append(CHECK)
        assert await store.settings.claim(name, b"mine") == b"mine"
        assert await store.settings.claim(name, b"theirs") == b"mine"
        assert await store.settings.get(name) == b"mine"


async def test_a_store_without_tables(backend: BigtableBackend) -> None:
    """Before the shared tables exist cluster facts read as empty, and a realm that was not created is named."""
    async with backend.open() as store:
        assert await store.discovery.list() == []
        assert await store.tenants.list() == {}
        assert await store.leases.list() == []
        assert await store.settings.get("x") is None
        assert await store.settings.list("") == {}
        assert await store.realms.list_realms() == []
        with pytest.raises(StoreInvalid, match="log"):
            await store.log.read_last(REALM, GROUP)


# --- opening -------------------------------------------------------------------------------------------


async def test_opening_by_url(
    backend: BigtableBackend, bigtable_emulator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator is taken from the URL or the environment, and the store says what it is."""
    monkeypatch.setenv("BIGTABLE_EMULATOR_HOST", bigtable_emulator)
    name = backend.rest.partition("?")[0]
    async with open_store(f"bigtable:{name}") as store:
        assert store.description == f"bigtable:{name} (emulator {bigtable_emulator})"
        await store.realms.create_shared()
    monkeypatch.setenv("BIGTABLE_EMULATOR_HOST", "127.0.0.1:1")
    async with open_store(f"bigtable:{backend.rest}") as store:
        assert await store.settings.list("") == {}, "the self-test leaves nothing behind"


async def test_a_service_that_cannot_decide(backend: BigtableBackend) -> None:
    """Opening fails with a hint at the application profile when conditional writes are refused or always match."""
    async with backend.open() as store:
        await store.realms.create_shared()
    for wrong in (Faults(decision=True), Faults(decision=False), Faults(dead={CHECK}, code="FAILED_PRECONDITION")):
        with pytest.raises(LocalError, match="single-cluster"):
            async with backend.open_with(wrong):
                pass


async def test_who_opens_before_there_is_a_table_tests_later(backend: BigtableBackend, faults: Faults) -> None:
    """A process that finds no tables when it opens tests conditional writes before its first registration, append or
    lease, once; on a service that cannot decide none of them happens."""
    async with backend.open_with(faults) as early, backend.open() as manager:
        assert faults.count(CHECK) == 0
        await manager.realms.create_shared()
        await manager.realms.create_realm(REALM)
        faults.decision = False
        with pytest.raises(LocalError, match="single-cluster"):
            await early.discovery.register(ServiceKind.AGENT, "tls://a:1", NOW_MS)
        with pytest.raises(LocalError, match="single-cluster"):
            await append(early, batch(1, 2))
        with pytest.raises(LocalError, match="single-cluster"):
            await early.leases.obtain("some-cm", "a", NOW_MS, 3_000)
        assert await manager.discovery.list() == []
        assert await manager.log.read_from(REALM, GROUP, 1, 10) == []
        faults.decision = None
        faults.calls.clear()
        await early.discovery.register(ServiceKind.AGENT, "tls://a:1", NOW_MS)
        tested = faults.count(CHECK)
        assert tested > 0
        assert await append(early, batch(1, 2)) is APPENDED
        await early.discovery.register(ServiceKind.AGENT, "tls://a:1", NOW_MS)
        assert faults.count(CHECK) == tested + 1, "only the append itself"


async def test_errors_pass_through_unchanged(backend: BigtableBackend) -> None:
    """What the body of the open store raises arrives as it was raised, not wrapped by our tasks."""
    with pytest.raises(LookupError, match="ours"):
        async with backend.open():
            raise LookupError("ours")
    with trio.move_on_after(0.05) as scope:
        async with backend.open():
            await trio.sleep_forever()
    assert scope.cancelled_caught


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "p",
        "p/",
        "/i",
        "p/i/x",
        "P/i",
        "p/i?",
        "p/i?x=1",
        "p/i?emulator=nowhere",
        "p/i?timeout=5",
        "p/i?timeout=0s",
        "p/i?keepalive-while-idle=no",
    ],
)
def test_addresses_that_are_none(rest: str) -> None:
    """Anything but PROJECT/INSTANCE with known settings is refused in one line."""
    with pytest.raises(LocalError) as caught:
        parse_address(rest, None)
    assert "\n" not in str(caught.value)
