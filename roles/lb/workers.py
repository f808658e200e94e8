"""`--workers N`: a parent that runs N copies of this program, which share the port (load-balancer.md 1).

The parent serves nothing. To its workers it is what systemd is to a lone balancer: each has a notify socket of the
parent's, says there when it is ready, has reloaded and is alive, and is started again when it dies or falls silent. To
the supervisor the parent speaks for all: ready when every worker is, reloaded when every worker has, alive while one
is. A worker reads its files when it starts, so a HUP that finds it starting is passed on once it is ready; before that
it has no handler, and the signal would end it. Each copy finds its place in an environment variable. Copies are made
by exec, never by fork alone: a forked event loop is a broken one. A worker is told who its parent is: one that asked
the system after its parent had died would take whoever adopted it for the parent, and live for ever.
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
from roles.options import WORKER_VARIABLE

RESTART_S: Final = 1.0
"""Pause before a worker that died is started again."""

START_S: Final = 90.0
"""Longest start of a worker, as in our unit template; it waits for the store with a deadline of its own."""

SILENCE_S_MIN: Final = 5.0
"""Shortest silence for which a worker is killed (own): a busy machine is no reason."""

RELOAD_S: Final = 30.0
"""Longest time until the supervisor is told that a reload is over (own); it takes a worker milliseconds."""

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


class _Worker:
    """One worker: its process, and what it said. `heard_at` is when it started or spoke last, on Trio's clock."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: trio.Process | None = None
        self.heard_at = 0.0
        self.is_ready = False
        self.is_reloading = False
        self.must_reload = False
        self.is_given_up = False
        # Abstract, so nothing is left in the file system.
        name = f"juicebox-hsm-lb-{os.getpid()}-{number}-{secrets.token_hex(8)}"
        endpoint = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        endpoint.bind(f"\0{name}")
        self.socket = trio.socket.from_stdlib_socket(endpoint)
        self.address = f"@{name}"

    @property
    def is_settled(self) -> bool:
        """Tell whether it is ready with what its files hold now, or never will be."""
        return self.is_given_up or (self.is_ready and not self.is_reloading and not self.must_reload)

    async def start(self) -> trio.Process:
        """Start the process. Raises `OSError` and `NoThread` when the system has no room for it."""
        # WATCHDOG_PID names the parent; the period holds for the worker, too.
        environment = {name: value for name, value in os.environ.items() if name != "WATCHDOG_PID"}
        environment["NOTIFY_SOCKET"] = self.address
        environment[WORKER_VARIABLE] = f"{self.number}:{os.getpid()}"
        with thread_needed():
            self.process = await trio.lowlevel.open_process(worker_command(), env=environment, stdin=subprocess.DEVNULL)
        self.heard_at = trio.current_time()
        return self.process

    def ended(self) -> None:
        """Forget the process; the next one reads its files anew."""
        self.process = None
        self.is_ready = self.is_reloading = self.must_reload = False

    def reload_if_due(self) -> None:
        """Pass a HUP on, one at a time and only to a process that has a handler for it."""
        if self.process is not None and self.must_reload and self.is_ready and not self.is_reloading:
            self.must_reload, self.is_reloading = False, True
            self.process.send_signal(signal.SIGHUP)

    def is_alive(self, now: float, silence_s: float) -> bool:
        """Tell whether it starts in time, or speaks at least every `silence_s`."""
        return self.process is not None and now - self.heard_at <= (silence_s if self.is_ready else START_S)


class _Parent:
    """The workers, and what the supervisor was told of them."""

    def __init__(self, count: int, patience_s: float) -> None:
        self._workers = [_Worker(number) for number in range(count)]
        self._patience_s = patience_s
        self._stopping = trio.Event()
        self._codes: list[int] = []
        self._has_been_ready = False
        self._owes_ready = True
        self._reload_until = 0.0

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

    async def _keep(self, worker: _Worker) -> None:
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

    def _give_up(self, worker: _Worker, status: int) -> None:
        worker.is_given_up = True
        left = sum(not other.is_given_up for other in self._workers)
        _log.error(
            "worker refuses its settings and is not started again", worker=worker.number, status=status, left=left
        )
        if left == 0:
            self._codes.append(status)
        self._say_ready()

    async def _listen(self, worker: _Worker) -> None:
        while True:
            lines = (await worker.socket.recv(DATAGRAM_BYTES)).split(b"\n")
            worker.heard_at = trio.current_time()
            if b"READY=1" in lines and worker.process is not None:
                worker.is_ready, worker.is_reloading = True, False
                worker.reload_if_due()
                self._say_ready()

    def _say_ready(self) -> None:
        """Tell the supervisor once everybody is settled, if it waits for that."""
        running = sum(not worker.is_given_up for worker in self._workers)
        if self._owes_ready and running and all(worker.is_settled for worker in self._workers):
            self._owes_ready, self._has_been_ready = False, True
            notify("READY=1", f"STATUS={running} workers")

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
                        if worker.process is not None and worker.is_ready:
                            worker.process.send_signal(number)

    def _stop(self) -> None:
        """Stop all workers, in order; again, at once. SIGTERM whatever came: the others dump core or a traceback."""
        self._stopping.set()
        notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={round(self._patience_s * 1e6)}")
        for worker in self._workers:
            if worker.process is not None:
                worker.process.terminate()

    def _reload(self) -> None:
        self._owes_ready = True
        self._reload_until = trio.current_time() + RELOAD_S
        if self._has_been_ready:
            notify_reloading()
        for worker in self._workers:
            worker.must_reload = worker.process is not None
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
        for worker in self._workers:
            if worker.process is not None and not worker.is_alive(now, silence_s) and not self._stopping.is_set():
                silent_s = round(now - worker.heard_at, 1)
                _log.error("worker hangs, killing it", worker=worker.number, silent_s=silent_s)
                worker.process.kill()
        if self._has_been_ready and self._owes_ready and now > self._reload_until:
            unsettled = [worker for worker in self._workers if not worker.is_settled]
            _log.error("workers have not reloaded in time", workers=[worker.number for worker in unsettled])
            self._owes_ready = False
            notify("READY=1")
        kept = [worker for worker in self._workers if not worker.is_given_up]
        return any(worker.process is None or worker.is_alive(now, silence_s) for worker in kept)


def _code_at_stop(status: int) -> int:
    """Return what a worker's end means once it was told to stop: SIGTERM before it had a handler ends it in order."""
    if status in (-signal.SIGTERM, -signal.SIGKILL):  # the latter is ours, and was warned of
        return ExitCode.OK
    return status if status >= 0 else ExitCode.INTERNAL
