"""Exit codes, crash reports, systemd's socket and signals."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from juicebox_hsm.adapters.hsm_directory.nvram import NvramFailed
from juicebox_hsm.adapters.observation import logging
from juicebox_hsm.adapters.process import supervision
from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.adapters.process.supervision import (
    StartPhase,
    exit_code_of,
    handle_signals,
    notify,
    reload_all,
    report_crash,
    run_service,
)
from juicebox_hsm.errors import InvariantViolation, LocalError, NotYet, RealmError, check
from juicebox_hsm.ports.errors import HsmGone, StoreUnavailable


class Terminal(io.StringIO):
    """An output that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


@pytest.mark.parametrize(
    ("error", "started", "code"),
    [
        (KeyError("x"), False, 70),
        (OSError("disk"), True, 70),
        (InvariantViolation("x"), False, 70),
        (LocalError("x"), False, 78),
        (NotYet("x"), False, 69),
        (NotYet("x"), True, 69),
        (ExceptionGroup("g", [NotYet("x"), LocalError("y")]), False, 78),
        (NvramFailed("x"), False, 75),
        (ExceptionGroup("g", [NvramFailed("x")]), True, 75),
        (HsmGone("x"), True, 75),
        (StoreUnavailable("x"), False, 69),
        (ExceptionGroup("g", [RealmError("x")]), False, 69),
        (ExceptionGroup("g", [RealmError("x")]), True, 70),
        (ExceptionGroup("g", [RealmError("x"), KeyError("y")]), False, 70),
    ],
)
def test_a_service_ends_with_its_code(
    error: BaseException, started: bool, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever leaves a service's main, in a group or bare, ends the process with the documented code, no traceback."""
    phase = StartPhase()

    async def main(_: str) -> None:
        phase.started = started
        await trio.lowlevel.checkpoint()
        raise error

    with pytest.raises(SystemExit) as ended:
        run_service(main, "argument", phase=phase)
    assert ended.value.code == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_service_that_ends_in_order() -> None:
    """What main returns comes back."""

    async def main(value: int) -> int:
        await trio.lowlevel.checkpoint()
        return value

    assert run_service(main, 7) == 7


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvariantViolation("x"), 70),
        (HsmGone("x"), 75),
        (LocalError("x"), 78),
        (RealmError("x"), 70),
        (KeyError("x"), 70),
        (BaseExceptionGroup("g", [KeyError("x"), HsmGone("y")]), 75),
        (BaseExceptionGroup("g", [HsmGone("y"), BaseExceptionGroup("h", [InvariantViolation("x")])]), 70),
        (ExceptionGroup("g", [ExceptionGroup("h", [LocalError("x")])]), 78),
        (ExceptionGroup("g", [LocalError("x"), KeyError("y")]), 70),
    ],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    """What ended a process decides whether its supervisor starts it again; in a group the gravest counts."""
    assert exit_code_of(error) == code


def test_the_numbers() -> None:
    """The codes are published; unit files rely on them."""
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0,
        "FAILED": 1,
        "USAGE": 2,
        "ID": 3,
        "UNREACHABLE": 4,
        "FINDINGS": 5,
        "UNAVAILABLE": 69,
        "INTERNAL": 70,
        "HSM": 75,
        "CONFIG": 78,
    }


def crash() -> BaseException:
    """Return a broken invariant, raised in a task of a nursery, with a secret nearby."""

    async def task() -> None:
        pin = "hunter2"
        check(len(pin) == 0, "the sky is blue")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task)

    with pytest.raises(BaseExceptionGroup) as caught:
        trio.run(main)
    return caught.value


def test_crash_report_is_one_json_line() -> None:
    """A supervisor's log gets one line with the place of the fault, not of the nursery, and no local values."""
    output = io.StringIO()
    assert report_crash(crash(), stream=output) is ExitCode.INTERNAL
    assert output.getvalue().count("\n") == 1
    report = json.loads(output.getvalue())
    assert sorted(report) == ["backtrace", "level", "location", "message", "panic", "reason"]
    assert report["reason"] == "InvariantViolation: the sky is blue"
    assert report["message"] == "process ends with code 70: InvariantViolation: the sky is blue"
    assert (report["panic"], report["level"]) == (True, "ERROR")
    assert report["location"].startswith("errors.py:")
    assert any("test_supervision.py" in place and place.endswith(" task") for place in report["backtrace"])
    assert "hunter2" not in output.getvalue()


def test_crash_report_on_a_terminal_is_a_traceback() -> None:
    """People get the whole traceback, still without local values."""
    output = Terminal()
    report_crash(crash(), stream=output)
    assert "Traceback" in output.getvalue()
    assert output.getvalue().endswith("exit 70: InvariantViolation: the sky is blue\n")


@pytest.mark.parametrize("output", [io.StringIO(), Terminal()])
def test_local_errors_are_one_line(output: io.StringIO) -> None:
    """A wrong setting is said in one line, without a traceback."""
    error = ExceptionGroup("g", [LocalError("ca.pem: missing")])
    assert report_crash(error, stream=output) is ExitCode.CONFIG
    assert output.getvalue() == "error: ca.pem: missing\n"


def test_crash_report_to_nowhere() -> None:
    """A closed stderr does not hide the exit code."""
    output = io.StringIO()
    output.close()
    with pytest.raises(ValueError, match="closed"):
        output.isatty()

    class Broken(io.StringIO):
        """An output nobody reads."""

        def write(self, text: str) -> int:
            """Fail."""
            raise BrokenPipeError

    assert report_crash(KeyError("x"), stream=Broken()) is ExitCode.INTERNAL


@pytest.mark.parametrize("abstract", [False, True])
def test_notify(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, abstract: bool) -> None:
    """States reach systemd's socket, be it a file or an abstract name."""
    name = f"juicebox-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + name if abstract else name)
        systemd.settimeout(1)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
        assert notify("READY=1", "STATUS=leading 1 group")
        assert systemd.recv(1000) == b"READY=1\nSTATUS=leading 1 group"
        supervision.notify_reloading()
        assert systemd.recv(1000).startswith(b"RELOADING=1\nMONOTONIC_USEC=")


@pytest.mark.parametrize("address", [None, "", "relative", "/nonexistent/socket", "@nobody-listens-here"])
def test_notify_without_systemd(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    """Without a supervisor, or with one that is gone, notifying does nothing and fails at nothing."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify("READY=1")


@pytest.mark.parametrize(
    ("usec", "pid", "expected"),
    [
        ("2000000", None, 1.0),
        ("2000000", "own", 1.0),
        ("2000000", "1", None),
        ("0", None, None),
        ("", None, None),
        ("x", None, None),
        ("-5", None, None),
    ],
)
def test_watchdog_interval(monkeypatch: pytest.MonkeyPatch, usec: str, pid: str | None, expected: float | None) -> None:
    """The watchdog is served at half its interval, and only by the process it was meant for."""
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)
    assert supervision.watchdog_interval_s() == expected


async def test_a_reload_says_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    """Parts are judged on their own, and the log tells exactly which one was reloaded and which one is the old one."""
    done: list[str] = []

    async def works() -> None:
        done.append("works")

    async def fails() -> None:
        raise LocalError("key.pem: not readable")

    logging.configure("info", json=True)
    await reload_all({"cluster certificate": fails, "edge certificate": works})
    await reload_all({"cluster certificate": fails})
    await reload_all({"edge certificate": works})
    await reload_all({})
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    told = [(line["message"], line.get("reloaded"), line.get("kept")) for line in lines]
    kept = {"cluster certificate": "key.pem: not readable"}
    assert told == [
        ("reloaded in part", ["edge certificate"], kept),
        ("reload refused, nothing changed", None, kept),
        ("reloaded", ["edge certificate"], None),
        ("nothing to reload", [], None),
    ]
    assert len(done) == 2


async def test_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each signal does what operators expect of it; a refused reload changes nothing and is not fatal."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    stops: list[str] = []
    reloads = 0

    async def reload() -> None:
        nonlocal reloads
        reloads += 1
        if reloads == 2:
            raise LocalError("cert.pem: key.pem does not match")

    async def settle() -> None:
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked(0.01)

    level = logging._output.level
    async with trio.open_nursery() as nursery:
        await nursery.start(handle_signals, stops.append, {"cluster certificate": reload})
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            os.kill(os.getpid(), number)
            await settle()
        assert stops == ["SIGTERM", "SIGINT", "SIGQUIT"]
        for expected in (1, 2, 3):
            os.kill(os.getpid(), signal.SIGHUP)
            await settle()
            assert reloads == expected
        os.kill(os.getpid(), signal.SIGUSR1)
        await settle()
        assert logging._output.level < level
        os.kill(os.getpid(), signal.SIGUSR2)
        await settle()
        assert logging._output.level == level
        nursery.cancel_scope.cancel()
