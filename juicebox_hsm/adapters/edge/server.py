"""The client edge: our own connection loop for HTTPS (load-balancer.md 2 to 5, decision record 0007).

`Edge.serve` accepts, bounds and drains connections; `edge_h1` and `edge_h2` speak HTTP; the caller's handler answers.
Nothing a client sends ends the process: protocol errors end that client's connection, and an unexpected error of a
handler is logged with its trace, counted, and ends that client's exchange.
"""

from __future__ import annotations

import errno
import math
import socket
import ssl
from collections.abc import Sequence
from typing import Final

import trio
import trio.abc

from juicebox_hsm.adapters.edge.connection import SWEEP_S, Connection, ConnectionTable
from juicebox_hsm.adapters.edge.drain import DrainController
from juicebox_hsm.adapters.edge.exchange import Handler
from juicebox_hsm.adapters.edge.h1 import H1Session
from juicebox_hsm.adapters.edge.limits import BACKLOG, EdgeLimits
from juicebox_hsm.adapters.edge.tls import EdgeTls
from juicebox_hsm.adapters.process.passing_trouble import local_error
from juicebox_hsm.adapters.tls.streams import ByteStream, TlsStream, lean
from juicebox_hsm.ports.observation import Log, Meter

ACCEPT_PAUSE_S: Final = 0.1
"""Pause after an accept error such as EMFILE (load-balancer.md 3)."""

CLOSED_PER_TURN: Final = 16
"""Connections closed in one turn of the scheduler: about 2 ms, so a crowd that leaves at once holds up nobody (own)."""

_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


def open_edge_listener(host: str, port: int, *, share_port: bool = False) -> trio.SocketListener:
    """Bind and listen on an IP address. `share_port` sets SO_REUSEPORT for several workers. Raises `LocalError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise local_error(
            f"--listen: cannot listen on {host}:{port}: {error.strerror}; give a free address", error
        ) from None
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


class Edge:
    """Serves HTTPS on given listeners until drained."""

    def __init__(
        self,
        handler: Handler,
        tls: EdgeTls,
        *,
        limits: EdgeLimits,
        drain: DrainController,
        metrics: Meter,
        log: Log,
    ) -> None:
        self._handler = handler
        self._tls = tls
        self._limits = limits
        self._drain = drain
        self._metrics = metrics
        self._log = log
        self._table = ConnectionTable()
        self._turns = trio.Semaphore(CLOSED_PER_TURN)

    async def serve(
        self,
        listeners: Sequence[trio.abc.Listener[trio.SocketStream]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `drain` is set and the last connection has ended. Cancelling ends everything at once."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sweep)
            async with trio.open_nursery() as acceptors:
                for listener in listeners:
                    acceptors.start_soon(self._accept, listener, nursery)
                task_status.started()
                await self._drain.drain.wait()
                acceptors.cancel_scope.cancel()
            for listener in listeners:
                await listener.aclose()
            self._table.stop_all()
            await self._drain.wait_zero()
            nursery.cancel_scope.cancel()

    async def _accept(self, listener: trio.abc.Listener[trio.SocketStream], nursery: trio.Nursery) -> None:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno in _RESOURCES:
                    self._log.warning("cannot accept a connection", error=error.strerror)
                    await trio.sleep(ACCEPT_PAUSE_S)
                continue
            try:
                await self._make_room()
            except trio.Cancelled:
                await trio.aclose_forcefully(stream)
                raise
            nursery.start_soon(self.serve_stream, lean(stream))

    async def _make_room(self) -> None:
        """Return when the connection at the door may be let in, closing the one idle longest if need be."""
        table = self._table
        while self._drain.connections >= self._limits.connections_max:
            if table.evict(trio.current_time()):
                self._metrics.count("load_balancer.connections.evicted")
            await table.wait_removed(SWEEP_S)

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP_S)
            self._table.sweep(trio.current_time())

    async def serve_stream(self, transport: ByteStream | trio.abc.Stream) -> None:
        """Serve one accepted connection to its end."""
        connection = self._table.add(trio.current_time(), self._limits.handshake_timeout_s)
        self._drain.enter()
        self._metrics.gauge("load_balancer.connections.active", self._drain.connections)
        stream = TlsStream(transport, self._tls.context, server_side=True)
        try:
            if self._drain.drain.is_set():
                return
            if await self._shake_hands(connection, stream):
                await self._speak(connection, stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client is gone
        except Exception as error:  # noqa: BLE001  # no input may end the process; reported with its trace
            self._report(error, connection.protocol)
        finally:
            connection.set_busy()
            connection.deadline = math.inf
            await self._close(connection, stream)

    async def _close(self, connection: Connection, stream: TlsStream) -> None:
        try:
            async with self._turns:  # waits for a turn and gives it on: nobody's slow goodbye holds up another's
                pass
        finally:
            with trio.move_on_after(self._limits.close_timeout_s):
                await stream.aclose()
            connection.session = None  # a cycle: without it the collector would keep dead connections for long
            self._table.remove(connection)
            self._drain.leave()
            self._metrics.gauge("load_balancer.connections.active", self._drain.connections)

    async def _shake_hands(self, connection: Connection, stream: TlsStream) -> bool:
        try:
            with connection.scope:
                connection.protocol = await stream.handshake() or "http/1.1"
                self._metrics.count("load_balancer.connections.count", protocol=connection.protocol)
                return not connection.stopping
        except ssl.SSLError as error:
            self._metrics.count("load_balancer.connections.errors", protocol="tls")
            self._log.warning("TLS handshake failed", reason=error.reason or "unknown")
            return False
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._metrics.count("load_balancer.connections.errors", protocol="tls")
            return False
        self._metrics.count("load_balancer.connections.errors", protocol="tls")  # too slow, or evicted
        return False

    async def _speak(self, connection: Connection, stream: TlsStream) -> None:
        connection.scope = trio.CancelScope()
        if connection.protocol == "h2":
            # Imported when the first such client comes: h2 and its tables cost memory that most balancers never need.
            from juicebox_hsm.adapters.edge.h2 import H2Session

            h2_session = H2Session(connection, stream, self._handler, self._limits, self._report_h2)
            connection.session = h2_session
            await h2_session.run()
        else:
            h1_session = H1Session(connection, stream, self._handler, self._limits)
            connection.session = h1_session
            await h1_session.run()

    def _report_h2(self, error: Exception) -> None:
        self._report(error, "h2")

    def _report(self, error: Exception, protocol: str) -> None:
        self._metrics.count("load_balancer.connections.errors", protocol=protocol)
        self._log.error("unexpected error while serving a client", protocol=protocol, exc_info=error)
