"""The queue of deletions is bounded: what does not fit stays in the store and is counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import trio
import trio.testing

from juicebox_hsm.adapters.bigtable.deletion import DELAY_S, KEYS_WAITING_MAX, DeferredDeletion, Removal
from juicebox_hsm.ids import RealmId

REALM = RealmId(b"\x11" * 16)


class Nodes:
    """Tree nodes that only count what is deleted."""

    def __init__(self) -> None:
        self.deleted = 0

    def table(self, realm: RealmId) -> Nodes:
        """Return the realm's table."""
        return self

    def forget(self, key: bytes, instance: bytes) -> None:
        """Forget a node."""

    async def mutate_rows(self, rows: Sequence[Any]) -> None:
        """Count."""
        await trio.lowlevel.checkpoint()
        self.deleted += len(rows)


async def test_a_full_queue_leaves_nodes_behind(autojump_clock: trio.testing.MockClock) -> None:
    """Up to 200,000 removals wait; a batch beyond is left behind whole and counted, and there is room again later."""
    nodes = Nodes()
    deletion = DeferredDeletion(cast("Any", nodes))
    batch: list[Removal] = [(b"key", b"instance")] * 1_000
    for _ in range(KEYS_WAITING_MAX // len(batch)):
        deletion.schedule(REALM, batch)
    assert (deletion.waiting, deletion.leaked) == (KEYS_WAITING_MAX, 0)
    deletion.schedule(REALM, batch[:7])
    assert (deletion.waiting, deletion.leaked) == (KEYS_WAITING_MAX, 7)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(deletion.run)
        await trio.sleep(DELAY_S + 1)
        assert (deletion.waiting, nodes.deleted) == (0, KEYS_WAITING_MAX)
        deletion.schedule(REALM, batch)
        assert (deletion.waiting, deletion.leaked) == (1_000, 7)
        deletion.close()
        deletion.schedule(REALM, batch[:5])
        await deletion.drained()
    assert (nodes.deleted, deletion.leaked) == (KEYS_WAITING_MAX + 1_000, 12)
