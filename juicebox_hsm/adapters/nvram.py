"""NVRAM in a file, the `file` backend of hardware.md 2.2.

What it gives: a write is durable, wholly or not at all, before `write` returns (new file, fsync, atomic replace,
fsync of the directory); corruption is detected at the next start; after any failed write the object writes nothing
more. What it does not give: freshness. Whoever can put back an older copy of the file (a restored backup, a virtual
machine's snapshot) resets guess counters and lets the HSM vote twice; nothing here notices. Real freshness needs
hardware that counts.

Beside the payload lies the start value of the role clock (hsm.md 6.3): it must not repeat when the wall clock is set
back. File: magic (8) || clock start u64 || payload length u16 || payload || BLAKE2s-256 of all before, big-endian.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path
from typing import Final

from juicebox_hsm.consensus.nvram import NVRAM_BYTES_MAX
from juicebox_hsm.errors import LocalError, RealmError, check

MAGIC: Final = b"JBXNVR01"
_HEADER_BYTES: Final = len(MAGIC) + 8 + 2
_CHECKSUM_BYTES: Final = 32
_FILE_BYTES_MAX: Final = _HEADER_BYTES + NVRAM_BYTES_MAX + _CHECKSUM_BYTES

CLOCK_STEP: Final = 2**32
"""Distance of two starts: more role changes than one life of an HSM can make."""


class NvramFailed(RealmError):
    """A write failed: whether it took effect is unknown, so nothing more is written until a restart reads the file."""


def write_durably(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace `path` by `content` atomically and durably; raises `OSError`. Cost: two fsyncs."""
    replacement = path.with_name(path.name + ".new")
    descriptor = os.open(replacement, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    replacement.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the directory's entries durable; raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(clock_start: int, payload: bytes) -> bytes:
    body = b"".join((MAGIC, clock_start.to_bytes(8, "big"), len(payload).to_bytes(2, "big"), payload))
    return body + hashlib.blake2s(body).digest()


def _decode(path: Path, content: bytes) -> tuple[int, bytes]:
    body, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    intact = (
        _HEADER_BYTES + _CHECKSUM_BYTES <= len(content) <= _FILE_BYTES_MAX
        and hmac.compare_digest(hashlib.blake2s(body).digest(), checksum)
        and body.startswith(MAGIC)
        and int.from_bytes(body[16:_HEADER_BYTES], "big") == len(body) - _HEADER_BYTES
    )
    if not intact:
        raise LocalError(
            f"{path}: the NVRAM file is corrupt; never restore a copy of it: "
            "make a new HSM directory with `juicebox-hsm hsm init` and let it join again"
        )
    return int.from_bytes(body[8:16], "big"), body[_HEADER_BYTES:]


class FileNvram:
    """The NVRAM of one HSM. The caller holds the directory's lock, so that there is one writer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._clock_start, self._payload = read_nvram(path)
        self._failed = False

    @staticmethod
    def create(path: Path) -> None:
        """Write the file of an HSM that never started; raises `OSError`."""
        write_durably(path, _encode(0, b""))

    def start(self, now_ms: int) -> int:
        """Begin a life of the HSM: record and return the first value of its role clock.

        `now_ms` is Unix time in milliseconds. The value exceeds everything an earlier life could have used.
        """
        self._clock_start = max(now_ms, self._clock_start + CLOCK_STEP)
        self.write(self._payload)
        return self._clock_start

    def read(self) -> bytes:
        """Return the payload of the last completed write; empty if there was none."""
        return self._payload

    def write(self, payload: bytes) -> None:
        """Make the payload (at most 4000 bytes) durable. Raises `NvramFailed`, then and ever after."""
        check(len(payload) <= NVRAM_BYTES_MAX, "an NVRAM payload has at most 4000 bytes")
        if self._failed:
            raise NvramFailed(f"{self._path}: an earlier write failed")
        self._failed = True  # until this write is known to be complete
        try:
            write_durably(self._path, _encode(self._clock_start, payload))
        except OSError as error:
            raise NvramFailed(f"{self._path}: {error.strerror}") from error
        self._failed = False
        self._payload = payload


def read_nvram(path: Path) -> tuple[int, bytes]:
    """Return (clock start, payload) without locking; raises `LocalError` when missing or corrupt.

    Replacement is atomic, so this may be called while an HSM runs.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise LocalError(
            f"{path}: {error.strerror}; without its NVRAM file this HSM is lost: make another with "
            "`juicebox-hsm hsm init`"
        ) from None
    return _decode(path, content)
