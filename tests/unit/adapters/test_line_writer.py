"""Lines on their way to an output that may not be read."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from juicebox_hsm.adapters.observation.line_writer import LineWriter, write_in_time
from tests.patience import HANGS_S

QUEUE_BYTES = 1000
SOON_S = 0.01


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Make a pipe: reader, writer."""
    ends = os.pipe()
    yield ends
    for end in ends:
        with suppress(OSError):
            os.close(end)


def _fill(writer: int) -> int:
    """Write until nothing more fits; return how many bytes that took."""
    os.set_blocking(writer, False)
    size = 0
    with suppress(BlockingIOError):
        while True:
            size += os.write(writer, bytes(select.PIPE_BUF))
    os.set_blocking(writer, True)
    return size


def _read(reader: int, size: int) -> bytes:
    found = b""
    while len(found) < size:
        found += os.read(reader, size - len(found))
    return found


def test_lines_arrive_in_order(pipe: tuple[int, int]) -> None:
    """What is put is written, whole and in order, and after `flush` all of it is."""
    reader, writer = pipe
    lines = LineWriter(writer)
    for number in range(100):
        lines.put(f"line {number} ä\udcff")
    assert lines.flush(HANGS_S)
    expected = "".join(f"line {number} ä\\udcff\n" for number in range(100)).encode()
    assert _read(reader, len(expected)) == expected
    assert lines.dropped == 0


@pytest.mark.parametrize("is_blocking", [True, False])
def test_a_full_output_costs_lines_and_nothing_else(pipe: tuple[int, int], is_blocking: bool) -> None:
    """Nobody waits for a reader; what finds the queue full is counted, and told only when there is room again."""
    reader, writer = pipe
    size = _fill(writer)
    os.set_blocking(writer, is_blocking)
    lines = LineWriter(writer, QUEUE_BYTES)
    for _ in range(25):
        lines.put("x" * 99)
    assert lines.dropped == 15
    assert lines.take_untold() == 0, "said while nobody listens"
    assert not lines.flush(SOON_S)
    _read(reader, size + QUEUE_BYTES)
    assert lines.flush(HANGS_S)
    assert (lines.take_untold(), lines.take_untold()) == (15, 0)


def test_a_closed_output_is_counted(pipe: tuple[int, int]) -> None:
    """A reader that is gone for good keeps nobody waiting, and is visible in the count."""
    reader, writer = pipe
    os.close(reader)
    lines = LineWriter(writer)
    lines.put("lost")
    assert lines.flush(HANGS_S)
    assert lines.dropped == 1


def test_a_system_without_threads_delays_lines(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that cannot be started is asked for again with the next line, which brings the first."""
    reader, writer = pipe
    lines = LineWriter(writer)
    start = threading.Thread.start

    def fails(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fails)
    lines.put("first")
    monkeypatch.setattr(threading.Thread, "start", start)
    lines.put("second")
    assert lines.flush(HANGS_S)
    assert _read(reader, 13) == b"first\nsecond\n"


def test_last_words_are_written_or_given_up(pipe: tuple[int, int]) -> None:
    """Why a process ends is said if somebody listens, and keeps it from ending for a bounded time if not."""
    reader, writer = pipe
    assert write_in_time(writer, "error: this", HANGS_S)
    assert _read(reader, 12) == b"error: this\n"
    _fill(writer)
    assert not write_in_time(writer, "error: this", SOON_S)
