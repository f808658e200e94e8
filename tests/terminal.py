"""Run a command on a pseudo-terminal of a chosen width, as an operator at a window sees it."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence

from tests.patience import PROGRAM_S

COLUMNS = 80  # what a fresh terminal window has
LINES = 24
WAIT_S = PROGRAM_S


def run_on_terminal(arguments: Sequence[str], *, columns: int = COLUMNS) -> tuple[int, str]:
    """Run `juicebox-hsm ARGUMENTS` with a terminal for input and output; return its exit code and what it printed."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(
        [sys.executable, "-m", "roles", *arguments],
        stdin=slave, stdout=slave, stderr=slave, env={**environment, "TERM": "xterm"},
    ) as process:  # fmt: skip
        os.close(slave)
        printed = read_all(master)
        code = process.wait(WAIT_S)
    os.close(master)
    return code, printed.decode().replace("\r\n", "\n")


def read_all(master: int) -> bytes:
    """Read until the last process on the terminal has ended, which Linux reports as EIO."""
    parts: list[bytes] = []
    while True:
        try:
            part = os.read(master, 65536)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            part = b""
        if not part:
            return b"".join(parts)
        parts.append(part)


def words_of(table: str) -> list[str]:
    """Return the words of a printed table or list of blocks, columns' names included; without borders and colons."""
    lines = [line for line in table.splitlines() if not line.startswith("+")]
    return [word for line in lines for word in line.replace("|", " ").replace(": ", " ").split()]
