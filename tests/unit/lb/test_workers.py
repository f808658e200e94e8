"""Workers that share a port: what their parent does (load-balancer.md 1). Real processes, real signals and sockets."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from juicebox_hsm.adapters.observation import logging
from juicebox_hsm.adapters.process.exit_codes import ExitCode
from roles.lb import workers
from tests.patience import HANGS_S

PRELUDE = """
import os, signal, socket, sys
def say(text, where=os.environ["NOTIFY_SOCKET"]):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as endpoint:
        endpoint.sendto(text.encode(), where.replace("@", "\\0", 1) if where[0] == "@" else where)
number = os.environ["JUICEBOX_HSM_LB_WORKER"].partition(":")[0]
def tell(text):
    say(f"{number} {text}", os.environ["TEST_SOCKET"])
"""
SERVING = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
def reload(*_):
    tell("reloading")
    gate = os.environ.get("GATE", "")
    if gate:
        open(gate).close()
    say("READY=1")
signal.signal(signal.SIGHUP, reload)
say("READY=1")
tell("started")
while True:
    signal.pause()
"""


class Listener:
    """A datagram socket of the test and what is said on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        endpoint = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        endpoint.bind(str(path))
        self.socket = trio.socket.from_stdlib_socket(endpoint)
        self.said: list[str] = []

    async def wait_for(self, *wanted: str) -> None:
        """Wait until each of `wanted` was said since the last time."""
        with trio.fail_after(HANGS_S):
            while not all(word in self.said for word in wanted):
                self.said += (await self.socket.recv(4096)).decode().split("\n")
        self.said.clear()

    def pending(self) -> list[str]:
        """Return what was said and not read."""
        said = []
        while True:
            try:
                said += os.read(self.socket.fileno(), 4096).decode().split("\n")
            except BlockingIOError:
                return said


class Stage:
    """The supervisor's socket, that of the workers for the test, and the log."""

    def __init__(self, folder: Path) -> None:
        self.supervisor = Listener(folder / "notify")
        self.told = Listener(folder / "told")
        self.log = io.StringIO()
        self.codes: list[int] = []

    def logged(self, message: str) -> list[dict[str, object]]:
        """Return the lines with this message."""
        return [line for line in map(json.loads, self.log.getvalue().splitlines()) if line["message"] == message]


@pytest.fixture
async def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    """Make the surroundings of a parent."""
    made = Stage(tmp_path)
    monkeypatch.setenv("NOTIFY_SOCKET", str(made.supervisor.path))
    monkeypatch.setenv("TEST_SOCKET", str(made.told.path))
    monkeypatch.setattr(workers, "RESTART_S", 0.0)
    logging.configure("info", json=True, stream=made.log)
    yield made
    made.supervisor.socket.close()
    made.told.socket.close()


@asynccontextmanager
async def _parent(stage: Stage, monkeypatch: pytest.MonkeyPatch, script: str, count: int = 2) -> AsyncIterator[None]:
    """Run a parent of `count` workers that do what `script` says, until it has ended by itself."""
    monkeypatch.setattr(workers, "worker_command", lambda: [sys.executable, "-c", PRELUDE + script])

    async def run() -> None:
        stage.codes.append(await workers.run_workers(count, HANGS_S))

    with trio.fail_after(3 * HANGS_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            yield


def _signal(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
async def test_stop_while_workers_start(stage: Stage, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """A stop signal ends workers that have no handlers yet; that is a clean stop, with patience asked for."""
    async with _parent(stage, monkeypatch, 'tell("here"); signal.pause()'):
        await stage.told.wait_for("0 here", "1 here")
        _signal(number)
        await stage.supervisor.wait_for("STOPPING=1", f"EXTEND_TIMEOUT_USEC={round(HANGS_S * 1e6)}")
    assert stage.codes == [ExitCode.OK]


async def test_stop_while_a_worker_is_being_started(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose start overlaps the stop signal is stopped too, so the parent ends, with 0."""
    start = trio.lowlevel.open_process
    parent: list[workers._Parent] = []
    made = workers._Parent.__init__

    def remember(self: workers._Parent, count: int, patience_s: float) -> None:
        made(self, count, patience_s)
        parent.append(self)

    async def open_process(*arguments: object, **options: object) -> trio.Process:
        process = await start([sys.executable, "-c", "import signal; signal.pause()"])
        parent[0]._stopping.set()
        return process

    monkeypatch.setattr(workers._Parent, "__init__", remember)
    monkeypatch.setattr(trio.lowlevel, "open_process", open_process)
    async with _parent(stage, monkeypatch, "", count=1):
        pass
    assert stage.codes == [ExitCode.OK]


async def test_ready_after_a_hup_means_reloaded(stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The supervisor hears READY=1 once every worker has reloaded, not when the signal was passed on."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    monkeypatch.setenv("GATE", str(gate))
    async with _parent(stage, monkeypatch, SERVING):
        await stage.supervisor.wait_for("READY=1", "STATUS=2 workers")
        _signal(signal.SIGHUP)
        await stage.supervisor.wait_for("RELOADING=1")
        await stage.told.wait_for("0 reloading", "1 reloading")
        assert stage.supervisor.pending() == []
        opened = await trio.to_thread.run_sync(lambda: os.open(gate, os.O_WRONLY))
        await stage.supervisor.wait_for("READY=1")
        os.close(opened)
        _signal(signal.SIGTERM)
    assert stage.codes == [ExitCode.OK]


async def test_a_hup_waits_for_a_worker_that_starts(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """HUP ends no worker that has no handler yet: it is passed on once that worker is ready."""
    gate = tmp_path / "start"
    os.mkfifo(gate)
    monkeypatch.setenv("START", str(gate))
    async with _parent(stage, monkeypatch, 'tell("here"); open(os.environ["START"]).close()\n' + SERVING, count=1):
        await stage.told.wait_for("0 here")
        _signal(signal.SIGHUP)
        opened = await trio.to_thread.run_sync(lambda: os.open(gate, os.O_WRONLY))
        os.close(opened)
        await stage.told.wait_for("0 reloading")
        await stage.supervisor.wait_for("READY=1")
        _signal(signal.SIGTERM)
    assert stage.codes == [ExitCode.OK]
    assert stage.logged("worker died, starting it again") == []


async def test_a_worker_that_refuses_its_settings(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that ends with 78 is given up, which is logged; the others are ready without it and stop with 0."""
    async with _parent(stage, monkeypatch, 'sys.exit(78) if number == "1" else None\n' + SERVING):
        await stage.supervisor.wait_for("READY=1", "STATUS=1 workers")
        _signal(signal.SIGTERM)
    assert stage.codes == [ExitCode.OK]
    (line,) = stage.logged("worker refuses its settings and is not started again")
    assert (line["worker"], line["status"], line["left"]) == (1, 78, 1)


async def test_all_workers_refuse_their_settings(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """When nobody is left the parent ends with the code that keeps the supervisor from starting it again."""
    async with _parent(stage, monkeypatch, "sys.exit(78)"):
        pass
    assert stage.codes == [ExitCode.CONFIG]


async def test_a_worker_that_hangs_is_started_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that was ready and falls silent is killed and started again, and that is logged."""
    monkeypatch.setattr(workers, "SILENCE_S_MIN", 0.1)
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    async with _parent(stage, monkeypatch, SERVING, count=1):
        await stage.told.wait_for("0 started")
        await stage.told.wait_for("0 started")
        _signal(signal.SIGTERM)
    assert stage.codes == [ExitCode.OK]
    assert stage.logged("worker hangs, killing it")
    assert stage.logged("worker died, starting it again")


async def test_no_watchdog_for_workers_that_all_hang(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent is alive to its supervisor only as long as one of its workers is."""
    parent = workers._Parent(2, HANGS_S)
    hanging = [_Hanging(), _Hanging()]
    for worker, process in zip(parent._workers, hanging, strict=True):
        monkeypatch.setattr(worker, "process", process)
        worker.worker.started(100.0)
        worker.worker.heard(100.0, says_ready=True)
    assert parent._look(105.0, 5.0)
    parent._workers[1].worker.heard(105.0, says_ready=False)
    assert parent._look(106.0, 5.0)
    assert [process.kills for process in hanging] == [1, 0]
    assert not parent._look(111.0, 5.0)
    for worker in parent._workers:
        worker.socket.close()


class _Hanging:
    """A process that does nothing and counts how often it is killed."""

    def __init__(self) -> None:
        self.kills = 0

    def kill(self) -> None:
        """Count."""
        self.kills += 1
