"""Copy a store's file in one snapshot, and put a copy into an empty store (operator-tools.md 5, decision record 0009).

SQLite's backup interface copies page by page inside one read transaction, so writers go on and the copy is of one
moment. A copy is a single file without a write-ahead log, with a digest at its end (`digest`). Who may restore it is
not decided here: `tails` says where its logs end, and the HSMs decide.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import apsw

from juicebox_hsm.adapters.hsm_directory.nvram import sync_directory
from juicebox_hsm.adapters.process.directory_lock import lock_holder
from juicebox_hsm.adapters.sqlite.check_logs import group_bounds
from juicebox_hsm.adapters.sqlite.digest import append_digest
from juicebox_hsm.adapters.sqlite.reads import fetch, fetch_one
from juicebox_hsm.adapters.sqlite.rows import decode_entries
from juicebox_hsm.adapters.sqlite.schema import (
    APPLICATION_ID,
    WRITER_CACHE_KIB,
    connect,
    prepare_file,
    prepare_tables,
    translate,
)
from juicebox_hsm.adapters.sqlite.snapshot import open_snapshot
from juicebox_hsm.adapters.sqlite.writer import FileLock
from juicebox_hsm.adapters.stores.check import LogTail, tail_of
from juicebox_hsm.errors import LocalError
from juicebox_hsm.ids import GroupId, RealmId

STEP_PAGES: Final = 2_048
"""Pages copied between two reports of progress: 8 MiB."""

PROBE_BYTES: Final = STEP_PAGES * 4_096
"""As much as one step writes: what stopped the copy stops this, too."""
_WRITING: Final = frozenset({
    apsw.SQLITE_IOERR_WRITE, apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_IOERR_DIR_FSYNC, apsw.SQLITE_IOERR_TRUNCATE,
    apsw.SQLITE_IOERR_CLOSE, apsw.SQLITE_IOERR_DELETE,
})  # fmt: skip

Progress = Callable[[str, int, int], None]


def backup_file(source: Path, target: Path, progress: Progress) -> int:
    """Write a copy of `source` to the new file `target`; returns its size in bytes.

    Raises `LocalError` if `target` exists or cannot be made, `StoreUnavailable` for trouble with the store.
    """
    if target.exists() or target.is_symlink():
        raise LocalError(f"{target} exists; a backup never overwrites, give another name")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.close(descriptor)
    except OSError as error:
        raise LocalError(f"{target}: cannot be written: {error.strerror}") from None
    try:
        with open_snapshot(source) as db:
            try:
                copy = apsw.Connection(str(part), flags=apsw.SQLITE_OPEN_READWRITE)
                try:
                    _copy_pages(db, copy, progress)
                    copy.pragma("journal_mode", "delete")
                finally:
                    copy.close()
            except apsw.Error as error:
                if not _is_of_writing(error):
                    raise
                raise LocalError(f"{target}: cannot be written: {_why_not_written(part)}") from None
        append_digest(part)
        _sync(part)
        os.link(part, target)  # unlike a rename, fails if somebody made the file meanwhile
        sync_directory(target.parent)
        return target.stat().st_size
    except FileExistsError:
        raise LocalError(f"{target} exists; a backup never overwrites, give another name") from None
    except OSError as error:
        raise LocalError(f"{target}: cannot be written: {error.strerror}") from None
    finally:
        for leftover in (part, part.with_name(part.name + "-journal"), part.with_name(part.name + "-wal")):
            leftover.unlink(missing_ok=True)


def read_tails(backup: Path) -> list[LogTail]:
    """Return where every group's log in a backup ends. Raises `LocalError` and `StoreInvalid`."""
    tails = []
    with open_snapshot(backup, is_backup=True) as db:
        for number, realm, group in fetch(
            db,
            "SELECT g.number, r.realm, g.grp FROM groups g JOIN realms r ON r.number = g.realm ORDER BY r.realm, g.grp",
        ):
            entries = [
                entry
                for (packed,) in db.execute(
                    "SELECT entries FROM log WHERE id BETWEEN ? AND ? ORDER BY id", group_bounds(number)
                )
                for entry in decode_entries(packed)
            ]
            tails.append(tail_of(RealmId(realm), GroupId(group), entries))
    return tails


def check_unused(target: Path) -> None:
    """Raise `LocalError` if a process has the store open: SQLite keeps a lock on its shared memory meanwhile."""
    holder = lock_holder(target.with_name(f"{target.name}-shm"))
    if holder is not None:
        raise LocalError(
            f"sqlite:{target}: is in use by process {holder}; stop all services that use it, and start them again "
            "when the restore is done"
        )


def check_empty(target: Path) -> None:
    """Raise `LocalError` unless `target` is no file yet, or a store without realms."""
    if not target.exists():
        if not target.parent.is_dir():
            raise LocalError(f"sqlite:{target}: the directory {target.parent} does not exist")
        return
    if target.is_file() and target.stat().st_size == 0:
        return  # left by an attempt that did not get further
    with open_snapshot(target) as db:
        realms = fetch_one(db, "SELECT count(*) FROM realms")
    if realms:
        raise LocalError(f"sqlite:{target}: holds {realms} realms; a backup is restored into an empty store only")


def restore_file(backup: Path, target: Path, progress: Progress) -> None:
    """Put a backup into the empty store `target`. What it says about running services is left out.

    Raises `LocalError` for a store that is not empty, or in use. On failure the target is as it was.
    """
    check_empty(target)
    lock = FileLock(target.with_name(target.name + ".lock"))
    db: apsw.Connection | None = None
    try:
        with lock, open_snapshot(backup, is_backup=True) as source:
            check_unused(target)
            check_empty(target)
            prepare_file(target)
            db = connect(target, WRITER_CACHE_KIB)
            if db.pragma("application_id") not in (0, APPLICATION_ID):
                raise LocalError(f"sqlite:{target}: is an SQLite database of another program")
            _copy_pages(source, db, progress)
            db.pragma("journal_mode", "wal")
            with db:
                db.execute("DELETE FROM discovery; DELETE FROM leases")
            prepare_tables(db, target)
            db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    except apsw.Error as error:
        raise translate(error, target) from error
    finally:
        if db is not None:
            db.close()
        lock.close()


def _is_of_writing(error: apsw.Error) -> bool:
    """Tell whether SQLite failed to write. Of the two files of a backup only the target is written."""
    return isinstance(error, apsw.FullError) or getattr(error, "extendedresult", 0) in _WRITING


def _why_not_written(part: Path) -> str:
    """Ask the system why nothing more can be written to a file: SQLite keeps its own errors and forgets the reason."""
    try:
        with part.open("ab") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return "the disk is full"


def _copy_pages(source: apsw.Connection, target: apsw.Connection, progress: Progress) -> None:
    with target.backup("main", source, "main") as copying:
        while not copying.done:
            copying.step(STEP_PAGES)
            progress("pages", copying.page_count - copying.remaining, copying.page_count)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
