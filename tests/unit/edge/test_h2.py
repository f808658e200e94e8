"""HTTP/2 at the edge: streams, limits, floods, deadlines (load-balancer.md 3)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
import trio
from h2.errors import ErrorCodes
from hyperframe.frame import ContinuationFrame, DataFrame, HeadersFrame, PingFrame, RstStreamFrame, SettingsFrame

from juicebox_hsm.adapters.edge.connection import ConnectionTable
from juicebox_hsm.adapters.edge.exchange import Request, Response
from juicebox_hsm.adapters.edge.h2 import H2Session
from juicebox_hsm.adapters.edge.limits import EdgeLimits
from tests.unit.edge.harness import EdgeFixture, H2Client, Identity, until_hangup

Act = Callable[[H2Client], Awaitable[None]]

_PSEUDO = [(":method", "GET"), (":path", "/"), (":scheme", "https"), (":authority", "localhost")]


async def _client(edge: EdgeFixture) -> H2Client:
    client = H2Client(await edge.connect("h2"))
    await client.start()
    return client


def _goaway(client: H2Client) -> int | None:
    events = client.of(h2.events.ConnectionTerminated)
    return None if not events else events[-1].error_code  # type: ignore[attr-defined]


async def _sent_before_hangup(client: H2Client, piece: bytes, pieces_max: int) -> int | None:
    """Send until the edge hangs up; return the bytes sent, None if it never did."""
    for index in range(pieces_max):
        try:
            await client.stream.send_all(piece)
        except trio.BrokenResourceError:
            return index * len(piece)
        await trio.testing.wait_all_tasks_blocked()
    return None


async def _open_and_reset(client: H2Client) -> None:
    stream_id = client.h2.get_next_available_stream_id()
    client.h2.send_headers(stream_id, _PSEUDO)
    client.h2.reset_stream(stream_id)
    await client.flush()


async def _ping(client: H2Client) -> None:
    client.h2.ping(b"12345678")
    await client.flush()


async def _rounds_until_calm(edge: EdgeFixture, client: H2Client, act: Act, rounds_max: int) -> int | None:
    """Do `act` until the edge ends the connection with ENHANCE_YOUR_CALM; return how often, None if it never did."""
    for rounds in range(1, rounds_max + 1):
        await act(client)
        await trio.testing.wait_all_tasks_blocked()
        if edge.drain.connections == 0:
            await client.until_hangup()
            return rounds if _goaway(client) == ErrorCodes.ENHANCE_YOUR_CALM else None
    return None


async def test_requests_on_one_connection(identity: Identity, nursery: trio.Nursery) -> None:
    """Streams are answered with status, body and x-exec-time."""
    edge = EdgeFixture(identity, nursery)
    client = await _client(edge)
    for index in range(3):
        answer = await client.request("POST", "/req", b"b" * index)
        assert (answer.status, answer.body) == (200, b"POST /req " + b"b" * index)
        assert int(answer.headers["x-exec-time"]) > 0


async def test_streams_run_side_by_side(identity: Identity, nursery: trio.Nursery) -> None:
    """A slow request does not hold up another on the same connection."""
    release = trio.Event()

    async def handler(request: Request) -> Response:
        if request.path == "/slow":
            await release.wait()
        return Response(200, request.path.encode())

    client = await _client(EdgeFixture(identity, nursery, handler))
    slow = await client.begin("GET", "/slow")
    assert (await client.request("GET", "/fast")).body == b"/fast"
    release.set()
    assert (await client.response(slow)).body == b"/slow"


async def test_body_limits(identity: Identity, nursery: trio.Nursery) -> None:
    """2048 bytes pass; one more is 413, whether declared or not, and the connection lives on."""
    client = await _client(EdgeFixture(identity, nursery))
    assert (await client.request("POST", "/", b"a" * 2048)).status == 200
    declared = await client.begin("POST", "/", ("content-length", "2049"), end=False)
    assert (await client.response(declared)).status == 413
    undeclared = await client.begin("POST", "/", end=False)
    client.h2.send_data(undeclared, b"a" * 2049)
    await client.flush()
    assert (await client.response(undeclared)).status == 413
    assert (await client.request("GET", "/")).status == 200


async def test_many_bodies_do_not_exhaust_the_window(identity: Identity, nursery: trio.Nursery) -> None:
    """The connection's flow-control window is given back: 200 kB pass through one connection."""
    client = await _client(EdgeFixture(identity, nursery))
    for _ in range(100):
        assert (await client.request("POST", "/", b"a" * 2000)).status == 200


async def test_head(identity: Identity, nursery: trio.Nursery) -> None:
    """HEAD gets headers only."""
    client = await _client(EdgeFixture(identity, nursery))
    answer = await client.request("HEAD", "/livez")
    assert (answer.status, answer.headers["content-length"], answer.body) == (200, "12", b"")


async def test_small_client_window(identity: Identity, nursery: trio.Nursery) -> None:
    """An answer larger than the client's window arrives in pieces as the client allows."""
    edge = EdgeFixture(identity, nursery)
    client = H2Client(await edge.connect("h2"))
    await client.start(window=4)
    stream_id = await client.begin("GET", "/123456789")
    opened = 0
    client.opens_window = False
    while not client.of(h2.events.StreamEnded, stream_id):
        assert await client.read()
        pieces = client.of(h2.events.DataReceived, stream_id)
        if len(pieces) > opened and not client.of(h2.events.StreamEnded, stream_id):
            opened = len(pieces)
            client.h2.increment_flow_control_window(4, stream_id)
            await client.flush()
    assert b"".join(e.data for e in client.of(h2.events.DataReceived, stream_id)) == b"GET /123456789 "  # type: ignore[attr-defined]
    assert len(client.of(h2.events.DataReceived, stream_id)) >= 4


async def test_client_that_gives_no_window(identity: Identity, nursery: trio.Nursery, autojump_clock: object) -> None:
    """A stream whose client never opens its window is reset after the write time-out."""
    edge = EdgeFixture(identity, nursery)
    await edge.start()
    client = H2Client(await edge.connect("h2"))
    await client.start(window=0)
    stream_id = await client.begin("GET", "/")
    reset = await client.until(h2.events.StreamReset, stream_id)
    assert reset.error_code == ErrorCodes.CANCEL  # type: ignore[attr-defined]


async def test_stream_cap_is_announced_and_kept(identity: Identity, nursery: trio.Nursery) -> None:
    """At most 100 streams are open; a client that ignores the announced cap loses the connection."""
    release = trio.Event()
    running = 0

    async def handler(request: Request) -> Response:
        nonlocal running
        running += 1
        await release.wait()
        return Response(200)

    edge = EdgeFixture(identity, nursery, handler)
    client = await _client(edge)
    await client.until(h2.events.RemoteSettingsChanged)
    assert client.h2.remote_settings.max_concurrent_streams == 100
    assert client.h2.remote_settings.max_header_list_size == 4096
    client.h2.remote_settings.max_concurrent_streams = 1000
    client.h2.remote_settings.acknowledge()
    for _ in range(101):
        await client.begin("GET", "/")
    await client.until_hangup()
    assert running == 100
    assert _goaway(client) is not None
    release.set()


async def test_rapid_reset(identity: Identity, nursery: trio.Nursery) -> None:
    """Opening and resetting streams in a loop ends the connection, and never runs more than 100 handlers at once."""
    release = trio.Event()
    running = finished = highest = 0

    async def handler(request: Request) -> Response:
        nonlocal running, finished
        running += 1
        await release.wait()
        finished += 1
        return Response(200)

    edge = EdgeFixture(identity, nursery, handler)
    client = await _client(edge)
    await client.until(h2.events.RemoteSettingsChanged)
    for _ in range(400):
        stream_id = client.h2.get_next_available_stream_id()
        client.h2.send_headers(stream_id, _PSEUDO)
        client.h2.reset_stream(stream_id)
        try:
            await client.flush()
        except trio.BrokenResourceError:
            break
        await trio.testing.wait_all_tasks_blocked()
        highest = max(highest, running - finished)
    assert edge.drain.connections == 1  # its handlers still run
    assert highest == 100
    assert running == 100
    release.set()
    await trio.testing.wait_all_tasks_blocked()
    assert edge.drain.connections == 0


async def test_resets_by_the_client_are_counted(identity: Identity, nursery: trio.Nursery) -> None:
    """Requests that are reset count even when each is answered at once, so that never many run: 101 end it."""
    heard = 0

    async def handler(request: Request) -> Response:
        nonlocal heard
        heard += 1
        return Response(200)

    edge = EdgeFixture(identity, nursery, handler)
    client = await _client(edge)
    await client.until(h2.events.RemoteSettingsChanged)
    limit = EdgeLimits().h2_resets_max
    assert await _rounds_until_calm(edge, client, _open_and_reset, 2 * limit) == limit + 1
    assert heard == limit + 1


async def test_refusals_of_the_edge_are_counted(
    identity: Identity, nursery: trio.Nursery, autojump_clock: object
) -> None:
    """A client that takes all places and asks on without ever resetting is refused 100 times, and then cut off."""
    release = trio.Event()

    async def handler(request: Request) -> Response:
        await release.wait()
        return Response(200)

    limits = EdgeLimits()
    client = await _client(EdgeFixture(identity, nursery, handler))
    await client.until(h2.events.RemoteSettingsChanged)
    for _ in range(limits.h2_streams_max):  # as many as are allowed: no stream is open, all places are taken
        await _open_and_reset(client)
    await trio.sleep(limits.h2_flood_window_s + 1)
    await _ping(client)  # what a window begins with is not counted
    await trio.testing.wait_all_tasks_blocked()
    refused = 0
    while not _goaway(client) and refused <= 2 * limits.h2_resets_max:
        stream_id = client.h2.get_next_available_stream_id()
        client.h2.send_headers(stream_id, _PSEUDO, end_stream=True)
        await client.flush()
        while not client.of(h2.events.StreamReset, stream_id) and await client.read():
            pass
        refused += 1
    assert _goaway(client) == ErrorCodes.ENHANCE_YOUR_CALM
    assert refused == limits.h2_resets_max + 1
    release.set()


@pytest.mark.parametrize("kind", ["pings", "resets"])
async def test_an_honest_client_over_an_hour(
    identity: Identity, nursery: trio.Nursery, autojump_clock: object, kind: str
) -> None:
    """Counts begin anew with each window: in an hour more pings and resets than a window allows do no harm.

    Nor do they buy anything: a flood after the hour is a flood.
    """
    edge = EdgeFixture(identity, nursery)
    client = await _client(edge)
    await client.until(h2.events.RemoteSettingsChanged)
    limits = EdgeLimits()
    most = limits.h2_control_frames_max if kind == "pings" else limits.h2_resets_max

    act = _ping if kind == "pings" else _open_and_reset
    for _ in range(most + 20):
        await act(client)
        await trio.sleep(3600 / most)
    await trio.sleep(limits.h2_flood_window_s + 1)
    assert (await client.request("GET", "/")).status == 200  # what a window begins with is not counted
    assert await _rounds_until_calm(edge, client, act, 2 * most) == most + 1


async def test_requests_pay_for_a_few_control_frames_only(identity: Identity, nursery: trio.Nursery) -> None:
    """An honest client sends some with each request; hundreds of requests earn no credit for a flood."""
    client = await _client(EdgeFixture(identity, nursery))
    await client.until(h2.events.RemoteSettingsChanged)
    for _ in range(100):
        for _ in range(9):
            client.h2.ping(b"12345678")
        assert (await client.request("GET", "/")).status == 200
    for _ in range(100):
        await client.request("GET", "/")
    await client.stream.send_all(PingFrame(0, b"12345678").serialize() * (EdgeLimits().h2_control_frames_max + 50))
    await client.until_hangup()
    assert _goaway(client) == ErrorCodes.ENHANCE_YOUR_CALM


async def test_bytes_that_complete_no_frame_are_counted_in_a_row(identity: Identity, nursery: trio.Nursery) -> None:
    """A frame that comes in pieces is forgiven once it is whole, however many such frames follow each other."""
    limits = EdgeLimits(h2_silent_bytes_max=100)
    client = await _client(EdgeFixture(identity, nursery, limits=limits))
    ping = PingFrame(0, b"12345678").serialize()
    for _ in range(20):
        for piece in (ping[:10], ping[10:]):
            await client.stream.send_all(piece)
            await trio.testing.wait_all_tasks_blocked()
    assert (await client.request("GET", "/")).status == 200


@pytest.mark.parametrize("kind", ["ping", "settings", "empty_data"])
async def test_control_floods(identity: Identity, nursery: trio.Nursery, kind: str) -> None:
    """A flood of frames that cost work and ask for nothing ends the connection with ENHANCE_YOUR_CALM."""
    edge = EdgeFixture(identity, nursery)
    client = await _client(edge)
    await client.until(h2.events.RemoteSettingsChanged)
    if kind == "empty_data":
        stream_id = await client.begin("POST", "/", end=False)
        frame = DataFrame(stream_id, b"").serialize()
    else:
        frame = (PingFrame(0, b"12345678") if kind == "ping" else SettingsFrame(0)).serialize()
    await client.stream.send_all(frame * 2000)
    await client.until_hangup()
    assert _goaway(client) == ErrorCodes.ENHANCE_YOUR_CALM


@pytest.mark.parametrize(
    "headers",
    [
        [(f"h{index}", "v" * 100) for index in range(40)],
        [("h", "v" * 9_000)],
        [(f"h{index}", "v" * 400) for index in range(40)],
        [("h", "v" * 400)] * 40,
    ],
    ids=["many", "one over 8,192 bytes", "over a frame", "named once and then by index"],
)
async def test_oversized_header_list(identity: Identity, nursery: trio.Nursery, headers: list[tuple[str, str]]) -> None:
    """More than 4096 bytes of headers end the connection, sent at once as well; the last form has few bytes itself."""
    reached = trio.Event()

    async def handler(_: Request) -> Response:
        reached.set()
        return Response(200, b"")

    edge = EdgeFixture(identity, nursery, handler)
    client = await _client(edge)
    await client.until(h2.events.RemoteSettingsChanged)
    client.h2.remote_settings.max_header_list_size = 1 << 20
    await client.begin("GET", "/", *headers)
    await client.until_hangup()
    assert _goaway(client) is not None
    assert not reached.is_set()
    await trio.testing.wait_all_tasks_blocked()
    assert edge.drain.connections == 0


async def test_continuation_flood(identity: Identity, nursery: trio.Nursery) -> None:
    """A header block without end is cut off."""
    edge = EdgeFixture(identity, nursery)
    client = await _client(edge)
    await client.stream.send_all(HeadersFrame(1, b"\x00" * 10).serialize())
    assert await _sent_before_hangup(client, ContinuationFrame(1, b"\x00" * 10).serialize(), 200) is not None
    await trio.testing.wait_all_tasks_blocked()
    assert edge.drain.connections == 0


async def test_huge_frame_is_not_buffered(identity: Identity, nursery: trio.Nursery) -> None:
    """A frame that announces 16 MiB is refused long before that much was taken in."""
    edge = EdgeFixture(identity, nursery)
    client = await _client(edge)
    await client.until(h2.events.RemoteSettingsChanged)
    await client.stream.send_all(b"\xff\xff\xff\x00\x00\x00\x00\x00\x01")
    sent = await _sent_before_hangup(client, b"a" * 16_000, 125)
    assert sent is not None
    assert sent <= EdgeLimits().h2_silent_bytes_max + 64_000


async def test_idle_connection_gets_goaway(identity: Identity, nursery: trio.Nursery, autojump_clock: object) -> None:
    """A silent connection ends with GOAWAY after the idle time-out; any activity starts it again."""
    edge = EdgeFixture(identity, nursery)
    await edge.start()
    client = await _client(edge)
    assert (await client.request("GET", "/")).status == 200
    await trio.sleep(50)
    client.h2.ping(b"12345678")
    await client.flush()
    began = trio.current_time()
    await client.until_hangup()
    assert 60 <= trio.current_time() - began <= 61
    assert _goaway(client) == ErrorCodes.NO_ERROR


async def test_preface_that_never_comes(identity: Identity, nursery: trio.Nursery, autojump_clock: object) -> None:
    """A client that chose h2 and says nothing ends after the header time-out."""
    edge = EdgeFixture(identity, nursery)
    await edge.start()
    stream = await edge.connect("h2")
    began = trio.current_time()
    await until_hangup(stream)
    assert 10 <= trio.current_time() - began <= 12


async def test_slow_body_is_reset(identity: Identity, nursery: trio.Nursery, autojump_clock: object) -> None:
    """A body that trickles is cut off after the body time-out; the connection lives on."""
    edge = EdgeFixture(identity, nursery)
    await edge.start()
    client = await _client(edge)
    stream_id = await client.begin("POST", "/", end=False)
    began = trio.current_time()

    async def trickle() -> None:
        while not client.of(h2.events.StreamReset):
            client.h2.send_data(stream_id, b"a")
            await client.flush()
            await trio.sleep(1)

    nursery.start_soon(trickle)
    await client.until(h2.events.StreamReset, stream_id)
    assert 10 <= trio.current_time() - began <= 12
    assert (await client.request("GET", "/")).status == 200


async def test_client_that_does_not_read(identity: Identity, nursery: trio.Nursery, autojump_clock: object) -> None:
    """A client that stops reading loses the connection after the write time-out."""
    edge = EdgeFixture(identity, nursery)
    await edge.start()
    raw, server = trio.testing.lockstep_stream_pair()
    nursery.start_soon(edge.edge.serve_stream, server)
    await trio.SSLStream(raw, identity.client_context("h2"), server_hostname="localhost").do_handshake()
    await trio.sleep(15)  # not even the edge's SETTINGS are read
    assert edge.drain.connections == 0


async def test_disconnect_does_not_cancel_the_handler(identity: Identity, nursery: trio.Nursery) -> None:
    """A request that was handed on runs to its end after a reset and after a disconnect."""
    release = trio.Event()
    finished = 0

    async def handler(request: Request) -> Response:
        nonlocal finished
        await release.wait()
        finished += 1
        return Response(200, b"late")

    edge = EdgeFixture(identity, nursery, handler)
    client = await _client(edge)
    first = await client.begin("GET", "/a")
    await client.begin("GET", "/b")
    client.h2.reset_stream(first)
    await client.flush()
    await trio.testing.wait_all_tasks_blocked()
    await client.stream.transport_stream.aclose()  # type: ignore[attr-defined]
    await trio.testing.wait_all_tasks_blocked()
    assert edge.drain.connections == 1
    release.set()
    await trio.testing.wait_all_tasks_blocked()
    assert finished == 2
    assert edge.drain.connections == 0


async def test_a_failing_handler_resets_its_stream_only(identity: Identity, nursery: trio.Nursery) -> None:
    """An unexpected error resets that stream and is reported; others go on."""

    async def handler(request: Request) -> Response:
        if request.path == "/bad":
            raise KeyError("defect")
        return Response(200, b"fine")

    edge = EdgeFixture(identity, nursery, handler)
    client = await _client(edge)
    bad = await client.begin("GET", "/bad")
    reset = await client.until(h2.events.StreamReset, bad)
    assert reset.error_code == ErrorCodes.INTERNAL_ERROR  # type: ignore[attr-defined]
    assert (await client.request("GET", "/")).body == b"fine"
    assert isinstance(edge.recorder.errors[0], KeyError)


async def test_invalid_frames_end_the_connection(identity: Identity, nursery: trio.Nursery) -> None:
    """A reset of a stream that never was is answered with GOAWAY."""
    edge = EdgeFixture(identity, nursery)
    client = await _client(edge)
    await client.stream.send_all(RstStreamFrame(77, 8).serialize())
    await client.until_hangup()
    assert _goaway(client) == ErrorCodes.PROTOCOL_ERROR


async def test_window_opened_while_we_send(autojump_clock: object) -> None:
    """A client that opens its window while the edge is still sending the head gets the body at once."""
    ended = trio.Event()
    to_edge, from_client = trio.open_memory_channel[bytes](10)

    class SlowStream:
        """A byte stream that takes 2 s to send the head of an answer."""

        async def receive_some(self, max_bytes: int = 0) -> bytes:
            return await from_client.receive()

        async def send_all(self, data: bytes) -> None:
            kinds = {type(event) for event in client.receive_data(data)}
            if h2.events.StreamEnded in kinds:
                ended.set()
            if h2.events.ResponseReceived in kinds:
                await trio.sleep(1)
                client.increment_flow_control_window(100, 1)
                await to_edge.send(client.data_to_send())
                await trio.sleep(1)

        async def aclose(self) -> None:
            await trio.lowlevel.checkpoint()

    async def handler(_: Request) -> Response:
        await trio.lowlevel.checkpoint()
        return Response(200, b"body")

    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
    client.send_headers(1, _PSEUDO, end_stream=True)
    await to_edge.send(client.data_to_send())
    table = ConnectionTable()
    session = H2Session(table.add(0.0, 10.0), SlowStream(), handler, EdgeLimits(), lambda _: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        with trio.fail_after(3):
            await ended.wait()
        nursery.cancel_scope.cancel()
