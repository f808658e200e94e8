"""NVRAM in a file, the `file` backend of hardware.md 2.2.

What it gives: a write is durable, wholly or not at all, before `write` returns; corruption is detected at the next
start; after any failed write the object writes nothing more. What it does not give: freshness. Whoever can put back an
older copy of the file (a restored backup, a virtual machine's snapshot) resets guess counters and lets the HSM vote
twice; nothing here notices. Real freshness needs hardware that counts.

Beside the payload lies the start value of the role clock (hsm.md 6.3): it must not repeat when the wall clock is set
back. Every start writes the file anew (new file, fsync, atomic replace, fsync of the directory). The writes after it
go in place, because a persist is on the path of every request and a replacement costs five times as much (ADR 0014).

File: two slots, at 0 and 8192, so that no physical block holds parts of both; writes alternate between them. A slot is
nine sectors of 512 bytes, big-endian:

    magic "JBXNVR02" (8) || sequence u64 || index u8 || zero (7) || data (472) || BLAKE2s-128 of all before (16)

The data of a slot's sectors, joined, is clock start u64 || payload length u16 || payload. A sector is what a disk
writes wholly or not at all, so after a crash each is of an old write or the new one, and intact. A slot whose sectors
do not agree on the sequence was being written: the other one counts. A sector that is *not* intact was damaged, and
might have been the newest: the start is refused, for falling back would be the rollback that NVRAM exists to prevent.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import time
from pathlib import Path
from typing import Final

from juicebox_hsm.adapters.process.passing_trouble import local_error
from juicebox_hsm.consensus.nvram import NVRAM_BYTES_MAX
from juicebox_hsm.errors import LocalError, check
from juicebox_hsm.ports.errors import HsmGone

MAGIC: Final = b"JBXNVR02"
SECTOR_BYTES: Final = 512
SLOT_OFFSETS: Final = (0, 8192)
_TAG_BYTES: Final = 16
_SECTOR_HEADER_BYTES: Final = 24
_DATA_BYTES: Final = SECTOR_BYTES - _SECTOR_HEADER_BYTES - _TAG_BYTES
_RECORD_HEADER_BYTES: Final = 8 + 2
SECTORS: Final = -(-(_RECORD_HEADER_BYTES + NVRAM_BYTES_MAX) // _DATA_BYTES)
_SLOT_BYTES: Final = SECTORS * SECTOR_BYTES
_FILE_BYTES: Final = SLOT_OFFSETS[1] + _SLOT_BYTES

CLOCK_STEP: Final = 2**32
"""Distance of two starts: more role changes than one life of an HSM can make."""

_READ_ATTEMPTS: Final = 5
_READ_PAUSE_S: Final = 0.005


class NvramFailed(HsmGone):
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


def _sectors(sequence: int, clock_start: int, payload: bytes) -> bytes:
    """Return the sectors that hold the record: as many as it needs."""
    record = b"".join((clock_start.to_bytes(8, "big"), len(payload).to_bytes(2, "big"), payload))
    parts: list[bytes] = []
    for index, start in enumerate(range(0, len(record), _DATA_BYTES)):
        data = record[start : start + _DATA_BYTES].ljust(_DATA_BYTES, b"\0")
        body = b"".join((MAGIC, sequence.to_bytes(8, "big"), index.to_bytes(8, "little"), data))
        parts += (body, _tag(body))
    return b"".join(parts)


def _tag(body: bytes) -> bytes:
    return hashlib.blake2s(body, digest_size=_TAG_BYTES).digest()


def _fresh_file(clock_start: int, payload: bytes) -> bytes:
    """Return a file with the record as write 1 in the first slot, and every other sector as never written."""
    slots = []
    for sequence, record in ((1, payload), (0, b"")):
        used = _sectors(sequence, clock_start, record)
        unused = _sectors(0, 0, bytes(NVRAM_BYTES_MAX))
        slots.append(used + unused[len(used) :])
    return slots[0].ljust(SLOT_OFFSETS[1], b"\0") + slots[1]


def _read_slot(slot: bytes) -> tuple[int, int, bytes] | None:
    """Return (sequence, clock start, payload), None if its write was not completed; raises `ValueError` if damaged."""
    sequences, data = [], []
    for index in range(SECTORS):
        sector = slot[index * SECTOR_BYTES : (index + 1) * SECTOR_BYTES]
        body, tag = sector[:-_TAG_BYTES], sector[-_TAG_BYTES:]
        if not hmac.compare_digest(_tag(body), tag) or body[:8] != MAGIC or body[16:24] != index.to_bytes(8, "little"):
            raise ValueError
        sequences.append(int.from_bytes(body[8:16], "big"))
        data.append(body[_SECTOR_HEADER_BYTES:])
    record = b"".join(data)
    length = int.from_bytes(record[8:_RECORD_HEADER_BYTES], "big")
    if length > NVRAM_BYTES_MAX:
        raise ValueError
    needed = -(-(_RECORD_HEADER_BYTES + length) // _DATA_BYTES)
    if sequences[0] == 0 or any(sequence != sequences[0] for sequence in sequences[:needed]):
        return None
    payload = record[_RECORD_HEADER_BYTES : _RECORD_HEADER_BYTES + length]
    return sequences[0], int.from_bytes(record[:8], "big"), payload


def _decode(content: bytes) -> tuple[int, bytes]:
    """Return (clock start, payload) of the last completed write; raises `ValueError` if damaged."""
    if len(content) != _FILE_BYTES:
        raise ValueError
    slots = [_read_slot(content[offset : offset + _SLOT_BYTES]) for offset in SLOT_OFFSETS]
    complete = [slot for slot in slots if slot is not None]
    if not complete:
        raise ValueError
    _, clock_start, payload = max(complete)
    return clock_start, payload


class FileNvram:
    """The NVRAM of one HSM. The caller holds the directory's lock, so that there is one writer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._clock_start, self._payload = read_nvram(path)
        self._sequence = 0
        self._descriptor = -1
        self._failed = False

    @staticmethod
    def create(path: Path) -> None:
        """Write the file of an HSM that never started; raises `OSError`."""
        write_durably(path, _fresh_file(0, b""))

    def start(self, now_ms: int) -> int:
        """Begin a life of the HSM: record and return the first value of its role clock. Raises `NvramFailed`.

        `now_ms` is Unix time in milliseconds. The value exceeds everything an earlier life could have used.
        """
        check(self._descriptor < 0, "NVRAM starts once")
        clock_start = max(now_ms, self._clock_start + CLOCK_STEP)
        self._failed = True  # until the file is known to be complete
        try:
            write_durably(self._path, _fresh_file(clock_start, self._payload))
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_DSYNC | os.O_CLOEXEC)
        except OSError as error:
            raise NvramFailed(f"{self._path}: {error.strerror}") from error
        self._failed = False
        self._sequence = 1
        self._clock_start = clock_start
        return clock_start

    def close(self) -> None:
        """Let go of the file; nothing can be written after."""
        self._failed = True
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self) -> bytes:
        """Return the payload of the last completed write; empty if there was none."""
        return self._payload

    def write(self, payload: bytes) -> None:
        """Make the payload (at most 4000 bytes) durable, after `start`. Raises `NvramFailed`, then and ever after."""
        check(len(payload) <= NVRAM_BYTES_MAX, "an NVRAM payload has at most 4000 bytes")
        if self._failed:
            raise NvramFailed(f"{self._path}: an earlier write failed, or the file is closed")
        check(self._descriptor >= 0, "NVRAM is written after its start")
        self._failed = True  # until this write is known to be complete
        sequence = self._sequence + 1
        content = _sectors(sequence, self._clock_start, payload)
        offset = SLOT_OFFSETS[(sequence - 1) % len(SLOT_OFFSETS)]
        try:
            while content:
                written = os.pwrite(self._descriptor, content, offset)
                content, offset = content[written:], offset + written
        except OSError as error:
            raise NvramFailed(f"{self._path}: {error.strerror}") from error
        self._failed = False
        self._sequence = sequence
        self._payload = payload


def read_nvram(path: Path) -> tuple[int, bytes]:
    """Return (clock start, payload) without locking.

    Raises `LocalError` when missing, corrupt or another user's, and `NvramFailed` when the device cannot be read.

    May be called while an HSM runs: a sector read in the middle of its being written is read again.
    """
    for attempt in range(_READ_ATTEMPTS):
        if attempt:
            time.sleep(_READ_PAUSE_S)
        try:
            with path.open("rb") as file:
                content = file.read(_FILE_BYTES + 1)
        except PermissionError as error:
            raise local_error(f"{path}: {error.strerror}; run as the user whose HSM it is", error) from None
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise NvramFailed(f"{path}: {error.strerror}") from error
            raise LocalError(
                f"{path}: {error.strerror}; without its NVRAM file this HSM is lost: make another with "
                "`juicebox-hsm hsm init`"
            ) from None
        try:
            return _decode(content)
        except ValueError:
            continue
    raise LocalError(
        f"{path}: the NVRAM file is corrupt; never restore a copy of it: "
        "make a new HSM directory with `juicebox-hsm hsm init` and let it join again"
    )
