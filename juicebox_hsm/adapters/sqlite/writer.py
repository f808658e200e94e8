"""Write through one thread per process with group commit (storage.md 10).

The thread takes whatever operations wait, up to 256, and runs them in one transaction, each in a savepoint of its
own, under the exclusive lock of `<file>.lock`. The lock is taken around every transaction and checkpoint of every
process: SQLite's busy handler sleeps and starves, the kernel's lock queue does not, and no checkpoint of ours ever
overlaps another process's commit. While a commit is in progress the next group accumulates. All tasks of a group wake
through one `run_sync_soon`, after COMMIT returned and therefore after the write-ahead log is on disk.

A task that waits for its operation cannot be cancelled: a local commit takes milliseconds, and a definite outcome is
worth more than a fast return. A process that is stopped (not killed) inside a transaction holds up the others until it
goes on; killing it frees the lock.
"""

from __future__ import annotations

import fcntl
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import apsw
import outcome
import trio

from juicebox_hsm.adapters.process.threads import in_thread_or_here, thread_needed
from juicebox_hsm.adapters.sqlite.identity import FileIdentity
from juicebox_hsm.adapters.sqlite.schema import BUSY_TIMEOUT_MS, translate
from juicebox_hsm.ports.errors import StoreUnavailable

GROUP_MAX: Final = 256
"""Operations per transaction: enough to share one flush among all tasks of a busy agent, small enough to stay short."""
CHECKPOINT_BYTES: Final = 8 << 20
"""Length of the write-ahead log at which it is copied into the file and begun again (storage.md 10).

The log file keeps its length and is truncated only on closing, or when it outgrew `schema.WAL_KEPT_BYTES`: overwriting
costs a third less CPU and flush time per commit than growing a truncated file again (measured).
"""
CHECKPOINT_BUSY_MS: Final = 20
"""How long a checkpoint waits for readers before it leaves the rest to the next one."""
CLOSE_S: Final = 60.0
FAILED_PAUSE_S: Final = 0.01
"""After a transaction that failed as a whole, so that overdue maintenance on a broken file does not spin (own)."""

T = TypeVar("T")
Operation = Callable[[apsw.Connection], T]


class FileLock:
    """The advisory exclusive lock between processes, as a context manager. Not re-entrant; one thread uses it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def __exit__(self, *exc: object) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the descriptor, which also frees the lock."""
        os.close(self._descriptor)


class _Job:
    """One queued operation, who waits for it (None: nobody) and what came of it."""

    __slots__ = ("error", "operation", "result", "task")

    def __init__(self, operation: Operation[Any], task: trio.lowlevel.Task | None) -> None:
        self.operation = operation
        self.task = task
        self.result: Any = None
        self.error: BaseException | None = None


def _not_cancellable(_raise_cancel: object) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED


class Writer:
    """The process's writer: owns the write connection and its thread.

    `chore` gives the maintenance operation that is due, if any; the next one is due in `chore_s()` seconds.
    """

    def __init__(
        self,
        path: Path,
        connection: apsw.Connection,
        lock: FileLock,
        chore: Callable[[], Operation[None] | None],
        chore_s: Callable[[], float],
    ) -> None:
        self._path = path
        self.identity = FileIdentity(path)
        self._connection = connection
        self._lock = lock
        self._chore = chore
        self._chore_s = chore_s
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._token = trio.lowlevel.current_trio_token()
        self._closing = False
        self._checkpoint_at = CHECKPOINT_BYTES
        self._page_bytes = cast("int", connection.pragma("page_size"))
        self._wal_pages = 0
        connection.set_wal_hook(self._on_commit)
        self._thread = threading.Thread(target=self._serve, name=f"sqlite-writer {path.name}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        with thread_needed():
            self._thread.start()

    async def run(self, operation: Operation[T]) -> T:
        """Run `operation` in the next transaction; return its result once committed.

        Raises what the operation raised, after its savepoint was rolled back, or `StoreUnavailable` when nothing of
        the transaction was kept. Operations run on the writer's thread and MUST touch nothing but the connection.
        """
        if self._closing:
            raise StoreUnavailable(f"sqlite:{self._path}: the store is closing")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._queue.put(_Job(operation, trio.lowlevel.current_task()))
        return cast("T", await trio.lowlevel.wait_task_rescheduled(_not_cancellable))

    def post(self, operation: Operation[object]) -> None:
        """Run `operation` some time soon and forget it: for cleaning whose failure does not matter."""
        if not self._closing:
            self._queue.put(_Job(operation, None))

    async def close(self) -> None:
        """Commit what is queued, checkpoint, close the connection and end the thread."""
        self._closing = True
        self._queue.put(None)
        with trio.CancelScope(shield=True):
            await in_thread_or_here(self._thread.join, CLOSE_S)

    # --- the thread ------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Commit groups until the end mark, then close."""
        open_ = True
        while open_:
            group: list[_Job] = []
            try:
                job = self._queue.get(timeout=self._chore_s())
                while job is not None and len(group) < GROUP_MAX - 1:
                    group.append(job)
                    job = self._queue.get_nowait()
            except queue.Empty:
                pass
            else:
                if job is None:
                    open_ = False
                else:
                    group.append(job)
            chore = self._chore() if open_ else None
            if chore is not None:
                group.append(_Job(chore, None))
            if group and not self._commit(group):
                time.sleep(FAILED_PAUSE_S)
        try:
            with self._lock:
                self.identity.before_close(self._connection)
                self._checkpoint(apsw.SQLITE_CHECKPOINT_TRUNCATE)
                self._connection.close()
        except (apsw.Error, OSError):
            pass  # everything acknowledged is in the write-ahead log, which the next opener reads
        self._lock.close()

    def _commit(self, group: list[_Job]) -> bool:
        """Run one group under the lock, wake its tasks, and checkpoint when the log has grown.

        Returns whether there was a transaction. Raises nothing: a dead writer would leave its tasks waiting for ever.
        """
        committed = told = False
        try:
            with self._lock:
                committed = self._run_group(group)
                self._tell(group)
                told = True
                if self._wal_pages * self._page_bytes >= self._checkpoint_at:
                    self._checkpoint()
        except apsw.Error:
            pass  # of a checkpoint: tried again after the next commit; a lasting fault shows there
        except OSError as error:  # of the lock
            if not told:
                for job in group:
                    job.error = StoreUnavailable(f"sqlite:{self._path}: cannot lock: {error.strerror}")
                self._tell(group)
        return committed

    def _run_group(self, group: list[_Job]) -> bool:
        """Run one group's transaction; False, with an error for every job, if nothing of it was kept."""
        try:
            self.identity.check()
            self._transact(group)
        except StoreUnavailable as error:
            for job in group:
                job.error = error
            return False
        except apsw.Error as error:
            self._roll_back()
            lost = translate(error, self._path)
            for job in group:
                job.error = job.error or lost
            return False
        except BaseException as error:  # noqa: BLE001 - see `_commit`
            self._roll_back()
            for job in group:
                job.error = error
            return False
        return True

    def _tell(self, group: list[_Job]) -> None:
        """Wake the tasks of a group."""
        try:
            self._token.run_sync_soon(_wake, group)
        except trio.RunFinishedError:
            pass  # nobody is left to be told

    def _transact(self, group: list[_Job]) -> None:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        if len(group) == 1:
            self._attempt(group[0])
            if group[0].error is not None:
                self._roll_back()
                return
        else:
            for job in group:
                connection.execute("SAVEPOINT job")
                self._attempt(job)
                if job.error is not None:
                    connection.execute("ROLLBACK TO job")  # fails, as it must, if the whole transaction is gone
                connection.execute("RELEASE job")
        connection.execute("COMMIT")

    def _attempt(self, job: _Job) -> None:
        """Run one operation and keep what it returned or raised for its task."""
        try:
            job.result = job.operation(self._connection)
        except apsw.Error as error:
            job.error = translate(error, self._path)
        except BaseException as error:  # noqa: BLE001 - it is raised in the task that asked, not here
            job.error = error

    def _roll_back(self) -> None:
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except apsw.Error:
            pass  # the next transaction cannot begin then, and tries this again

    def _on_commit(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        self._wal_pages = pages
        return 0

    def _checkpoint(self, mode: int = apsw.SQLITE_CHECKPOINT_RESTART) -> None:
        """Copy the write-ahead log into the file and begin it again as far as readers allow."""
        self._connection.set_busy_timeout(CHECKPOINT_BUSY_MS)
        try:
            pages, copied = self._connection.wal_checkpoint(mode=mode)
            left = 0 if copied >= pages else pages
        except apsw.BusyError:
            left = self._wal_pages
        finally:
            self._connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        # With a reader in the way the next try comes only after as much again, not after every commit.
        self._checkpoint_at = CHECKPOINT_BYTES + left * self._page_bytes
        self._wal_pages = left


def _wake(group: list[_Job]) -> None:
    """Reschedule the tasks of a group; runs in the Trio thread."""
    for job in group:
        if job.task is None:
            continue
        if job.error is not None:
            trio.lowlevel.reschedule(job.task, outcome.Error(job.error))
        else:
            trio.lowlevel.reschedule(job.task, outcome.Value(job.result))
