"""Writes lines to a descriptor without ever making who has something to say wait for who reads it.

A full pipe, a terminal stopped with Ctrl-S and a stalled disk all stop the writer of a descriptor, for as long as they
like. Here that is a thread of its own behind a bounded queue; whatever finds the queue full is dropped and counted.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from typing import Final

QUEUE_BYTES_MAX: Final = 1 << 20
"""Most that waits for a reader (own): a few thousand lines, more than any start or burst says."""

CHUNK_BYTES: Final = 1 << 16
"""Most that is written at once: what a pipe of Linux takes."""


class LineWriter:
    """Lines on their way to `descriptor`. Any thread may use it; only `flush` waits, and not for long."""

    def __init__(self, descriptor: int, bytes_max: int = QUEUE_BYTES_MAX) -> None:
        self.dropped = 0
        """Lines that nobody will see, since the start: the queue was full, or the output closed."""
        self._descriptor = descriptor
        self._bytes_max = bytes_max
        self._changed = threading.Condition()  # on an RLock: a finalizer may log while this thread is in `put`
        self._lines: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._untold = 0
        self._is_running = False

    def put(self, line: str) -> None:
        """Take a line to write, without its end, or count it as dropped."""
        encoded = line.encode("utf-8", "backslashreplace") + b"\n"
        with self._changed:
            if self._waiting_bytes + len(encoded) > self._bytes_max:
                self.dropped += 1
                self._untold += 1
                return
            self._lines.append(encoded)
            self._waiting_bytes += len(encoded)
            self._run()
            self._changed.notify_all()

    def take_untold(self) -> int:
        """Return how many lines found the queue full since the last time, 0 until there is room to say so."""
        with self._changed:
            if self._waiting_bytes > self._bytes_max // 2:
                return 0
            untold, self._untold = self._untold, 0
            return untold

    def flush(self, patience_s: float) -> bool:
        """Wait until everything is written, for at most `patience_s`; tell whether it is."""
        with self._changed:
            self._run()
            return self._changed.wait_for(lambda: self._waiting_bytes == 0, patience_s)

    def _run(self) -> None:
        """Start the thread. A system that has none left gets asked again with the next line; this one waits."""
        if not self._is_running:
            try:
                threading.Thread(target=self._write_for_ever, name="log lines", daemon=True).start()
            except RuntimeError:
                return
            self._is_running = True

    def _write_for_ever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._lines))
                lines = [self._lines.popleft()]
                size = len(lines[0])
                while self._lines and size + len(self._lines[0]) <= CHUNK_BYTES:
                    size += len(self._lines[0])
                    lines.append(self._lines.popleft())
            is_written = self._write(b"".join(lines))
            with self._changed:
                self._waiting_bytes -= size
                self.dropped += 0 if is_written else len(lines)
                self._changed.notify_all()

    def _write(self, content: bytes) -> bool:
        """Write all of it, however long that takes; False when the output is closed or broken."""
        while content:
            try:
                content = content[os.write(self._descriptor, content) :]
            except BlockingIOError:  # somebody who shares the descriptor made it so
                _wait_for_room(self._descriptor)
            except OSError:
                return False
        return True


def _wait_for_room(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    poll.poll()


def write_in_time(descriptor: int, text: str, patience_s: float) -> bool:
    """Write `text` as the last words of a process; False when nobody took them within `patience_s`."""
    until = time.monotonic() + patience_s
    writer = LineWriter(descriptor, bytes_max=len(text) * 8 + 1)
    writer.put(text)
    return writer.flush(until - time.monotonic()) and writer.dropped == 0
