"""A process with keys in memory leaves no core file and admits no debugger of its own user."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import ctypes, resource
from juicebox_hsm.adapters.process.memory_guard import forbid_dumps
forbid_dumps()
print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""


def test_no_core_and_not_dumpable() -> None:
    """The core limit is 0 for good and the kernel reports the process as not dumpable."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["(0,", "0)", "0"]
