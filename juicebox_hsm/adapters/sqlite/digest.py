"""The digest at the end of a backup: it finds every altered byte, also in rows that nothing else can check (own).

A backup is an SQLite file followed by a trailer of 48 bytes: a mark of 16 bytes, and the SHA-256 of everything before
it, the mark included. SQLite reads as many pages as its header names and never looks at the trailer. The digest finds
damage, not forgery: whoever alters a backup on purpose can write a new one, and what that could hide is what a check
with the realm's MAC key finds.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO, Final

from juicebox_hsm.errors import LocalError, NoStore

MARK: Final = b"JUICEBOX-BACKUP1"
_DIGEST_BYTES: Final = hashlib.sha256().digest_size
TRAILER_BYTES: Final = len(MARK) + _DIGEST_BYTES
_CHUNK_BYTES: Final = 1 << 20
_PAGE_BYTES_MIN: Final = 512
"""SQLite's smallest page; the size of a file without a trailer is a multiple of it."""


def append_digest(path: Path) -> None:
    """Add the trailer to a finished backup. Raises `OSError`."""
    with path.open("r+b") as file:
        digest = _digest(file, path.stat().st_size, MARK)
        file.seek(0, os.SEEK_END)
        file.write(MARK + digest)


def digest_problem(path: Path) -> str | None:
    """Return what is wrong with the bytes of a backup, None if they are as they were written.

    Raises `LocalError` for a file that has no trailer at all, as backups of before this rule, and what cannot be read.
    """
    if not path.is_file():
        raise NoStore(f"sqlite:{path}: no such file")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size % _PAGE_BYTES_MIN == 0:
                raise LocalError(f"{path}: carries no digest, so damage in it could not be told")
            content = max(0, size - TRAILER_BYTES)
            digest = _digest(file, content, MARK)
            file.seek(content)
            trailer = file.read(TRAILER_BYTES)
    except OSError as error:
        raise LocalError(f"{path}: cannot be read: {error.strerror}") from None
    if trailer != MARK + digest:
        return f"{path}: is not what was written: its digest differs; take another backup"
    return None


def _digest(file: BinaryIO, size: int, mark: bytes) -> bytes:
    """Return the SHA-256 of the first `size` bytes of the file, followed by the mark."""
    file.seek(0)
    running = hashlib.sha256()
    left = size
    while left > 0:
        chunk = file.read(min(left, _CHUNK_BYTES))
        if not chunk:
            break
        running.update(chunk)
        left -= len(chunk)
    running.update(mark)
    return running.digest()
