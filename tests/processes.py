"""Processes that tests start: what a test leaves, however it ends, is nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any, Final

END_S: Final = 10.0
"""Longest wait for killed processes to be gone."""


def start_group(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process as the leader of a group of its own, which `end_group` ends with all that it started."""
    return subprocess.Popen(command, start_new_session=True, **options)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all of its group, reap it, and wait for the others to be gone."""
    _kill(process.pid)
    process.wait()
    deadline = time.monotonic() + END_S
    while _kill(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)


def _kill(group: int) -> bool:
    """Kill a group; False when nothing of it is left."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
