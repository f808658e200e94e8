"""Group commit: what shares a transaction, what an error undoes, what is acknowledged when."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import apsw
import pytest
import trio
import trio.testing

from juicebox_hsm.adapters.sqlite.backend import _open_files
from juicebox_hsm.adapters.sqlite.reads import fetch, fetch_one
from juicebox_hsm.adapters.sqlite.schema import connect
from juicebox_hsm.adapters.sqlite.writer import CHECKPOINT_BYTES, FileLock, Operation, Writer
from juicebox_hsm.errors import InvariantViolation, check
from juicebox_hsm.ports.errors import StoreUnavailable
from tests.patience import HANGS_S


def put(name: str, size: int = 1) -> Operation[str]:
    """Return an operation that writes a setting and gives its name back."""

    def write(db: apsw.Connection) -> str:
        db.execute("INSERT INTO settings VALUES (?, zeroblob(?))", (name, size))
        return name

    return write


class Held:
    """An operation that holds its transaction open until it is released, after doing `first`."""

    def __init__(self, first: Operation[None] = lambda _: None) -> None:
        self.first = first
        self.begun = threading.Event()
        self.release = threading.Event()

    def __call__(self, db: apsw.Connection) -> None:
        self.first(db)
        self.begun.set()
        self.release.wait(HANGS_S)

    async def start(self, nursery: trio.Nursery, writer: Writer) -> None:
        """Queue the operation and return when the writer is in it, alone in its group."""
        nursery.start_soon(writer.run, self)
        assert await trio.to_thread.run_sync(self.begun.wait, HANGS_S)


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Writer]:
    """Run a writer without maintenance."""
    lock, connection, _ = _open_files(path)
    writer = Writer(path, connection, lock, lambda: None, lambda: HANGS_S)
    writer.start()
    try:
        yield writer
    finally:
        await writer.close()


def names(path: Path) -> list[str]:
    """Return the settings another connection sees."""
    connection = connect(path, 100)
    try:
        return [name for (name,) in fetch(connection, "SELECT name FROM settings ORDER BY name")]
    finally:
        connection.close()


async def test_what_waits_shares_a_transaction(tmp_path: Path) -> None:
    """Operations that arrive while one is in progress are committed together, each with its own result."""
    results: list[str] = []
    commits: list[int] = []
    transactions: list[int] = []

    def count(_: object, __: str, ___: int) -> int:
        commits.append(1)
        return 0

    def first(db: apsw.Connection) -> None:
        db.set_wal_hook(count)
        db.execute("INSERT INTO tenants VALUES ('t', 1)")

    def seen(db: apsw.Connection) -> None:
        transactions.append(fetch_one(db, "SELECT count(*) FROM settings"))

    hold = Held(first)
    async with opened(tmp_path / "f.db") as writer:

        async def one(number: int) -> None:
            results.append(await writer.run(put(f"{number:02}")))

        async with trio.open_nursery() as nursery:
            await hold.start(nursery, writer)
            for number in range(20):
                nursery.start_soon(one, number)
            await trio.testing.wait_all_tasks_blocked()
            hold.release.set()
        assert len(commits) == 2, "the one held, then all that waited"
        assert sorted(results) == [f"{number:02}" for number in range(20)]
        await writer.run(seen)
    assert transactions == [20]


async def test_an_error_undoes_only_its_own_operation(tmp_path: Path) -> None:
    """A failing operation of a group raises in its task; its neighbours are kept, its own writes are not."""
    hold = Held()
    errors: list[str] = []

    def fails(db: apsw.Connection) -> None:
        put("half")(db)
        raise KeyError("mine")

    def broken(db: apsw.Connection) -> None:
        put("never")(db)
        check(0, "broken")

    async with opened(tmp_path / "f.db") as writer:

        async def expect(operation: Operation[None], error: type[BaseException]) -> None:
            with pytest.raises(error):
                await writer.run(operation)
            errors.append(error.__name__)

        async with trio.open_nursery() as nursery:
            await hold.start(nursery, writer)
            nursery.start_soon(writer.run, put("a"))
            nursery.start_soon(expect, fails, KeyError)
            nursery.start_soon(expect, broken, InvariantViolation)
            nursery.start_soon(writer.run, put("b"))
            await trio.testing.wait_all_tasks_blocked()
            hold.release.set()
        await expect(fails, KeyError)
    assert sorted(errors) == ["InvariantViolation", "KeyError", "KeyError"]
    assert names(tmp_path / "f.db") == ["a", "b"]


async def test_acknowledged_means_visible_to_others(tmp_path: Path) -> None:
    """When `run` returns, another connection sees the write."""
    async with opened(tmp_path / "f.db") as writer:
        for number in range(5):
            await writer.run(put(str(number)))
            assert len(names(tmp_path / "f.db")) == number + 1


async def test_cancellation_never_leaves_an_outcome_open(tmp_path: Path) -> None:
    """A task cancelled while it waits still learns the result; cancelled before, nothing is written."""
    hold = Held()
    async with opened(tmp_path / "f.db") as writer, trio.open_nursery() as nursery:
        await hold.start(nursery, writer)
        with trio.CancelScope() as scope:
            scope.cancel()
            await writer.run(put("before"))
        assert scope.cancelled_caught
        with trio.CancelScope() as scope:
            nursery.start_soon(_cancel_then_release, scope, hold.release)
            assert await writer.run(put("during")) == "during"
        assert not scope.cancelled_caught
    assert names(tmp_path / "f.db") == ["during"]


async def _cancel_then_release(scope: trio.CancelScope, release: threading.Event) -> None:
    await trio.testing.wait_all_tasks_blocked()
    scope.cancel()
    release.set()


async def test_closing_commits_what_is_queued(tmp_path: Path) -> None:
    """Operations queued before closing are committed; later ones are refused."""
    async with opened(tmp_path / "f.db") as writer, trio.open_nursery() as nursery:
        for number in range(600):
            writer.post(put(f"{number:03}"))
        nursery.start_soon(writer.run, put("last"))
        await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(StoreUnavailable):
        await writer.run(put("late"))
    assert len(names(tmp_path / "f.db")) == 601


async def test_the_log_file_stays_bounded(tmp_path: Path) -> None:
    """Checkpoints keep the write-ahead log near its bound, also after a reader was in the way, and end with it."""
    log = tmp_path / "f.db-wal"
    async with opened(tmp_path / "f.db") as writer:
        for number in range(30):
            await writer.run(put(f"a{number}", 1 << 20))
        assert log.stat().st_size < CHECKPOINT_BYTES + (4 << 20)
        reader = connect(tmp_path / "f.db", 100)
        cursor = reader.execute("SELECT name FROM settings")
        for number in range(20):
            await writer.run(put(f"b{number}", 1 << 20))
        cursor.close()
        reader.close()
        for number in range(30):
            await writer.run(put(f"c{number}", 1 << 20))
        assert writer._wal_pages * 4096 < CHECKPOINT_BYTES + (2 << 20)
    assert not log.exists()


async def test_trouble_of_the_file_is_unavailable(tmp_path: Path) -> None:
    """When COMMIT fails every operation of the group raises StoreUnavailable and none is kept; later ones work."""
    raised: list[BaseException] = []

    def first(db: apsw.Connection) -> None:
        failing = iter((False, True))  # the held operation commits first
        db.set_commit_hook(lambda: next(failing, False))

    hold = Held(first)
    async with opened(tmp_path / "f.db") as writer:

        async def one(name: str) -> None:
            try:
                await writer.run(put(name))
            except StoreUnavailable as error:
                raised.append(error)

        async with trio.open_nursery() as nursery:
            await hold.start(nursery, writer)
            nursery.start_soon(one, "a")
            nursery.start_soon(one, "b")
            await trio.testing.wait_all_tasks_blocked()
            hold.release.set()
        assert len(raised) == 2
        await writer.run(put("c"))
    assert names(tmp_path / "f.db") == ["c"]


async def test_a_lock_that_fails_is_unavailable(tmp_path: Path) -> None:
    """When the lock file cannot be locked the operation raises StoreUnavailable; the writer lives on."""
    async with opened(tmp_path / "f.db") as writer:
        lock = writer._lock
        good, lock._descriptor = lock._descriptor, 1 << 20  # nobody has that many files open
        with pytest.raises(StoreUnavailable, match="cannot lock"), trio.fail_after(HANGS_S):
            await writer.run(put("a"))
        lock._descriptor = good
        await writer.run(put("b"))
    assert names(tmp_path / "f.db") == ["b"]


_HOLD = """
import fcntl, sys
with open(sys.argv[1] + ".lock") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print(flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another(path: Path) -> Iterator[int]:
    """Let another process keep the lock; hands over its id."""
    command = [sys.executable, "-c", _HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            yield holder.pid
        finally:
            holder.kill()


async def test_a_lock_that_is_kept_is_told(tmp_path: Path) -> None:
    """Operations that would wait for a stopped process fail with its id, and are not done later; then all goes on."""
    path = tmp_path / "x.db"
    async with opened(path) as writer:
        await writer.run(put("before"))
        with held_by_another(path) as pid:
            for name in ("first", "second"):
                with pytest.raises(StoreUnavailable, match=f"is locked by process {pid}"):
                    await writer.run(put(name))
        with trio.fail_after(HANGS_S):
            while not await is_done(writer, put("after")):
                pass
    assert names(path) == ["after", "before"]


def test_a_lock_that_comes_too_late_is_let_go(tmp_path: Path) -> None:
    """Who gave up waiting does not get a lock that nobody would give back; who wants it again still has its place."""
    path = tmp_path / "x.db.lock"
    first, second, third = FileLock(path), FileLock(path), FileLock(path)
    assert first.acquire(0.0)
    assert not second.acquire(0.01)
    assert not second.acquire(0.01)
    assert "is locked by process" in second.why_not()
    first.release()
    assert third.acquire(HANGS_S)
    third.release()
    assert second.acquire(HANGS_S)
    assert not first.acquire(0.0)
    second.release()
    assert first.acquire(HANGS_S)
    first.release()


def test_a_wait_that_fails_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that cannot be waited for is an error each time; a store's process does not run out of files by it."""
    lock = FileLock(tmp_path / "x.db.lock")

    def refuse(_: int, operation: int) -> None:
        raise BlockingIOError if operation & fcntl.LOCK_NB else OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(OSError, match="No locks available"):
            lock.acquire(HANGS_S)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    lock.close()


async def is_done(writer: Writer, operation: Operation[str]) -> bool:
    """Tell whether an operation was done; not while the lock that was kept is on its way."""
    try:
        await writer.run(operation)
    except StoreUnavailable:
        return False
    return True
