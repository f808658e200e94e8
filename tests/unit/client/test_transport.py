"""The HTTP pool over socket pairs, plain and TLS: reuse, limits, failures, and never sending twice."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import h11
import pytest
import trio
import trustme
from trio.testing import MockClock

from juicebox_hsm.client import HttpTransport, TransportError

Handler = Callable[["Server", trio.abc.Stream], Awaitable[None]]
HEADERS = (("x-juicebox-version", "0.3.7"),)


class Server:
    """A scripted HTTP server; `connect` opens a connection to it without any network."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.connections = 0
        self.requests: list[tuple[h11.Request, bytes]] = []
        self.answer: Callable[[], bytes] = lambda: reply(b"ok")
        self.handler: Handler = serve_keep_alive

    async def connect(self, host: str, port: int) -> trio.SocketStream:
        """Open a connection; the arguments are where the client believes it to lead."""
        assert (host, port) == ("realm.test", 8443)
        ours, theirs = trio.socket.socketpair()
        self.nursery.start_soon(self.connected, trio.SocketStream(theirs))
        return trio.SocketStream(ours)

    def transport(self, **options: Any) -> HttpTransport:
        """Return a transport whose connections all lead here."""
        return HttpTransport(connect=self.connect, **options)

    async def connected(self, stream: trio.abc.Stream) -> None:
        """Handle one connection."""
        self.connections += 1
        try:
            async with stream:
                await self.handler(self, stream)
        except (trio.BrokenResourceError, h11.RemoteProtocolError):
            pass  # the peer went away, which tests do on purpose


def reply(body: bytes, status: bytes = b"200 OK", headers: bytes = b"") -> bytes:
    """Return the bytes of an HTTP answer."""
    return b"HTTP/1.1 %s\r\ncontent-length: %d\r\n%s\r\n%s" % (status, len(body), headers, body)


async def read_request(connection: h11.Connection, stream: trio.abc.Stream) -> tuple[h11.Request, bytes] | None:
    """Return the next request of a connection, or None when it ended."""
    request: h11.Request | None = None
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some(65536)))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert request is not None
            return request, body
        else:
            return None


async def serve_keep_alive(server: Server, stream: trio.abc.Stream) -> None:
    """Answer every request with `server.answer`."""
    connection = h11.Connection(h11.SERVER)
    while (received := await read_request(connection, stream)) is not None:
        server.requests.append(received)
        await stream.send_all(server.answer())
        connection = h11.Connection(h11.SERVER)


@pytest.fixture
async def server(nursery: trio.Nursery) -> AsyncIterator[Server]:
    """Run a plain HTTP server."""
    yield Server(nursery)
    nursery.cancel_scope.cancel()


async def post(transport: HttpTransport, **options: Any) -> tuple[int, bytes]:
    """Send one request."""
    url = options.pop("url", "http://realm.test:8443/req")
    return await transport.post(url, HEADERS, options.pop("body", b"body"), options.pop("timeout_s", 5.0))


async def test_request_and_reuse(server: Server) -> None:
    """Requests carry method, path, host, length and headers, and share one connection."""
    async with server.transport() as transport:
        for _ in range(3):
            assert await post(transport, url="http://realm.test:8443/a/req?x=1") == (200, b"ok")
    assert server.connections == 1
    request, body = server.requests[0]
    headers = dict(request.headers)
    assert (request.method, request.target, body) == (b"POST", b"/a/req?x=1", b"body")
    assert headers[b"host"] == b"realm.test:8443"
    assert headers[b"content-length"] == b"4"
    assert headers[b"x-juicebox-version"] == b"0.3.7"
    assert b"content-type" not in headers


async def test_no_reuse(server: Server) -> None:
    """With reuse off every request has a connection of its own and says so."""
    async with server.transport(reuse=False) as transport:
        for _ in range(3):
            await post(transport)
    assert server.connections == 3
    assert dict(server.requests[0][0].headers)[b"connection"] == b"close"


async def test_connection_limit(server: Server) -> None:
    """Parallel requests to one host wait for one of the allowed connections."""
    gate = trio.Event()

    async def slow(server: Server, stream: trio.abc.Stream) -> None:
        await gate.wait()
        await serve_keep_alive(server, stream)

    server.handler = slow
    async with server.transport(connections_per_host_max=2) as transport, trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(lambda: post(transport))
        while server.connections < 2:
            await trio.lowlevel.checkpoint()
        gate.set()
    assert len(server.requests) == 6
    assert server.connections == 2


async def test_connection_closed_while_idle(server: Server) -> None:
    """A connection the server closed between requests is noticed before anything is sent."""

    async def once(server: Server, stream: trio.abc.Stream) -> None:
        received = await read_request(h11.Connection(h11.SERVER), stream)
        assert received is not None
        server.requests.append(received)
        await stream.send_all(reply(b"ok"))

    server.handler = once
    async with server.transport() as transport:
        for number in range(1, 4):
            assert await post(transport) == (200, b"ok")
            assert server.connections == number
            await trio.testing.wait_all_tasks_blocked()
    assert len(server.requests) == 3


@pytest.mark.parametrize("partial", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", b"HTTP/1.1 2"])
async def test_lost_answer_is_reported_not_resent(server: Server, partial: bytes) -> None:
    """A request whose answer is lost may have been processed; it is never sent again."""

    async def lose(server: Server, stream: trio.abc.Stream) -> None:
        received = await read_request(h11.Connection(h11.SERVER), stream)
        assert received is not None
        server.requests.append(received)
        if len(server.requests) == 1:
            await stream.send_all(reply(b"ok"))
            received = await read_request(h11.Connection(h11.SERVER), stream)
            assert received is not None
            server.requests.append(received)
        await stream.send_all(partial)

    server.handler = lose
    async with server.transport() as transport:
        assert await post(transport) == (200, b"ok")
        with pytest.raises(TransportError):
            await post(transport)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 999999 x\r\n\r\n", b"HTTP/1.1 200 OK\r\nx: " + b"y" * 40_000]
)
async def test_answers_that_are_not_http(server: Server, answer: bytes) -> None:
    """Whatever the other side speaks, the failure is a `TransportError`."""
    server.answer = lambda: answer
    async with server.transport() as transport:
        with pytest.raises(TransportError):
            await post(transport)


async def test_interim_answers_and_statuses(server: Server) -> None:
    """Interim answers are skipped; statuses and bodies other than 200 are returned as they are."""
    server.answer = lambda: b"HTTP/1.1 103 Early Hints\r\n\r\n" + reply(b"nope", b"503 Unavailable")
    async with server.transport() as transport:
        assert await post(transport) == (503, b"nope")


async def test_close_header_ends_the_connection(server: Server) -> None:
    """A server that announces closing is not asked again on that connection."""
    server.answer = lambda: reply(b"ok", headers=b"connection: close\r\n")
    async with server.transport() as transport:
        for _ in range(2):
            await post(transport)
    assert server.connections == 2


async def test_response_limit(server: Server) -> None:
    """A body is cut at the limit and the connection is given up."""
    server.answer = lambda: reply(b"z" * 5000)
    async with server.transport(response_bytes_max=1000) as transport:
        assert await post(transport) == (200, b"z" * 1000)
        assert await post(transport) == (200, b"z" * 1000)
    assert server.connections == 2


async def test_timeout(server: Server, autojump_clock: MockClock) -> None:
    """A silent server ends in `TransportError` after the time-out, and its connection is closed."""
    closed = trio.Event()

    async def silent(server: Server, stream: trio.abc.Stream) -> None:
        await read_request(h11.Connection(h11.SERVER), stream)
        await stream.receive_some(1)
        closed.set()

    server.handler = silent
    async with server.transport() as transport:
        with pytest.raises(TransportError, match="30"):
            await post(transport, timeout_s=30.0)
        await closed.wait()


async def test_unreachable() -> None:
    """A connection that cannot be made is a `TransportError` that names the host."""

    async def refuse(host: str, port: int) -> trio.SocketStream:
        raise ConnectionRefusedError("refused")

    async with HttpTransport(connect=refuse) as transport:
        with pytest.raises(TransportError, match=r"realm\.test: refused"):
            await post(transport)


async def test_closed_transport() -> None:
    """A closed transport sends nothing."""
    transport = HttpTransport()
    await transport.aclose()
    with pytest.raises(TransportError, match="closed"):
        await transport.post("http://realm.test:8443/req", (), b"", 5.0)


async def test_headers_that_are_not_http(server: Server) -> None:
    """A header that could split the request is refused before anything is sent."""
    async with server.transport() as transport:
        for value in ("a\r\nx: y", "\u00fc\u4e00"):
            with pytest.raises(TransportError):
                await transport.post("http://realm.test:8443/", (("x", value),), b"", 5.0)
    assert server.connections == 0


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A certificate authority for the module."""
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


@pytest.mark.parametrize("trusted", [True, False])
async def test_tls(server: Server, authority: trustme.CA, trusted: bool, tmp_path: Path) -> None:
    """TLS connections are reused, stale ones replaced, and certificates checked against the given authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("realm.test", key_type=trustme.KeyType.ECDSA).configure_cert(context)

    async def over_tls(server: Server, stream: trio.abc.Stream) -> None:
        await serve_keep_alive(server, trio.SSLStream(stream, context, server_side=True, https_compatible=True))

    server.handler = over_tls
    other = trustme.CA(key_type=trustme.KeyType.ECDSA)
    (authority if trusted else other).cert_pem.write_to_path(tmp_path / "ca.pem")
    url = "https://realm.test:8443/req"
    async with server.transport(ca_file=tmp_path / "ca.pem") as transport:
        if trusted:
            for _ in range(3):
                assert await post(transport, url=url) == (200, b"ok")
            assert server.connections == 1
        else:
            with pytest.raises(TransportError, match="certificate"):
                await post(transport, url=url)
            assert server.requests == []
