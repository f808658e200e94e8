"""`--workers N`: a parent that runs N copies of this program, which share the port (load-balancer.md 1).

The parent serves nothing: it passes stop signals and HUP on, restarts a worker that dies, and speaks to the supervisor
for all of them: ready when every worker is. Each copy finds its place in an environment variable. Copies are made by
exec, never by fork alone: a forked event loop is a broken one.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Final

import trio

from juicebox_hsm.adapters.logging import get_logger
from juicebox_hsm.adapters.supervision import ExitCode, notify, notify_reloading, watchdog_interval_s

PLACE_VARIABLE: Final = "JUICEBOX_HSM_LB_WORKER"
RESTART_S: Final = 1.0
"""Pause before a worker that died is started again."""

DATAGRAM_BYTES: Final = 4096
"""Largest message of a worker; READY=1 and a line of status take less than 200."""

_NOT_RESTARTED: Final = frozenset({ExitCode.USAGE, ExitCode.CONFIG})
_STOP: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)

_log = get_logger("lb.workers")


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """Which worker this process is; worker 0 also speaks for all in discovery."""

    number: int


def worker_place() -> WorkerPlace | None:
    """Return this process's place, or None in a parent or a lone process."""
    text = os.environ.get(PLACE_VARIABLE, "")
    return WorkerPlace(int(text)) if text.isascii() and text.isdigit() else None


def worker_command() -> list[str]:
    """Return the command line of this process, for a copy of it."""
    return [sys.executable, *sys.orig_argv[1:]]


async def run_workers(count: int) -> int:
    """Run `count` workers until told to stop; return the exit code for this process."""
    processes: dict[int, trio.Process] = {}
    stopping = trio.Event()
    code = int(ExitCode.OK)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_pass_signals, processes, stopping)
        nursery.start_soon(_feed_watchdog)
        sockets = [_ReadySocket(number) for number in range(count)]
        nursery.start_soon(_say_ready, sockets)
        async with trio.open_nursery() as keepers:
            codes: list[int] = []
            for number in range(count):
                keepers.start_soon(_keep, number, sockets[number].address, processes, stopping, codes)
        code = max(codes, default=code)
        nursery.cancel_scope.cancel()
    return code


class _ReadySocket:
    """Where one worker says READY=1; abstract, so nothing is left in the file system."""

    def __init__(self, number: int) -> None:
        self._socket = trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._name = f"juicebox-hsm-lb-{os.getpid()}-{number}-{secrets.token_hex(8)}"
        self.address = f"@{self._name}"

    async def wait(self) -> None:
        """Return when the worker says that it is ready."""
        await self._socket.bind(f"\0{self._name}")
        while b"READY=1" not in (await self._socket.recv(DATAGRAM_BYTES)).split(b"\n"):
            pass

    def close(self) -> None:
        """Stop listening; later messages of the worker are lost, which is fine."""
        self._socket.close()


async def _say_ready(sockets: list[_ReadySocket]) -> None:
    try:
        async with trio.open_nursery() as nursery:
            for each in sockets:
                nursery.start_soon(each.wait)
    finally:
        for each in sockets:
            each.close()
    notify("READY=1", f"STATUS={len(sockets)} workers")


async def _feed_watchdog() -> None:
    interval_s = watchdog_interval_s()
    while interval_s is not None:
        notify("WATCHDOG=1")
        await trio.sleep(interval_s)


async def _keep(
    number: int, address: str, processes: dict[int, trio.Process], stopping: trio.Event, codes: list[int]
) -> None:
    """Run one worker, again and again unless it says that this is pointless."""
    # Workers report to the parent's supervisor only through the parent.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WATCHDOG_")}
    environment["NOTIFY_SOCKET"] = address
    environment[PLACE_VARIABLE] = str(number)
    while not stopping.is_set():
        process = await trio.lowlevel.open_process(worker_command(), env=environment, stdin=subprocess.DEVNULL)
        processes[number] = process
        if stopping.is_set():
            process.terminate()  # the signal was passed on while this one was being started
        status = await process.wait()
        del processes[number]
        if stopping.is_set() or status in _NOT_RESTARTED:
            codes.append(abs(status))
            return
        _log.error("worker died, starting it again", worker=number, status=status)
        with trio.move_on_after(RESTART_S):
            await stopping.wait()


async def _pass_signals(processes: dict[int, trio.Process], stopping: trio.Event) -> None:
    with trio.open_signal_receiver(*_STOP, signal.SIGHUP) as signals:
        async for number in signals:
            if number in _STOP:
                stopping.set()
                notify("STOPPING=1")
            else:
                notify_reloading()
            for process in list(processes.values()):
                process.send_signal(number)
            if number not in _STOP:
                notify("READY=1")
