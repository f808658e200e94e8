"""Whole realms, each from one seed (docs/reliability.md). In a folder of its own, for it takes minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEEDS = "1..200"  # some two minutes on two processors; scripts/release-checks runs thousands
TIMEOUT_S = 3600  # minutes on a quiet machine; a busy one only takes longer


@pytest.mark.time_limit(TIMEOUT_S + 60)
def test_realms_keep_every_rule() -> None:
    """No seed of a mixed batch breaks a rule; one that does is printed with the command that replays it."""
    done = subprocess.run(
        [sys.executable, "-m", "roles", "simulate", "--seeds", SEEDS, "--jobs", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
