"""The driver keeps the semantics of storage.md 8 on the emulator: ranges, versions, conditions, broken streams."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from juicebox_hsm.adapters.bigtable.auth import NoAuthorization
from juicebox_hsm.adapters.bigtable.channel import ChannelTransport
from juicebox_hsm.adapters.bigtable.codec import (
    AnyTimestampAtLeast,
    AnyValueEquals,
    DeleteColumn,
    DeleteFamily,
    DeleteRow,
    KeyRange,
    Mutation,
    RowExists,
    RowSet,
    Selection,
    SetCell,
)
from juicebox_hsm.adapters.bigtable.driver import Driver
from juicebox_hsm.adapters.bigtable.keys import realm_tables, whole_table
from juicebox_hsm.adapters.bigtable.realms import BigtableRealms
from juicebox_hsm.adapters.bigtable.retry import NoSuchTable
from juicebox_hsm.adapters.bigtable.table import Endpoint, Table
from juicebox_hsm.errors import InvariantViolation
from juicebox_hsm.host.retry import RetryProfile
from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.errors import StoreAmbiguous, StoreInvalid, StoreUnavailable
from tests.emulator.bigtable_backend import QUICK_RETRY, Faults
from tests.patience import HANGS_S

pytestmark = pytest.mark.emulator
REALM = RealmId(b"\x11" * 16)
_numbers = itertools.count(1)


@asynccontextmanager
async def opened(address: str, instance: str, faults: Faults, call_s: float = 20.0) -> AsyncIterator[Endpoint]:
    """Open an endpoint of an instance."""
    driver = Driver()
    await driver.start()
    transport = ChannelTransport(driver, address, insecure=True)
    await transport.open()
    try:
        yield Endpoint(faults.wrap(transport), NoAuthorization(), f"projects/t/instances/{instance}", "", call_s)
    finally:
        await transport.close()
        await driver.stop()


@pytest.fixture
def instance() -> str:
    """Name an instance nobody else uses."""
    return f"table{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def faults() -> Faults:
    """Let nothing go wrong unless told."""
    return Faults()


@pytest.fixture
async def table(bigtable_emulator: str, instance: str, faults: Faults) -> AsyncIterator[Table]:
    """Make an outbox table, which has all three families."""
    async with opened(bigtable_emulator, instance, faults) as endpoint:
        realms = BigtableRealms(endpoint, endpoint.transport)
        await realms.create_realm(REALM)
        yield Table(endpoint, realm_tables(REALM)[3], QUICK_RETRY)


async def fill(table: Table, *keys: bytes) -> None:
    """Write one cell to each row."""
    await table.mutate_rows([(key, (SetCell("f", b"q", b"v" + key, 1000),)) for key in keys])


async def read(table: Table, *ranges: KeyRange, keys: tuple[bytes, ...] = (), limit: int = 0) -> list[bytes]:
    """Return the keys that a row set gives."""
    return [row.key for row in await table.read_rows(RowSet(keys, ranges), limit=limit)]


async def test_order_ranges_and_limits(table: Table) -> None:
    """Rows come once each in key order, whatever the order and overlap of ranges; open ends exclude, limits cut."""
    await fill(table, b"d", b"b", b"a", b"c", b"aa")
    assert await read(table, whole_table()) == [b"a", b"aa", b"b", b"c", b"d"]
    for start_open, end_open in itertools.product((False, True), repeat=2):
        expected = [b"a"][start_open:] + [b"aa", b"b"] + ([] if end_open else [b"c"])
        assert await read(table, KeyRange(b"a", b"c", start_open, end_open)) == expected
    assert await read(table, KeyRange(b"c", b"d"), KeyRange(b"b", b"c"), keys=(b"c", b"a", b"x")) == [
        b"a", b"b", b"c", b"d"
    ]  # fmt: skip
    assert await read(table, whole_table(), limit=2) == [b"a", b"aa"]
    assert await read(table, KeyRange(b"x", b"x")) == []
    pages = [[row.key for row in page] async for page in table.scan(whole_table(), page_rows=2)]
    assert pages == [[b"a", b"aa"], [b"b", b"c"], [b"d"]]


async def test_mistakes_are_caught_before_they_are_sent(table: Table, faults: Faults) -> None:
    """What the service would refuse or the emulator misunderstand never leaves: it would be retried for 30 s."""
    before = len(faults.calls)
    with pytest.raises(InvariantViolation, match="whole table"):
        await table.read_rows(RowSet())
    for wrong in (KeyRange(b"b", b"a"), KeyRange(b"a", b"a", True), KeyRange(b"a", b"a", end_open=True)):
        with pytest.raises(InvariantViolation, match="range"):
            await table.read_rows(RowSet(ranges=(wrong,)))
    bad: list[tuple[Mutation, ...]] = [
        (),
        (SetCell("g", b"q", b"v"),),
        (SetCell("f", b"q", b"v", 1001),),
        (SetCell("f", b"q", b"v", -2000),),
        (SetCell("f", bytes(16_385), b"v"),),
        (DeleteColumn("f", b"q", before=1),),
        (DeleteColumn("f", b"q", since=1000),),
        (DeleteColumn("f", b"q", before=1000, since=1000),),
        (DeleteFamily("x"),),
    ]
    for mutations in bad:
        with pytest.raises(InvariantViolation):
            await table.mutate_row(b"key", mutations)
        with pytest.raises(InvariantViolation):
            await table.check_and_mutate(b"key", RowExists(), if_not=mutations)
    with pytest.raises(InvariantViolation, match="row key"):
        await table.mutate_row(bytes(4097), (DeleteRow(),))
    await table.mutate_rows([])
    assert len(faults.calls) == before


async def test_selections(table: Table) -> None:
    """One cell per row is the lowest qualifier; stripping, families, columns and time bounds narrow as asked."""
    await table.mutate_row(
        b"row",
        (
            SetCell("f", b"b", b"2", 2000),
            SetCell("f", b"a", b"old", 1000),
            SetCell("f", b"a", b"new", 5000),
            SetCell("t", b"0", b"tomb", 1000),
            SetCell("n", b"z", b"count", 1000),
        ),
    )
    row = await table.read_row(b"row")
    assert row is not None
    assert [(cell.family, cell.qualifier, cell.timestamp) for cell in row.cells] == [
        ("f", b"a", 5000), ("f", b"a", 1000), ("f", b"b", 2000), ("n", b"z", 1000), ("t", b"0", 1000)
    ]  # fmt: skip

    async def values(selection: Selection) -> list[bytes]:
        found = await table.read_row(b"row", selection)
        return [] if found is None else [cell.value for cell in found.cells]

    assert await values(Selection(family="f", cells_per_row=1)) == [b"new"]
    assert await values(Selection(family="f", cells_per_row=1, strip_values=True)) == [b""]
    assert await values(Selection(family="f", cells_per_column=1)) == [b"new", b"2"]
    assert await values(Selection(family="f", qualifier=b"a", before=5000, cells_per_column=1)) == [b"old"]
    assert await values(Selection(family="f", qualifier=b"c")) == []
    assert await values(Selection(family="t")) == [b"tomb"]


async def test_versions(table: Table) -> None:
    """Cells of one timestamp overwrite each other, others pile up; a column can be deleted up to a time."""
    for value, micros in ((b"1", 1000), (b"2", 2000), (b"other", 1000), (b"0", 0)):
        await table.mutate_row(b"row", (SetCell("f", b"q", value, micros),))
    row = await table.read_row(b"row")
    assert row is not None
    assert [cell.value for cell in row.cells] == [b"2", b"other", b"0"]
    await table.mutate_row(b"row", (DeleteColumn("f", b"q", before=2000),))
    row = await table.read_row(b"row")
    assert row is not None
    assert [cell.value for cell in row.cells] == [b"2"]


async def test_mutations_of_a_row_apply_in_order(table: Table) -> None:
    """Delete then set keeps the cell, set then delete loses it."""
    await fill(table, b"row")
    await table.mutate_row(b"row", (DeleteRow(), SetCell("t", b"t", b"")))
    row = await table.read_row(b"row")
    assert row is not None
    assert [cell.family for cell in row.cells] == ["t"]
    await table.mutate_row(b"row", (SetCell("f", b"q", b"v"), DeleteRow()))
    assert await table.read_row(b"row") is None
    await table.mutate_row(b"row", (SetCell("f", b"q", b"v"), DeleteFamily("f"), SetCell("n", b"q", b"n")))
    row = await table.read_row(b"row")
    assert row is not None
    assert [cell.family for cell in row.cells] == ["n"]


async def test_predicates(table: Table) -> None:
    """Each predicate is tried on an absent row, a tombstone and cells at, before and after the bound."""
    hit, miss = (SetCell("n", b"hit", b"", 0),), (SetCell("n", b"miss", b"", 0),)

    async def ask(key: bytes, predicate: RowExists | AnyTimestampAtLeast | AnyValueEquals) -> bool:
        answer = await table.check_and_mutate(key, predicate, if_match=hit, if_not=miss)
        row = await table.read_row(key, Selection(family="n"))
        assert row is not None
        assert [cell.qualifier for cell in row.cells] == [b"hit" if answer else b"miss"]
        await table.mutate_row(key, (DeleteFamily("n"),))
        return answer

    await table.mutate_row(b"tombstone", (SetCell("t", b"t", b""),))
    await table.mutate_row(b"cell", (SetCell("f", b"q", b"a.c", 5000),))
    assert not await ask(b"absent", RowExists())
    assert await ask(b"tombstone", RowExists())
    assert await ask(b"cell", RowExists())
    assert not await ask(b"absent", AnyTimestampAtLeast(0))
    assert not await ask(b"cell", AnyTimestampAtLeast(6000))
    assert await ask(b"cell", AnyTimestampAtLeast(5000)), "the bound itself still counts"
    assert not await ask(b"absent", AnyValueEquals(b"a.c"))
    assert not await ask(b"cell", AnyValueEquals(b"abc")), "values are no patterns"
    assert not await ask(b"cell", AnyValueEquals(b"a.cd"))
    assert not await ask(b"cell", AnyValueEquals(b"a."))
    assert await ask(b"cell", AnyValueEquals(b"a.c"))


async def test_one_winner(table: Table) -> None:
    """Of 64 concurrent conditional writes of one row exactly one finds it absent, and its value stands."""
    won: list[int] = []

    async def attempt(number: int) -> None:
        cell = SetCell("f", b"q", b"%d" % number)
        if not await table.check_and_mutate(b"row", RowExists(), if_not=(cell,)):
            won.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(64):
            nursery.start_soon(attempt, number)
    assert len(won) == 1
    row = await table.read_row(b"row")
    assert row is not None
    assert row.cells[0].value == b"%d" % won[0]


def race(address: str, instance: str, rows: int) -> int:
    """Try to be the first on each of some rows, in a process of its own; return how often it was."""

    async def main() -> int:
        won = 0
        async with opened(address, instance, Faults()) as endpoint:
            table = Table(endpoint, realm_tables(REALM)[3])
            for number in range(rows):
                cell = SetCell("f", b"q", b"%d" % os.getpid())
                won += not await table.check_and_mutate(b"row%d" % number, RowExists(), if_not=(cell,))
        return won

    return trio.run(main)


async def test_one_winner_across_processes(table: Table, bigtable_emulator: str, instance: str) -> None:
    """Of three processes that race for the same rows exactly one gets each."""
    context = multiprocessing.get_context("spawn")  # never fork after gRPC started

    def run() -> list[int]:
        with context.Pool(3) as pool:
            return pool.starmap(race, [(bigtable_emulator, instance, 40)] * 3)

    assert sum(await trio.to_thread.run_sync(run)) == 40
    assert len(await read(table, KeyRange(b"row", b"rox"))) == 40


async def test_conditional_writes_are_never_repeated(table: Table, faults: Faults) -> None:
    """A conditional write whose fate is unknown is reported so after one attempt; a refused one did not happen."""
    cell = (SetCell("f", b"q", b"v"),)
    for rules in (faults.lose_answer, faults.lose_request):
        for faults.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL", "UNKNOWN", "ABORTED", "CANCELLED"):
            before = faults.count("CheckAndMutateRow")
            rules.append("CheckAndMutateRow")
            with pytest.raises(StoreAmbiguous):
                await table.check_and_mutate(b"row", RowExists(), if_not=cell)
            assert faults.count("CheckAndMutateRow") == before + 1
    for code, error in (("PERMISSION_DENIED", StoreUnavailable), ("INVALID_ARGUMENT", StoreInvalid)):
        faults.code = code
        faults.lose_request.append("CheckAndMutateRow")
        with pytest.raises(error):
            await table.check_and_mutate(b"row", RowExists(), if_not=cell)


async def test_other_calls_are_retried(table: Table, faults: Faults) -> None:
    """Reads and plain writes go again after passing failures, within their budget, and not after others."""
    for method in ("MutateRow", "MutateRows", "ReadRows"):
        faults.lose_request += [method, method]
        faults.lose_answer.append(method)
    await table.mutate_row(b"a", (SetCell("f", b"q", b"v", 0),))
    await fill(table, b"b")
    assert await read(table, whole_table()) == [b"a", b"b"]
    assert not faults.lose_request
    assert not faults.lose_answer
    faults.dead.add("ReadRows")
    before = faults.count("ReadRows")
    with pytest.raises(StoreUnavailable, match="UNAVAILABLE"):
        await read(table, whole_table())
    assert faults.count("ReadRows") - before == QUICK_RETRY.attempts_max
    faults.code = "INVALID_ARGUMENT"
    with pytest.raises(StoreInvalid):
        await read(table, whole_table())


async def test_a_broken_stream_is_continued(table: Table, faults: Faults) -> None:
    """After a stream broke reading goes on behind the last whole row: no row is lost, none comes twice."""
    keys = [b"%02d" % number for number in range(30)]
    await fill(table, *keys)
    for cuts in ([0], [1], [1, 1, 5], [30], [7, 100]):
        faults.cut_stream_after[:] = cuts
        assert await read(table, KeyRange(b"00", b"14"), KeyRange(b"10", b"99"), keys=(b"03", b"29")) == keys
    faults.cut_stream_after[:] = [3, 2]
    assert await read(table, whole_table(), limit=6) == keys[:6]
    faults.cut_stream_after[:] = [6]
    assert await read(table, whole_table(), limit=6) == keys[:6], "nothing is left to ask for"


async def test_missing_table_and_partial_failure(table: Table, bigtable_emulator: str, instance: str) -> None:
    """A table that does not exist is named as such by every call, also inside a bulk write that was accepted."""
    async with opened(bigtable_emulator, instance, Faults()) as endpoint:
        absent = Table(endpoint, "absent", QUICK_RETRY)
        with pytest.raises(NoSuchTable, match="absent"):
            await absent.read_row(b"key")
        with pytest.raises(NoSuchTable):
            await absent.mutate_row(b"key", (DeleteRow(),))
        with pytest.raises(NoSuchTable):
            await absent.check_and_mutate(b"key", RowExists(), if_not=(DeleteRow(),))
        users = Table(endpoint, realm_tables(REALM)[2], QUICK_RETRY)  # has no family t
        with pytest.raises(StoreInvalid, match="1 of 2 rows"):
            await users.mutate_rows([(b"good", (SetCell("f", b"q", b"v"),)), (b"bad", (SetCell("t", b"q", b"v"),))])
        assert await users.read_row(b"good") is not None


async def test_a_large_value(table: Table) -> None:
    """20 MiB in one cell pass both ways: no message limit of gRPC's is in the way."""
    value = os.urandom(1 << 20) * 20
    await table.mutate_row(b"row", (SetCell("f", b"q", value),))
    row = await table.read_row(b"row")
    assert row is not None
    assert row.cells[0].value == value


async def test_deadlines() -> None:
    """A service that takes the connection and stays silent costs a deadline, not for ever."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
    async with opened(address, "silent", Faults(), call_s=0.05) as endpoint:
        silent = Table(endpoint, "silent", RetryProfile(attempts_max=2))
        with trio.fail_after(HANGS_S):
            with pytest.raises(StoreUnavailable, match="DEADLINE_EXCEEDED"):
                await silent.read_row(b"key")
            with pytest.raises(StoreAmbiguous, match="DEADLINE_EXCEEDED"):
                await silent.check_and_mutate(b"key", RowExists(), if_not=(DeleteRow(),))
    await listeners[0].aclose()


async def test_cancellation(table: Table) -> None:
    """A cancelled read stops at once, and the driver goes on working."""
    await fill(table, *(b"%03d" % number for number in range(200)))
    for _ in range(20):
        with trio.move_on_after(0.0005) as scope:
            await read(table, whole_table())
        assert scope.cancelled_caught
    assert len(await read(table, whole_table())) == 200


async def test_nobody_listens(unused_port: int) -> None:
    """A refused connection is a failure that may pass, soon."""
    async with opened(f"127.0.0.1:{unused_port}", "none", Faults()) as endpoint:
        with trio.fail_after(HANGS_S), pytest.raises(StoreUnavailable, match="UNAVAILABLE"):
            await Table(endpoint, "none", QUICK_RETRY).read_row(b"key")


@pytest.fixture
async def unused_port() -> int:
    """Return a port on which nobody listens."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port: int = listeners[0].socket.getsockname()[1]
    await listeners[0].aclose()
    return port


async def test_rotation(bigtable_emulator: str, instance: str) -> None:
    """A rotated channel is warmed before it is used, serves at once, and calls on the old one finish."""
    driver = Driver()
    await driver.start()
    transport = ChannelTransport(driver, bigtable_emulator, insecure=True)
    await transport.open()
    endpoint = Endpoint(transport, NoAuthorization(), f"projects/t/instances/{instance}")
    await BigtableRealms(endpoint, transport).create_shared()
    table = Table(endpoint, "settings")
    warmed: list[ChannelTransport] = []

    async def warm(fresh: ChannelTransport) -> None:
        warmed.append(fresh)

    async def write(number: int) -> None:
        await table.mutate_row(b"%d" % number, (SetCell("f", b"v", b""),))

    try:
        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(write, number)
            await trio.lowlevel.checkpoint()
            await transport.rotate(warm)
        assert len(warmed) == 1
        assert len(await table.read_rows(RowSet(ranges=(whole_table(),)))) == 50
    finally:
        await transport.close()
        await driver.stop()
