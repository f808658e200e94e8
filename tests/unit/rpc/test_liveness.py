"""Pings, silence, slow and half-dead peers: a stream ends in bounded time and with bounded memory."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from juicebox_hsm.adapters.rpc import RpcConnection, RpcFailed, RpcUnreachable, frames
from juicebox_hsm.adapters.rpc import streams as streams_module
from juicebox_hsm.adapters.rpc.streams import SEND_S
from juicebox_hsm.wire.rpc import AppOk, RpcCode

from .harness import ECHO, Gate, RawPeer, body, connected, echo, raw_client, raw_server


async def test_idle_stream_lives(autojump_clock: trio.testing.MockClock) -> None:
    """Two healthy ends keep an idle stream for ever, by pings alone."""
    async with connected({"echo": echo}) as (_, client):
        await trio.sleep(600)
        assert await client.call(ECHO, body(), timeout_s=1) == AppOk(b"hello")


async def test_ping_after_quarter_of_a_second(autojump_clock: trio.testing.MockClock) -> None:
    """A peer that sends nothing is pinged after 250 ms, and a pong is as good as any frame."""
    async with raw_client({}) as (server, peer):
        await peer.hello()
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        for number in range(1, 9):
            assert await peer.next_frame() == frames.Ping()
            assert trio.current_time() - began == pytest.approx(0.25 * number)
            await peer.stream.send_all(frames.PONG)
        assert server.connections == 1


async def test_frames_postpone_the_ping(autojump_clock: trio.testing.MockClock) -> None:
    """A peer that talks is not pinged."""
    async with raw_client({"echo": echo}) as (_, peer):
        await peer.hello()
        for number in range(10):
            await peer.stream.send_all(frames.encode_request(number, "echo", 1000, None, body()))
            assert isinstance(await peer.next_frame(), frames.Reply)
            await trio.sleep(0.24)


@pytest.mark.parametrize("first", [b"", frames.encode_hello("raw"), frames.encode_hello("raw")[:5]])
async def test_silent_peer_is_closed_after_a_second(first: bytes, autojump_clock: trio.testing.MockClock) -> None:
    """A peer without a frame for 1 s loses the stream, whether it ever said hello or not."""
    async with raw_client({}) as (server, peer):
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        await peer.stream.send_all(first)
        assert await peer.until_closed() == [frames.Ping()] * 3
        assert trio.current_time() - began == pytest.approx(1.0)
        assert server.connections == 0


async def test_silent_server_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    """A call to a server that froze fails after 1 s, not at its own deadline; it may be delivered."""
    async with raw_server() as (peer, client, _):
        await peer.hello()
        await client.greeted.wait()
        began = trio.current_time()
        with pytest.raises(RpcUnreachable, match="silent") as caught:
            await client.call(ECHO, body(), timeout_s=30)
        assert caught.value.maybe_delivered
        assert trio.current_time() - began == pytest.approx(1.0)


async def test_trickled_frame_does_not_keep_a_stream(autojump_clock: trio.testing.MockClock) -> None:
    """Single bytes of a frame that never ends count as silence."""
    async with raw_client({}) as (server, peer):
        await peer.hello()
        await peer.stream.send_all((1 << 20).to_bytes(4, "big"))
        began = trio.current_time()

        async def trickle() -> None:
            while True:
                await peer.stream.send_all(b"\x96")
                await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle)
            await peer.until_closed()
            nursery.cancel_scope.cancel()
        assert trio.current_time() - began == pytest.approx(1.0, abs=0.1)
        assert server.connections == 0


async def test_ping_is_answered(autojump_clock: trio.testing.MockClock) -> None:
    """A ping gets a pong at once."""
    async with raw_client({}) as (_, peer):
        await peer.hello()
        await peer.stream.send_all(frames.PING)
        assert await peer.next_frame() == frames.Pong()


async def test_ping_flood_queues_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """Pings of a peer that does not read are answered together: they cannot fill memory."""
    async with raw_client({}, lockstep=True) as (server, peer):

        async def read_hello() -> None:
            assert isinstance(peer.reader.feed(await peer.stream.receive_some()), list)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_hello)
            nursery.start_soon(peer.hello)
        for _ in range(20):
            await peer.stream.send_all(frames.PING * 1000)
        connection = next(iter(server._connections))
        assert connection.stream.queued_bytes <= len(frames.PING) + len(frames.PONG)


async def test_peer_that_does_not_read_is_closed(autojump_clock: trio.testing.MockClock) -> None:
    """A peer that keeps sending but never reads its replies is cut off after the send time-out."""
    async with raw_client({"echo": echo}, lockstep=True) as (server, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.hello)
            await peer.stream.receive_some()
        began = trio.current_time()

        async def talk() -> None:
            number = 0
            while True:
                await peer.stream.send_all(frames.encode_request(number, "echo", 1000, None, body()))
                await trio.sleep(0.2)
                number += 1

        with pytest.raises(trio.BrokenResourceError):
            await talk()
        assert SEND_S < trio.current_time() - began < SEND_S + 1
        assert server.connections == 0


async def test_unread_replies_stop_the_reading(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """While a peer leaves more than the high mark unread, its requests are not read: no new replies pile up."""
    monkeypatch.setattr(streams_module, "QUEUE_BYTES_HIGH", 10_000)
    handled = 0

    async def large(_body: object, _caller: object) -> AppOk:
        nonlocal handled
        handled += 1
        return AppOk(bytes(4000))

    async with raw_client({"echo": large}, lockstep=True) as (server, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.hello)
            await peer.stream.receive_some()
        with trio.move_on_after(0.9):
            for number in range(100):
                await peer.stream.send_all(frames.encode_request(number, "echo", 1000, None, body()))
                await trio.testing.wait_all_tasks_blocked()
        assert 3 <= handled <= 6
        assert next(iter(server._connections)).stream.queued_bytes < 20_000


async def test_queue_without_bound_is_cut(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Replies of calls already in flight cannot fill memory either: beyond the bound the stream ends."""
    monkeypatch.setattr(streams_module, "QUEUE_BYTES_MAX", 100_000)
    gate = Gate()

    async def large(request: object, caller: object) -> AppOk:
        await gate(request, caller)  # type: ignore[arg-type]
        return AppOk(bytes(4000))

    async with raw_client({"wait": large}, lockstep=True) as (server, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.hello)
            await peer.stream.receive_some()
        await peer.stream.send_all(
            b"".join(frames.encode_request(number, "wait", 9000, None, body()) for number in range(100))
        )
        await trio.testing.wait_all_tasks_blocked()
        gate.opened.set()
        await trio.testing.wait_all_tasks_blocked()
        assert server.connections == 0


async def test_stopped_process_does_not_accuse_its_peers(autojump_clock: trio.testing.MockClock) -> None:
    """After the whole process stood still for long, one missed frame is one missed frame, not a dead peer."""
    clock = autojump_clock
    async with connected({"echo": echo}) as (_, client):
        await trio.sleep(0.1)
        clock.jump(30)
        assert await client.call(ECHO, body(), timeout_s=1) == AppOk(b"hello")
        await trio.sleep(1)
        assert client.open


async def test_client_deadline_below_the_tick(autojump_clock: trio.testing.MockClock) -> None:
    """A short deadline of a caller wakes the ticker earlier than its next ping would."""
    async with raw_server() as (peer, client, _):
        await peer.hello()
        await client.greeted.wait()
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        with pytest.raises(RpcFailed, match="DeadlineExceeded") as caught:
            await client.call(ECHO, body(), timeout_s=0.03)
        assert caught.value.maybe_delivered
        assert trio.current_time() - began == pytest.approx(0.03, abs=0.01)


async def test_server_deadline_below_the_tick(autojump_clock: trio.testing.MockClock) -> None:
    """The server answers a short deadline in time as well, for callers that do not watch it themselves."""
    gate = Gate()
    async with raw_client({"echo": gate}) as (_, peer):
        await peer.hello()
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        await peer.stream.send_all(frames.encode_request(0, "echo", 30, None, body()))
        assert await peer.next_frame() == frames.Failure(0, RpcCode.DEADLINE_EXCEEDED)
        assert trio.current_time() - began == pytest.approx(0.03, abs=0.01)
        gate.opened.set()


async def test_peer_that_vanishes_is_noticed_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """A closed stream fails its calls without any time-out."""
    async with raw_server() as (peer, client, nursery):
        await peer.hello()
        await client.greeted.wait()
        nursery.start_soon(peer.stream.aclose)
        began = trio.current_time()
        with pytest.raises(RpcUnreachable, match="closed the stream"):
            await client.call(ECHO, body(), timeout_s=30)
        assert trio.current_time() == began


async def test_frames_are_joined(autojump_clock: trio.testing.MockClock) -> None:
    """Requests made in one scheduler pass leave in one write: that is what makes the RPC cheap."""
    ours, theirs = trio.testing.memory_stream_pair()
    writes: list[int] = []

    class Counting(trio.abc.Stream):
        """Counts writes."""

        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            writes.append(len(data))
            await ours.send_all(data)

        async def wait_send_all_might_not_block(self) -> None:
            await ours.wait_send_all_might_not_block()

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            return bytes(await ours.receive_some(max_bytes))

        async def aclose(self) -> None:
            await ours.aclose()

    async with trio.open_nursery() as nursery:
        client = RpcConnection(Counting(), peer="server", role=None)
        nursery.start_soon(client.run)
        peer = RawPeer(theirs)
        await peer.hello()
        await client.greeted.wait()
        writes.clear()
        for _ in range(50):
            nursery.start_soon(lambda: client.call(ECHO, body(), timeout_s=0.1))
        await trio.testing.wait_all_tasks_blocked()
        assert len(writes) == 1
        nursery.cancel_scope.cancel()
