"""A system without room for another thread, as `RLIMIT_NPROC`, a cgroup or the memory's limit make it."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import trio

from juicebox_hsm.adapters.process.threads import NoThread, in_thread, in_thread_or_here

PROGRAM = """
import resource, threading, trio
from juicebox_hsm.adapters.process.threads import NoThread, in_thread, in_thread_or_here

async def main():
    try:
        await in_thread(print, "another")
    except NoThread:
        await in_thread_or_here(print, "here")

threading.stack_size(256 << 20)  # more than is left, while the interpreter's own needs are met
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
trio.run(main)
"""


def test_a_real_system_without_threads() -> None:
    """The interpreter's own words for it are recognised, and short work is done all the same."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "here\n"), done.stderr


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every start of a thread fail as the interpreter does."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(trio._core._thread_cache.THREAD_CACHE, "_idle_workers", {})


@pytest.mark.usefixtures("no_threads")
async def test_errors_of_the_work_are_its_own() -> None:
    """Only a thread that did not start is "no thread"; a permit of the limiter is given back."""
    limiter = trio.CapacityLimiter(1)

    def fail() -> None:
        raise RuntimeError("of the work")

    with pytest.raises(NoThread):
        await in_thread(fail, limiter=limiter)
    assert limiter.borrowed_tokens == 0
    with pytest.raises(RuntimeError, match="of the work"):
        await in_thread_or_here(fail)
