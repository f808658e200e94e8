"""Keep what happens on a hypercorn connection with that connection (decision record: outsiders).

Hypercorn runs all connections in one nursery, so an error that its own protocol code raises (for one, any bytes after
a WebSocket upgrade that was refused) would end the server, and with it the process. It also takes any number of them.
"""

from __future__ import annotations

from typing import Final

import hypercorn.trio.run
import trio
from hypercorn.config import Config
from hypercorn.events import Event, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.typing import ASGIFramework, ASGIReceiveCallable, ASGISendCallable, Scope

from juicebox_hsm.adapters.observation.logging import get_logger
from juicebox_hsm.host.addresses import path_of_target

CONNECTIONS_MAX: Final = 128  # own: people, probes and scrapers are few
HANDSHAKE_S: Final = 10  # own: as at the edge (load-balancer.md 3)

_PROTOCOL_ERROR: Final = 1002
"""How a WebSocket is closed (RFC 6455 7.4.1)."""

_log = get_logger("http")


class ContainedConfig(Config):
    """Hypercorn's settings and a bound on open connections, for one server."""

    def __init__(self, connections_max: int) -> None:
        super().__init__()
        self.ssl_handshake_timeout = HANDSHAKE_S
        self.connections_max = connections_max
        self.connections = 0
        self.idle: dict[ContainedServer, None] = {}
        """Connections without a request in progress, longest idle first; from their first moment on."""


class ContainedServer(TCPServer):
    """One connection. Whatever goes wrong ends it and nothing else; broken invariants still end the process.

    Above the bound of its server, the connection that is idle longest makes room; if none is, the new one is closed.
    It ends when its client has left: hypercorn lets its timer for idle connections run out first.
    """

    scope: trio.CancelScope
    is_left = False

    async def run(self) -> None:
        """Serve the connection."""
        config = self.config
        if not isinstance(config, ContainedConfig):
            await self._run_contained()
            return
        if config.connections >= config.connections_max:
            _log.warning("too many connections", limit=config.connections_max)
            evicted = next(iter(config.idle), None)
            if evicted is None:
                await trio.aclose_forcefully(self.stream)
                return
            del config.idle[evicted]
            evicted.scope.cancel()
        config.connections += 1
        config.idle[self] = None
        self.scope = trio.CancelScope()
        try:
            with self.scope:
                await self._run_contained()
        finally:
            config.connections -= 1
            config.idle.pop(self, None)

    async def protocol_send(self, event: Event) -> None:
        """Note whether a request is in progress, and act on the event."""
        if isinstance(event, Updated) and isinstance(self.config, ContainedConfig):
            self.config.idle.pop(self, None)
            if event.idle and not self.scope.cancel_called:
                self.config.idle[self] = None
        if not (isinstance(event, Updated) and self.is_left):
            await super().protocol_send(event)

    async def _read_data(self) -> None:
        await super()._read_data()
        self.is_left = True
        await self.idle_task.stop()

    async def _run_contained(self) -> None:
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


class GoodTargets:
    """An application that is only asked for targets with a path; what looks for one in others would fail (answer 400).

    `http://[/livez` is such a target, and so is one without any path.
    """

    def __init__(self, inner: ASGIFramework) -> None:
        self._inner = inner

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Answer, or hand on."""
        if scope["type"] == "lifespan" or path_of_target(scope["path"]) is not None:
            await self._inner(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _PROTOCOL_ERROR, "reason": None})
        else:
            headers = [(b"content-length", b"0"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 400, "headers": headers})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
