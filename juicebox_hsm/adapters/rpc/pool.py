"""One stream per peer address, opened when first needed and again, with backoff, after it was lost (agent.md 2).

Calls to a peer in backoff fail at once with the last reason: callers know other peers, or poll.
"""

from __future__ import annotations

import math
import random
import ssl
import time
from dataclasses import dataclass
from typing import Final

import trio

from juicebox_hsm.adapters.observation.logging import get_logger, outside_context
from juicebox_hsm.adapters.observation.metrics import Metrics, Timer
from juicebox_hsm.adapters.observation.tracing import current
from juicebox_hsm.adapters.process.dialing import dial
from juicebox_hsm.adapters.rpc.client import RpcConnection
from juicebox_hsm.adapters.rpc.errors import RpcError, RpcFailed, RpcUnreachable
from juicebox_hsm.adapters.tls.cluster_tls import ClusterTls, peer_identity
from juicebox_hsm.adapters.tls.streams import SocketStream, TlsStream
from juicebox_hsm.adapters.tls.wording import reason_of
from juicebox_hsm.errors import PeerError
from juicebox_hsm.host.addresses import is_loopback, parse_url, shown
from juicebox_hsm.host.retry import RetryProfile
from juicebox_hsm.wire.methods import Method, Reply, Request
from juicebox_hsm.wire.rpc import PeerRole

HTTP_OK: Final = 200  # how a metric that was made for HTTP calls success
CONNECT_S: Final = 2.0  # own: name, TCP and TLS; and again for the hello
RECONNECT: Final = RetryProfile(first_s=0.03, cap_s=0.75, attempts_max=None, total_s=math.inf, spread=1 / 3)
"""Own: 20 to 40 ms at first, since a restarting process is soon back; at most 1 s, since a peer that is
back must be found within the failover target. The spread keeps peers of a restarted process from coming back in step.
"""
SETTLED_S: Final = 1.0
"""A stream that lived this long was no failure."""
PEERS_MAX: Final = 1024  # own: addresses come from discovery; old ones are dropped when this many are known
SERVERS: Final = frozenset({PeerRole.AGENT, PeerRole.MANAGER})  # decision record: who serves RPC at all

_log = get_logger("rpc.client")


@dataclass(slots=True)
class _Peer:
    """What is known about one address."""

    url: str
    connection: RpcConnection | None = None
    connecting: trio.Event | None = None
    scope: trio.CancelScope | None = None
    failures: int = 0
    retry_at: float = 0.0
    reason: str = ""


class RpcPool:
    """Calls by address. Streams live in `nursery`; cancelling it closes them."""

    def __init__(
        self,
        nursery: trio.Nursery,
        tls: ClusterTls | None,
        *,
        build: str = "",
        metrics: Metrics | None = None,
        passes_trace: bool = False,
    ) -> None:
        """With `passes_trace`, calls without a `trace` carry that of their task (`tracing.active`).

        Without `tls` only `tcp://` addresses on loopback are called, else only `tls://`."""
        self._nursery = nursery
        self._tls = tls
        self._build = build
        self._metrics = metrics if metrics is not None else Metrics()
        self._passes_trace = passes_trace
        self._peers: dict[str, _Peer] = {}
        self._timers: dict[tuple[str, str, str], Timer] = {}

    async def call(
        self,
        url: str,
        method: Method[Request, Reply],
        body: Request,
        *,
        timeout_s: float,
        server: PeerRole | None = None,
        trace: str | None = None,
    ) -> Reply:
        """Call `method` at `url` and return its reply, an instance of `method.reply`. Never sends twice.

        `timeout_s` covers connecting too. `server` demands that role of the peer's certificate (any that serves by
        default). Raises `RpcFailed` and `RpcUnreachable`; `maybe_delivered` of both says whether the peer may have
        got the request. Raises `FrameTooLarge` for a request over 1 MiB.
        """
        started_ns = time.perf_counter_ns()
        if self._passes_trace and trace is None:
            trace = current()
        result = "cancelled"
        try:
            peer = self._peers.get(url)
            connection = peer.connection if peer is not None else None
            if connection is None or not connection.open:
                deadline = trio.current_time() + timeout_s
                connection = await self._connect(url, deadline)
                timeout_s = deadline - trio.current_time()
            if server is not None and connection.role is not None and connection.role is not server:
                raise RpcUnreachable(f"{url}: is {connection.role.value}, not {server.value}", maybe_delivered=False)
            reply = await connection.call(method, body, timeout_s=timeout_s, trace=trace)
            result = "ok"
            return reply
        except RpcError as error:
            result = error.code.value if isinstance(error, RpcFailed) else "Unreachable"
            raise
        finally:
            key = (method.name, url, result)
            timer = self._timers.get(key)
            if timer is None:
                timer = self._timer(key)
            timer.observe_ns(time.perf_counter_ns() - started_ns)

    def forget(self, url: str) -> None:
        """Close the stream to `url`, if any; calls in flight fail."""
        peer = self._peers.pop(url, None)
        if peer is not None:
            self._drop(peer)

    def is_connected(self, url: str) -> bool:
        """Tell whether there is an open stream to `url` now."""
        peer = self._peers.get(url)
        return peer is not None and peer.connection is not None and peer.connection.open

    def close(self) -> None:
        """Close all streams."""
        for peer in self._peers.values():
            self._drop(peer)
        self._peers.clear()

    def _timer(self, key: tuple[str, str, str]) -> Timer:
        if len(self._timers) > 64 * PEERS_MAX:
            self._timers.clear()
        method, url, result = key
        timer = self._timers[key] = self._metrics.timer(
            # the name of the reference's HTTP client, for dashboards (load-balancer.md 10)
            "reqwest.client.time",
            method=method,
            url=url,
            status_code=HTTP_OK if result == "ok" else None,
            err=None if result == "ok" else result,
        )
        return timer

    def _drop(self, peer: _Peer) -> None:
        if peer.scope is not None:
            peer.scope.cancel()

    async def _connect(self, url: str, deadline: float) -> RpcConnection:
        peer = self._peers.get(url)
        if peer is None:
            self._make_room()
            peer = self._peers[url] = _Peer(url)
        if peer.connecting is None:
            if peer.scope is not None and peer.connection is not None:  # lost a moment ago, still being closed
                raise RpcUnreachable(f"{url}: {peer.connection.stream.reason}", maybe_delivered=False)
            if trio.current_time() < peer.retry_at:
                raise RpcUnreachable(f"{url}: {peer.reason}", maybe_delivered=False)
            peer.connecting = trio.Event()
            outside_context(self._nursery.start_soon, self._run_peer, peer)
        with trio.move_on_at(deadline):
            await peer.connecting.wait()
        connection = peer.connection
        if connection is None or not connection.open:
            raise RpcUnreachable(f"{url}: {peer.reason or 'no connection in time'}", maybe_delivered=False)
        return connection

    def _make_room(self) -> None:
        if len(self._peers) >= PEERS_MAX:
            for url, peer in list(self._peers.items()):
                if peer.scope is None:
                    del self._peers[url]

    async def _run_peer(self, peer: _Peer) -> None:
        """Open the stream and keep it until it is lost. Raises nothing but `Cancelled`."""
        connecting = peer.connecting
        opened_at = 0.0
        try:
            with trio.CancelScope() as peer.scope:
                connection = await self._open(peer)
                if connection is not None:
                    opened_at = trio.current_time()
                    await self._run_connection(peer, connection)
        finally:
            peer.connection = None
            peer.connecting = None
            peer.scope = None
            lived_s = trio.current_time() - opened_at if opened_at and peer.failures == 0 else 0.0
            peer.failures = 0 if lived_s > SETTLED_S else peer.failures + 1
            backoff_s = RECONNECT.delay_s(peer.failures, random.random()) if peer.failures else 0.0  # noqa: S311 - no secret
            peer.retry_at = trio.current_time() + backoff_s
            if connecting is not None:
                connecting.set()

    async def _run_connection(self, peer: _Peer, connection: RpcConnection) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._greet, peer, connection)
            await connection.run()
            nursery.cancel_scope.cancel()
        peer.reason = connection.stream.reason
        _log.debug("stream ended", peer=peer.url, reason=peer.reason)

    async def _greet(self, peer: _Peer, connection: RpcConnection) -> None:
        with trio.move_on_after(CONNECT_S):
            await connection.greeted.wait()
            if connection.open:
                peer.connection = connection
                peer.failures = 0
                peer.reason = ""
                if peer.connecting is not None:
                    peer.connecting.set()
                    peer.connecting = None
            return
        connection.stream.stop("no hello in time")

    async def _open(self, peer: _Peer) -> RpcConnection | None:
        """Return a connection that is not yet greeted, or None with `peer.reason` set."""
        try:
            host, port, secure = _parse(peer.url)
        except ValueError as error:
            peer.reason = f"not an address for RPC: {error}"
            return None
        if secure != (self._tls is not None):
            peer.reason = "tls:// needs --cluster-tls" if secure else "tcp:// needs --insecure-rpc"
            return None
        tcp: trio.SocketStream | None = None
        try:
            with trio.fail_after(CONNECT_S):
                tcp = await dial(host, port)
                if self._tls is None:
                    return RpcConnection(SocketStream(tcp), peer=peer.url, role=None, build=self._build)
                stream = TlsStream(SocketStream(tcp), self._tls.client_context, server_side=False)
                await stream.handshake()
                identity = peer_identity(stream)
            if identity.role not in SERVERS:
                raise PeerError(f"peer's certificate is for role {identity.role.value}, which serves no RPC")
            return RpcConnection(stream, peer=peer.url, role=identity.role, build=self._build)
        except (OSError, trio.BrokenResourceError, ssl.SSLError, PeerError) as error:
            peer.reason = reason_of(error)
        except trio.TooSlowError:
            peer.reason = f"no connection within {CONNECT_S} s"
        if tcp is not None:
            await trio.aclose_forcefully(tcp)
        _log.debug("cannot connect", peer=peer.url, reason=peer.reason)
        return None


def _parse(url: str) -> tuple[str, int, bool]:
    """Return host, port and whether TLS is asked for; raises ValueError."""
    found = parse_url(url, ("tls", "tcp"))
    if found.port is None:
        raise ValueError(f"{shown(url)}: expected tls://HOST:PORT")
    if found.scheme == "tcp" and not is_loopback(found.host):
        raise ValueError("tcp:// is for loopback only")
    return found.host, found.port, found.scheme == "tls"
