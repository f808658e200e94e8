"""One owner at a time of a directory whose files belong together (own: two owners would each undo the other's work)."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from juicebox_hsm.errors import LocalError

LOCK_FILE: Final = ".lock"
_PID_BYTES_MAX: Final = 20


@contextmanager
def own_directory(directory: Path) -> Iterator[None]:
    """Hold the directory until the block ends; the kernel lets go of it when the process dies, however it dies.

    Raises `LocalError` with the holder's process id when somebody else has it; nothing was touched then.
    """
    try:
        descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LocalError(f"{directory / LOCK_FILE}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, _PID_BYTES_MAX).decode("ascii", "replace").strip()
            raise LocalError(
                f"{directory}: is in use by process {holder or 'unknown'}; stop it first, or give another directory"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        yield
    finally:
        os.close(descriptor)
