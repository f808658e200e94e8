"""A test that hangs is stopped, says where it hung, and does not take the others with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.patience import PROGRAM_S

HOOKS = ("protocol", "setup", "call", "teardown")
CONFTEST = f"from tests.time_limit import {', '.join('pytest_runtest_' + hook for hook in HOOKS)}\n"
TESTS = """
import threading

import pytest
import trio


@pytest.mark.time_limit(1)
async def test_waits():
    await trio.sleep_forever()


@pytest.mark.time_limit(1)
async def test_spins():
    while True:
        await trio.sleep(0)


@pytest.mark.time_limit(1)
def test_hangs_in_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


@pytest.mark.time_limit(1)
async def test_cleans_up(tmp_path):
    try:
        await trio.sleep_forever()
    finally:
        (tmp_path.parent.parent / "cleaned up").touch()


async def test_goes_on():
    await trio.sleep(0)
"""
INI = "[pytest]\ntrio_mode = true\nmarkers = time_limit(seconds)\n"


def test_hanging_tests_fail_with_stacks_and_others_go_on(tmp_path: Path) -> None:
    """Whether it waits, spins or blocks, a hanging test fails alone, and stderr tells its stack."""
    for name, text in (("conftest.py", CONFTEST), ("test_some.py", TESTS), ("pytest.ini", INI)):
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--basetemp={tmp_path / 'temporary'}",
            "--rootdir",
            str(tmp_path),
            str(tmp_path),
        ],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        check=False,
    )
    assert "4 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    for name in ("test_waits", "test_spins", "test_hangs_in_a_lock"):
        assert f"{name} hangs after" in done.stderr
    assert (tmp_path / "cleaned up").exists()
    assert "in test_hangs_in_a_lock" in done.stderr
