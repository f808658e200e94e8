"""The lean byte streams: everything arrives, ends are told apart from failures, closed means closed."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trustme

from juicebox_hsm.adapters.tls.streams import SocketStream, TlsStream, aclose_forcefully

LARGE = bytes(range(256)) * 40_000


@asynccontextmanager
async def _pair() -> AsyncIterator[tuple[SocketStream, SocketStream]]:
    """Two ends of one TCP connection."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    client = await trio.open_tcp_stream("127.0.0.1", listeners[0].socket.getsockname()[1])
    server = await listeners[0].accept()
    ends = SocketStream(client), SocketStream(server)
    try:
        yield ends
    finally:
        for end in ends:
            await end.aclose()
        await listeners[0].aclose()


def _contexts(name: str = "localhost") -> tuple[ssl.SSLContext, ssl.SSLContext]:
    ca = trustme.CA()
    server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    ca.issue_cert(name).configure_cert(server)
    ca.configure_trust(client)
    return client, server


async def _receive(stream: SocketStream | TlsStream, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        received += await stream.receive_some()
    return bytes(received)


async def test_more_than_the_kernel_takes_arrives_whole_both_ways_at_once() -> None:
    """A reader and a writer on each end: 10 MB each way, plain."""
    async with _pair() as ends, trio.open_nursery() as nursery:
        for end, other in (ends, ends[::-1]):
            nursery.start_soon(end.send_all, LARGE)

            async def check(reader: SocketStream = other) -> None:
                assert await _receive(reader, len(LARGE)) == LARGE

            nursery.start_soon(check)


async def test_tls_carries_the_same() -> None:
    """As before, through TLS, after a handshake from both sides."""
    client_context, server_context = _contexts()
    async with _pair() as (client, server):
        ends = (
            TlsStream(client, client_context, server_side=False, server_name="localhost"),
            TlsStream(server, server_context, server_side=True),
        )
        async with trio.open_nursery() as nursery:
            for end in ends:
                nursery.start_soon(end.handshake)
        assert ends[0].getpeercert()
        async with trio.open_nursery() as nursery:
            for end, other in (ends, ends[::-1]):
                nursery.start_soon(end.send_all, LARGE)

                async def check(reader: TlsStream = other) -> None:
                    assert await _receive(reader, len(LARGE)) == LARGE

                nursery.start_soon(check)
        await ends[0].aclose()
        assert await ends[1].receive_some() == b""


async def test_another_name_is_refused_by_the_client() -> None:
    """The certificate's name is checked; both ends notice."""
    client_context, server_context = _contexts("elsewhere.example")
    failures: list[str] = []
    async with _pair() as (client, server), trio.open_nursery() as nursery:

        async def side(stream: TlsStream) -> None:
            try:
                await stream.handshake()
                await stream.receive_some()
            except (ssl.SSLError, trio.BrokenResourceError) as error:
                failures.append(type(error).__name__)

        nursery.start_soon(side, TlsStream(client, client_context, server_side=False, server_name="localhost"))
        nursery.start_soon(side, TlsStream(server, server_context, server_side=True))
    assert "SSLCertVerificationError" in failures
    assert len(failures) == 2


async def test_bytes_that_are_not_tls_break_the_stream() -> None:
    """Garbage after the handshake is an error, never data; nothing can be sent afterwards."""
    client_context, server_context = _contexts()
    async with _pair() as (client, server):
        tls = TlsStream(client, client_context, server_side=False, server_name="localhost")
        other = TlsStream(server, server_context, server_side=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tls.handshake)
            nursery.start_soon(other.handshake)
        await server.send_all(b"\x17\x03\x03\x00\x20" + b"x" * 32)
        with pytest.raises(trio.BrokenResourceError):
            await tls.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            await tls.send_all(b"more")


async def test_a_closed_stream_touches_no_descriptor() -> None:
    """After closing, reads and writes raise instead of using a number that may belong to another file; waiters wake."""
    async with _pair() as (client, server):
        woken = trio.Event()

        async def reader() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await client.receive_some()
            woken.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked()
            await aclose_forcefully(client)
        assert woken.is_set()
        with pytest.raises(trio.ClosedResourceError):
            await client.send_all(b"x")
        assert await server.receive_some() == b""


async def test_a_send_that_was_cut_short_is_not_followed_by_another() -> None:
    """A half-sent TLS record cannot be continued: the stream is broken from then on."""
    client_context, server_context = _contexts()
    async with _pair() as (client, server):
        tls = TlsStream(client, client_context, server_side=False, server_name="localhost")
        other = TlsStream(server, server_context, server_side=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tls.handshake)
            nursery.start_soon(other.handshake)
        with trio.move_on_after(0.05) as scope:
            await tls.send_all(LARGE)
        assert scope.cancelled_caught
        with pytest.raises(trio.BrokenResourceError):
            await tls.send_all(b"x")
