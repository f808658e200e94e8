"""A real load balancer process: exit codes, reload, drain, workers, memory (load-balancer.md 1 to 4)."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from roles.tools.demo.layout import PORTS
from tests.fakes.secret_manager import SecretManager
from tests.patience import HANGS_S
from tests.processes import end_group, start_group
from tests.unit.edge.harness import Identity, make_identity

pytestmark = pytest.mark.processes

RSS_MIB_MAX = 120  # the promise for an idle balancer
SECRETS = {
    "record-id-randomization": {
        "1": {"data": "32-bytes-to-randomize-record-IDs", "encoding": "UTF8", "algorithm": "Blake2sMac256"}
    }
}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _free_ports_in_a_row() -> int:
    """Return the first of two free ports for probes: worker N has the N-th behind the first.

    Below the range from which outgoing connections are numbered: one of those must not take a port meanwhile.
    """
    while True:
        first = random.choice(PORTS)
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", first))
                other.bind(("127.0.0.1", first + 1))
            except OSError:
                continue
            return first


class Balancer:
    """One balancer process (or parent of workers) and how to talk to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity = make_identity(folder)
        self.port = _free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        self.secrets(SECRETS)

    def secrets(self, content: object) -> None:
        path = self.folder / "secrets.json"
        path.write_text(json.dumps(content))
        path.chmod(0o600)

    def start(self, *more: str, http_port: int = 0, cloud: str = "") -> subprocess.Popen[bytes]:
        arguments = [sys.executable, "-m", "roles", "--role", "lb", "--insecure-rpc", "--allow-loopback"]
        arguments += ["--store", f"sqlite:{self.folder / 'realm.db'}", "--listen", f"127.0.0.1:{self.port}"]
        arguments += ["--http-listen", f"127.0.0.1:{http_port}"]
        if cloud:
            arguments += ["--secrets-manager-project", "prod", "--secrets-manager-url", f"http://{cloud}"]
        else:
            arguments += ["--secrets-file", str(self.folder / "secrets.json")]
        arguments += ["--tls-key", str(self.identity.key), "--tls-cert", str(self.identity.cert), *more]
        with (self.folder / "lb.log").open("ab") as log:
            self.process = start_group(arguments, stdout=log, stderr=log, env={**os.environ, **self.environment})
        return self.process

    def connect(self, identity: Identity | None = None) -> http.client.HTTPSConnection:
        context = (identity or self.identity).client_context()
        return http.client.HTTPSConnection("localhost", self.port, context=context, timeout=HANGS_S)

    def livez(self, connection: http.client.HTTPSConnection | None = None) -> str:
        link = connection or self.connect()
        try:
            link.request("GET", "/livez")
            return link.getresponse().read().decode()
        finally:
            if connection is None:
                link.close()

    def wait_until_live(self) -> str:
        deadline = time.monotonic() + HANGS_S
        while True:
            try:
                return self.livez()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def wait_until_logged(self, text: str) -> None:
        """Return once the log says `text`."""
        self.wait_for(lambda: text in (self.folder / "lb.log").read_text())

    @staticmethod
    def wait_for(condition: Callable[[], bool]) -> None:
        """Return once the condition holds; fails after a time no machine needs."""
        deadline = time.monotonic() + HANGS_S
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def serial(self, identity: Identity) -> str:
        context = identity.client_context()
        with (
            socket.create_connection(("localhost", self.port), timeout=HANGS_S) as tcp,
            context.wrap_socket(tcp, server_hostname="localhost") as tls,
        ):
            certificate = tls.getpeercert()
            assert certificate is not None
            return str(certificate["serialNumber"])


@pytest.fixture
def balancer(tmp_path: Path) -> Iterator[Balancer]:
    """Return a balancer that is not started; end it and its workers at the end."""
    made = Balancer(tmp_path)
    yield made
    if made.process is not None:
        end_group(made.process)


@contextmanager
def _kept_alive(balancer: Balancer) -> Iterator[http.client.HTTPSConnection]:
    connection = balancer.connect()
    try:
        yield connection
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("fault", "code"), [("mismatch", 69), ("secrets", 78), ("two_keys", 78), ("no_key", 78), ("port", 69)]
)
def test_a_start_that_fails_says_why(balancer: Balancer, tmp_path: Path, fault: str, code: int) -> None:
    """What an operator has to correct ends the start with 78, what may pass with 69, and one line names it."""
    name = ""
    with socket.socket() as other:
        if fault == "mismatch":
            shutil.copy(make_identity(tmp_path, "other").key, balancer.identity.key)
            name = "edge.key"
        elif fault == "secrets":
            balancer.secrets({"tenant-a": {"1": {}}})
            name = "tenant-a"
        elif fault == "two_keys":
            key = SECRETS["record-id-randomization"]["1"]
            balancer.secrets({"record-id-randomization": {"1": key, "2": key}})
            name = "several enabled versions"
        elif fault == "no_key":
            balancer.secrets({"tenant-a": {}})
            name = "record-id-randomization"
        else:
            other.bind(("127.0.0.1", balancer.port))
            other.listen()
            name = str(balancer.port)
        assert balancer.start().wait(HANGS_S) == code
    log = (balancer.folder / "lb.log").read_text()
    assert name in log
    assert "Traceback" not in log


def test_secrets_from_the_cloud(balancer: Balancer) -> None:
    """Without a file the balancer reads Secret Manager; a project without a record id key ends the start with 78."""
    manager = SecretManager("prod")
    try:
        assert balancer.start(cloud=manager.address).wait(HANGS_S) == 78
        assert "record-id-randomization: no enabled version" in (balancer.folder / "lb.log").read_text()
        payload = json.dumps(SECRETS["record-id-randomization"]["1"])
        manager.put("record-id-randomization", "1", payload, kind="record_id_randomization_key")
        process = balancer.start("--shutdown-notice-period", "0s", cloud=manager.address)
        balancer.wait_until_live()
        process.terminate()
        assert process.wait(HANGS_S) == 0
    finally:
        manager.stop()
    assert "32-bytes" not in (balancer.folder / "lb.log").read_text()


def test_reload_over_hup(balancer: Balancer) -> None:
    """HUP swaps a good pair and ignores a bad one; a connection opened before lives through both."""
    process = balancer.start()
    assert balancer.wait_until_live().startswith("Juicebox load balancer: ")
    old = balancer.identity
    new = make_identity(balancer.folder, "new")
    first = balancer.serial(old)
    assert balancer.serial(old) == first
    with _kept_alive(balancer) as connection:
        assert "name: " in balancer.livez(connection)
        shutil.copy(new.key, old.key)  # a pair that does not match
        process.send_signal(signal.SIGHUP)
        balancer.wait_until_logged('"kept"')
        assert balancer.serial(old) == first
        shutil.copy(new.cert, old.cert)
        process.send_signal(signal.SIGHUP)

        def is_changed() -> bool:
            try:
                return balancer.serial(new) != first
            except ssl.SSLError:
                return False

        balancer.wait_for(is_changed)
        assert "name: " in balancer.livez(connection)
    assert process.poll() is None


def test_notice_drain_and_exit(balancer: Balancer) -> None:
    """SIGTERM: first the notice with everything served, then idle connections go and the process ends with 0."""
    process = balancer.start("--shutdown-notice-period", "5s")
    balancer.wait_until_live()
    with _kept_alive(balancer) as idle:
        balancer.livez(idle)
        process.send_signal(signal.SIGTERM)
        balancer.wait_for(lambda: balancer.livez() == "Shutting down")
        assert process.poll() is None
        assert process.wait(HANGS_S) == 0


def test_second_signal_ends_at_once(balancer: Balancer) -> None:
    """A second SIGTERM during the notice skips the rest; the exit code is still 0."""
    process = balancer.start("--shutdown-notice-period", "600s", "--shutdown-timeout", "700s")
    balancer.wait_until_live()
    process.send_signal(signal.SIGTERM)
    balancer.wait_for(lambda: balancer.livez() == "Shutting down")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANGS_S) == 0


def test_idle_memory(balancer: Balancer) -> None:
    """An idle balancer stays below the promised memory."""
    process = balancer.start()
    balancer.wait_until_live()
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert int(status.split("VmRSS:")[1].split()[0]) / 1024 < RSS_MIB_MAX


def _children(pid: int) -> list[int]:
    """Return the child processes, whichever thread started them."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has just ended
            found += [int(text) for text in task.read_text().split()]
    return sorted(found)


def _lives(pid: int) -> bool:
    """Tell whether a process runs; one that has ended may wait for whoever adopted it to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_end_with_their_parent(balancer: Balancer) -> None:
    """Workers whose parent was killed end by themselves, so that the next parent finds its ports free."""
    process = balancer.start("--workers", "2", http_port=_free_ports_in_a_row())
    balancer.wait_until_live()
    deadline = time.monotonic() + HANGS_S
    log = balancer.folder / "lb.log"
    while log.read_text().count("Load balancer started") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = _children(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + HANGS_S
    while any(_lives(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


HELD_AT_ITS_START = """
import os, pathlib, time
folder = pathlib.Path(os.environ["TEST_FOLDER"])
if os.environ.get("JUICEBOX_HSM_LB_WORKER", "").startswith("0"):
    (folder / "started").write_text(str(os.getpid()))
    for _ in range(6000):
        if (folder / "go").exists():
            break
        time.sleep(0.01)
"""


def test_a_worker_whose_parent_dies_while_it_starts(balancer: Balancer, tmp_path: Path) -> None:
    """It is told who its parent is, so it ends although the parent died before it could ask the system."""
    (tmp_path / "sitecustomize.py").write_text(HELD_AT_ITS_START)
    balancer.environment = {"PYTHONPATH": str(tmp_path), "TEST_FOLDER": str(tmp_path)}
    process = balancer.start("--workers", "2", http_port=_free_ports_in_a_row())
    deadline = time.monotonic() + HANGS_S
    while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker = int((tmp_path / "started").read_text())
    process.kill()
    process.wait()
    (tmp_path / "go").touch()
    deadline = time.monotonic() + HANGS_S
    while _lives(worker):
        assert time.monotonic() < deadline, (balancer.folder / "lb.log").read_text()
        time.sleep(0.05)
    assert "the parent of the workers is gone, not starting" in (balancer.folder / "lb.log").read_text()


def test_workers(balancer: Balancer) -> None:
    """Workers share the port, one that dies is started again, and stopping stops all, even one that still starts."""
    process = balancer.start("--workers", "2", "--shutdown-notice-period", "0s", http_port=_free_ports_in_a_row())
    balancer.wait_until_live()
    deadline = time.monotonic() + HANGS_S
    while len(_children(process.pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first, second = _children(process.pid)
    os.kill(first, signal.SIGKILL)
    while len(_children(process.pid)) < 2 or first in _children(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert second in _children(process.pid)
    balancer.wait_until_live()
    workers = _children(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANGS_S) == 0
    for worker in workers:
        assert not Path(f"/proc/{worker}").exists()
