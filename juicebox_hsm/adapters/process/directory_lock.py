"""One owner at a time of a directory whose files belong together (own: two owners would each undo the other's work)."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from juicebox_hsm.adapters.process.passing_trouble import local_error
from juicebox_hsm.errors import LocalError

DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY
"""Flags with which a directory is opened for its lock."""
LOCK_FILE: Final = ".lock"
_PID_BYTES_MAX: Final = 20
_LOCKS: Final = Path("/proc/locks")


def lock_holder(path: Path) -> int | None:
    """Return the id of a process that holds a lock on a file or directory, None when none is known to.

    The kernel's list names processes of this machine and of our container only; a lock of another one goes unseen.
    """
    try:
        found = path.stat()
        lines = _LOCKS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    wanted = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    for line in lines:
        words = line.split()
        if "->" not in words and len(words) > 5 and words[5] == wanted and int(words[4]) > 0:
            return int(words[4])
    return None


def by_whom(path: Path) -> str:
    """Return ` by process N` for a message about a locked file, "" when nobody is known to hold it."""
    holder = lock_holder(path)
    return "" if holder is None else f" by process {holder}"


def lock_now(path: Path, flags: int, taken: Callable[[], LocalError], *, name: str = "") -> int:
    """Open a file or directory and lock it at once; return the descriptor, which holds the lock until it is closed.

    Raises what `taken` makes while another has the lock, and a `LocalError` that calls the path `name`, if given, when
    it cannot be opened or locked.
    """
    name = name or str(path)
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise local_error(f"{name}: {error.strerror}", error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise taken() from None
        raise LocalError(f"{name}: cannot be locked ({error.strerror}); use a local file system") from None
    return descriptor


@contextmanager
def locked(path: Path, flags: int, taken: Callable[[], LocalError], *, name: str = "") -> Iterator[int]:
    """Hold the lock of `lock_now` until the block ends; hands out the descriptor."""
    descriptor = lock_now(path, flags, taken, name=name)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def writing_into(directory: Path) -> Iterator[None]:
    """Keep other writers out of a directory that others only read; leaves nothing behind there.

    Raises `LocalError` with the other's process id.
    """

    def taken() -> LocalError:
        return LocalError(f"{directory}: is being written{by_whom(directory)}; try again when it is done")

    with locked(directory, DIRECTORY, taken):
        yield


@contextmanager
def own_directory(directory: Path) -> Iterator[None]:
    """Hold the directory until the block ends; the kernel lets go of it when the process dies, however it dies.

    Raises `LocalError` with the holder's process id when somebody else has it; nothing was touched then.
    """
    lock = directory / LOCK_FILE

    def taken() -> LocalError:
        holder = lock.read_bytes()[:_PID_BYTES_MAX].decode("ascii", "replace").strip() or "unknown"
        return LocalError(f"{directory}: is in use by process {holder}; stop it first, or give another directory")

    with locked(lock, os.O_RDWR | os.O_CREAT, taken) as descriptor:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        yield
