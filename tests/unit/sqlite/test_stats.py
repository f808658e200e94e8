"""What operators are told about the tables."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from juicebox_hsm.adapters.sqlite.rows import entries_size
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.host.events import AccountingEvent
from juicebox_hsm.ids import RealmId, RecordId
from juicebox_hsm.ports.errors import StoreInvalid
from tests.emulator.realm_data import GROUP, OTHER_GROUP, REALM, Grown, append, batch

DAY_MS = 86_400_000


async def test_counts_are_those_of_the_realm(tmp_path: Path) -> None:
    """Leaves, interior nodes, roots, log rows and accounting are counted as they were written."""
    rng = random.Random(1)
    async with open_store(f"sqlite:{tmp_path / 'realm.db'}") as store:
        assert store.stats is not None
        await store.realms.create_realm(REALM)
        await store.realms.create_realm(RealmId(b"\x12" * 16))
        grown = await Grown.start(store)
        records = [RecordId(rng.randbytes(32)) for _ in range(300)]
        for start in range(0, 300, 50):
            await grown.write(dict.fromkeys(records[start : start + 50], b"value"))
        tree = await store.stats.tree(REALM, 20)
        assert (tree.leaves, tree.interior, tree.roots) == (300, 298, 1)
        assert len(tree.prefixes) == 20
        assert tree.prefixes[0].nodes >= tree.prefixes[-1].nodes
        by_byte = {f"{record[0]:02x}" for record in records}
        assert {prefix.prefix for prefix in tree.prefixes} <= by_byte
        assert tree.size_bytes > 300 * 40
        await append(store, batch(1, 7), OTHER_GROUP)
        logs = {stats.group: stats for stats in await store.stats.log(REALM)}
        assert (logs[GROUP].first_index, logs[GROUP].last_index, logs[GROUP].rows) == (1, 7, 7)
        assert (logs[OTHER_GROUP].rows, logs[OTHER_GROUP].entries, logs[OTHER_GROUP].tombstones) == (1, 7, 0)
        first, second = records[:2]
        await store.accounting.write(REALM, [AccountingEvent("acme", first, 1, 0, True)])
        await store.accounting.write(REALM, [AccountingEvent("acme", first, 2, DAY_MS, False)])
        await store.accounting.write(REALM, [AccountingEvent("acme", second, 3, 0, True)])
        await store.accounting.write(REALM, [AccountingEvent("beta", second, 1, 0, False)])
        users = {stats.tenant: (stats.rows, stats.records) for stats in await store.stats.users(REALM)}
        assert users == {"acme": (3, 2), "beta": (1, 0)}
        empty = await store.stats.tree(RealmId(b"\x12" * 16), 20)
        assert (empty.leaves, empty.rows, empty.prefixes) == (0, 0, ())
        with pytest.raises(StoreInvalid):
            await store.stats.log(RealmId(b"\x13" * 16))


@pytest.mark.parametrize(
    ("head", "size"),
    [(b"\x80", 0), (b"\x8fxxxx", 15), (b"\xde\x01\x00xx", 256), (b"\xdf\x00\x01\x00\x00", 65536), (b"\x90", None),
     (b"", None), (b"\xde\x01", None)],
)  # fmt: skip
def test_size_of_an_encoded_map(head: bytes, size: int | None) -> None:
    """The first bytes of a page tell how many nodes it has; anything else is not a page."""
    assert entries_size(head) == size
