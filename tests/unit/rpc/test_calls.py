"""Calls between our server and our client, and what each does with a peer that is not ours."""

from __future__ import annotations

from contextlib import suppress

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.adapters.rpc import RpcFailed, RpcUnreachable, frames
from juicebox_hsm.adapters.rpc import server as server_module
from juicebox_hsm.adapters.rpc.client import IN_FLIGHT_MAX
from juicebox_hsm.errors import InvariantViolation, RealmError
from juicebox_hsm.ports.errors import HsmGone
from juicebox_hsm.wire.methods import AGENT_METHODS, MANAGER_METHODS, AnyMethod, Method
from juicebox_hsm.wire.rpc import AppOk, Done, Empty, GroupCall, PartitionInfo, PeerRole, Range, RpcCode

from .harness import ECHO, METHODS, WAIT, Gate, a_server, body, connect, connected, echo, raw_client, raw_server

PIECES = [
    frames.encode_hello("x"),
    frames.PING,
    frames.PONG,
    frames.encode_request(1, "echo", 100, None, body()),
    frames.encode_request(2, "echo", 100, None, None),
    frames.encode_request(3, "nope", 100, "trace", body()),
    frames.encode_request(4, "echo", 0, None, body()),
    frames.encode_reply(1, body()),
    frames.encode_failure(1, RpcCode.OVERLOADED),
    (1 << 20).to_bytes(4, "big"),
]
A, L, M, OP = PeerRole.AGENT, PeerRole.LOAD_BALANCER, PeerRole.MANAGER, PeerRole.OPERATOR


async def test_reply(autojump_clock: trio.testing.MockClock) -> None:
    """A call returns what the handler returned, as the method's reply type."""
    async with connected({"echo": echo}) as (server, client):
        assert await client.call(ECHO, body(b"x"), timeout_s=1) == AppOk(b"x")
        assert server.connections == 1


async def test_many_calls_share_a_stream(autojump_clock: trio.testing.MockClock) -> None:
    """More callers than may be in flight all get their own reply, and the limit is never passed."""
    most = running = 0

    async def slow(request: GroupCall, _caller: object) -> AppOk:
        nonlocal most, running
        running += 1
        most = max(most, running)
        await trio.sleep(0.01)
        running -= 1
        return AppOk(request.group)

    async with connected({"echo": slow}) as (_, client), trio.open_nursery() as nursery:

        async def one(number: int) -> None:
            text = str(number).encode()
            assert await client.call(ECHO, body(text), timeout_s=10) == AppOk(text)

        for number in range(3 * IN_FLIGHT_MAX):
            nursery.start_soon(one, number)
    assert most == IN_FLIGHT_MAX


async def test_waiting_for_a_turn_ends_with_the_deadline(autojump_clock: trio.testing.MockClock) -> None:
    """A caller beyond the limit fails at its deadline, surely undelivered; later callers get the turns that come."""
    gate = Gate()
    async with connected({"wait": gate}) as (_, client), trio.open_nursery() as nursery:
        for _ in range(IN_FLIGHT_MAX):
            nursery.start_soon(lambda: client.call(WAIT, body(), timeout_s=60))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(RpcFailed) as caught:
            await client.call(WAIT, body(), timeout_s=1)
        assert caught.value.code is RpcCode.DEADLINE_EXCEEDED
        assert not caught.value.maybe_delivered
        assert gate.begun == IN_FLIGHT_MAX
        gate.opened.set()
        assert await client.call(WAIT, body(b"y"), timeout_s=1) == AppOk(b"y")


ADMITTED = {
    "status": {A, L, M, OP},
    "realm/new": {OP},
    "realm/join": {OP},
    "group/new": {OP},
    "group/join": {OP},
    "group/retire": {OP},
    "become_leader": {M},
    "stepdown": {M, OP},
    "replicate": {A},
    "captured": {A},
    "app": {L},
    "rate/state": {A},
    "tenants/reload": {OP},
    "leader_stepdown": {A, OP},
    "leader_lost": {A},
    "rebalance": {OP},
    "transfer": {OP},
}


@pytest.mark.parametrize("role", list(PeerRole))
async def test_roles(role: PeerRole, autojump_clock: trio.testing.MockClock) -> None:
    """Each method admits exactly the roles decided for it; others get Forbidden and the handler is not run."""
    for methods in (AGENT_METHODS, MANAGER_METHODS):
        reached: list[str] = []

        def handler(name: str, reached: list[str] = reached):  # type: ignore[no-untyped-def]
            async def handle(_body: object, _caller: object) -> Done:
                reached.append(name)
                return Done()

            return handle

        async with connected({name: handler(name) for name in methods}, methods, role) as (_, client):
            for name, method in methods.items():
                admitted = ADMITTED.get(name, {M} if name.startswith("transfer/") else set())
                untyped = Method(name, object, Done, method.callers)
                if role in admitted:
                    assert await client.call(untyped, _sample(method), timeout_s=1) == Done()
                    assert reached.pop() == name
                    continue
                with pytest.raises(RpcFailed) as caught:
                    await client.call(untyped, _sample(method), timeout_s=1)
                assert caught.value.code is RpcCode.FORBIDDEN
                assert not caught.value.maybe_delivered
                assert not reached


def _sample(method: AnyMethod) -> object:
    """Return some body of the method's request type."""
    span = Range(b"", b"")
    known: dict[object, object] = {
        Range: span,
        PartitionInfo: PartitionInfo(span, b""),
        bool: False,
        int: 0,
        str: "",
        bytes: b"",
    }
    values = [
        known.get(info.type, [] if getattr(info.type, "__origin__", None) in {list, tuple} else None)
        for info in msgspec.structs.fields(method.request)
    ]
    return method.request(*values)


@pytest.mark.parametrize(
    ("method", "request_body", "code"),
    [
        (Method("nope", Empty, Done, frozenset()), Empty(), RpcCode.UNKNOWN_METHOD),
        (ECHO, Empty(), RpcCode.BAD_REQUEST),
        (ECHO, None, RpcCode.BAD_REQUEST),
        (ECHO, GroupCall(1, b""), RpcCode.BAD_REQUEST),  # type: ignore[arg-type]
    ],
)
async def test_refusals(
    method: AnyMethod, request_body: object, code: RpcCode, autojump_clock: trio.testing.MockClock
) -> None:
    """Unknown methods and bad bodies are answered with their code; the stream goes on."""
    async with connected({"echo": echo}) as (_, client):
        with pytest.raises(RpcFailed) as caught:
            await client.call(method, request_body, timeout_s=1)
        assert caught.value.code is code
        assert not caught.value.maybe_delivered
        assert await client.call(ECHO, body(), timeout_s=1) == AppOk(b"hello")


@pytest.mark.parametrize("error", [RealmError("store"), KeyError("bug"), frames.FrameTooLarge("big")])
async def test_handler_failure_is_answered(error: Exception, autojump_clock: trio.testing.MockClock) -> None:
    """A handler that raises costs its own call only: no reachable abort."""

    async def fail(_body: object, _caller: object) -> AppOk:
        raise error

    async with connected({"wait": fail, "echo": echo}) as (_, client):
        with pytest.raises(RpcFailed) as caught:
            await client.call(WAIT, body(), timeout_s=1)
        assert caught.value.code is RpcCode.HANDLER_FAILED
        assert caught.value.maybe_delivered
        assert await client.call(ECHO, body(), timeout_s=1) == AppOk(b"hello")


async def test_reply_over_the_limit_is_a_failed_handler(autojump_clock: trio.testing.MockClock) -> None:
    """A reply of more than 1 MiB is not sent in part; the caller learns that there is none."""

    async def large(_body: object, _caller: object) -> AppOk:
        return AppOk(bytes(1 << 20))

    async with connected({"echo": large}) as (_, client):
        with pytest.raises(RpcFailed, match="HandlerFailed"):
            await client.call(ECHO, body(), timeout_s=1)


async def test_request_over_the_limit_is_refused_here(autojump_clock: trio.testing.MockClock) -> None:
    """A request of more than 1 MiB is the caller's mistake; nothing is sent and the stream goes on."""
    async with connected({"echo": echo}) as (_, client):
        with pytest.raises(frames.FrameTooLarge):
            await client.call(ECHO, body(bytes(1 << 20)), timeout_s=1)
        largest = bytes((1 << 20) - 100)
        assert await client.call(ECHO, body(largest), timeout_s=1) == AppOk(largest)


@pytest.mark.parametrize("error", [HsmGone("gone"), InvariantViolation("broken")])
async def test_fatal_errors_leave_the_server(error: BaseException, autojump_clock: trio.testing.MockClock) -> None:
    """A lost HSM and a broken invariant are no answers: they end the process."""

    async def fail(_body: object, _caller: object) -> AppOk:
        raise error

    with pytest.raises(BaseExceptionGroup) as caught:
        async with connected({"wait": fail}) as (_, client):
            await client.call(WAIT, body(), timeout_s=1)
    assert caught.group_contains(type(error))


async def test_deadline_answers_but_does_not_cancel_the_body(autojump_clock: trio.testing.MockClock) -> None:
    """A caller that waited long enough is told so at its deadline; the body runs on (handler isolation)."""
    gate = Gate()
    async with connected({"wait": gate, "echo": echo}) as (server, client):
        began = trio.current_time()
        with pytest.raises(RpcFailed) as caught:
            await client.call(WAIT, body(), timeout_s=0.6)
        assert caught.value.code is RpcCode.DEADLINE_EXCEEDED
        assert caught.value.maybe_delivered
        assert trio.current_time() - began == pytest.approx(0.6, abs=0.02)
        assert (gate.begun, server.bodies) == (1, 1)
        gate.opened.set()
        await trio.sleep(0.1)
        assert (gate.ended, server.bodies) == (1, 0)
        assert await client.call(ECHO, body(), timeout_s=1) == AppOk(b"hello")


async def test_lost_stream_does_not_cancel_the_body(autojump_clock: trio.testing.MockClock) -> None:
    """A body runs to its end although its stream is gone; the caller learns that it may have been delivered."""
    gate = Gate()
    async with connected({"wait": gate}) as (server, client):
        outcome: list[RpcUnreachable] = []

        async def call() -> None:
            with pytest.raises(RpcUnreachable) as caught:
                await client.call(WAIT, body(), timeout_s=5)
            outcome.append(caught.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            client.stream.stop("test")
        assert outcome[0].maybe_delivered
        await trio.testing.wait_all_tasks_blocked()
        assert (gate.begun, server.connections) == (1, 0)
        gate.opened.set()
        await trio.sleep(0.1)
        assert (gate.ended, server.bodies) == (1, 0)
        with pytest.raises(RpcUnreachable) as caught:
            await client.call(WAIT, body(), timeout_s=5)
        assert not caught.value.maybe_delivered


async def test_cancelled_caller_leaves_the_stream_whole(autojump_clock: trio.testing.MockClock) -> None:
    """Cancelling a caller, before or after its request went out, disturbs nobody else."""
    gate = Gate()
    async with connected({"wait": gate, "echo": echo}) as (_, client):
        with trio.CancelScope() as at_once:
            at_once.cancel()
            await client.call(WAIT, body(), timeout_s=5)
        assert at_once.cancelled_caught
        await trio.testing.wait_all_tasks_blocked()
        assert gate.begun == 0  # it was withdrawn
        with trio.move_on_after(0.1):
            await client.call(WAIT, body(), timeout_s=5)
        assert gate.begun == 1
        assert await client.call(ECHO, body(b"1"), timeout_s=1) == AppOk(b"1")
        gate.opened.set()  # the late reply has nobody waiting
        await trio.testing.wait_all_tasks_blocked()
        assert gate.ended == 1
        assert await client.call(ECHO, body(b"2"), timeout_s=1) == AppOk(b"2")
        assert not client._calls


async def test_cancelled_callers_keep_their_places(autojump_clock: trio.testing.MockClock) -> None:
    """There is no cancel frame: what was sent stays in flight, so that our limit is the one the server counts."""
    gate = Gate()
    async with connected({"wait": gate}) as (_, client):
        async with trio.open_nursery() as nursery:
            for _ in range(IN_FLIGHT_MAX):
                nursery.start_soon(lambda: client.call(WAIT, body(), timeout_s=5))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        with pytest.raises(RpcFailed) as caught:
            await client.call(WAIT, body(), timeout_s=1)
        assert caught.value.code is RpcCode.DEADLINE_EXCEEDED
        assert not caught.value.maybe_delivered
        gate.opened.set()
        assert await client.call(WAIT, body(), timeout_s=1) == AppOk(b"hello")


async def test_lost_stream_ends_the_waiting_for_a_turn(autojump_clock: trio.testing.MockClock) -> None:
    """Callers that wait for a turn learn at once that none will come, and that nothing was delivered."""
    gate = Gate()
    delivered: list[bool] = []
    async with connected({"wait": gate}) as (_, client), trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(RpcUnreachable) as caught:
                await client.call(WAIT, body(), timeout_s=60)
            delivered.append(caught.value.maybe_delivered)

        for _ in range(IN_FLIGHT_MAX + 5):
            nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        client.stream.stop("test")
        await trio.testing.wait_all_tasks_blocked()
        assert trio.current_time() == began
        assert (delivered.count(True), delivered.count(False)) == (IN_FLIGHT_MAX, 5)
        gate.opened.set()


async def test_call_id_of_a_running_body_is_taken(autojump_clock: trio.testing.MockClock) -> None:
    """An id cannot be used again while its body runs, even after its deadline was answered."""
    gate = Gate()
    async with raw_client({"wait": gate}) as (server, peer):
        await peer.hello()
        await peer.stream.send_all(frames.encode_request(1, "wait", 30, None, body()))
        assert await peer.next_frame() == frames.Failure(1, RpcCode.DEADLINE_EXCEEDED)
        await peer.stream.send_all(frames.encode_request(1, "wait", 30, None, body()))
        assert await peer.until_closed() == []
        assert server.bodies == 1
        gate.opened.set()


async def test_caller_is_told_and_closed_is_set(autojump_clock: trio.testing.MockClock) -> None:
    """A handler knows role and stream of its caller, and learns of the stream's end."""
    seen: list[server_module.Caller] = []

    async def look(request: GroupCall, caller: server_module.Caller) -> AppOk:
        seen.append(caller)
        return AppOk(request.group)

    async with connected({"echo": look}) as (_, client):
        await client.call(ECHO, body(), timeout_s=1)
        await client.call(ECHO, body(), timeout_s=1)
        assert seen[0] is seen[1]
        assert (seen[0].role, seen[0].name, seen[0].closed.is_set()) == (PeerRole.AGENT, "client", False)
        client.stream.stop("test")
        with trio.fail_after(1):
            await seen[0].closed.wait()


async def test_shutdown_drains(autojump_clock: trio.testing.MockClock) -> None:
    """Shutting down refuses new calls, lets bodies end, delivers their replies, and only then closes."""
    gate = Gate()
    async with connected({"wait": gate, "echo": echo}) as (server, client), trio.open_nursery() as nursery:
        replies: list[object] = []

        async def call() -> None:
            reply = await client.call(WAIT, body(), timeout_s=60)
            replies.append(reply)

        async def shut_down() -> None:
            replies.append(await server.shutdown(10))

        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(shut_down)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(RpcFailed) as caught:
            await client.call(ECHO, body(), timeout_s=1)
        assert caught.value.code is RpcCode.SHUTTING_DOWN
        await trio.sleep(3)
        assert not replies
        gate.opened.set()
        await trio.sleep(0.1)
        assert replies in ([AppOk(b"hello"), True], [True, AppOk(b"hello")])
        assert not client.open


async def test_shutdown_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    """A body that does not end does not keep the server from stopping, and is not cancelled by it."""
    gate = Gate()
    async with connected({"wait": gate}) as (server, client), trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(RpcUnreachable):
                await client.call(WAIT, body(), timeout_s=60)

        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        assert not await server.shutdown(2)
        assert trio.current_time() - began == pytest.approx(2)
        assert server.bodies == 1
        gate.opened.set()
        await trio.testing.wait_all_tasks_blocked()
        assert gate.ended == 1


async def test_flood_is_answered_overloaded(autojump_clock: trio.testing.MockClock) -> None:
    """A peer that sends more than 1024 requests at once gets Overloaded for the rest, and no more bodies run."""
    gate = Gate()
    async with raw_client({"wait": gate}) as (server, peer):
        await peer.hello()
        await peer.stream.send_all(
            b"".join(frames.encode_request(number, "wait", 5000, None, body()) for number in range(IN_FLIGHT_MAX + 10))
        )
        answers = [await peer.next_frame() for _ in range(10)]
        assert answers == [frames.Failure(IN_FLIGHT_MAX + number, RpcCode.OVERLOADED) for number in range(10)]
        assert server.bodies == IN_FLIGHT_MAX
        gate.opened.set()


async def test_timed_out_bodies_keep_their_place(autojump_clock: trio.testing.MockClock) -> None:
    """Bodies whose callers gave up still count: short time-outs do not buy unbounded work."""
    gate = Gate()
    async with connected({"wait": gate}) as (server, client):
        async with trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises(RpcFailed, match="DeadlineExceeded"):
                    await client.call(WAIT, body(), timeout_s=0.05)

            for _ in range(IN_FLIGHT_MAX):
                nursery.start_soon(call)
        assert server.bodies == IN_FLIGHT_MAX
        with pytest.raises(RpcFailed) as caught:
            await client.call(WAIT, body(), timeout_s=0.05)
        assert caught.value.code is RpcCode.OVERLOADED
        gate.opened.set()


async def test_reconnecting_does_not_buy_more_bodies(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """The bound on bodies holds over all streams, those that are gone included."""
    monkeypatch.setattr(server_module, "BODIES_MAX", 3)
    gate = Gate()
    async with a_server({"wait": gate}) as (server, nursery):
        for number in range(5):
            client = await connect(server, nursery)
            with pytest.raises(RpcFailed) as caught:
                await client.call(WAIT, body(), timeout_s=0.05)
            assert caught.value.code is (RpcCode.DEADLINE_EXCEEDED if number < 3 else RpcCode.OVERLOADED)
            client.stream.stop("test")
        assert server.bodies == 3
        gate.opened.set()


@pytest.mark.parametrize(
    "nonsense",
    [
        frames.encode_reply(0, body()),
        frames.encode_failure(0, RpcCode.OVERLOADED),
        frames.encode_request(1, "wait", 5000, None, body()) * 2,
        b"\x00\x00\x00\x00",
        b"\xff\xff\xff\xffabc",
        frames.encode_hello("again"),
    ],
)
async def test_server_closes_on_nonsense(nonsense: bytes, autojump_clock: trio.testing.MockClock) -> None:
    """Answers nobody asked for, a call id used twice and what is no frame end the stream, not the server."""
    gate = Gate()
    async with raw_client({"wait": gate}) as (server, peer):
        await peer.hello()
        await peer.stream.send_all(nonsense)
        began = trio.current_time()
        assert await peer.until_closed() == []
        assert trio.current_time() == began
        assert server.connections == 0
        gate.opened.set()


@given(st.lists(st.one_of(st.binary(min_size=1, max_size=60), st.sampled_from(PIECES)), min_size=1, max_size=12))
async def test_hostile_stream_leaves_the_server_whole(pieces: list[bytes]) -> None:
    """Whatever a peer sends, in whatever pieces, the server answers the next caller and keeps nothing of it."""
    async with raw_client({"echo": echo}) as (server, peer):
        with suppress(trio.BrokenResourceError):  # it may close at the first piece
            for piece in pieces:
                await peer.stream.send_all(piece)
            await peer.stream.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        assert server.connections == 0
        assert server.bodies == 0
        async with trio.open_nursery() as nursery:
            client = await connect(server, nursery)
            assert await client.call(ECHO, body(), timeout_s=1) == AppOk(b"hello")
            client.stream.stop("done")


async def test_request_without_time_is_not_run(autojump_clock: trio.testing.MockClock) -> None:
    """A request with a time-out of 0 is answered DeadlineExceeded, unrun."""
    gate = Gate()
    async with raw_client({"wait": gate}) as (_, peer):
        await peer.hello()
        await peer.stream.send_all(frames.encode_request(7, "wait", 0, None, body()))
        assert await peer.next_frame() == frames.Failure(7, RpcCode.DEADLINE_EXCEEDED)
        assert gate.begun == 0


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (frames.encode_reply(5, body()), "not asked"),
        (frames.encode_request(1, "echo", 1, None, body()), "not asked"),
        (frames.encode_reply(0, Done()), "reply of echo"),
        (b"\x00\x00\x00\x01\xc1", "not a frame"),
    ],
)
async def test_client_closes_on_nonsense(answer: bytes, reason: str, autojump_clock: trio.testing.MockClock) -> None:
    """A server that answers what was not asked, or with another type, loses the stream; the call may be delivered."""
    async with raw_server() as (peer, client, nursery):
        await peer.hello()
        await client.greeted.wait()
        outcome: list[RpcUnreachable] = []

        async def call() -> None:
            with pytest.raises(RpcUnreachable, match=reason) as caught:
                await client.call(ECHO, body(), timeout_s=5)
            outcome.append(caught.value)

        nursery.start_soon(call)
        await peer.next_frame()
        await peer.stream.send_all(answer)
        await trio.testing.wait_all_tasks_blocked()
        assert outcome[0].maybe_delivered
        assert not client.open


async def test_requests_not_yet_sent_are_surely_undelivered(autojump_clock: trio.testing.MockClock) -> None:
    """When a stream ends, requests of which no byte was handed to it are said to be undelivered; others may be."""
    ours, _theirs = trio.testing.lockstep_stream_pair()  # the first write never ends: the peer does not read
    async with trio.open_nursery() as nursery:
        from juicebox_hsm.adapters.rpc import RpcConnection

        client = RpcConnection(ours, peer="server", role=None)
        nursery.start_soon(client.run)
        outcome: dict[bytes, bool] = {}

        async def call(text: bytes) -> None:
            with pytest.raises(RpcUnreachable) as caught:
                await client.call(ECHO, body(text), timeout_s=5)
            outcome[text] = caught.value.maybe_delivered

        nursery.start_soon(call, b"goes with the hello")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(call, b"stays in the queue")
        await trio.testing.wait_all_tasks_blocked()
        client.stream.stop("test")
    assert outcome == {b"goes with the hello": True, b"stays in the queue": False}


async def test_methods_without_handler_are_unknown(autojump_clock: trio.testing.MockClock) -> None:
    """A role may serve a part of a table; the rest does not exist there."""
    async with connected({"echo": echo}, METHODS) as (_, client):
        with pytest.raises(RpcFailed, match="UnknownMethod"):
            await client.call(WAIT, body(), timeout_s=1)
