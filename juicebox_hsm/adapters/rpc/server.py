"""Server of the internal RPC: listens, admits peers, and runs handler bodies (agent.md 2).

Handler isolation: a body runs in the server's own nursery. Neither a lost stream nor a caller that gave up cancels
it, because once the HSM was asked for a log entry the entry must reach the log (agent.md 2). `shutdown` lets bodies
end; only cancelling the server itself cancels them.

Bounds: streams of proven peers, TLS handshakes at a time, calls in flight per stream, bodies over all streams (a peer
that reconnects does not get new room while its old bodies run), time for TLS handshake and hello. Everything refused
is answered or closed, and counted.
"""

from __future__ import annotations

import math
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from juicebox_hsm.adapters.observation.logging import get_logger
from juicebox_hsm.adapters.observation.metrics import Counter, Gauge, Metrics, Timer
from juicebox_hsm.adapters.observation.tracing import Span, Traces, active
from juicebox_hsm.adapters.process.file_limit import SERVICE_SHARE, fit_connections
from juicebox_hsm.adapters.process.passing_trouble import local_error
from juicebox_hsm.adapters.process.threads import thread_needed
from juicebox_hsm.adapters.rpc import frames
from juicebox_hsm.adapters.rpc.streams import FramedStream
from juicebox_hsm.adapters.tls.cluster_tls import ClusterTls, PeerIdentity, peer_identity
from juicebox_hsm.adapters.tls.streams import ByteStream, SocketStream, TlsStream
from juicebox_hsm.adapters.tls.wording import reason_of
from juicebox_hsm.errors import DecodingError, LocalError, PeerError, RealmError
from juicebox_hsm.host.addresses import is_loopback
from juicebox_hsm.ports.errors import HsmGone
from juicebox_hsm.wire.methods import AnyMethod, Method, Reply, Request
from juicebox_hsm.wire.rpc import PeerRole, RpcCode

IN_FLIGHT_MAX: Final = 1024  # agent.md 2: per stream
BODIES_MAX: Final = 8192  # own: eight full streams; about 10 kB each
STREAMS_MAX: Final = 1024  # own: every role of a large cluster several times over
HANDSHAKES_MAX: Final = 128  # own: unproven peers at a time; beyond, the oldest goes, so nobody is locked out
_HANDSHAKES_SHARE: Final = SERVICE_SHARE / 8
_STREAMS_SHARE: Final = SERVICE_SHARE - _HANDSHAKES_SHARE
HANDSHAKE_S: Final = 5.0  # own: TLS handshake and hello together
BACKLOG: Final = 128

_log = get_logger("rpc.server")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. `role` is None on a plain (loopback, test) stream; `closed` is set when the stream has ended."""

    role: PeerRole | None
    name: str
    connection_id: int
    closed: trio.Event = field(default_factory=trio.Event)


Handler = Callable[[Any, Any], Awaitable[Any]]
"""A handler as it is found by name; `handles` is where its types are known."""


def handles(
    method: Method[Request, Reply], handler: Callable[[Request, Caller], Awaitable[Reply]]
) -> tuple[str, Handler]:
    """Return an entry of a server's `handlers`, for a handler of the method's types."""
    return method.name, handler


class _Route:
    """A method with everything its calls need."""

    __slots__ = ("callers", "decode", "handler", "name", "timers")

    def __init__(self, method: AnyMethod, handler: Handler, metrics: Metrics) -> None:
        self.name = method.name
        self.handler = handler
        self.callers = method.callers
        self.decode = frames.BodyDecoder(method.request)
        self.timers: dict[bool, Timer] = {
            ok: metrics.timer("rpc.server.time", method=method.name, result="ok" if ok else "failed")
            for ok in (True, False)
        }


class _Connection:
    """The server's end of one stream."""

    __slots__ = ("_expired", "_open_calls", "caller", "greeted", "server", "stream")

    def __init__(self, server: RpcServer, stream: ByteStream | trio.abc.Stream, caller: Caller) -> None:
        self.server = server
        self.caller = caller
        self.stream = FramedStream(stream, self, server.build)
        self.greeted = False
        self._open_calls: dict[int, float] = {}  # call id -> deadline, not answered
        self._expired: set[int] = set()  # answered DeadlineExceeded, body still runs

    def on_hello(self, hello: frames.Hello) -> None:
        """Take note that the peer introduced itself."""
        self.greeted = True
        _log.debug("peer connected", peer=self.caller.name, build=hello.build)

    def on_frame(self, frame: frames.Request | frames.Reply | frames.Failure) -> None:
        """Start the body of a request, or refuse it."""
        if type(frame) is not frames.Request:
            self.stream.stop("peer answers what it was not asked")
            return
        server = self.server
        call_id = frame.id
        if call_id in self._open_calls or call_id in self._expired:
            self.stream.stop("peer uses a call id twice")
            return
        route = server.routes.get(frame.method)
        if route is None:
            self._refuse(call_id, RpcCode.UNKNOWN_METHOD)
        elif self.caller.role is not None and self.caller.role not in route.callers:
            self._refuse(call_id, RpcCode.FORBIDDEN)
        elif server.draining:
            self._refuse(call_id, RpcCode.SHUTTING_DOWN)
        elif len(self._open_calls) + len(self._expired) >= IN_FLIGHT_MAX or server.bodies >= BODIES_MAX:
            self._refuse(call_id, RpcCode.OVERLOADED)
        elif frame.timeout_ms == 0:
            self._refuse(call_id, RpcCode.DEADLINE_EXCEEDED)
        else:
            try:
                body = route.decode(frame.body)
            except DecodingError as error:
                _log.warning("bad request body", peer=self.caller.name, method=route.name, error=str(error))
                self._refuse(call_id, RpcCode.BAD_REQUEST)
                return
            deadline = trio.current_time() + frame.timeout_ms / 1000
            self._open_calls[call_id] = deadline
            self.stream.wake_at(deadline)
            server.start_body(self, route, call_id, body, frame.trace)

    def on_tick(self, now: float) -> float:
        """Answer the calls whose deadline has passed; their bodies run on."""
        if not self._open_calls:
            return math.inf
        for call_id in [call_id for call_id, deadline in self._open_calls.items() if deadline <= now]:
            del self._open_calls[call_id]
            self._expired.add(call_id)
            self._refuse(call_id, RpcCode.DEADLINE_EXCEEDED)
        return min(self._open_calls.values(), default=math.inf)

    def finish(self, call_id: int, frame: bytes) -> None:
        """Send the answer of a body that has ended, unless it is too late."""
        if self._open_calls.pop(call_id, None) is None:
            self._expired.discard(call_id)
        else:
            self.stream.send(frame)

    def _refuse(self, call_id: int, code: RpcCode) -> None:
        self.server.refusals[code].add()
        self.stream.send(frames.encode_failure(call_id, code))


class RpcServer:
    """The running server, as `serve_rpc` hands it out."""

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        tls: ClusterTls | None,
        methods: Mapping[str, AnyMethod],
        handlers: Mapping[str, Handler],
        build: str = "",
        metrics: Metrics | None = None,
        fatal: tuple[type[BaseException], ...] = (HsmGone,),
        traces: Traces | None = None,
    ) -> None:
        """`nursery` runs the bodies. Errors of the types `fatal` leave it; others become `HandlerFailed`."""
        _check_handlers(methods, handlers)
        metrics = metrics if metrics is not None else Metrics()
        self.build = build
        self.port = 0
        self.draining = False
        self.bodies = 0
        self.routes = {name: _Route(methods[name], handler, metrics) for name, handler in handlers.items()}
        self.refusals = {code: metrics.counter("rpc.server.refusals", code=code.value) for code in RpcCode}
        self._broken: Counter = metrics.counter("rpc.server.connections.errors")
        self._gauge: Gauge = metrics.gauge_of("rpc.server.connections.active")
        self._nursery = nursery
        self._tls = tls
        self._fatal = fatal
        self._traces = traces
        self._connections: set[_Connection] = set()
        self._streams_max = fit_connections(STREAMS_MAX, _STREAMS_SHARE)
        self._handshakes_max = fit_connections(HANDSHAKES_MAX, _HANDSHAKES_SHARE)
        self._streams = 0
        self._handshakes: dict[trio.CancelScope, None] = {}  # oldest first
        self._next_connection = 0
        self._idle = trio.Event()
        self.stop_accepting = trio.CancelScope()
        self._stopped = trio.Event()

    @property
    def connections(self) -> int:
        """Count the streams whose peer has introduced itself."""
        return len(self._connections)

    async def shutdown(self, drain_s: float) -> bool:
        """Stop accepting, refuse new calls, wait up to `drain_s` for bodies and their replies; then close all streams.

        Returns whether everything was drained; what was not is left running until the server's nursery is cancelled.
        """
        self.draining = True
        self.stop_accepting.cancel()
        drained = False
        with trio.move_on_after(drain_s):
            while self.bodies:
                self._idle = trio.Event()
                await self._idle.wait()
            for connection in list(self._connections):
                await connection.stream.flush()
            drained = True
        for connection in list(self._connections):
            connection.stream.stop("shutting down")
        self._stopped.set()
        return drained

    async def wait_stopped(self) -> None:
        """Wait until `shutdown` has finished."""
        await self._stopped.wait()

    async def handle_tcp(self, stream: trio.SocketStream) -> None:
        """Serve one accepted connection until it ends. Raises nothing but `Cancelled`."""
        address = "unknown"
        try:
            peer = stream.socket.getpeername()
            address = f"{peer[0]}:{peer[1]}"
        except OSError:
            pass  # it has gone already; the next read will tell
        if self._tls is None:
            await self._serve_counted(stream, SocketStream(stream), None, address)
            return
        secured = TlsStream(SocketStream(stream), self._tls.server_context, server_side=True)
        identity = await self._shake_hands(stream, secured, address)
        if identity is not None:
            await self._serve_counted(
                stream, secured, identity.role, f"{identity.role.value}/{identity.name} {address}"
            )

    async def _serve_counted(
        self, tcp: trio.SocketStream, stream: ByteStream, role: PeerRole | None, name: str
    ) -> None:
        """Serve a stream if there is room for it. Peers that have proved nothing cannot take that room."""
        if self._streams >= self._streams_max:
            self._broken.add()
            _log.warning("too many connections", limit=self._streams_max, peer=name)
            await trio.aclose_forcefully(tcp)
            return
        self._streams += 1
        try:
            await self.serve_stream(stream, role, name)
        finally:
            self._streams -= 1

    async def _shake_hands(self, tcp: trio.SocketStream, stream: TlsStream, address: str) -> PeerIdentity | None:
        """Return who the peer proved to be; None if it was refused, which is done. Bounded in time and in number."""
        if len(self._handshakes) >= self._handshakes_max:
            oldest = next(iter(self._handshakes))
            del self._handshakes[oldest]
            oldest.cancel()
        scope = trio.CancelScope(deadline=trio.current_time() + HANDSHAKE_S)
        self._handshakes[scope] = None
        reason = "no TLS handshake in time"
        try:
            with scope:
                await stream.handshake()
                return peer_identity(stream)
        except (trio.BrokenResourceError, ssl.SSLError, PeerError) as error:
            reason = reason_of(error)
        finally:
            self._handshakes.pop(scope, None)
        self._broken.add()
        _log.warning("connection refused", peer=address, error=reason)
        await trio.aclose_forcefully(tcp)
        return None

    async def serve_stream(self, stream: ByteStream | trio.abc.Stream, role: PeerRole | None, name: str) -> None:
        """Serve frames on a stream whose peer is known. `role` None admits every method. Closes the stream."""
        self._next_connection += 1
        connection = _Connection(self, stream, Caller(role, name, self._next_connection))
        self._connections.add(connection)
        self._gauge.set(len(self._connections))
        try:
            await connection.stream.run()
        finally:
            connection.caller.closed.set()
            self._connections.discard(connection)
            self._gauge.set(len(self._connections))
            if not connection.greeted:
                self._broken.add()
            _log.debug("peer disconnected", peer=name, reason=connection.stream.reason)

    def start_body(self, connection: _Connection, route: _Route, call_id: int, body: Any, trace: str | None) -> None:
        """Run a handler in the server's nursery."""
        self.bodies += 1
        span = None if self._traces is None else self._traces.served(route.name, trace)
        if span is None:
            self._nursery.start_soon(self._run_body, connection, route, call_id, body)
        else:
            self._nursery.start_soon(self._run_traced, span, connection, route, call_id, body)

    async def _run_traced(self, span: Span, connection: _Connection, route: _Route, call_id: int, body: Any) -> None:
        with active(span):
            await self._run_body(connection, route, call_id, body)

    async def _run_body(self, connection: _Connection, route: _Route, call_id: int, body: Any) -> None:
        started_ns = time.perf_counter_ns()
        ok = False
        try:
            frame = frames.encode_reply(call_id, await route.handler(body, connection.caller))
            ok = True
        except self._fatal:
            raise
        except RealmError as error:
            _log.warning("handler failed", method=route.name, error=f"{type(error).__name__}: {error}")
            frame = self._failed(call_id)
        except Exception:  # noqa: BLE001  # see below
            # Not the caller's fault, and not a reason to stop serving everybody else (decision record: no reachable
            # abort). A broken invariant is no Exception and does stop the process.
            _log.exception("handler failed unexpectedly", method=route.name)
            frame = self._failed(call_id)
        finally:
            self.bodies -= 1
            if not self.bodies:
                self._idle.set()
        connection.finish(call_id, frame)
        route.timers[ok].observe_ns(time.perf_counter_ns() - started_ns)

    def _failed(self, call_id: int) -> bytes:
        self.refusals[RpcCode.HANDLER_FAILED].add()
        return frames.encode_failure(call_id, RpcCode.HANDLER_FAILED)


async def serve_rpc(
    listen: tuple[str, int],
    *,
    tls: ClusterTls | None,
    methods: Mapping[str, AnyMethod],
    handlers: Mapping[str, Handler],
    build: str = "",
    metrics: Metrics | None = None,
    fatal: tuple[type[BaseException], ...] = (HsmGone,),
    traces: Traces | None = None,
    task_status: trio.TaskStatus[RpcServer] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the handlers on `listen` (host, port; port 0 picks one) until `shutdown`, or until cancelled.

    Reports the `RpcServer` once it accepts connections. After `shutdown` it returns when the last body has ended;
    cancelling it cancels bodies too. Without `tls` the address must be a loopback address, and every caller may call
    everything. Raises `LocalError` when it cannot listen.
    """
    host, port = listen
    if tls is None and not is_loopback(host):
        raise LocalError(f"--insecure-rpc serves only loopback addresses, not {host}; use --cluster-tls")
    _check_handlers(methods, handlers)
    try:
        with thread_needed():
            listeners = await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)
    except OSError as error:
        raise local_error(
            f"--listen: cannot listen on {host}:{port}: {error.strerror or error}; give a free address", error
        ) from None
    async with trio.open_nursery() as bodies:
        server = RpcServer(
            bodies,
            tls=tls,
            methods=methods,
            handlers=handlers,
            build=build,
            metrics=metrics,
            fatal=fatal,
            traces=traces,
        )
        server.port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as streams:
            # The accept loop and the streams are apart: shutting down ends the first and keeps serving the second.
            task_status.started(server)
            with server.stop_accepting:
                await trio.serve_listeners(server.handle_tcp, listeners, handler_nursery=streams)
            await server.wait_stopped()
            streams.cancel_scope.cancel()


def _check_handlers(methods: Mapping[str, AnyMethod], handlers: Mapping[str, Handler]) -> None:
    unknown = set(handlers) - set(methods)
    if unknown:
        raise LocalError(f"handlers without a method: {', '.join(sorted(unknown))}")
