"""An edge in memory: TLS clients over stream pairs, a handler the test controls, and recorders."""

from __future__ import annotations

import datetime as dt
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import h2.settings
import trio
import trio.testing
import trustme

from juicebox_hsm.adapters.edge.drain import DrainController
from juicebox_hsm.adapters.edge.exchange import BodyTooLarge, Request, Response
from juicebox_hsm.adapters.edge.limits import EdgeLimits
from juicebox_hsm.adapters.edge.server import Edge
from juicebox_hsm.adapters.edge.tls import EdgeTls
from tests.sink import Sink

MemoryStream = trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]
HandlerFunction = Callable[[Request], Awaitable[Response]]

WAIT_S = 10.0
"""Longest wait of a client for the edge: all happens in memory, so this is no figure of speed."""

VIRTUAL_WAIT_S = 3600.0
"""The same where time jumps: longer than any time-out of the edge."""


def patience() -> AbstractContextManager[trio.CancelScope]:
    """Return a deadline for whatever a client waits for, so that an edge that says nothing is a failure at once."""
    is_virtual = isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock)
    return trio.fail_after(VIRTUAL_WAIT_S if is_virtual else WAIT_S)


async def until_hangup(stream: trio.abc.ReceiveStream) -> bytes:
    """Return what comes until the edge hangs up."""
    received = b""
    with patience():
        try:
            while data := await stream.receive_some():
                received += data
        except trio.BrokenResourceError:
            pass
    return received


@dataclass(frozen=True)
class Identity:
    """Certificate files of one edge, and the CA that signed them."""

    ca: trustme.CA
    key: Path
    cert: Path

    def client_context(self, *protocols: str) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.ca.configure_trust(context)
        if protocols:
            context.set_alpn_protocols(list(protocols))
        return context


def make_identity(folder: Path, name: str = "edge", *, valid_days: tuple[int, int] = (-1, 365)) -> Identity:
    """Make a CA, and a key pair of it that is valid from the first day to the second, counted from now."""
    ca = trustme.CA()
    now = dt.datetime.now(dt.UTC)
    begin, end = (now + dt.timedelta(days=day) for day in valid_days)
    leaf = ca.issue_cert("localhost", not_before=begin, not_after=end)
    folder.mkdir(exist_ok=True)
    identity = Identity(ca, folder / f"{name}.key", folder / f"{name}.pem")
    leaf.private_key_pem.write_to_path(identity.key)
    for index, pem in enumerate(leaf.cert_chain_pems):
        pem.write_to_path(identity.cert, append=index > 0)
    return identity


@dataclass
class Recorder(Sink):
    """Counts metrics and keeps log lines."""

    counts: Counter[str] = field(default_factory=Counter)
    lines: list[tuple[str, str]] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    def count(self, name: str, n: int = 1, **tags: str | int | bool | None) -> None:
        self.counts[name] += n
        for value in tags.values():
            self.counts[f"{name}/{value}"] += n

    def gauge(self, name: str, value: float, **tags: str | int | bool | None) -> None:
        self.counts[name] = int(value)

    def info(self, event: str, **fields: object) -> None:
        self.lines.append(("info", event))

    def warning(self, event: str, **fields: object) -> None:
        self.lines.append(("warning", event))

    def error(self, event: str, **fields: object) -> None:
        self.lines.append(("error", event))
        if isinstance(fields.get("exc_info"), BaseException):
            self.errors.append(fields["exc_info"])  # type: ignore[arg-type]


async def echo(request: Request) -> Response:
    """Answer with method, path and body; 413 with nothing read when the body is over 2048 bytes."""
    try:
        body = await request.body(2048)
    except BodyTooLarge:
        return Response(413, b"too large")
    return Response(200, request.method.encode() + b" " + request.path.encode() + b" " + body)


class EdgeFixture:
    """An edge whose connections come from `connect`."""

    def __init__(
        self,
        identity: Identity,
        nursery: trio.Nursery,
        handler: HandlerFunction = echo,
        limits: EdgeLimits | None = None,
    ) -> None:
        self.identity = identity
        self.nursery = nursery
        self.recorder = Recorder()
        self.drain = DrainController()
        self.tls = EdgeTls(identity.key, identity.cert)
        self.edge = Edge(
            handler,
            self.tls,
            limits=limits or EdgeLimits(),
            drain=self.drain,
            metrics=self.recorder,
            log=self.recorder,
        )

    async def start(self) -> None:
        """Run the sweeper (and the drain watcher)."""
        await self.nursery.start(self.edge.serve, [])

    def dial(self) -> MemoryStream:
        """Return the client's raw end of a new connection."""
        client, server = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self.edge.serve_stream, server)
        return client

    async def connect(self, *protocols: str) -> trio.SSLStream[MemoryStream]:
        """Return a client stream after its handshake."""
        context = self.identity.client_context(*protocols)
        stream = trio.SSLStream(self.dial(), context, server_hostname="localhost", https_compatible=True)
        with patience():
            await stream.do_handshake()
        return stream


@dataclass(frozen=True)
class Answer:
    """One parsed HTTP/1.1 response."""

    status: int
    headers: dict[str, str]
    body: bytes


class H1Client:
    """A minimal HTTP/1.1 client that also sends what no honest client would."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._buffer = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def request(self, method: str, path: str, body: bytes = b"", *headers: str) -> Answer:
        lines = [f"{method} {path} HTTP/1.1", "host: localhost", *headers]
        if body or method == "POST":
            lines.append(f"content-length: {len(body)}")
        await self.send("\r\n".join([*lines, "", ""]).encode() + body)
        return await self.answer(head=method == "HEAD")

    async def answer(self, *, head: bool = False) -> Answer:
        while b"\r\n\r\n" not in self._buffer:
            await self._more()
        block, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *lines = block.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        length = 0 if head else int(headers.get("content-length", "0"))
        while len(self._buffer) < length:
            await self._more()
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return Answer(int(first.split(" ")[1]), headers, body)

    async def closed(self) -> bool:
        """Wait for the end of the connection; True when nothing else came."""
        with patience():
            try:
                return not self._buffer and not await self.stream.receive_some()
            except trio.BrokenResourceError:
                return not self._buffer

    async def _more(self) -> None:
        with patience():
            data = await self.stream.receive_some()
        if not data:
            raise EOFError(self._buffer)
        self._buffer += data


class H2Client:
    """A minimal HTTP/2 client."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.events: list[h2.events.Event] = []
        self.opens_window = True
        self._sending = trio.Lock()

    async def start(self, window: int | None = None) -> None:
        self.h2.initiate_connection()
        if window is not None:
            self.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        await self.flush()

    async def flush(self) -> None:
        async with self._sending:
            data = self.h2.data_to_send()
            if data:
                await self.stream.send_all(data)

    async def begin(self, method: str, path: str, *headers: tuple[str, str], end: bool = True) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        pseudo = [(":method", method), (":path", path), (":scheme", "https"), (":authority", "localhost")]
        self.h2.send_headers(stream_id, [*pseudo, *headers], end_stream=end)
        await self.flush()
        return stream_id

    async def read(self) -> bool:
        """Take in what came; False at the end of the connection."""
        try:
            with patience():
                data = await self.stream.receive_some()
        except trio.BrokenResourceError:
            return False
        if not data:
            return False
        events = self.h2.receive_data(data)
        self.events += events
        for event in events:
            if self.opens_window and isinstance(event, h2.events.DataReceived) and event.flow_controlled_length:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        await self.flush()
        return True

    async def until_hangup(self) -> None:
        """Take in everything until the edge hangs up."""
        with patience():
            while await self.read():
                pass

    def of(self, kind: type, stream_id: int | None = None) -> list[h2.events.Event]:
        return [e for e in self.events if isinstance(e, kind) and stream_id in (None, getattr(e, "stream_id", None))]

    async def until(self, kind: type, stream_id: int | None = None) -> h2.events.Event:
        while not self.of(kind, stream_id):
            if not await self.read():
                raise EOFError
        return self.of(kind, stream_id)[0]

    async def response(self, stream_id: int) -> Answer:
        head = await self.until(h2.events.ResponseReceived, stream_id)
        await self.until(h2.events.StreamEnded, stream_id)
        headers = dict(head.headers)  # type: ignore[attr-defined]
        body = b"".join(e.data for e in self.of(h2.events.DataReceived, stream_id))  # type: ignore[attr-defined]
        return Answer(int(headers.pop(":status")), headers, body)

    async def request(self, method: str, path: str, body: bytes = b"", *headers: tuple[str, str]) -> Answer:
        stream_id = await self.begin(method, path, *headers, end=not body)
        if body:
            self.h2.send_data(stream_id, body, end_stream=True)
            await self.flush()
        return await self.response(stream_id)
