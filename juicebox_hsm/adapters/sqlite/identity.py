"""Notice that a store's file was removed or replaced while it is open (decision record 0031).

An open file outlives its name: everything would go on working, be acknowledged, and be gone with the last process.
The same holds for the write-ahead log beside it, which people take for litter. A look costs two microseconds, so the
writer looks before every transaction, and readers at most once a second.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

import apsw

from juicebox_hsm.ports.errors import StoreReplaced

LOOK_S: Final = 1.0
"""Between two looks of readers: what they read is no older than that."""

_Identity = tuple[int, int]


def _identity(path: str) -> _Identity | None:
    """Return what tells the file at `path` from any other; None when there is none that can be seen."""
    try:
        found = os.stat(path)  # noqa: PTH116 -- a `Path` costs more than the call
    except OSError:
        return None
    return found.st_dev, found.st_ino


class FileIdentity:
    """The file that was opened, and whether its name still leads to it. Used from several threads."""

    def __init__(self, path: Path) -> None:
        """Take the file that is there now: the caller has just opened it."""
        self._path = str(path)
        self._log_path = f"{path}-wal"
        self._opened = _identity(self._path)
        self._log: _Identity | None = None
        self._due_s = 0.0

    def check(self) -> None:
        """Raise `StoreReplaced` unless the file and its write-ahead log are those that are in use."""
        if self._opened is None or _identity(self._path) != self._opened:
            raise StoreReplaced(
                f"sqlite:{self._path}: the file was removed or replaced while in use; stop all services that use it,"
                " put the right file back, and start them again"
            )
        log = _identity(self._log_path)
        if self._log is None:
            self._log = log  # made with the first transaction, and kept until the last process closes the store
        elif log != self._log:
            raise StoreReplaced(
                f"sqlite:{self._log_path}: this part of the store was removed or replaced while in use; put it back, or"
                " stop all services that use the store and see `store check` before they start again"
            )

    def before_close(self, connection: apsw.Connection) -> None:
        """Let `connection` touch nothing when it closes, if the names now belong to other files.

        SQLite's last connection removes the write-ahead log by name: that of the file which was put back.
        """
        try:
            self.check()
        except StoreReplaced:
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)

    def check_sometimes(self) -> None:
        """Check unless that was done within the last second. Raises `StoreReplaced`, then at every call."""
        now_s = time.monotonic()
        if now_s >= self._due_s:
            self.check()
            self._due_s = now_s + LOOK_S
