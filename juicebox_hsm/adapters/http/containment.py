"""Keep errors inside hypercorn where they belong: with the connection they happened on (decision record: outsiders).

Hypercorn runs all connections in one nursery, so an error that its own protocol code raises (for one, any bytes after
a WebSocket upgrade that was refused) would end the server, and with it the process.
"""

from __future__ import annotations

import hypercorn.trio.run
from hypercorn.trio.tcp_server import TCPServer

from juicebox_hsm.adapters.logging import get_logger

_log = get_logger("http")


class ContainedServer(TCPServer):
    """One connection. Whatever goes wrong ends it and nothing else; broken invariants still end the process."""

    async def run(self) -> None:
        """Serve the connection."""
        try:
            await super().run()
        except* Exception as errors:  # noqa: BLE001 - that is what it is for; reported with its name
            first: BaseException = errors
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            _log.warning("connection ended by an error in it", error=f"{type(first).__name__}: {first}")


def contain_connections() -> None:
    """Make every hypercorn server of this process use `ContainedServer`; idempotent."""
    hypercorn.trio.run.TCPServer = ContainedServer  # type: ignore[attr-defined]  # it has no setting for this
