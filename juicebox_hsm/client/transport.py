"""HTTP/1.1 over Trio for the client: a small keep-alive pool around h11.

A request is never sent twice here. A realm may have processed a request whose answer was lost (Recover2 spends a guess
by then), so a failure after the first byte went out is reported and the protocol's own retry opens a new session.
What can be known beforehand is checked instead: a kept connection that became readable while idle was closed by its
peer, and is replaced before anything is sent.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, Self

import h11
import trio

from juicebox_hsm.adapters.process.dialing import dial
from juicebox_hsm.adapters.tls.streams import SocketStream, TlsStream, aclose_forcefully
from juicebox_hsm.adapters.tls.wording import reason_of
from juicebox_hsm.errors import RealmError, check
from juicebox_hsm.host.addresses import parse_url

RESPONSE_BYTES_MAX: Final = 64 * 1024
"""Bodies are cut here; a realm's answers stay below 1 KiB, only a proxy's error pages may be longer."""

CONNECTIONS_PER_HOST_MAX: Final = 64
"""Default bound of parallel connections to one host; more requests wait for one to be free."""

_HEADER_BYTES_MAX: Final = 16 * 1024

Headers = Sequence[tuple[str, str]]
Connect = Callable[[str, int], Awaitable[trio.SocketStream]]


class TransportError(RealmError):
    """No complete answer: connecting, TLS, sending or receiving failed, or time ran out."""

    retryable = True


@dataclass(frozen=True, slots=True)
class Observation:
    """What a monitor wants to know of one answer; `elapsed_ns` is from the first byte sent, names are lower-case."""

    url: str
    status: int
    elapsed_ns: int
    headers: tuple[tuple[str, str], ...]


Observe = Callable[[Observation], None]


class Transport(Protocol):
    """Sends one POST and returns the answer."""

    async def post(self, url: str, headers: Headers, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Return (status, body). Raises `TransportError` when there is no complete answer."""
        ...


@dataclass(slots=True)
class _Connection:
    stream: SocketStream | TlsStream
    socket: trio.socket.SocketType
    http: h11.Connection
    response: h11.Response | None = None

    def went_stale(self) -> bool:
        """Tell whether the peer has sent something (most likely its goodbye) while the connection was idle."""
        return self.socket.is_readable()


@dataclass(slots=True)
class _Host:
    """Connections to one (scheme, host, port), newest idle one used first."""

    scheme: str
    name: str
    port: int
    slots: trio.Semaphore
    idle: list[_Connection] = field(default_factory=list)


class HttpTransport:
    """A pool of HTTP/1.1 connections. One may serve many clients; close it with `aclose` or `async with`.

    `ca_file` names a PEM file to trust instead of the system's certificates. `reuse=False` opens a connection for
    every request. `connect` opens the byte stream to (host, port). `observe` is told of every complete answer.
    """

    def __init__(
        self,
        *,
        ca_file: str | os.PathLike[str] | None = None,
        connections_per_host_max: int = CONNECTIONS_PER_HOST_MAX,
        reuse: bool = True,
        response_bytes_max: int = RESPONSE_BYTES_MAX,
        connect: Connect = dial,
        observe: Observe | None = None,
    ) -> None:
        check(connections_per_host_max >= 1, "a transport may open at least one connection")
        self._tls = ssl.create_default_context(cafile=None if ca_file is None else os.fspath(ca_file))
        self._tls.set_alpn_protocols(["http/1.1"])
        self._connections_per_host_max = connections_per_host_max
        self._reuse = reuse
        self._response_bytes_max = response_bytes_max
        self._connect = connect
        self._observe = observe
        self._hosts: dict[tuple[str, str, int], _Host] = {}
        self._targets: dict[str, tuple[_Host, str, str]] = {}
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close idle connections; those in use are closed when their request ends."""
        self._closed = True
        for host in self._hosts.values():
            while host.idle:
                await aclose_forcefully(host.idle.pop().stream)

    async def post(self, url: str, headers: Headers, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Return (status, body), the body cut at `response_bytes_max`. Raises `TransportError`."""
        if self._closed:
            raise TransportError("the transport is closed")
        host, target, authority = self._target(url)
        closing = () if self._reuse else (("connection", "close"),)
        try:
            request = h11.Request(
                method="POST",
                target=target,
                headers=[("host", authority), ("content-length", str(len(body))), *headers, *closing],
            )
        except (h11.ProtocolError, UnicodeError) as refused:
            raise TransportError("the request's headers are not valid HTTP") from refused
        with trio.move_on_after(timeout_s):
            async with host.slots:
                return await self._exchange(host, url, request, body)
        raise TransportError(f"no answer from {authority} within {timeout_s} s")

    def _target(self, url: str) -> tuple[_Host, str, str]:
        """Return (host, request target, authority) of a URL, remembering what was parsed. Raises `TransportError`."""
        known = self._targets.get(url)
        if known is not None:
            return known
        try:
            parts = parse_url(url, ("https", "http"))
        except ValueError as error:
            raise TransportError(str(error)) from None
        key = (parts.scheme, parts.host, parts.port or (443 if parts.scheme == "https" else 80))
        host = self._hosts.get(key)
        if host is None:
            host = _Host(*key, trio.Semaphore(self._connections_per_host_max))
            self._hosts[key] = host
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        known = (host, target, parts.authority)
        self._targets[url] = known
        return known

    async def _exchange(self, host: _Host, url: str, request: h11.Request, body: bytes) -> tuple[int, bytes]:
        connection = await self._connection(host)
        reusable = False
        begun_ns = time.perf_counter_ns()
        try:
            status, answer = await self._send_and_receive(connection, request, body)
            reusable = self._keep(connection)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError) as failure:
            raise TransportError(f"request to {host.name} failed: {type(failure).__name__}") from failure
        finally:
            if reusable:
                host.idle.append(connection)
            else:
                await aclose_forcefully(connection.stream)
        if self._observe is not None and connection.response is not None:
            headers = tuple(
                (name.decode("latin-1"), value.decode("latin-1")) for name, value in connection.response.headers
            )
            self._observe(Observation(url, status, time.perf_counter_ns() - begun_ns, headers))
        return status, answer

    async def _connection(self, host: _Host) -> _Connection:
        while host.idle:
            connection = host.idle.pop()
            if not connection.went_stale():
                return connection
            await aclose_forcefully(connection.stream)
        try:
            tcp = SocketStream(await self._connect(host.name, host.port))
            stream = await self._secure(tcp, host.name) if host.scheme == "https" else tcp
        except (OSError, trio.BrokenResourceError) as failure:
            raise TransportError(f"cannot connect to {host.name}: {reason_of(failure)}") from failure
        return _Connection(stream, tcp.socket, h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEADER_BYTES_MAX))

    async def _secure(self, tcp: SocketStream, name: str) -> TlsStream:
        """Do the TLS handshake now, closing the connection if it fails: a failed stream must not leak its socket."""
        tls = TlsStream(tcp, self._tls, server_side=False, server_name=name)
        try:
            await tls.handshake()
        except BaseException:
            await aclose_forcefully(tls)
            raise
        return tls

    async def _send_and_receive(self, connection: _Connection, request: h11.Request, body: bytes) -> tuple[int, bytes]:
        http, stream = connection.http, connection.stream
        head = http.send(request) or b""
        await stream.send_all(head + (http.send(h11.Data(data=body)) or b"") + (http.send(h11.EndOfMessage()) or b""))
        status = 0
        received = 0
        chunks: list[bytes] = []
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(await stream.receive_some())
            elif isinstance(event, h11.Response):
                status = event.status_code
                connection.response = event
            elif isinstance(event, h11.Data):
                chunks.append(bytes(event.data))
                received += len(event.data)
                if received > self._response_bytes_max:
                    return status, b"".join(chunks)[: self._response_bytes_max]
            elif isinstance(event, h11.EndOfMessage):
                return status, b"".join(chunks)
            elif not isinstance(event, h11.InformationalResponse):
                raise TransportError("the connection ended before the answer")

    def _keep(self, connection: _Connection) -> bool:
        """Prepare a connection for its next request; False when it must be closed."""
        http = connection.http
        if not self._reuse or self._closed or http.our_state is not h11.DONE or http.their_state is not h11.DONE:
            return False
        http.start_next_cycle()
        return True
