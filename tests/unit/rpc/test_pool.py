"""The pool and the listening server over loopback, with real TLS: addresses, roles, loss and return of peers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from itertools import pairwise

import pytest
import trio
import trio.testing

from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.rpc import Handler, RpcFailed, RpcPool, RpcServer, RpcUnreachable, frames, serve_rpc
from juicebox_hsm.adapters.rpc import server as server_module
from juicebox_hsm.adapters.tls.certificates import init_ca, issue
from juicebox_hsm.adapters.tls.cluster_tls import ClusterTls
from juicebox_hsm.errors import LocalError
from juicebox_hsm.wire.methods import Method
from juicebox_hsm.wire.rpc import AppOk, PeerRole, RpcCode
from tests.patience import HANGS_S

from .harness import ECHO, METHODS, WAIT, Gate, body, echo


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ClusterTls]:
    """Return one identity per role of one CA, and `intruder`, an agent of another."""
    path = tmp_path_factory.mktemp("identities")
    init_ca(path / "ca")
    init_ca(path / "ca2")
    for role in PeerRole:
        issue(path / "ca", role, f"{role.value}-1", path / role.value)
    issue(path / "ca2", PeerRole.AGENT, "intruder", path / "intruder")
    return {name: ClusterTls.load(path / name) for name in [*(role.value for role in PeerRole), "intruder"]}


@asynccontextmanager
async def listening(
    tls: ClusterTls | None, handlers: Mapping[str, Handler], port: int = 0, metrics: Metrics | None = None
) -> AsyncIterator[tuple[RpcServer, str]]:
    """Run a server on loopback; gives it and its address."""
    async with trio.open_nursery() as nursery:

        async def start(task_status: trio.TaskStatus[RpcServer]) -> None:
            await serve_rpc(
                ("127.0.0.1", port),
                tls=tls,
                methods=METHODS,
                handlers=handlers,
                metrics=metrics,
                task_status=task_status,
            )

        server: RpcServer = await nursery.start(start)
        yield server, f"{'tcp' if tls is None else 'tls'}://127.0.0.1:{server.port}"
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def pool_of(tls: ClusterTls | None, metrics: Metrics | None = None) -> AsyncIterator[RpcPool]:
    """Run a pool."""
    async with trio.open_nursery() as nursery:
        yield RpcPool(nursery, tls, metrics=metrics)
        nursery.cancel_scope.cancel()


async def test_calls_over_tls(identities: dict[str, ClusterTls]) -> None:
    """An agent calls an agent; all calls to an address share one stream, opened once even by callers at once."""
    async with listening(identities["agent"], {"echo": echo}) as (server, url), pool_of(identities["agent"]) as pool:
        large = bytes(1_000_000)

        async def call(text: bytes) -> None:
            assert await pool.call(url, ECHO, body(text), timeout_s=5) == AppOk(text)

        async with trio.open_nursery() as nursery:
            for text in (b"a", b"b", large, b"c"):
                nursery.start_soon(call, text)
        assert server.connections == 1
        assert pool.is_connected(url)


@pytest.mark.parametrize("role", list(PeerRole))
async def test_role_comes_from_the_certificate(identities: dict[str, ClusterTls], role: PeerRole) -> None:
    """The caller's certificate decides what it may call and who the handler says it is."""
    seen: list[server_module.Caller] = []

    async def look(_body: object, caller: server_module.Caller) -> AppOk:
        seen.append(caller)
        return AppOk(b"")

    async with (
        listening(identities["agent"], {"echo": look}) as (_, url),
        pool_of(identities[role.value]) as pool,
    ):
        if role is PeerRole.AGENT:
            await pool.call(url, ECHO, body(), timeout_s=5)
            assert seen[0].role is role
            assert seen[0].name.startswith("agent/agent-1 127.0.0.1:")
        else:
            with pytest.raises(RpcFailed) as caught:
                await pool.call(url, ECHO, body(), timeout_s=5)
            assert caught.value.code is RpcCode.FORBIDDEN
            assert not seen


@pytest.mark.parametrize("role", ["lb", "operator"])
async def test_only_agents_and_managers_serve(identities: dict[str, ClusterTls], role: str) -> None:
    """A stolen balancer's certificate cannot pretend to be an agent; no request reaches it."""
    gate = Gate()
    async with listening(identities[role], {"wait": gate}) as (_, url), pool_of(identities["agent"]) as pool:
        with pytest.raises(RpcUnreachable, match=f"role {role}, which serves no RPC") as caught:
            await pool.call(url, WAIT, body(), timeout_s=5)
        assert not caught.value.maybe_delivered
        assert gate.begun == 0


async def test_caller_may_demand_a_role(identities: dict[str, ClusterTls]) -> None:
    """Who wants to talk to a manager does not talk to an agent, whatever discovery says."""
    async with listening(identities["agent"], {"echo": echo}) as (_, url), pool_of(identities["agent"]) as pool:
        await pool.call(url, ECHO, body(), timeout_s=5, server=PeerRole.AGENT)
        with pytest.raises(RpcUnreachable, match="is agent, not manager") as caught:
            await pool.call(url, ECHO, body(), timeout_s=5, server=PeerRole.MANAGER)
        assert not caught.value.maybe_delivered


@pytest.mark.parametrize(("server", "client"), [("agent", "intruder"), ("intruder", "agent")])
async def test_other_ca(identities: dict[str, ClusterTls], server: str, client: str) -> None:
    """Neither side talks to a certificate of another CA; the reason says so and the request is not delivered."""
    gate = Gate()
    metrics = Metrics()
    async with (
        listening(identities[server], {"wait": gate}, metrics=metrics) as (_, url),
        pool_of(identities[client]) as pool,
    ):
        with pytest.raises(RpcUnreachable) as caught:
            await pool.call(url, WAIT, body(), timeout_s=5)
        assert not caught.value.maybe_delivered
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert gate.begun == 0
    assert metrics.counter("rpc.server.connections.errors").value == 1


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("tcp://127.0.0.1:9", "tcp:// needs --insecure-rpc"),
        ("tcp://10.0.0.1:9", "loopback only"),
        ("https://127.0.0.1:9", r"expected tls://HOST\[:PORT\]"),
        ("tls://127.0.0.1", "expected tls://HOST:PORT"),
        ("tls://127.0.0.1:99999", "not an address"),
        ("tls://[::1:9", "not an address"),
        ("", r"expected tls://HOST\[:PORT\]"),
        ("tls://a..b:9", "neither an IP address"),
        ("tls://a\x00b:9", "tls://a"),
        (f"tls://{'x' * 64}:9", "neither an IP address"),
        ("tls://\u2603\ud800:9", "tls://"),
    ],
)
async def test_bad_addresses(identities: dict[str, ClusterTls], url: str, reason: str) -> None:
    """Whatever somebody wrote to discovery is an unreachable peer, not a crash."""
    async with pool_of(identities["agent"]) as pool:
        with pytest.raises(RpcUnreachable, match=reason) as caught:
            await pool.call(url, ECHO, body(), timeout_s=1)
        assert not caught.value.maybe_delivered


async def test_plain_streams_admit_everybody_on_loopback_only() -> None:
    """`--insecure-rpc` is for tests on one machine: it does not listen elsewhere, and knows no roles."""
    open_to_nobody = Method("echo", ECHO.request, ECHO.reply, frozenset())
    async with listening(None, {"echo": echo}) as (_, url), pool_of(None) as pool:
        assert await pool.call(url, open_to_nobody, body(), timeout_s=5) == AppOk(b"hello")
        with pytest.raises(RpcUnreachable, match="tls:// needs --cluster-tls"):
            await pool.call("tls://127.0.0.1:9", ECHO, body(), timeout_s=5)
    with pytest.raises(LocalError, match="only loopback"):
        await serve_rpc(("0.0.0.0", 0), tls=None, methods=METHODS, handlers={})


async def test_handler_without_a_method_is_refused() -> None:
    """A misspelt handler is found at start, not by its callers."""
    with pytest.raises(LocalError, match="handlers without a method: ehco"):
        await serve_rpc(("127.0.0.1", 0), tls=None, methods=METHODS, handlers={"ehco": echo})


async def test_port_in_use_is_a_local_error() -> None:
    """A second server on a port fails at start, with the address in the message."""
    async with listening(None, {}) as (server, _):
        with pytest.raises(LocalError, match=f"cannot listen on 127.0.0.1:{server.port}"):
            await serve_rpc(("127.0.0.1", server.port), tls=None, methods=METHODS, handlers={})


async def test_peer_that_comes_back_is_found(autojump_clock: trio.testing.MockClock) -> None:
    """A lost peer fails fast while it is away, is not dialled at every call, and is found again after the backoff."""
    async with pool_of(None) as pool:
        async with listening(None, {"echo": echo}) as (server, url):
            port = server.port
            await pool.call(url, ECHO, body(), timeout_s=5)
        with pytest.raises(RpcUnreachable):
            await pool.call(url, ECHO, body(), timeout_s=5)
        began = trio.current_time()
        for _ in range(50):
            with pytest.raises(RpcUnreachable) as caught:
                await pool.call(url, ECHO, body(), timeout_s=5)
            assert not caught.value.maybe_delivered
            await trio.sleep(0.1)
        assert trio.current_time() - began < 6
        async with listening(None, {"echo": echo}, port):
            await trio.sleep(1)
            assert await pool.call(url, ECHO, body(), timeout_s=5) == AppOk(b"hello")


async def test_backoff_limits_the_dialling(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """However often callers try, a dead peer is dialled about once per second, after a quicker start."""
    dialled: list[float] = []

    async def refuse(host: str, port: int) -> trio.SocketStream:
        dialled.append(trio.current_time())
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(trio, "open_tcp_stream", refuse)
    async with pool_of(None) as pool:
        with trio.move_on_after(20):
            while True:
                with pytest.raises(RpcUnreachable, match="refused"):
                    await pool.call("tcp://127.0.0.1:9", ECHO, body(), timeout_s=5)
                await trio.sleep(0.01)
    assert 20 <= len(dialled) <= 60
    assert dialled[1] - dialled[0] < 0.1
    assert all(later - earlier < 1.1 for earlier, later in pairwise(dialled))


async def test_connecting_is_within_the_deadline(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A caller waits for a stream no longer than for its call; one that gives up leaves the dialling to others."""

    async def hang(host: str, port: int) -> trio.SocketStream:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(trio, "open_tcp_stream", hang)
    async with pool_of(None) as pool:
        began = trio.current_time()
        with pytest.raises(RpcUnreachable, match="no connection in time") as caught:
            await pool.call("tcp://127.0.0.1:9", ECHO, body(), timeout_s=0.3)
        assert not caught.value.maybe_delivered
        assert trio.current_time() - began == pytest.approx(0.3)
        with pytest.raises(RpcUnreachable, match="no connection within 2"):
            await pool.call("tcp://127.0.0.1:9", ECHO, body(), timeout_s=60)
        assert trio.current_time() - began == pytest.approx(2.0)


async def test_forget(identities: dict[str, ClusterTls]) -> None:
    """Forgetting an address closes its stream; the next call opens another, without backoff."""
    async with listening(identities["agent"], {"echo": echo}) as (server, url), pool_of(identities["agent"]) as pool:
        await pool.call(url, ECHO, body(), timeout_s=5)
        pool.forget(url)
        assert not pool.is_connected(url)
        await pool.call(url, ECHO, body(), timeout_s=5)
        assert server.connections <= 2
        pool.close()
        assert not pool.is_connected(url)


async def test_shutdown_over_tcp() -> None:
    """A server that shuts down answers what it has, closes its port and its streams, and `serve_rpc` returns."""
    gate = Gate()
    async with pool_of(None) as pool, trio.open_nursery() as nursery:

        async def start(task_status: trio.TaskStatus[RpcServer]) -> None:
            await serve_rpc(
                ("127.0.0.1", 0), tls=None, methods=METHODS, handlers={"wait": gate}, task_status=task_status
            )

        async with trio.open_nursery() as serving:
            server: RpcServer = await serving.start(start)
            url = f"tcp://127.0.0.1:{server.port}"
            replied = trio.Event()

            async def call() -> None:
                assert await pool.call(url, WAIT, body(), timeout_s=5) == AppOk(b"hello")
                replied.set()

            nursery.start_soon(call)
            await gate.entered.wait()
            gate.opened.set()
            assert await server.shutdown(5)
        with trio.fail_after(HANGS_S):
            await replied.wait()
        with pytest.raises(RpcUnreachable):
            await pool.call(url, WAIT, body(), timeout_s=5)


async def test_half_open_handshake_ends(
    identities: dict[str, ClusterTls], autojump_clock: trio.testing.MockClock
) -> None:
    """A client that connects and never finishes TLS, or never says hello, is dropped in bounded time."""
    metrics = Metrics()
    async with listening(identities["agent"], {"echo": echo}, metrics=metrics) as (server, _):
        for first in (b"", b"\x16\x03\x01"):
            began = trio.current_time()
            stream = await trio.open_tcp_stream("127.0.0.1", server.port)
            await stream.send_all(first)
            with trio.fail_after(60):
                assert await stream.receive_some() == b""
            assert trio.current_time() - began == pytest.approx(server_module.HANDSHAKE_S, abs=0.1)
            await stream.aclose()
    assert metrics.counter("rpc.server.connections.errors").value == 2


async def test_unfinished_handshakes_lock_nobody_out(
    identities: dict[str, ClusterTls], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers that never finish TLS take no stream's room; beyond their bound the oldest of them makes room."""
    monkeypatch.setattr(server_module, "HANDSHAKES_MAX", 4)
    monkeypatch.setattr(server_module, "STREAMS_MAX", 1)
    metrics = Metrics()
    async with (
        listening(identities["agent"], {"echo": echo}, metrics=metrics) as (server, url),
        pool_of(identities["agent"]) as pool,
    ):
        crowd = [await trio.open_tcp_stream("127.0.0.1", server.port) for _ in range(12)]
        with trio.fail_after(HANGS_S):
            for stream in crowd[:8]:
                assert await stream.receive_some() == b""
        assert await pool.call(url, ECHO, body(), timeout_s=5) == AppOk(b"hello")
        crowd += [await trio.open_tcp_stream("127.0.0.1", server.port) for _ in range(12)]
        assert await pool.call(url, ECHO, body(), timeout_s=5) == AppOk(b"hello"), "a proven stream stays"
        for stream in crowd:
            await trio.aclose_forcefully(stream)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", bytes(100), frames.encode_hello("plain")])
async def test_plaintext_to_a_tls_port(identities: dict[str, ClusterTls], data: bytes) -> None:
    """What is no TLS is closed and counted; the server goes on."""
    metrics = Metrics()
    async with (
        listening(identities["agent"], {"echo": echo}, metrics=metrics) as (server, url),
        pool_of(identities["agent"]) as pool,
    ):
        async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
            await stream.send_all(data)
            with trio.fail_after(HANGS_S):
                while await stream.receive_some():
                    pass
        assert await pool.call(url, ECHO, body(), timeout_s=5) == AppOk(b"hello")
    assert metrics.counter("rpc.server.connections.errors").value == 1


async def test_too_many_streams_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound new streams are closed at once; those that are open keep working."""
    monkeypatch.setattr(server_module, "STREAMS_MAX", 1)
    async with listening(None, {"echo": echo}) as (_, url), pool_of(None) as first, pool_of(None) as second:
        await first.call(url, ECHO, body(), timeout_s=5)
        with pytest.raises(RpcUnreachable):
            await second.call(url, ECHO, body(), timeout_s=5)
        assert await first.call(url, ECHO, body(), timeout_s=5) == AppOk(b"hello")
        first.close()
        with trio.fail_after(HANGS_S):
            while True:
                second.forget(url)  # no backoff
                with suppress(RpcUnreachable):
                    assert await second.call(url, ECHO, body(), timeout_s=5) == AppOk(b"hello")
                    break


async def test_timings_by_method_peer_and_result() -> None:
    """Every call is counted, with its time, at both ends."""
    ours, theirs = Metrics(), Metrics()
    async with listening(None, {"echo": echo}, metrics=theirs) as (_, url), pool_of(None, ours) as pool:
        await pool.call(url, ECHO, body(), timeout_s=5)
        with pytest.raises(RpcFailed):
            await pool.call(url, WAIT, body(), timeout_s=5)
    assert ours.timer("reqwest.client.time", method="echo", url=url, status_code=200).count == 1
    assert ours.timer("reqwest.client.time", method="wait", url=url, err="UnknownMethod").count == 1
    assert theirs.timer("rpc.server.time", method="echo", result="ok").count == 1
    assert theirs.counter("rpc.server.refusals", code="UnknownMethod").value == 1
