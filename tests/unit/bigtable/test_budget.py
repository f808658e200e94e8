"""One retry budget for an operation of the agent on Bigtable, however many calls it consists of."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from juicebox_hsm.adapters.bigtable import codec
from juicebox_hsm.adapters.bigtable.auth import NoAuthorization
from juicebox_hsm.adapters.bigtable.deletion import DeferredDeletion
from juicebox_hsm.adapters.bigtable.driver import CallFailed, Metadata
from juicebox_hsm.adapters.bigtable.log import BigtableLog
from juicebox_hsm.adapters.bigtable.log_reads import LogReads
from juicebox_hsm.adapters.bigtable.nodes import TreeNodes
from juicebox_hsm.adapters.bigtable.outbox import BigtableOutbox
from juicebox_hsm.adapters.bigtable.settled import Settled
from juicebox_hsm.adapters.bigtable.table import Endpoint
from juicebox_hsm.adapters.clock.retrying import retrying
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.stores.node_tuning import DEFAULT_NODE_TUNING
from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.host.events import EventKind, NewEvent
from juicebox_hsm.host.retry import STORE_RETRY
from juicebox_hsm.ids import GroupId, HsmId, RealmId, RecordId
from juicebox_hsm.merkle.kernel import squash
from juicebox_hsm.ports.errors import StoreAmbiguous, StoreUnavailable

FIRST = LogEntry(1, None, None, bytes(32), bytes(range(32)), HsmId(bytes(16)))
REALM, GROUP = RealmId(bytes(16)), GroupId(bytes(16))
CALL_S = 4.0
READS_AFTER_S = 24.0


class HalfDead:
    """A transport to an instance that reads, after trouble for most of a budget, and then takes no writes."""

    def __init__(self) -> None:
        self._began = trio.current_time()

    async def unary(self, method: str, request: bytes, metadata: Metadata, timeout_s: float) -> bytes:
        await trio.sleep(CALL_S)
        raise CallFailed("UNAVAILABLE", "no writes")

    async def stream(self, method: str, request: bytes, metadata: Metadata, timeout_s: float) -> list[bytes]:
        await trio.sleep(CALL_S)
        if method != codec.READ_ROWS or trio.current_time() - self._began < READS_AFTER_S:
            raise CallFailed("UNAVAILABLE", "not yet")
        return []


def record(endpoint: Endpoint) -> Callable[[], Awaitable[object]]:
    """Return the recording of an event: the tenant's tail is read, then a row is written."""
    outbox = BigtableOutbox(endpoint, Settled(endpoint))
    event = NewEvent("acme", GROUP, 7, bytes(32), RecordId(bytes(32)), "u" * 64, EventKind.RECOVER1, None, None, 1)
    return lambda: outbox.record(REALM, [event], {})


def append(endpoint: Endpoint) -> Callable[[], Awaitable[object]]:
    """Return the appending of a batch to a log: its end is read, then nodes and a row are written."""
    nodes = TreeNodes(endpoint, DEFAULT_NODE_TUNING)
    log = BigtableLog(LogReads(endpoint), nodes, DeferredDeletion(nodes), Metrics())
    return lambda: log.append(REALM, GROUP, [FIRST], [None], squash([]))


@pytest.mark.parametrize("begin", [record, append])
async def test_thirty_seconds_are_not_sixty(
    begin: Callable[[Endpoint], Callable[[], Awaitable[object]]], autojump_clock: trio.testing.MockClock
) -> None:
    """What the agent tries again is tried for 30 s and the calls under way, though the store tries again itself."""
    operation = begin(Endpoint(HalfDead(), NoAuthorization(), "projects/p/instances/i"))
    began = trio.current_time()
    with pytest.raises((StoreUnavailable, StoreAmbiguous)):
        await retrying(operation)
    assert STORE_RETRY.total_s <= trio.current_time() - began <= STORE_RETRY.total_s + 2 * CALL_S + STORE_RETRY.cap_s
