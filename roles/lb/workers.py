"""`--workers N`: a parent that runs N copies of this program, which share the port (load-balancer.md 1).

The parent serves nothing. To its workers it is what systemd is to a lone balancer: each has a notify socket of the
parent's, says there when it is ready, has reloaded and is alive, and is started again when it dies or falls silent, as
`juicebox_hsm.host.workers` judges. Each copy finds its place in an environment variable. Copies are made by exec, never
by fork alone: a forked event loop is a broken one. A worker is told who its parent is: one that asked the system after
its parent had died would take whoever adopted it for the parent, and live for ever.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Final

import trio

from juicebox_hsm.adapters.observation.logging import get_logger, louder, quieter
from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.adapters.process.supervision import (
    NOT_RESTARTED,
    STOP_SIGNALS,
    notify,
    notify_reloading,
    watchdog_interval_s,
)
from juicebox_hsm.adapters.process.threads import NoThread, thread_needed
from juicebox_hsm.host.workers import SILENCE_S_MIN, Crew, Worker
from roles.options import WORKER_VARIABLE

RESTART_S: Final = 1.0
"""Pause before a worker that died is started again."""

LOOK_S: Final = 1.0
DATAGRAM_BYTES: Final = 4096
"""Largest message of a worker; READY=1 and a line of status take less than 200."""

_VERBOSITY: Final = {signal.SIGUSR1: louder, signal.SIGUSR2: quieter}

_log = get_logger("lb.workers")


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """Which worker this process is; worker 0 also speaks for all in discovery. `parent` is its process id, if any."""

    number: int
    parent: int | None = None

    def is_orphan(self) -> bool:
        """Tell whether the parent is gone, by a signal that left it no time: nobody would stop or restart us."""
        return self.parent is not None and os.getppid() != self.parent


def worker_place() -> WorkerPlace | None:
    """Return this process's place as its parent told it (`NUMBER:PID`), or None in a parent or a lone process."""
    told = re.fullmatch("([0-9]{1,4}):([0-9]{1,10})", os.environ.get(WORKER_VARIABLE, ""))
    return None if told is None else WorkerPlace(int(told[1]), int(told[2]))


def worker_command() -> list[str]:
    """Return the command line of this process, for a copy of it."""
    return [sys.executable, *sys.orig_argv[1:]]


async def run_workers(count: int, patience_s: float) -> int:
    """Run `count` workers until told to stop, then for at most `patience_s`; return the exit code for this process."""
    return await _Parent(count, patience_s).run()


class _Process:
    """A worker's process, if it runs, and the socket on which it speaks."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.number = number = worker.number
        self.process: trio.Process | None = None
        # Abstract, so nothing is left in the file system.
        name = f"juicebox-hsm-lb-{os.getpid()}-{number}-{secrets.token_hex(8)}"
        endpoint = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        endpoint.bind(f"\0{name}")
        self.socket = trio.socket.from_stdlib_socket(endpoint)
        self.address = f"@{name}"

    async def start(self) -> trio.Process:
        """Start the process. Raises `OSError` and `NoThread` when the system has no room for it."""
        # WATCHDOG_PID names the parent; the period holds for the worker, too.
        environment = {name: value for name, value in os.environ.items() if name != "WATCHDOG_PID"}
        environment["NOTIFY_SOCKET"] = self.address
        environment[WORKER_VARIABLE] = f"{self.number}:{os.getpid()}"
        with thread_needed():
            self.process = await trio.lowlevel.open_process(worker_command(), env=environment, stdin=subprocess.DEVNULL)
        self.worker.started(trio.current_time())
        return self.process

    def ended(self) -> None:
        """Forget the process."""
        self.process = None
        self.worker.ended()

    def reload_if_due(self) -> None:
        """Pass a HUP on when its time has come."""
        if self.process is not None and self.worker.takes_reload():
            self.process.send_signal(signal.SIGHUP)


class _Parent:
    """Runs the workers' processes as `host.workers` judges, and tells the supervisor of them."""

    def __init__(self, count: int, patience_s: float) -> None:
        self._crew = Crew(count)
        self._workers = [_Process(worker) for worker in self._crew.workers]
        self._patience_s = patience_s
        self._stopping = trio.Event()
        self._codes: list[int] = []

    async def run(self) -> int:
        """Run until every worker has ended for good."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._take_signals)
                nursery.start_soon(self._watch)
                nursery.start_soon(self._end_in_time)
                async with trio.open_nursery() as keepers:
                    for worker in self._workers:
                        nursery.start_soon(self._listen, worker)
                        keepers.start_soon(self._keep, worker)
                nursery.cancel_scope.cancel()
        finally:
            for worker in self._workers:
                worker.socket.close()
                if worker.process is not None:
                    worker.process.kill()  # a parent that fails leaves nobody behind
        return max(self._codes, default=int(ExitCode.OK))

    async def _keep(self, worker: _Process) -> None:
        """Run one worker, again and again unless it says that this is pointless."""
        while not self._stopping.is_set():
            try:
                process = await worker.start()
            except (OSError, NoThread) as error:
                _log.error("worker not started, trying again", worker=worker.number, error=str(error))
            else:
                if self._stopping.is_set():
                    process.terminate()  # the signal was passed on while this one was being started
                status = await process.wait()
                worker.ended()
                if self._stopping.is_set():
                    self._codes.append(_code_at_stop(status))
                    return
                if status in NOT_RESTARTED:
                    self._give_up(worker, status)
                    return
                _log.error("worker died, starting it again", worker=worker.number, status=status)
            with trio.move_on_after(RESTART_S):
                await self._stopping.wait()

    def _give_up(self, worker: _Process, status: int) -> None:
        worker.worker.is_given_up = True
        left = len(self._crew.kept)
        _log.error(
            "worker refuses its settings and is not started again", worker=worker.number, status=status, left=left
        )
        if left == 0:
            self._codes.append(status)
        self._say_ready()

    async def _listen(self, worker: _Process) -> None:
        while True:
            lines = (await worker.socket.recv(DATAGRAM_BYTES)).split(b"\n")
            if worker.worker.heard(trio.current_time(), says_ready=b"READY=1" in lines):
                worker.reload_if_due()
                self._say_ready()

    def _say_ready(self) -> None:
        """Tell the supervisor once everybody is settled, if it waits for that."""
        if self._crew.is_ready_due():
            notify("READY=1", f"STATUS={len(self._crew.kept)} workers")

    async def _take_signals(self, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(*STOP_SIGNALS, signal.SIGHUP, *_VERBOSITY) as signals:
            task_status.started()
            async for number in signals:
                if number in STOP_SIGNALS:
                    self._stop()
                elif number == signal.SIGHUP:
                    self._reload()
                else:
                    _VERBOSITY[signal.Signals(number)]()
                    for worker in self._workers:
                        if worker.process is not None and worker.worker.is_ready:
                            worker.process.send_signal(number)

    def _stop(self) -> None:
        """Stop all workers, in order; again, at once. SIGTERM whatever came: the others dump core or a traceback."""
        self._stopping.set()
        notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={round(self._patience_s * 1e6)}")
        for worker in self._workers:
            if worker.process is not None:
                worker.process.terminate()

    def _reload(self) -> None:
        self._crew.reload(trio.current_time())
        if self._crew.has_been_ready:
            notify_reloading()
        for worker in self._workers:
            worker.reload_if_due()

    async def _end_in_time(self) -> None:
        await self._stopping.wait()
        await trio.sleep(self._patience_s)
        for worker in self._workers:
            if worker.process is not None:
                _log.warning("worker does not stop, killing it", worker=worker.number)
                worker.process.kill()

    async def _watch(self) -> None:
        """Feed the supervisor's watchdog while a worker lives, kill workers that hang, end reloads that do not end."""
        interval_s = watchdog_interval_s()
        silence_s = float("inf") if interval_s is None else max(2 * interval_s, SILENCE_S_MIN)
        while True:
            alive = self._look(trio.current_time(), silence_s)
            if interval_s is not None and alive:
                notify("WATCHDOG=1")
            await trio.sleep(LOOK_S if interval_s is None else min(interval_s, LOOK_S))

    def _look(self, now: float, silence_s: float) -> bool:
        """Kill what hangs; tell whether any worker lives, be it between two processes of it."""
        for hanging in [] if self._stopping.is_set() else self._crew.hanging(now, silence_s):
            _log.error("worker hangs, killing it", worker=hanging.number, silent_s=round(now - hanging.heard_s, 1))
            process = self._workers[hanging.number].process
            if process is not None:
                process.kill()
        unsettled = self._crew.overdue(now)
        if unsettled is not None:
            _log.error("workers have not reloaded in time", workers=[worker.number for worker in unsettled])
            notify("READY=1")
        return self._crew.is_alive(now, silence_s)


def _code_at_stop(status: int) -> int:
    """Return what a worker's end means once it was told to stop: SIGTERM before it had a handler ends it in order."""
    if status in (-signal.SIGTERM, -signal.SIGKILL):  # the latter is ours, and was warned of
        return ExitCode.OK
    return status if status >= 0 else ExitCode.INTERNAL
