"""Start, watch, kill and stop the processes of a demo cluster."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

import trio

from roles.tools.demo.layout import Service

LAST_LINES: Final = 12
LAST_BYTES: Final = 8192
STOP_S: Final = 10.0
MANAGERS_STOP_S: Final = 2.0
RESTART_PAUSE_S: Final = 0.5
PORT_POLL_S: Final = 0.02
_LOOPBACK_HEX: Final = "0100007F"
_TCP_LISTEN_HEX: Final = "0A"
_GUARD_SCRIPT: Final = 'while read pid; do pids="$pids $pid"; done; kill -TERM $pids 2>/dev/null'


class OrphanGuard:
    """A shell that stops the services when the demo itself is killed: it reads pids until its input ends."""

    def __init__(self) -> None:
        self._shell = subprocess.Popen(  # noqa: S603 -- a fixed script
            ["/bin/sh", "-c", _GUARD_SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def watch(self, pid: int) -> None:
        """Stop this process too."""
        if self._shell.stdin is not None:
            self._shell.stdin.write(f"{pid}\n".encode())
            self._shell.stdin.flush()

    def close(self) -> None:
        """Stand down; the services have been stopped in order."""
        self._shell.kill()
        if self._shell.stdin is not None:
            self._shell.stdin.close()
        self._shell.wait()


class RunningService:
    """One service's process, which may be killed and started again on the same ports."""

    def __init__(self, service: Service, log: Path, guard: OrphanGuard) -> None:
        self.service = service
        self._guard = guard
        self.log = log
        self.realm = ""
        self.hsm = ""
        self.wanted = False
        self._process: subprocess.Popen[bytes] | None = None
        self._log_file: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        """Return the process id, 0 when it never ran."""
        return 0 if self._process is None else self._process.pid

    @property
    def is_running(self) -> bool:
        """Tell whether the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        """Return how it ended: an exit code, or minus the signal's number."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start the process; its output is appended to the log."""
        if self._log_file is None:
            self._log_file = self.log.open("ab")
        self.wanted = True
        # A session of its own: Ctrl-C at the terminal reaches only the demo, which stops the others in order.
        self._process = subprocess.Popen(  # noqa: S603 -- our own command line
            self.service.argv,
            stdin=subprocess.DEVNULL,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._guard.watch(self._process.pid)

    async def wait(self) -> int:
        """Wait until the process ends; return its exit status."""
        process = self._process
        if process is None:
            return 0
        try:
            descriptor = os.pidfd_open(process.pid)
        except ProcessLookupError:
            return process.wait()
        try:
            await trio.lowlevel.wait_readable(descriptor)
        finally:
            os.close(descriptor)
        return process.wait()

    async def started_again(self) -> None:
        """Wait until the process runs once more."""
        while True:
            if self.is_running:
                return
            await trio.sleep(RESTART_PAUSE_S)

    def send(self, signal_number: int) -> None:
        """Send a signal, if the process lives."""
        if self.is_running and self._process is not None:
            self._process.send_signal(signal_number)

    async def kill(self, signal_number: int = signal.SIGKILL) -> None:
        """End the process on purpose and wait for it: this exit is not reported."""
        self.wanted = False
        self.send(signal_number)
        await self.wait()

    async def stop(self, grace_s: float = STOP_S) -> None:
        """Send SIGTERM, and SIGKILL when it takes longer than `grace_s`."""
        self.wanted = False
        self.send(signal.SIGTERM)
        with trio.move_on_after(grace_s):
            await self.wait()
        if self.is_running:
            await self.kill()

    async def wait_listening(self) -> None:
        """Wait until something listens on the service's port, without connecting: a server logs broken handshakes."""
        while True:
            if is_listening(self.service.port):
                return
            await trio.sleep(PORT_POLL_S)

    def last_lines(self) -> str:
        """Return the end of the log."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - LAST_BYTES))
                lines = file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-LAST_LINES:])

    def close(self) -> None:
        """Close the log file."""
        if self._log_file is not None:
            self._log_file.close()
            self._log_file = None


def is_listening(port: int) -> bool:
    """Tell whether a TCP socket on 127.0.0.1 listens on `port`, as the kernel's table says."""
    wanted = f"{_LOOPBACK_HEX}:{port:04X}"
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        columns = line.split(maxsplit=4)
        if columns[1] == wanted and columns[3] == _TCP_LISTEN_HEX:
            return True
    return False


def describe_exit(running: RunningService) -> str:
    """Say how a service ended, with the end of its log."""
    status = running.exit_status
    how = f"was killed by signal {-status}" if status is not None and status < 0 else f"exited with status {status}"
    return f"{running.service.name} {how}; the end of {running.log}:\n{running.last_lines()}"


async def watch(running: RunningService, on_exit: Callable[[RunningService], None], *, restart: bool) -> None:
    """Report every exit that was not asked for; start it again when told to."""
    while True:
        await running.wait()
        if running.wanted:
            running.wanted = False
            on_exit(running)
            if restart:
                await trio.sleep(RESTART_PAUSE_S)
                running.start()
                on_exit(running)
                continue
        await running.started_again()


async def stop_all(services: list[RunningService]) -> None:
    """Stop managers first, so that agents step down by themselves instead of handing over to each other."""
    managers = [running for running in services if running.service.role == "manager"]
    others = [running for running in services if running.service.role != "manager"]
    for group, grace_s in ((managers, MANAGERS_STOP_S), (others, STOP_S)):
        async with trio.open_nursery() as nursery:
            for running in group:
                nursery.start_soon(running.stop, grace_s)
    for running in services:
        running.close()
