"""The file backend of NVRAM: atomic, durable, fail-stop, and a role clock that never repeats."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from juicebox_hsm.adapters import nvram
from juicebox_hsm.adapters.nvram import CLOCK_STEP, FileNvram, NvramFailed, read_nvram
from juicebox_hsm.errors import LocalError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a fresh NVRAM file."""
    FileNvram.create(tmp_path / "nvram")
    return tmp_path / "nvram"


def test_fresh_file_is_a_first_start(path: Path) -> None:
    """A new file reads as empty and is private to its owner."""
    assert FileNvram(path).read() == b""
    assert path.stat().st_mode & 0o777 == 0o600


def test_writes_survive_reopening(path: Path) -> None:
    """What was written is what the next life reads; the largest payload fits."""
    for payload in (b"x", b"\xff" * 4000, b""):
        FileNvram(path).write(payload)
        assert FileNvram(path).read() == payload


def test_i19_clock_starts_rise_even_when_the_wall_clock_does_not(path: Path) -> None:
    """Each start is above everything the life before could use, with the wall clock set back too."""
    starts = []
    for now_ms in (10**12, 10**12, 5, 10**13):
        store = FileNvram(path)
        starts.append(store.start(now_ms))
        store.write(b"state")
        assert read_nvram(path) == (starts[-1], b"state")
    assert starts == [10**12, 10**12 + CLOCK_STEP, 10**12 + 2 * CLOCK_STEP, 10**13]


@pytest.mark.parametrize("position", [0, 9, 16, 18, 20, -1])
def test_m8_corruption_is_refused(path: Path, position: int) -> None:
    """A flipped byte anywhere stops the start; the message names the file and the way out."""
    FileNvram(path).write(b"payload")
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(LocalError, match=r"nvram.*hsm init"):
        FileNvram(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 10, b"\0" * 100, b"\0" * 10000])
def test_m8_truncated_or_foreign_files_are_refused(path: Path, content: bytes) -> None:
    """An empty, short, foreign or oversized file is not a first start."""
    path.write_bytes(content)
    with pytest.raises(LocalError, match="nvram"):
        FileNvram(path)


def test_m8_missing_file_is_not_a_first_start(path: Path) -> None:
    """Losing the file must not silently make a new HSM."""
    path.unlink()
    with pytest.raises(LocalError, match="No such file"):
        FileNvram(path)


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace", "directory"])
def test_m9_failure_at_each_step_stops_all_further_writes(
    path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever step fails, the write raises, later ones are refused, and the file is the old or the new content."""
    store = FileNvram(path)
    store.write(b"old")
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
            store.write(b"new")
    with pytest.raises(NvramFailed, match="earlier write failed"):
        store.write(b"newer")
    assert store.read() == b"old"
    assert FileNvram(path).read() == (b"new" if step == "directory" else b"old")


def test_short_writes_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operating system that takes a few bytes at a time still ends with the whole content."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:7])))
    FileNvram(path).write(b"payload" * 100)
    assert read_nvram(path)[1] == b"payload" * 100


def test_durable_before_return(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    FileNvram(path).write(b"x")
    assert order == ["file", "replace", "directory"]
