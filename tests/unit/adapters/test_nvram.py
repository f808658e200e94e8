"""The file backend of NVRAM: atomic, durable, fail-stop, and a role clock that never repeats."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from juicebox_hsm.adapters.hsm_directory import nvram
from juicebox_hsm.adapters.hsm_directory.nvram import (
    CLOCK_STEP,
    SECTOR_BYTES,
    SLOT_OFFSETS,
    FileNvram,
    NvramFailed,
    read_nvram,
)
from juicebox_hsm.errors import LocalError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a fresh NVRAM file."""
    FileNvram.create(tmp_path / "nvram")
    return tmp_path / "nvram"


@pytest.fixture
def started(path: Path) -> Iterator[FileNvram]:
    """Return the NVRAM of a life that began."""
    store = FileNvram(path)
    store.start(1)
    yield store
    store.close()


def test_fresh_file_is_a_first_start(path: Path) -> None:
    """A new file reads as empty and is private to its owner."""
    assert FileNvram(path).read() == b""
    assert path.stat().st_mode & 0o777 == 0o600


def test_writes_survive_reopening(path: Path, started: FileNvram) -> None:
    """What was written last is what the next life reads, whichever size followed which; the largest payload fits."""
    for payload in (b"x", b"\xff" * 4000, b"", b"y" * 462, b"z" * 463, b"", b"\xfe" * 4000, b"w"):
        started.write(payload)
        assert FileNvram(path).read() == payload


def test_a_start_keeps_the_payload(path: Path, started: FileNvram) -> None:
    """A life that writes nothing passes on what it found."""
    started.write(b"state")
    for _ in range(2):
        store = FileNvram(path)
        store.start(1)
        store.close()
    assert FileNvram(path).read() == b"state"


def test_i19_clock_starts_rise_even_when_the_wall_clock_does_not(path: Path) -> None:
    """Each start is above everything the life before could use, with the wall clock set back too."""
    starts = []
    for now_ms in (10**12, 10**12, 5, 10**13):
        store = FileNvram(path)
        starts.append(store.start(now_ms))
        store.write(b"state")
        store.close()
        assert read_nvram(path) == (starts[-1], b"state")
    assert starts == [10**12, 10**12 + CLOCK_STEP, 10**12 + 2 * CLOCK_STEP, 10**13]


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("sector", [0, 1, 8])
@pytest.mark.parametrize("position", [0, 9, 16, 20, 25, 100, 511])
def test_m8_corruption_is_refused(path: Path, started: FileNvram, slot: int, sector: int, position: int) -> None:
    """A flipped byte in any sector of either slot stops the start: falling back would be a rollback."""
    started.write(b"older")
    started.write(b"payload" * 100)
    content = bytearray(path.read_bytes())
    content[SLOT_OFFSETS[slot] + sector * SECTOR_BYTES + position] ^= 1
    path.write_bytes(content)
    with pytest.raises(LocalError, match=r"nvram.*hsm init"):
        FileNvram(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 10, b"\0" * 12800, b"\0" * 100000])
def test_m8_truncated_or_foreign_files_are_refused(path: Path, content: bytes) -> None:
    """An empty, short, foreign or oversized file is not a first start."""
    path.write_bytes(content)
    with pytest.raises(LocalError, match="nvram"):
        FileNvram(path)


def test_m8_sectors_moved_within_the_file_are_refused(path: Path, started: FileNvram) -> None:
    """A sector counts only at its own place."""
    started.write(b"payload" * 200)
    content = bytearray(path.read_bytes())
    first, second = SLOT_OFFSETS[1], SLOT_OFFSETS[1] + SECTOR_BYTES
    content[first:second], content[second : second + SECTOR_BYTES] = (
        content[second : second + SECTOR_BYTES],
        content[first:second],
    )
    path.write_bytes(content)
    with pytest.raises(LocalError, match="corrupt"):
        FileNvram(path)


def test_m8_missing_file_is_not_a_first_start(path: Path) -> None:
    """Losing the file must not silently make a new HSM."""
    path.unlink()
    with pytest.raises(LocalError, match="No such file"):
        FileNvram(path)


@pytest.mark.parametrize("old", [b"old", b"old" * 1000], ids=["short", "long"])
@pytest.mark.parametrize("new", [b"new", b"new" * 1200], ids=["to-short", "to-long"])
def test_m9_a_write_torn_at_any_sectors_leaves_the_old_or_the_new_content(
    path: Path, started: FileNvram, old: bytes, new: bytes
) -> None:
    """Whichever of the sectors reached the disk before the power went, the next start finds a complete write."""
    for payload in (b"oldest" * 300, b"older" * 600, old):
        started.write(payload)
    before = path.read_bytes()
    started.write(new)
    after = path.read_bytes()
    changed = [
        at for at in range(0, len(after), SECTOR_BYTES) if after[at:][:SECTOR_BYTES] != before[at:][:SECTOR_BYTES]
    ]
    for landed in range(2 ** len(changed)):
        torn = bytearray(before)
        for bit, at in enumerate(changed):
            if landed >> bit & 1:
                torn[at : at + SECTOR_BYTES] = after[at : at + SECTOR_BYTES]
        path.write_bytes(torn)
        assert FileNvram(path).read() == (new if torn == after else old)


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace", "directory"])
def test_m9_failure_at_each_step_of_the_start(path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever step fails, the start raises, writes are refused, and the file has the state of the life before."""
    store = FileNvram(path)
    store.start(1)
    store.write(b"state")
    store.close()
    store = FileNvram(path)
    failing = OSError(errno.ENOSPC, "No space left on device")

    def broken(*_: Any, **__: Any) -> Any:
        raise failing

    with monkeypatch.context() as patch:
        if step == "replace":
            patch.setattr(Path, "replace", broken)
        elif step == "directory":
            patch.setattr(nvram, "sync_directory", broken)
        else:
            patch.setattr(os, step, broken)
        with pytest.raises(NvramFailed, match="No space left"):
            store.start(1)
    with pytest.raises(NvramFailed, match="earlier write failed"):
        store.write(b"newer")
    assert FileNvram(path).read() == b"state"


def test_m9_a_failed_write_stops_all_further_writes(
    path: Path, started: FileNvram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write raises, later ones are refused though the disk works again, and the file has the old content."""
    started.write(b"old")

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", broken)
        with pytest.raises(NvramFailed, match="Input/output error"):
            started.write(b"new")
    with pytest.raises(NvramFailed, match="earlier write failed"):
        started.write(b"newer")
    assert started.read() == b"old"
    assert FileNvram(path).read() == b"old"


def test_short_writes_are_continued(path: Path, started: FileNvram, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operating system that takes a few bytes at a time still ends with the whole content."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:7], offset))
    started.write(b"payload" * 100)
    assert read_nvram(path)[1] == b"payload" * 100


def test_a_start_is_durable_before_it_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is synced before it replaces the old one, and the directory after."""
    order: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        order.append("directory" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file")
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        order.append("replace")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    store = FileNvram(path)
    store.start(1)
    assert order == ["file", "replace", "directory"]
    store.close()


def test_a_write_is_durable_before_it_returns(path: Path, started: FileNvram, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes go through a descriptor on which each write is a synchronous one, into the very file."""
    seen: list[int] = []
    real = os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        seen.append(descriptor)
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    started.write(b"x")
    assert all(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DSYNC for descriptor in seen)
    assert [os.fstat(descriptor).st_ino for descriptor in seen] == [path.stat().st_ino]


def test_reading_beside_a_writer(path: Path, started: FileNvram) -> None:
    """A reader without the lock never calls a file corrupt that is only being written."""
    stop = threading.Event()

    def write() -> None:
        for number in range(10_000):
            if stop.is_set():
                return
            started.write(bytes([number % 256]) * 3000)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            payload = read_nvram(path)[1]
            assert payload == payload[:1] * len(payload)
    finally:
        stop.set()
        writer.join()
