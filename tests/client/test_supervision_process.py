"""Real services under a supervisor: what they say on the notify socket, and the unit templates that rely on it."""

from __future__ import annotations

import itertools
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click
import pytest

import roles.agent.main
import roles.lb.main
import roles.manager.main
import roles.tenant_log.main
import roles.tools.check.command
from juicebox_hsm.adapters.hsm_directory.hsm_host import generate_keys, init_hsm_dir
from juicebox_hsm.adapters.process.exit_codes import OF_TOOLS, ExitCode
from juicebox_hsm.adapters.process.supervision import NOT_RESTARTED
from juicebox_hsm.adapters.tls.certificates import CaKind, init_ca, issue, issue_edge
from roles.options import flag_of
from roles.tools.demo.layout import PORTS
from roles.words import EXIT_CODES
from tests.patience import HANGS_S
from tests.processes import end_group, start_group

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "docs" / "systemd").glob("*.service"))
COMMANDS = {
    "agent": roles.agent.main.command,
    "lb": roles.lb.main.command,
    "manager": roles.manager.main.command,
}
TOOLS = {
    "tenant-log": (roles.tenant_log.main.command, ("tenant-log", "serve")),
    "check": (roles.tools.check.command.command, ("check", "--forever")),
}
ROLE_UNITS = [path for path in UNITS if path.stem.removeprefix("juicebox-").rstrip("@") in COMMANDS]
TOOL_UNITS = [path for path in UNITS if path not in ROLE_UNITS]
WATCHDOG_S = 4.0
WAIT_S = HANGS_S


class Supervisor:
    """A notify socket, and everything that was said on it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self.said: list[tuple[float, str]] = []
        self.metrics = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.metrics.bind(("127.0.0.1", 0))
        self.metrics.settimeout(WAIT_S)

    def wait_for(self, wanted: str, *, after: int = 0, process: subprocess.Popen[bytes] | None = None) -> int:
        """Wait for a line that begins with `wanted` after the first `after` ones; return how many lines that makes.

        A `process` that is given has to live meanwhile.
        """
        deadline = time.monotonic() + WAIT_S
        while True:
            for number, (_, line) in enumerate(self.said[after:], start=after):
                if line.startswith(wanted):
                    return number + 1
            left_s = max(0.01, deadline - time.monotonic())
            self._socket.settimeout(left_s if process is None else min(1.0, left_s))
            try:
                self._hear()
            except TimeoutError:
                if process is not None and process.poll() is None and time.monotonic() < deadline:
                    continue
                raise AssertionError(f"{wanted} not said within {WAIT_S} s: {self.said}") from None

    def _hear(self) -> None:
        message = self._socket.recv(4096).decode()
        self.said += [(time.monotonic(), line) for line in message.split("\n")]

    def wait_for_metric(self, wanted: str) -> str:
        """Return the first line for DogStatsD that begins with `wanted`."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            ready, _, _ = select.select([self.metrics, self._socket], [], [], WAIT_S)
            if self._socket in ready:  # a notify socket takes ten messages, then they are lost
                self._hear()
            if self.metrics not in ready:
                continue
            for line in self.metrics.recv(2000).decode().split("\n"):
                if line.startswith(wanted):
                    assert "|#service:" in line
                    return line
        raise AssertionError(f"no metric {wanted} within {WAIT_S} s")

    def close(self) -> None:
        """Close the sockets."""
        self._socket.close()
        self.metrics.close()


def _flags(role: str, directory: Path, store: Path) -> list[str]:
    """Prepare what a role needs; return its flags."""
    tls = directory / f"tls-{role}"
    issue(directory / "ca", role, role, tls)
    flags = ["--store", f"sqlite:{store}", "--cluster-tls", str(tls), "--allow-loopback"]
    if role == "agent":
        generate_keys(directory / "keys.json", "test")
        init_hsm_dir(directory / "keys.json", directory / "hsm")
        flags += ["--hsm-dir", str(directory / "hsm")]
    if role == "lb":
        init_ca(directory / "edge-ca", kind=CaKind.EDGE)
        issue_edge(directory / "edge-ca", ["localhost"], directory / "edge.pem", directory / "edge-key.pem")
        subprocess.run(
            [sys.executable, "-m", "roles", "secrets", "init-record-id", "--file", directory / "secrets.json"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        flags += ["--tls-cert", str(directory / "edge.pem"), "--tls-key", str(directory / "edge-key.pem")]
        flags += ["--secrets-file", str(directory / "secrets.json"), "--shutdown-notice-period", "0s"]
    return flags


@contextmanager
def _service(
    role: str,
    directory: Path,
    supervisor: Supervisor,
    *more: str,
    stdout: int | None = None,
    witness: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    init_ca(directory / "ca")
    command = [sys.executable, "-m", "roles", "--role", role, *_flags(role, directory, directory / "realm.db"), *more]
    with _running(command, directory, supervisor, stdout, witness) as process:
        yield process


GUARD_WITNESS = """
import atexit, ctypes, os, resource
def tell():
    state = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), *resource.getrlimit(resource.RLIMIT_CORE)
    with open(os.path.join(os.environ["TEST_GUARDS"], str(os.getpid())), "w") as told:
        told.write(str(state))
atexit.register(tell)
"""
"""Makes each process tell at its end whether it is dumpable (prctl PR_GET_DUMPABLE), and its limits of core files."""


UNREADABLE = "(0, 0, 0)"


def _guards(directory: Path) -> list[str]:
    """Return what the processes that have ended told."""
    return [path.read_text() for path in (directory / "guards").iterdir()]


@contextmanager
def _running(
    command: list[str],
    directory: Path,
    supervisor: Supervisor,
    stdout: int | None = None,
    witness: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    (directory / "guards").mkdir()
    (directory / "witness").mkdir()
    (directory / "witness" / "sitecustomize.py").write_text(GUARD_WITNESS)
    environment = {
        **os.environ,
        "PYTHONPATH": str(witness or directory / "witness"),
        "TEST_GUARDS": str(directory / "guards"),
        "DD_AGENT_HOST": "127.0.0.1",
        "DD_DOGSTATSD_PORT": str(supervisor.metrics.getsockname()[1]),
        "NOTIFY_SOCKET": str(supervisor.path),
        "WATCHDOG_USEC": str(round(WATCHDOG_S * 1e6)),
    }
    with (directory / "log").open("wb") as log:
        process = start_group(command, env=environment, stdout=log if stdout is None else stdout, stderr=log)
    try:
        yield process
    finally:
        end_group(process)
        supervisor.close()


@pytest.mark.parametrize(
    ("role", "more"),
    [
        ("agent", ("--listen", "127.0.0.1:0")),
        ("manager", ("--listen", "127.0.0.1:0")),
        ("lb", ("--listen", "127.0.0.1:0")),
        ("lb", ("--workers", "2")),
    ],
)
def test_a_services_life_as_its_supervisor_hears_it(role: str, more: tuple[str, ...], tmp_path: Path) -> None:
    """Ready with a status, watchdog twice per period, reloading to ready on HUP, stopping with patience, exit 0."""
    if "--workers" in more:
        more = (*more, "--listen", f"127.0.0.1:{PORTS[-1000]}", "--http-listen", f"127.0.0.1:{PORTS[-990]}")
    supervisor = Supervisor(tmp_path)
    with _service(role, tmp_path, supervisor, *more) as process:
        ready = supervisor.wait_for("READY=1")
        assert supervisor.wait_for("STATUS=")
        first = supervisor.wait_for("WATCHDOG=1", after=ready)
        supervisor.wait_for("WATCHDOG=1", after=first)
        beats = [at for at, line in supervisor.said if line == "WATCHDOG=1"][-2:]
        assert beats[1] - beats[0] < WATCHDOG_S, "later than systemd allows"
        told = supervisor.wait_for_metric("cluster_tls.cert.remaining_days:8")  # of a certificate of 90 days
        assert (",worker:" in told) == ("--workers" in more), "several would overwrite each other's gauges"
        process.send_signal(signal.SIGHUP)
        reloading = supervisor.wait_for("RELOADING=1", after=ready)
        assert supervisor.said[reloading][1].startswith("MONOTONIC_USEC=")
        supervisor.wait_for("READY=1", after=reloading)
        process.send_signal(signal.SIGTERM)
        stopping = supervisor.wait_for("STOPPING=1", after=reloading)
        supervisor.wait_for("EXTEND_TIMEOUT_USEC=", after=stopping)
        assert process.wait(WAIT_S) == ExitCode.OK, (tmp_path / "log").read_text()
    if role != "manager":  # it holds no key of a realm or a tenant
        workers = 2 if "--workers" in more else 1  # their parent reads no keys
        assert _guards(tmp_path).count(UNREADABLE) == workers, "keys in memory that others may read"


def test_the_tenant_log_reports_like_the_roles(tmp_path: Path) -> None:
    """The tenant log is ready, sends its metrics to the DogStatsD agent that is named, and stops with 0."""
    supervisor = Supervisor(tmp_path)
    secrets = tmp_path / "secrets.json"
    tool = [sys.executable, "-m", "roles"]
    subprocess.run([*tool, "secrets", "init-record-id", "--file", secrets], check=True, stdout=subprocess.DEVNULL)
    store = f"sqlite:{tmp_path / 'realm.db'}"
    subprocess.run([*tool, "store", "init", "--store", store], check=True, stdout=subprocess.DEVNULL)
    command = [*tool, "tenant-log", "serve", "--store", store, "--secrets-file", str(secrets), "--port", "0"]
    with _running(command, tmp_path, supervisor) as process:
        supervisor.wait_for("READY=1")
        assert "|#service:tenant_log,version:" in supervisor.wait_for_metric("service.uptime")
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == ExitCode.OK, (tmp_path / "log").read_text()
    assert _guards(tmp_path) == [UNREADABLE], "keys in memory that others may read"


EARLY_SIGNALS = """
import os, signal, sys
class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == "roles.shell":
            for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(os.getpid(), number)
sys.meta_path.insert(0, Sender())
"""
"""Sends a service those signals while it is still importing what it needs, long before it has handlers."""


@pytest.mark.parametrize("role", ["agent", "lb", "lb of two", "manager", "tenant-log"])
def test_signals_while_starting_end_nothing(role: str, tmp_path: Path) -> None:
    """SIGHUP, SIGUSR1 and SIGUSR2 that find a service starting, or one of its workers, leave it starting."""
    supervisor = Supervisor(tmp_path)
    early = tmp_path / "early"
    early.mkdir()
    (early / "sitecustomize.py").write_text(EARLY_SIGNALS)
    if role == "tenant-log":
        store = f"sqlite:{tmp_path / 'realm.db'}"
        tool = [sys.executable, "-m", "roles"]
        subprocess.run([*tool, "store", "init", "--store", store], check=True, stdout=subprocess.DEVNULL)
        secrets = tmp_path / "secrets.json"
        subprocess.run([*tool, "secrets", "init-record-id", "--file", secrets], check=True, stdout=subprocess.DEVNULL)
        command = [*tool, "tenant-log", "serve", "--store", store, "--secrets-file", str(secrets), "--port", "0"]
        running = _running(command, tmp_path, supervisor, witness=early)
    else:
        more = ["--listen", "127.0.0.1:0"]
        if role == "lb of two":
            listen, probes = next(pair for pair in itertools.pairwise(PORTS[-800:]) if all(map(_is_free, pair)))
            more = ["--workers", "2", "--listen", f"127.0.0.1:{listen}", "--http-listen", f"127.0.0.1:{probes}"]
        running = _service(role.split(maxsplit=1)[0], tmp_path, supervisor, *more, witness=early)
    with running as process:
        supervisor.wait_for("READY=1", process=process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == ExitCode.OK, (tmp_path / "log").read_text()
        assert "worker died" not in (tmp_path / "log").read_text()


@contextmanager
def _full_pipe() -> Iterator[int]:
    """Make a pipe that holds all it can and that nobody reads."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        with suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(select.PIPE_BUF))
        os.set_blocking(writer, True)
        yield writer
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("role", ["agent", "lb", "manager"])
def test_an_output_that_nobody_reads_stops_nothing(role: str, tmp_path: Path) -> None:
    """With a full pipe as stdout a service starts, answers probes and clients, reloads, and ends on SIGTERM with 0."""
    supervisor = Supervisor(tmp_path)
    listen, probes = next(pair for pair in itertools.pairwise(PORTS[-900:]) if all(map(_is_free, pair)))
    more = ("--listen", f"127.0.0.1:{listen}", "--http-listen", f"127.0.0.1:{probes}")
    with _full_pipe() as stdout, _service(role, tmp_path, supervisor, *more, stdout=stdout) as process:
        ready = supervisor.wait_for("READY=1")
        with urllib.request.urlopen(f"http://127.0.0.1:{probes}/livez", timeout=WAIT_S) as answer:
            assert answer.status == 200
        for _ in range(20):  # strangers, whose failed handshakes are logged
            with socket.create_connection(("127.0.0.1", listen), WAIT_S) as stranger:
                stranger.sendall(b"no TLS at all\r\n\r\n")
                with suppress(ConnectionResetError):
                    while stranger.recv(100):
                        pass
        process.send_signal(signal.SIGHUP)
        supervisor.wait_for("READY=1", after=ready)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == ExitCode.OK, (tmp_path / "log").read_text()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _unit(path: Path) -> dict[str, list[str]]:
    """Return the directives of a unit's [Service] section."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in path.read_text().splitlines():
        if line.startswith("["):
            section = line
        elif section == "[Service]" and "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def _prevents(unit: dict[str, list[str]]) -> set[int]:
    return {int(code) for code in unit["RestartPreventExitStatus"][0].split()}


@pytest.mark.parametrize("name", ["operator-guide.md", "command-reference.md", "protocol/operator-tools.md"])
def test_exit_codes_are_documented(name: str) -> None:
    """Each document has a row for each code, and says of it what the supervisors do: workers' parent and units."""
    rows = re.findall(r"^\| (\d+) \| (.*) \| (yes|no) \|$", (ROOT / "docs" / name).read_text(), re.MULTILINE)
    told = {ExitCode(int(code)): (meaning, answer) for code, meaning, answer in rows if code != "1"}
    assert told.keys() == EXIT_CODES.keys() == set(ExitCode) - OF_TOOLS
    for code, (meaning, answer) in told.items():
        assert answer == ("no" if code in NOT_RESTARTED | {ExitCode.OK} else "yes")
        assert meaning == EXIT_CODES[code] or name.startswith("protocol/")


def test_there_is_a_unit_for_each_role() -> None:
    """Every role and every tool that runs for ever has its template."""
    assert {path.stem.removeprefix("juicebox-").rstrip("@") for path in UNITS} == {*COMMANDS, *TOOLS}


@pytest.mark.parametrize("path", TOOL_UNITS, ids=lambda path: path.stem)
def test_units_of_tools_fit_them(path: Path) -> None:
    """The command line is one the tool takes, and it is restarted unless that is wrong."""
    command, words = TOOLS[path.stem.removeprefix("juicebox-")]
    unit = _unit(path)
    given = unit["ExecStart"][0].split()[1:]
    assert tuple(given[: len(words)]) == words
    flags = {f"--{flag_of(parameter)}" for parameter in command.params if isinstance(parameter, click.Option)}
    assert {word for word in given if word.startswith("--")} <= flags
    assert unit["Restart"] == ["always"]
    assert str(int(ExitCode.USAGE)) in unit["RestartPreventExitStatus"][0].split()
    assert unit["NoNewPrivileges"] == ["yes"]


@pytest.mark.parametrize("path", ROLE_UNITS, ids=lambda path: path.stem)
def test_units_fit_the_program(path: Path) -> None:
    """Start command, exit codes, notification and time-outs agree with what the role does."""
    role = path.stem.removeprefix("juicebox-").rstrip("@")
    unit = _unit(path)
    words = unit["ExecStart"][0].split()
    assert words[1:3] == ["--role", role]
    flags = {f"--{flag_of(parameter)}" for parameter in COMMANDS[role].params if isinstance(parameter, click.Option)}
    assert {word for word in words[3:] if word.startswith("--")} <= flags
    assert unit["Type"] == ["notify"]
    assert unit["Restart"] == ["always"]
    assert unit["RestartSec"] == ["1"]
    assert _prevents(unit) == NOT_RESTARTED
    assert unit["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    assert int(unit["TimeoutStopSec"][0]) == 90
    assert 10 <= int(unit["WatchdogSec"][0]) <= 60
    assert unit["NoNewPrivileges"] == ["yes"]
    assert unit["LimitCORE"] == ["0"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_reads_the_units(path: Path, tmp_path: Path) -> None:
    """systemd finds no directive it does not know and no value it cannot read."""
    name = path.name.replace("@", "@1")
    text = path.read_text().replace("/opt/juicebox/bin/juicebox-hsm", "/bin/true")
    (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / name], capture_output=True, text=True, check=False
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if name in line]
    assert complaints == []
