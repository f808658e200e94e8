"""Warm a new channel before it serves: the instance, then each table in use (storage.md 9.4).

The first read of a table over a new connection finds the service's routing and caches cold and takes several times as
long as the next; here no client waits for it.
"""

from __future__ import annotations

from typing import Final

from juicebox_hsm.adapters.bigtable import codec, keys
from juicebox_hsm.adapters.bigtable.codec import RowSet, Selection
from juicebox_hsm.adapters.bigtable.driver import CallFailed, Transport
from juicebox_hsm.adapters.bigtable.table import Endpoint
from juicebox_hsm.adapters.observation.logging import get_logger

_ANY_ROW: Final = RowSet(ranges=(keys.whole_table(),))
_NAME: Final = Selection(cells_per_row=1, strip_values=True)
_log = get_logger("bigtable.channel")


async def warm_channel(endpoint: Endpoint, fresh: Transport) -> None:
    """Let the instance warm up for `fresh`, then read one row of each table that this process uses.

    Raises `CallFailed` if the instance does not answer; a table that cannot be read is only logged.
    """
    ping = codec.ping_request(endpoint.instance, endpoint.profile)
    routing = ("x-goog-request-params", f"name={endpoint.instance}")
    await fresh.unary(codec.PING_AND_WARM, ping, (routing, *endpoint.authorization.metadata()), endpoint.call_s)
    for table in sorted(endpoint.tables):
        request = codec.read_rows_request(table, endpoint.profile, _ANY_ROW, 1, _NAME)
        headers = (*endpoint.routing(table), *endpoint.authorization.metadata())
        try:
            await fresh.stream(codec.READ_ROWS, request, headers, endpoint.call_s)
        except CallFailed as failure:
            _log.warning("table not warmed", table=table, error=str(failure))
