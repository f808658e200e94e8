"""One changed bit in what an SQLite file keeps is never taken for data: it is named, by kind, group and place."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from juicebox_hsm.adapters.sqlite import schema
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.host.log import AppendOutcome
from juicebox_hsm.merkle.walk import Lost
from juicebox_hsm.ports.errors import StoreDamaged
from juicebox_hsm.ports.store import Store
from juicebox_hsm.wire.rpc import DamageKind
from tests.emulator.realm_data import (
    GROUP,
    REALM,
    Grown,
    append,
    batch,
    certificate,
    event,
    intent,
    random_record,
)

Read = Callable[[Store], Awaitable[object]]


@asynccontextmanager
async def _opened(path: Path) -> AsyncIterator[Store]:
    async with open_store(f"sqlite:{path}") as store:
        yield store


async def _write(path: Path) -> None:
    async with _opened(path) as store:
        await store.realms.create_realm(REALM)
        await append(store, batch(1, 2), intents=[intent(1), intent(2)])
        await store.log.write_certificate(REALM, GROUP, certificate(1))
        await store.outbox.record(REALM, [event(1, body={"num_guesses": 3}), event(2)], {GROUP: 2})


def _flips(path: Path, column: str, table: str) -> list[bytes]:
    """Return the column's value in a table's first row with each of its bytes changed in one bit, in turn."""
    with closing(schema.connect(path, 100)) as db:
        value: bytes = db.execute(f"SELECT {column} FROM {table} LIMIT 1").get
    return [value[:at] + bytes([value[at] ^ 1 << at % 8]) + value[at + 1 :] for at in range(len(value))]


async def _events(store: Store) -> object:
    return await store.outbox.read(REALM, "acme", 0, 10)


async def _intents(store: Store) -> object:
    return await store.log.read_intents(REALM, GROUP, 1, 2)


async def _entries(store: Store) -> object:
    return await store.log.read_from(REALM, GROUP, 1, 10)


async def _last(store: Store) -> object:
    return await store.log.read_last(REALM, GROUP)


@pytest.mark.parametrize(
    ("table", "column", "read", "named"),
    [
        ("log", "entries", _entries, (DamageKind.LOG, "of entries 1 to 2", GROUP)),
        ("log", "entries", _last, (DamageKind.LOG, "of entries 1 to 2", GROUP)),
        ("log", "mac", _last, (DamageKind.LOG, "of entries 1 to 2", GROUP)),
        ("log", "intents", _intents, (DamageKind.LOG, "of entries 1 to 2", GROUP)),
        ("outbox", "data", _events, (DamageKind.EVENT, "1 of tenant acme", GROUP)),
    ],
)
async def test_a_changed_bit_is_named(
    table: str, column: str, read: Read, named: tuple[DamageKind, str, bytes], tmp_path: Path
) -> None:
    """Whichever byte it is in: the error says what, where, and of which group."""
    path = tmp_path / "x.db"
    await _write(path)
    async with _opened(path) as store:
        with closing(schema.connect(path, 100)) as db:
            for flipped in _flips(path, column, table):
                db.execute(
                    f"UPDATE {table} SET {column} = ? WHERE idx = 1"
                    if table == "outbox"
                    else f"UPDATE {table} SET {column} = ?",
                    (flipped,),
                )
                with pytest.raises(StoreDamaged, match="run `store check`") as caught:
                    await read(store)
                damage = caught.value.damage
                assert (damage.kind, damage.place, damage.group) == named


async def test_a_damaged_tail_is_no_conflict(tmp_path: Path) -> None:
    """Who appends to a log whose last row was changed is told, and not that another leader was faster."""
    path = tmp_path / "x.db"
    await _write(path)
    async with _opened(path) as store:
        with closing(schema.connect(path, 100)) as db:
            db.execute("UPDATE log SET mac = zeroblob(32)")
        with pytest.raises(StoreDamaged):
            await append(store, batch(3, 3))
        assert await append(store, batch(1, 1, salt=9), group=type(GROUP)(b"\x77" * 16)) is AppendOutcome.APPENDED


async def test_a_certificate_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """By its index; what still decodes is for the HSM to judge."""
    path = tmp_path / "x.db"
    await _write(path)
    async with _opened(path) as store:
        with closing(schema.connect(path, 100)) as db:
            db.execute("UPDATE certificates SET data = x'c1'")
        with pytest.raises(StoreDamaged) as caught:
            await store.log.read_certificate(REALM, GROUP)
        assert (caught.value.damage.kind, caught.value.damage.place) == (DamageKind.CERTIFICATE, "at index 1")


async def test_a_page_of_nodes_that_cannot_be_read_is_missing_nodes(tmp_path: Path) -> None:
    """One page costs the records behind it and no others; who reads learns which node."""
    path = tmp_path / "x.db"
    rng = random.Random(1)
    records = [random_record(rng) for _ in range(20)]
    async with _opened(path) as store:
        await store.realms.create_realm(REALM)
        grown = await Grown.start(store)
        await grown.write(dict.fromkeys(records, b"v"))
    with closing(schema.connect(path, 100)) as db:
        db.execute("UPDATE tree SET data = x'c1' WHERE id = (SELECT max(id) FROM tree)")
    async with _opened(path) as store:
        found = await store.nodes.read_proofs(REALM, grown.partition, records)
    lost = [proof for proof in found if isinstance(proof, Lost)]
    assert 0 < len(lost) < len(records)
    assert all(node.depth > 0 and len(node.hash) == 32 for node in lost)
