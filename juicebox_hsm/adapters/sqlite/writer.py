"""Write through one thread per process with group commit (storage.md 10).

The thread takes whatever operations wait, up to 256, and runs them in one transaction, each in a savepoint of its
own, under the exclusive lock of `<file>.lock`. The lock is taken around every transaction and checkpoint of every
process: SQLite's busy handler sleeps and starves, the kernel's lock queue does not, and no checkpoint of ours ever
overlaps another process's commit. While a commit is in progress the next group accumulates. All tasks of a group wake
through one `run_sync_soon`, after COMMIT returned and therefore after the write-ahead log is on disk.

A task that waits for its operation cannot be cancelled: a local commit takes milliseconds, and a definite outcome is
worth more than a fast return. A process that is stopped (not killed) inside a transaction keeps the lock until it goes
on; killing it frees the lock. Until then the operations of others fail with its process id, and none is left waiting:
they were not begun.
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

from juicebox_hsm.adapters.process.directory_lock import by_whom
from juicebox_hsm.adapters.process.threads import NoThread, in_thread_or_here, thread_needed
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
LOCK_PATIENCE_S: Final = 2.0
"""How long operations wait for another process's transaction, which takes milliseconds, or a second on a busy disk."""
LOCKED_OUT_S: Final = 0.2
"""How long they wait while it is known to last (own)."""
OPEN_S: Final = 10.0
"""How long whoever opens or closes a store waits for it."""
CLOSE_S: Final = 60.0
FAILED_PAUSE_S: Final = 0.01
"""After a transaction that failed as a whole, so that overdue maintenance on a broken file does not spin (own)."""

T = TypeVar("T")
Operation = Callable[[apsw.Connection], T]


class FileLock:
    """The advisory exclusive lock between processes, as a context manager. Not re-entrant; one thread uses it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._place: _Place | None = None
        """Where we stand in the queue, or that by which we have the lock."""

    def __enter__(self) -> None:
        """Raises `StoreUnavailable` when another process keeps the lock for `OPEN_S`."""
        if not self.acquire(OPEN_S):
            raise StoreUnavailable(f"sqlite:{self._path.with_suffix('')}: {self.why_not()}")

    def __exit__(self, *exc: object) -> None:
        self.release()

    def acquire(self, patience_s: float) -> bool:
        """Take the lock, or give up after `patience_s`; the place in the queue is kept as long as it takes.

        The kernel's queue has no time-out, so a thread stands in it when the lock is not free. Raises `OSError`, and
        `NoThread` when there is none for that.
        """
        place = self._place
        if place is None or not place.want():
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                place = self._place = _Place(self._path)
            else:
                self._place = None
                return True
        if not place.granted.wait(patience_s) and not place.give_up():
            return False
        if place.error is not None:
            self.release()
            raise place.error
        return True

    def release(self) -> None:
        """Give the lock back."""
        place, self._place = self._place, None
        if place is None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        else:
            place.leave()

    def why_not(self) -> str:
        """Say who has the lock, as far as that can be told."""
        return f"is locked{by_whom(self._path)}, which does not go on"

    def close(self) -> None:
        """Close the descriptor, which also frees the lock."""
        os.close(self._descriptor)


class _Place:
    """A place in the queue for a lock, and the lock once it is `granted`; if nobody wants it then, it is let go."""

    def __init__(self, path: Path) -> None:
        self.granted = threading.Event()
        self.error: OSError | None = None
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # of its own: locks belong to open files
        self._mutex = threading.Lock()
        self._is_wanted = True
        self._is_over = False
        try:
            with thread_needed():
                threading.Thread(target=self._stand, name="sqlite-lock", daemon=True).start()
        except NoThread:
            os.close(self._descriptor)
            raise

    def _stand(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        except OSError as error:
            self.error = error
        with self._mutex:
            if self._is_wanted:
                self.granted.set()
            else:
                self._is_over = True
                self.leave()

    def want(self) -> bool:
        """Want the lock again after giving up; False if it came meanwhile and was let go."""
        with self._mutex:
            self._is_wanted = True
            return not self._is_over

    def give_up(self) -> bool:
        """Want the lock no more; True, and it is ours, if it was granted after all."""
        with self._mutex:
            self._is_wanted = self.granted.is_set()
            return self._is_wanted

    def leave(self) -> None:
        """Let the lock go."""
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
        self._patience_s = LOCK_PATIENCE_S
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
        except (apsw.Error, OSError, StoreUnavailable):
            pass  # everything acknowledged is in the write-ahead log, which the next opener reads
        self._lock.close()

    def _commit(self, group: list[_Job]) -> bool:
        """Run one group under the lock, wake its tasks, and checkpoint when the log has grown.

        Returns whether there was a transaction. Raises nothing: a dead writer would leave its tasks waiting for ever.
        """
        refused = self._take_lock()
        if refused is not None:
            for job in group:
                job.error = refused
            self._tell(group)
            return False
        is_held = True
        try:
            committed = self._run_group(group)
            if self._wal_pages * self._page_bytes < self._checkpoint_at:
                self._lock.release()  # before anybody is woken: a process stopped from here on holds up nobody
                is_held = False
                self._tell(group)
            else:
                self._tell(group)
                self._checkpoint()
        except apsw.Error:
            pass  # of a checkpoint: tried again after the next commit; a lasting fault shows there
        finally:
            if is_held:
                self._lock.release()
        return committed

    def _take_lock(self) -> StoreUnavailable | None:
        """Take the lock, or return why that took too long. From then on patience is short until it was had again."""
        try:
            if self._lock.acquire(self._patience_s):
                self._patience_s = LOCK_PATIENCE_S
                return None
            why = self._lock.why_not()
        except OSError as error:
            why = f"cannot lock: {error.strerror}"
        except NoThread as error:
            why = f"cannot wait for its lock: {error}"
        self._patience_s = LOCKED_OUT_S
        return StoreUnavailable(f"sqlite:{self._path}: {why}")

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
