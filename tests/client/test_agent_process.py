"""A real agent process: exit codes, restart with its HSM directory, graceful stop."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from juicebox_hsm.adapters.faults.switch import ENVIRONMENT, Faults
from juicebox_hsm.adapters.hsm_directory.hsm_host import generate_keys, init_hsm_dir
from juicebox_hsm.adapters.rpc import RpcPool, RpcUnreachable
from juicebox_hsm.wire.methods import AGENT_METHODS
from juicebox_hsm.wire.rpc import (
    AgentStatus,
    BecomeLeaderCall,
    Done,
    Empty,
    GroupRole,
    RealmCreated,
    Refusal,
    Refused,
)
from tests.patience import HANGS_S
from tests.processes import end_group, start_group

pytestmark = pytest.mark.processes
START_S = HANGS_S


@pytest.fixture
def unused_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def agent(directory: Path, port: int, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start an agent on loopback without TLS; kill it at the end if it still runs."""
    arguments = [
        sys.executable,
        "-m",
        "roles",
        "--role",
        "agent",
        "--insecure-rpc",
        "--allow-loopback",
        "--store",
        f"sqlite:{directory / 'realm.db'}",
        "--hsm-dir",
        str(directory / "hsm"),
        "--listen",
        f"127.0.0.1:{port}",
        "--http-listen",
        "127.0.0.1:0",
        *more,
    ]
    with (directory / "agent.log").open("ab") as log:
        process = start_group(arguments, stdout=log, stderr=log)
    try:
        yield process
    finally:
        end_group(process)


def prepare(directory: Path) -> None:
    """Make realm keys and one HSM directory."""
    generate_keys(directory / "keys.json", "test")
    init_hsm_dir(directory / "keys.json", directory / "hsm")


async def call(port: int, method: str, body: object) -> object:
    """Call the agent as soon as it listens."""
    async with trio.open_nursery() as nursery:
        pool = RpcPool(nursery, None)
        with trio.fail_after(START_S):
            while True:
                try:
                    reply: object = await pool.call(
                        f"tcp://127.0.0.1:{port}", AGENT_METHODS[method], body, timeout_s=10
                    )
                    break
                except RpcUnreachable:
                    await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    return reply


async def wait(process: subprocess.Popen[bytes], timeout_s: float = 15.0) -> int:
    """Return the exit code."""
    return await trio.to_thread.run_sync(process.wait, timeout_s)


async def test_agent_keeps_its_realm_over_a_restart(tmp_path: Path, unused_port: int) -> None:
    """SIGTERM while leading ends with 0, and the next process finds realm, group and log."""
    prepare(tmp_path)
    with agent(tmp_path, unused_port) as process:
        created = await call(unused_port, "realm/new", Empty())
        assert isinstance(created, RealmCreated)
        refused = await call(unused_port, "realm/new", Empty())
        assert isinstance(refused, Refused)
        assert refused.outcome is Refusal.HAVE_REALM
        process.send_signal(signal.SIGTERM)
        assert await wait(process) == 0
    with agent(tmp_path, unused_port) as process:
        assert await call(unused_port, "become_leader", BecomeLeaderCall(created.realm, created.group)) == Done()
        status = await call(unused_port, "status", Empty())
        assert isinstance(status, AgentStatus)
        assert [(group.group, group.role.name) for group in status.groups] == [(created.group, GroupRole.LEADER)]
        process.send_signal(signal.SIGINT)
        assert await wait(process) == 0


@pytest.mark.parametrize(
    ("spoil", "code", "says"),
    [
        (lambda directory: (directory / "hsm").rename(directory / "elsewhere"), 69, "hsm-dir"),
        (lambda directory: (directory / "realm.db").mkdir(), 78, "realm.db"),
        (lambda directory: (directory / "hsm" / "nvram").write_bytes(b"x" * 100), 78, "nvram"),
    ],
)
async def test_what_cannot_be_used_ends_with_one_line(
    tmp_path: Path, unused_port: int, spoil: object, code: int, says: str
) -> None:
    """Bad settings and unusable files end at once with one line and the code that forbids a restart.

    What may come back by itself, as a directory that is not mounted yet, ends with the code that asks for one.
    """
    prepare(tmp_path)
    assert callable(spoil)
    spoil(tmp_path)
    with agent(tmp_path, unused_port) as process:
        assert await wait(process) == code
    log = (tmp_path / "agent.log").read_text()
    assert says in log
    assert "Traceback" not in log


async def test_one_hsm_directory_serves_one_process(tmp_path: Path, unused_port: int) -> None:
    """A second agent on the same HSM directory refuses to start."""
    prepare(tmp_path)
    with agent(tmp_path, unused_port):
        await call(unused_port, "status", Empty())
        with agent(tmp_path, 0) as second:
            assert await wait(second) == 69  # the first one may be its predecessor, about to leave


async def test_agent_stops_while_the_store_is_down(
    tmp_path: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM ends an agent that cannot register yet, with 0 and within its budget."""
    prepare(tmp_path)
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    (tmp_path / "lone.json").write_text(Faults(store_refuses=True).to_json())
    with agent(tmp_path, unused_port, "--name", "lone") as process:
        assert isinstance(await call(unused_port, "status", Empty()), AgentStatus)
        process.send_signal(signal.SIGTERM)
        assert await wait(process, 10) == 0


async def test_a_failed_nvram_write_ends_with_75_and_loses_nothing(
    tmp_path: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The HSM is poisoned, the process ends with the code that asks for a restart, and its next life has the realm."""
    prepare(tmp_path)
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    with agent(tmp_path, unused_port, "--name", "lone") as process:
        created = await call(unused_port, "realm/new", Empty())
        assert isinstance(created, RealmCreated)
        process.kill()
        await wait(process)
    (tmp_path / "lone.json").write_text(Faults(nvram_fails=True).to_json())
    with agent(tmp_path, unused_port, "--name", "lone") as process:
        assert await wait(process) == 75, "a life begins with a write"
    assert "the NVRAM takes no writes" in (tmp_path / "agent.log").read_text()
    (tmp_path / "lone.json").unlink()
    with agent(tmp_path, unused_port, "--name", "lone"):
        assert await call(unused_port, "become_leader", BecomeLeaderCall(created.realm, created.group)) == Done()
