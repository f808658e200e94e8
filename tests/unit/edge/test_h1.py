"""HTTP/1.1 at the edge: framing, limits, deadlines, keep-alive (load-balancer.md 3 and 5)."""

from __future__ import annotations

import pytest
import trio

from juicebox_hsm.adapters.edge.exchange import Request, Response
from juicebox_hsm.adapters.edge.limits import EdgeLimits
from juicebox_hsm.adapters.tls.streams import lean
from tests.patience import HANGS_S
from tests.unit.edge.harness import EdgeFixture, H1Client, H2Client, Identity, until_hangup


async def test_answers_and_keeps_alive(identity: Identity, nursery: trio.Nursery) -> None:
    """Several requests share one connection, each answered with x-exec-time."""
    edge = EdgeFixture(identity, nursery)
    client = H1Client(await edge.connect("http/1.1"))
    for index in range(3):
        answer = await client.request("POST", "/req", b"x" * index)
        assert (answer.status, answer.body) == (200, b"POST /req " + b"x" * index)
        assert int(answer.headers["x-exec-time"]) > 0
        assert "connection" not in answer.headers


async def test_a_401_does_not_tell_how_long_it_took(identity: Identity, nursery: trio.Nursery) -> None:
    """The time of a refused token would show which tenants have keys; over both protocols it is left out."""

    async def refuse(_request: Request) -> Response:
        return Response(401)

    edge = EdgeFixture(identity, nursery, refuse)
    first = await H1Client(await edge.connect("http/1.1")).request("GET", "/")
    second = H2Client(await edge.connect("h2"))
    await second.start()
    for answer in (first, await second.request("GET", "/")):
        assert answer.status == 401
        assert "x-exec-time" not in answer.headers


async def test_a_body_does_not_count_as_head(identity: Identity, nursery: trio.Nursery) -> None:
    """A small head with a large body in the same read, and pipelined requests, are no large head."""
    edge = EdgeFixture(identity, nursery)
    client = H1Client(await edge.connect("http/1.1"))
    assert (await client.request("POST", "/req", b"x" * 20_000)).status == 413
    client = H1Client(await edge.connect("http/1.1"))
    head = b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"a" * 5000 + b"\r\n\r\n"
    await client.send(head + head)
    assert [(await client.answer()).status, (await client.answer()).status] == [200, 200]


@pytest.mark.parametrize(
    ("offer", "chosen"),
    [((), "http/1.1"), (("spdy/3",), "http/1.1"), (("h2", "http/1.1"), "http/1.1"), (("h2",), "h2")],
)
async def test_alpn(identity: Identity, nursery: trio.Nursery, offer: tuple[str, ...], chosen: str) -> None:
    """HTTP/1.1 is preferred, h2 is served to those who offer only that, and a peer without ALPN gets HTTP/1.1."""
    edge = EdgeFixture(identity, nursery)
    stream = await edge.connect(*offer)
    assert (stream.selected_alpn_protocol() or "http/1.1") == chosen
    await trio.testing.wait_all_tasks_blocked()
    assert edge.recorder.counts[f"load_balancer.connections.count/{chosen}"] == 1


async def test_body_at_the_limit_is_read(identity: Identity, nursery: trio.Nursery) -> None:
    """2048 bytes are allowed, with a length or in chunks."""
    edge = EdgeFixture(identity, nursery)
    client = H1Client(await edge.connect())
    assert (await client.request("POST", "/", b"y" * 2048)).status == 200
    head = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    await client.send(head + b"400\r\n" + b"z" * 1024 + b"\r\n400\r\n" + b"z" * 1024 + b"\r\n0\r\n\r\n")
    assert (await client.answer()).body == b"POST / " + b"z" * 2048


async def test_declared_excess_is_refused_unread(identity: Identity, nursery: trio.Nursery) -> None:
    """A content-length above the limit is answered before any byte of the body was sent."""
    edge = EdgeFixture(identity, nursery)
    client = H1Client(await edge.connect())
    await client.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2049\r\n\r\n")
    assert (await client.answer()).status == 413


async def test_chunked_excess_stops_reading(identity: Identity, nursery: trio.Nursery) -> None:
    """Reading a body of unknown length stops once the limit is passed; the connection is closed afterwards."""
    edge = EdgeFixture(identity, nursery)
    client = H1Client(await edge.connect())
    await client.send(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n801\r\n" + b"z" * 2049)
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (413, "close")


async def test_short_unread_body_keeps_the_connection(identity: Identity, nursery: trio.Nursery) -> None:
    """A handler that does not want the body (version gate) does not cost an honest client its connection."""

    async def refuse(request: Request) -> Response:
        return Response(426, b"no") if request.path == "/old" else Response(200, await request.body(9))

    edge = EdgeFixture(identity, nursery, refuse)
    client = H1Client(await edge.connect())
    assert (await client.request("POST", "/old", b"b" * 1800)).status == 426
    assert (await client.request("POST", "/new", b"c" * 9)).body == b"c" * 9


async def test_expect_continue(identity: Identity, nursery: trio.Nursery) -> None:
    """A client that waits for 100 is told to go on when the body is wanted, and refused at once when it is not."""
    edge = EdgeFixture(identity, nursery)
    client = H1Client(await edge.connect())
    await client.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n")
    assert (await client.answer()).status == 100
    await client.send(b"ok")
    assert (await client.answer()).body == b"POST / ok"
    await client.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9999\r\nexpect: 100-continue\r\n\r\n")
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (413, "close")


async def test_pipelined_requests_are_answered_in_order(identity: Identity, nursery: trio.Nursery) -> None:
    """Requests that arrive together are answered one after the other."""
    edge = EdgeFixture(identity, nursery)
    client = H1Client(await edge.connect())
    await client.send(b"".join(b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n" % index for index in range(5)))
    assert [(await client.answer()).body for _ in range(5)] == [b"GET /%d " % index for index in range(5)]


async def test_head_has_length_but_no_body(identity: Identity, nursery: trio.Nursery) -> None:
    """HEAD gets the headers of GET and no body, and the next answer is not confused."""
    edge = EdgeFixture(identity, nursery)
    client = H1Client(await edge.connect())
    answer = await client.request("HEAD", "/livez")
    assert (answer.status, answer.headers["content-length"]) == (200, "12")
    assert (await client.request("GET", "/a")).body == b"GET /a "


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\x00\x01\x02\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"a" * 9000, 431),
        (b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"a" * 9000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nhost: x\r\na: " + b" " * 9000 + b"a\r\n\r\n", 431),
    ],
)
async def test_malformed_requests(identity: Identity, nursery: trio.Nursery, raw: bytes, status: int) -> None:
    """Bytes that are not HTTP are answered 400 (431 for a head that is too large), never 5xx, and the end follows."""
    edge = EdgeFixture(identity, nursery)
    client = H1Client(await edge.connect())
    await client.send(raw)
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (status, "close")


async def test_idle_connection_is_closed(identity: Identity, nursery: trio.Nursery, autojump_clock: object) -> None:
    """A silent keep-alive connection ends after the idle time-out, measured from the last answer."""
    edge = EdgeFixture(identity, nursery, limits=EdgeLimits(idle_timeout_s=60))
    await edge.start()
    client = H1Client(await edge.connect())
    await trio.sleep(50)
    assert (await client.request("GET", "/")).status == 200
    began = trio.current_time()
    assert await client.closed()
    assert 60 <= trio.current_time() - began <= 61


async def test_long_request_is_not_idle(identity: Identity, nursery: trio.Nursery, autojump_clock: object) -> None:
    """A request that is processed for longer than every time-out is answered."""

    async def slow(request: Request) -> Response:
        await trio.sleep(300)
        return Response(200, b"done")

    edge = EdgeFixture(identity, nursery, slow)
    await edge.start()
    client = H1Client(await edge.connect())
    assert (await client.request("GET", "/")).body == b"done"


@pytest.mark.parametrize("start", [b"GET / HT", b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2000\r\n\r\n"])
async def test_slow_loris(identity: Identity, nursery: trio.Nursery, autojump_clock: object, start: bytes) -> None:
    """A head or body that trickles is cut off at its time-out however regularly bytes arrive."""
    edge = EdgeFixture(identity, nursery)
    await edge.start()
    stream = await edge.connect()
    began = trio.current_time()
    await stream.send_all(start)
    cut_off = False
    while not cut_off and trio.current_time() - began < 60:
        try:
            await stream.send_all(b"a")
        except trio.BrokenResourceError:
            cut_off = True
        await trio.sleep(1)
    assert 10 <= trio.current_time() - began <= 13
    assert edge.drain.connections == 0


async def test_silent_handshake_is_cut_off(identity: Identity, nursery: trio.Nursery, autojump_clock: object) -> None:
    """A connection that never begins TLS ends after the handshake time-out."""
    edge = EdgeFixture(identity, nursery)
    await edge.start()
    raw = edge.dial()
    began = trio.current_time()
    assert await until_hangup(raw) == b""
    assert 10 <= trio.current_time() - began <= 11
    assert edge.recorder.counts["load_balancer.connections.errors/tls"] == 1


async def test_client_that_does_not_read(identity: Identity, nursery: trio.Nursery, autojump_clock: object) -> None:
    """A client that never takes its answer loses the connection after the write time-out."""
    edge = EdgeFixture(identity, nursery)
    await edge.start()
    client, server = trio.testing.lockstep_stream_pair()
    nursery.start_soon(edge.edge.serve_stream, server)
    stream = trio.SSLStream(client, identity.client_context(), server_hostname="localhost")
    await stream.do_handshake()
    await stream.send_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    await trio.sleep(12)
    assert edge.drain.connections == 0


async def test_disconnect_does_not_cancel_the_handler(identity: Identity, nursery: trio.Nursery) -> None:
    """Once a request is handed on, the client's disappearance does not cancel it."""
    finished = trio.Event()
    release = trio.Event()

    async def forward(request: Request) -> Response:
        await request.body(10)
        await release.wait()
        finished.set()
        return Response(200)

    edge = EdgeFixture(identity, nursery, forward)
    stream = await edge.connect()
    await stream.send_all(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n1")
    await trio.testing.wait_all_tasks_blocked()
    await trio.aclose_forcefully(stream.transport_stream)
    await trio.testing.wait_all_tasks_blocked()
    release.set()
    with trio.fail_after(HANGS_S):
        await finished.wait()


async def test_a_failing_handler_harms_one_client_only(identity: Identity, nursery: trio.Nursery) -> None:
    """An unexpected error is reported with its trace and ends that connection; the next one is served."""

    async def handler(request: Request) -> Response:
        if request.path == "/bad":
            raise KeyError("defect")
        return Response(200, b"fine")

    edge = EdgeFixture(identity, nursery, handler)
    client = H1Client(await edge.connect())
    await client.send(b"GET /bad HTTP/1.1\r\nhost: x\r\n\r\n")
    assert await client.closed()
    assert isinstance(edge.recorder.errors[0], KeyError)
    other = H1Client(await edge.connect())
    assert (await other.request("GET", "/good")).body == b"fine"


_HEAD = b"POST /req HTTP/1.1\r\nhost: x\r\n"
_HIDDEN = b"0\r\n\r\nGET /hidden HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        _HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n" + _HIDDEN,
        _HEAD + b"Transfer-Encoding: Chunked\r\nContent-Length: %d\r\n\r\n" % len(_HIDDEN) + _HIDDEN,
        _HEAD + b"transfer-encoding: chunked, chunked\r\n\r\n" + _HIDDEN,
        _HEAD + b"transfer-encoding: identity\r\ncontent-length: 0\r\n\r\n" + _HIDDEN,
        _HEAD + b"transfer-encoding : chunked\r\ncontent-length: 0\r\n\r\n" + _HIDDEN,
        _HEAD + b"content-length: 0\r\ncontent-length: %d\r\n\r\n" % len(_HIDDEN) + _HIDDEN,
        _HEAD + b"content-length: 0, 5\r\n\r\n" + _HIDDEN,
        _HEAD + b"content-length: +5\r\n\r\n" + _HIDDEN,
        b"POST /req HTTP/1.0\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + _HIDDEN,
    ],
)
async def test_no_request_can_be_smuggled(identity: Identity, nursery: trio.Nursery, raw: bytes) -> None:
    """Where two readers may see different ends of a request it is refused unheard, and nothing behind it is read."""
    heard: list[bytes] = []

    async def handler(request: Request) -> Response:
        heard.append(request.path.encode())
        return Response(200, b"")

    edge = EdgeFixture(identity, nursery, handler)
    client = H1Client(await edge.connect())
    await client.send(raw)
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert heard == []


async def test_a_length_said_twice_alike_counts_once(identity: Identity, nursery: trio.Nursery) -> None:
    """The same length repeated leaves no doubt (RFC 9112 6.3): one request, and the next one is the client's."""
    edge = EdgeFixture(identity, nursery)
    client = H1Client(await edge.connect())
    await client.send(_HEAD + b"content-length: 2\r\ncontent-length: 2\r\n\r\nhi")
    assert (await client.answer()).body == b"POST /req hi"
    assert (await client.request("GET", "/next")).body == b"GET /next "


async def test_http_1_0_closes(identity: Identity, nursery: trio.Nursery) -> None:
    """An HTTP/1.0 request is answered and the connection closed."""
    edge = EdgeFixture(identity, nursery)
    client = H1Client(await edge.connect())
    await client.send(b"GET /x HTTP/1.0\r\n\r\n")
    assert (await client.answer()).body == b"GET /x "
    assert await client.closed()


@pytest.mark.parametrize(
    ("target", "path"), [(b"/req?a=b", b"/req"), (b"https://h:1/req?x", b"/req"), (b"*", b""), (b"http://[::1/", b"")]
)
async def test_target_forms(identity: Identity, nursery: trio.Nursery, target: bytes, path: bytes) -> None:
    """Queries are cut off, absolute targets are understood, those without a path and broken ones match nothing."""
    edge = EdgeFixture(identity, nursery)
    client = H1Client(await edge.connect())
    await client.send(b"GET %s HTTP/1.1\r\nhost: x\r\n\r\n" % target)
    assert (await client.answer()).body == b"GET %s " % path


async def test_pipelined_requests_leave_turns_to_others(identity: Identity, nursery: trio.Nursery) -> None:
    """Hundreds of requests sent in one piece are not answered in one turn: who asks meanwhile is served between."""
    heard: list[str] = []

    async def handler(request: Request) -> Response:
        heard.append(request.path)
        return Response(200, b"")

    edge = EdgeFixture(identity, nursery, handler)

    async def connect() -> H1Client:
        """Connect over a real socket: unlike streams in memory it takes answers without giving others a turn."""
        ours, theirs = trio.socket.socketpair()
        nursery.start_soon(edge.edge.serve_stream, lean(trio.SocketStream(theirs)))
        context = identity.client_context()
        stream = trio.SSLStream(trio.SocketStream(ours), context, server_hostname="localhost", https_compatible=True)
        await stream.do_handshake()
        return H1Client(stream)

    crowd, other = await connect(), await connect()
    await other.request("GET", "/first")
    await crowd.send(b"GET /crowd HTTP/1.1\r\nhost: x\r\n\r\n" * 300)
    await other.request("GET", "/other")
    assert "/other" in heard
    assert len(heard) < 150, "most of the crowd was answered first"
    for client in (crowd, other):
        await trio.aclose_forcefully(client.stream)
