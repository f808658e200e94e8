"""What a table sends: how writes of many rows are split."""

from __future__ import annotations

from typing import Any, Final

import trio
from google.cloud.bigtable_v2.types import bigtable as messages

from juicebox_hsm.adapters.bigtable.auth import NoAuthorization
from juicebox_hsm.adapters.bigtable.codec import SetCell
from juicebox_hsm.adapters.bigtable.driver import Metadata
from juicebox_hsm.adapters.bigtable.table import BULK_BYTES_MAX, BULK_ROWS_MAX, Endpoint, Table

_Request: Final[Any] = messages.MutateRowsRequest.pb()
_Response: Final[Any] = messages.MutateRowsResponse.pb()
MIB = 1 << 20


class Recorder:
    """A transport that takes every row and remembers the keys of each request."""

    def __init__(self) -> None:
        self.requests: list[list[bytes]] = []
        self.largest_bytes = 0

    async def unary(self, method: str, request: bytes, metadata: Metadata, timeout_s: float) -> bytes:
        """Nothing here sends one."""
        raise AssertionError(method)

    async def stream(self, method: str, request: bytes, metadata: Metadata, timeout_s: float) -> list[bytes]:
        """Acknowledge all rows."""
        await trio.lowlevel.checkpoint()
        self.largest_bytes = max(self.largest_bytes, len(request))
        self.requests.append([entry.row_key for entry in _Request.FromString(request).entries])
        return [_Response(entries=[{"index": at} for at in range(len(self.requests[-1]))]).SerializeToString()]


async def sent(cells: list[list[SetCell]]) -> Recorder:
    """Write rows with these cells, and return what was sent."""
    transport = Recorder()
    table = Table(Endpoint(transport, NoAuthorization(), "projects/p/instances/i"), "x-merkle")
    rows = [(b"%06d" % number, own) for number, own in enumerate(cells)]
    await table.mutate_rows(rows)
    assert [key for keys in transport.requests for key in keys] == [key for key, _ in rows], "each once, in order"
    return transport


async def test_many_small_rows_are_split_by_mutations() -> None:
    """A request has at most 10,000 mutations, however they are spread over rows; a row is never divided."""
    cell = SetCell("f", b"q", b"v", 0)
    one_each = await sent([[cell]] * (2 * BULK_ROWS_MAX + 1))
    assert [len(keys) for keys in one_each.requests] == [BULK_ROWS_MAX, BULK_ROWS_MAX, 1]
    many_each = await sent([[cell] * 999] * 21)
    assert [len(keys) for keys in many_each.requests] == [10, 10, 1]


async def test_large_rows_are_split_by_bytes() -> None:
    """A request is about 8 MiB at most; a row that is larger goes alone."""
    written = await sent([[SetCell("f", b"q", bytes(size), 0)] for size in (3 * MIB, 3 * MIB, 3 * MIB, 9 * MIB, 1, 1)])
    assert [len(keys) for keys in written.requests] == [2, 1, 1, 2]
    small = await sent([[SetCell("f", b"q", bytes(MIB), 0)]] * 30)
    assert small.largest_bytes <= BULK_BYTES_MAX
    assert len(small.requests) == 5
