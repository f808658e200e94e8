"""The small HTTP port, in this process over loopback."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
import trio.lowlevel
import trio.testing
from quart_trio import QuartTrio

from juicebox_hsm.adapters.observation import probes
from juicebox_hsm.adapters.observation.containment import ContainedConfig
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.observation.probes import serve_probes
from juicebox_hsm.errors import LocalError, RealmError
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.readiness import OwnClockOff, Plain, Readiness
from roles.words import readiness_text
from tests.patience import HANGS_S


class Health:
    """Probes whose answers the test decides."""

    def __init__(self) -> None:
        self.ok = True
        self.error: Exception | None = None
        self.hang = False
        self.running = self.most = 0
        self.entered, self.left = trio.Event(), trio.Event()

    async def __call__(self) -> tuple[bool, str]:
        """Answer."""
        self.running += 1
        self.most = max(self.most, self.running)
        self.entered.set()
        try:
            if self.hang:
                await trio.sleep_forever()
        finally:
            self.running -= 1
            self.left.set()
        if self.error is not None:
            raise self.error
        return self.ok, "hsm id: 00"

    async def judge(self) -> Readiness:
        """Answer as a service that does not hear its HSM, unless all is well."""
        ok, _ = await self()
        return Readiness() if ok else Readiness((Plain(Code.HSM_SILENT),), (OwnClockOff(6.0),))


async def get(port: int, path: str, method: str = "GET") -> tuple[int, str, str]:
    """Return status, head and body; waits for the server to close, as it was asked to."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        data = b""
        with trio.fail_after(HANGS_S):
            async for piece in stream:
                data += piece
    head, _, content = data.decode().partition("\r\n\r\n")
    return int(head.split()[1]), head, content


@asynccontextmanager
async def serving(live: Health, ready: Health, metrics: Metrics | None = None) -> AsyncIterator[int]:
    """Run the port."""

    def add(app: QuartTrio) -> None:
        async def page() -> str:
            return "<h1>manager</h1>"

        app.add_url_rule("/manager", view_func=page)

    async with trio.open_nursery() as nursery:

        async def start(task_status: trio.TaskStatus[int]) -> None:
            await serve_probes(
                ("127.0.0.1", 0),
                name="agent one",
                livez=live,
                readyz=ready.judge,
                show=readiness_text,
                metrics=metrics if metrics is not None else Metrics(),
                app_hook=add,
                task_status=task_status,
            )

        yield await nursery.start(start)
        nursery.cancel_scope.cancel()


async def test_pages() -> None:
    """Live and ready are apart, metrics are Prometheus text, roles may add pages, the rest is 404 or 405."""
    live, ready = Health(), Health()
    ready.ok = False
    metrics = Metrics()
    metrics.count("realm.request.count", 7)
    async with serving(live, ready, metrics) as port:
        status, head, text = await get(port, "/livez")
        assert (status, text) == (200, "hsm id: 00\n")
        assert "server:" not in head.lower()
        status, head, text = await get(port, "/readyz")
        assert (status, text) == (503, "the HSM does not answer\nwarning: its clock is 6 s ahead of the others'\n")
        assert "x-reasons: hsm-silent\r\nx-warnings: clock" in head
        status, head, text = await get(port, "/metrics")
        assert status == 200
        assert "content-type: text/plain; version=0.0.4; charset=utf-8" in head
        assert "\nrealm_request_count_total 7\n" in text
        assert (await get(port, "/manager"))[2] == "<h1>manager</h1>"
        assert "agent one" in (await get(port, "/"))[2]
        assert (await get(port, "/nope"))[0] == 404
        assert (await get(port, "/livez", "DELETE"))[0] == 405


async def test_trouble_is_not_ok(capsys: pytest.CaptureFixture[str]) -> None:
    """A probe that fails or hangs is answered 503 in bounded time, and the port goes on."""
    live, ready = Health(), Health()
    async with serving(live, ready) as port:
        live.error = RealmError("store is down")
        assert (await get(port, "/livez"))[::2] == (503, "store is down\n")
        live.error = None
        assert (await get(port, "/livez"))[0] == 200
    assert capsys.readouterr().out == ""


async def test_hanging_probe_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that hangs is given up, and several askers never run it twice at a time."""
    monkeypatch.setattr(probes, "PROBE_S", 0.1)
    live = Health()
    live.hang = True
    async with serving(live, Health()) as port:
        statuses: list[int] = []

        async def ask() -> None:
            statuses.append((await get(port, "/livez"))[0])

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
        assert statuses == [503] * 3
        assert live.most == 1
    ready = Health()
    ready.hang = True
    async with serving(Health(), ready) as port:
        status, head, text = await get(port, "/readyz")
    assert (status, text) == (503, "no answer within 0.1 s\n")
    assert "x-reasons: no-answer" in head


async def test_garbage_is_survived() -> None:
    """What is no HTTP is closed; the port goes on."""
    async with serving(Health(), Health()) as port:
        for data in (b"\x16\x03\x01\x00\x05hello", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 100, b"A" * 100_000):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                with trio.move_on_after(0.05):
                    try:
                        await stream.send_all(data)
                        await stream.receive_some()
                    except trio.BrokenResourceError:
                        pass
        assert (await get(port, "/livez"))[0] == 200


async def test_stops_promptly_with_idle_and_busy_connections() -> None:
    """Cancelling ends the port at once although clients hold connections and a probe runs."""
    live = Health()
    live.hang = True
    async with serving(live, Health()) as port:
        idle = await trio.open_tcp_stream("127.0.0.1", port)
        busy = await trio.open_tcp_stream("127.0.0.1", port)
        await busy.send_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        while not live.running:  # noqa: ASYNC110  # the probe has no event to offer
            await trio.sleep(0.001)
        began = trio.current_time()
    assert trio.current_time() - began < 1
    await idle.aclose()
    await busy.aclose()


async def test_reader_that_takes_nothing_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypercorn's writes cannot be cancelled; the system's own time-out ends them."""
    monkeypatch.setattr(probes, "SEND_MS", 300)
    metrics = Metrics()
    for number in range(5000):
        metrics.count("filling.the.buffers", number=number)
    async with serving(Health(), Health(), metrics) as port:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        await trio.sleep(0.2)
        began = trio.current_time()
    assert trio.current_time() - began < HANGS_S
    await stream.aclose()


async def test_port_in_use() -> None:
    """A taken port is a configuration error that names it."""
    async with serving(Health(), Health()) as port:
        with pytest.raises(LocalError, match=f"cannot listen on 127.0.0.1:{port}"):
            await serve_probes(
                ("127.0.0.1", port),
                name="x",
                livez=Health(),
                readyz=Health().judge,
                show=readiness_text,
                metrics=Metrics(),
            )


async def test_bytes_after_a_refused_upgrade_end_their_connection_only() -> None:
    """An error inside hypercorn (here: bytes after a WebSocket upgrade) ends neither the port nor the process."""
    upgrade = (
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    async with serving(Health(), Health()) as port:
        for filler in range(0, 256, 16):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                with trio.move_on_after(0.05):
                    try:
                        await stream.send_all(upgrade)
                        await stream.send_all(bytes([filler]) * 50)
                        await stream.receive_some()
                    except trio.BrokenResourceError:
                        pass
        assert (await get(port, "/livez"))[0] == 200


async def test_a_crowd_does_not_lock_anybody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the bound the connection idle longest makes room, half a request counts as idle, a working one stays."""
    monkeypatch.setattr(probes, "ContainedConfig", lambda _: ContainedConfig(4))
    monkeypatch.setattr(probes, "PROBE_S", 30.0)
    live = Health()
    live.hang = True
    async with serving(live, Health()) as port:
        busy = await trio.open_tcp_stream("127.0.0.1", port)
        await busy.send_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        with trio.fail_after(HANGS_S):
            while not live.running:
                await trio.lowlevel.checkpoint()
        crowd = []
        for _ in range(8):
            crowd.append(await trio.open_tcp_stream("127.0.0.1", port))
            await crowd[-1].send_all(b"GET /readyz HTTP/1.1\r\nHo")
        with trio.fail_after(HANGS_S):
            for stream in crowd[:5]:
                assert await stream.receive_some() == b""
        assert (await get(port, "/readyz"))[0] == 200
        assert live.running == 1, "the request in progress was not evicted"
        for stream in (busy, *crowd):
            await trio.aclose_forcefully(stream)


async def test_beyond_the_bound_all_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a request in progress on every connection a further one is closed at once, and the port goes on after."""
    monkeypatch.setattr(probes, "ContainedConfig", lambda _: ContainedConfig(1))
    monkeypatch.setattr(probes, "PROBE_S", 30.0)
    live = Health()
    live.hang = True
    async with serving(live, Health()) as port:
        busy = await trio.open_tcp_stream("127.0.0.1", port)
        await busy.send_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        with trio.fail_after(HANGS_S):
            while not live.running:
                await trio.lowlevel.checkpoint()
            other = await trio.open_tcp_stream("127.0.0.1", port)
            with suppress(trio.BrokenResourceError):
                assert await other.receive_some() == b""
            await other.aclose()
            await trio.aclose_forcefully(busy)
            while live.running:
                await trio.lowlevel.checkpoint()
        with trio.fail_after(HANGS_S):
            while True:  # the place is free a moment after the client has gone
                try:
                    assert (await get(port, "/readyz"))[0] == 200
                except (OSError, trio.BrokenResourceError, IndexError):
                    continue
                break


@pytest.mark.parametrize("sent", [b"", b"GET /livez HTTP/1.1\r\nHo", b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"])
async def test_who_has_left_takes_no_place(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """A connection ends with its client, wherever that was: silent, in half a head, waiting for an answer."""
    config = ContainedConfig(100)
    monkeypatch.setattr(probes, "ContainedConfig", lambda _: config)
    monkeypatch.setattr(probes, "IDLE_S", 3600)
    monkeypatch.setattr(probes, "PROBE_S", 3600.0)
    live = Health()
    live.hang = bool(sent.endswith(b"\r\n\r\n"))
    async with serving(live, Health()) as port:
        for _ in range(20):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(sent)
            if live.hang:
                await live.entered.wait()
            await stream.aclose()
        with trio.fail_after(HANGS_S):
            while config.connections or live.running:
                await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("target", ["http://[/livez", "http://[::1", "?x", "*", "http://host"])
async def test_targets_without_a_path_are_bad_requests(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A stranger's odd target is answered 400 and is no trouble of ours; one in absolute form works."""
    async with serving(Health(), Health()) as port:
        assert (await get(port, target))[0] == 400
        assert (await get(port, "http://host/livez"))[0] == 200
    assert capsys.readouterr() == ("", "")
