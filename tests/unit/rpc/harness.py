"""Both ends of a stream in memory: a server with a real client, or with a peer that sends whatever a test likes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import trio
import trio.testing

from juicebox_hsm.adapters.rpc import Handler, RpcConnection, RpcServer, frames
from juicebox_hsm.wire.methods import AnyMethod, Method
from juicebox_hsm.wire.rpc import AppOk, GroupCall, PeerRole

ECHO = Method("echo", GroupCall, AppOk, frozenset({PeerRole.AGENT}))
WAIT = Method("wait", GroupCall, AppOk, frozenset({PeerRole.AGENT}))
METHODS = {"echo": ECHO, "wait": WAIT}


def body(text: bytes = b"hello") -> GroupCall:
    """Return a request body that carries `text`."""
    return GroupCall(bytes(16), text)


async def echo(request: GroupCall, _caller: object) -> AppOk:
    """Answer with what the request carried."""
    return AppOk(request.group)


class Gate:
    """A handler that waits until the test opens it, and counts."""

    def __init__(self) -> None:
        self.opened = trio.Event()
        self.entered = trio.Event()
        self.begun = 0
        self.ended = 0

    async def __call__(self, request: GroupCall, _caller: object) -> AppOk:
        """Wait, then answer like `echo`."""
        self.begun += 1
        self.entered.set()
        await self.opened.wait()
        self.ended += 1
        return AppOk(request.group)


class RawPeer:
    """A peer that sends what it likes."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self.reader = frames.FrameReader()
        self.received: list[frames.Frame] = []

    async def hello(self) -> None:
        """Introduce ourselves."""
        await self.stream.send_all(frames.encode_hello("raw"))

    async def next_frame(self) -> frames.Frame | None:
        """Return the next frame, None at the end of the stream."""
        while not self.received:
            data = await self.stream.receive_some()
            if not data:
                return None
            self.received += self.reader.feed(data)
        return self.received.pop(0)

    async def until_closed(self) -> list[frames.Frame]:
        """Return all frames up to the end of the stream."""
        got = []
        while (frame := await self.next_frame()) is not None:
            got.append(frame)
        await trio.testing.wait_all_tasks_blocked()  # the server is still putting its things away
        return got


@asynccontextmanager
async def a_server(
    handlers: Mapping[str, Handler], methods: Mapping[str, AnyMethod] = METHODS, **options: object
) -> AsyncIterator[tuple[RpcServer, trio.Nursery]]:
    """Run a server without a listener; its bodies and streams end with the block."""
    async with trio.open_nursery() as nursery:
        yield RpcServer(nursery, tls=None, methods=methods, handlers=handlers, **options), nursery  # type: ignore[arg-type]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected(
    handlers: Mapping[str, Handler],
    methods: Mapping[str, AnyMethod] = METHODS,
    role: PeerRole | None = PeerRole.AGENT,
    **options: object,
) -> AsyncIterator[tuple[RpcServer, RpcConnection]]:
    """Run a server and a client that calls it as `role`."""
    async with a_server(handlers, methods, **options) as (server, nursery):
        yield server, await connect(server, nursery, role)


async def connect(server: RpcServer, nursery: trio.Nursery, role: PeerRole | None = PeerRole.AGENT) -> RpcConnection:
    """Open one more stream to the server."""
    ours, theirs = trio.testing.memory_stream_pair()
    connection = RpcConnection(ours, peer="server", role=None)
    nursery.start_soon(server.serve_stream, theirs, role, "client")
    nursery.start_soon(connection.run)
    await connection.greeted.wait()
    return connection


@asynccontextmanager
async def raw_client(
    handlers: Mapping[str, Handler], *, lockstep: bool = False
) -> AsyncIterator[tuple[RpcServer, RawPeer]]:
    """Run a server whose client is the test; with `lockstep` the server's writes wait for the test's reads."""
    async with a_server(handlers) as (server, nursery):
        pair = trio.testing.lockstep_stream_pair() if lockstep else trio.testing.memory_stream_pair()
        nursery.start_soon(server.serve_stream, pair[1], PeerRole.AGENT, "raw")
        yield server, RawPeer(pair[0])


@asynccontextmanager
async def raw_server() -> AsyncIterator[tuple[RawPeer, RpcConnection, trio.Nursery]]:
    """Run a client whose server is the test."""
    async with trio.open_nursery() as nursery:
        ours, theirs = trio.testing.memory_stream_pair()
        connection = RpcConnection(ours, peer="server", role=None)
        nursery.start_soon(connection.run)
        yield RawPeer(theirs), connection, nursery
        nursery.cancel_scope.cancel()
