"""Short forms of the drills on a balancer: reloads under load, every flood for a moment (load-balancer.md 2, 3)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.client.reloads import drill
from tests.patience import PROGRAM_S

pytestmark = pytest.mark.processes

FLOOD = Path(__file__).parents[2] / "scripts" / "flood"


async def test_reloads_under_load(tmp_path: Path) -> None:
    """Certificates change under traffic: no request fails, and a pair that does not match is reported and not used."""
    tally = await drill(tmp_path, reloads=6, users=6, pause_s=0.05)
    assert tally.failures == []
    assert (len(tally.waits_ms), tally.wrong_pairs) == (6, 1)
    assert tally.recovers >= 10


@pytest.mark.slow
def test_floods_in_short(tmp_path: Path) -> None:
    """Honest clients are served during every flood, memory stays bounded, and all of it ends with the flood."""
    command = [sys.executable, "-m", "roles", "demo", "--pin-hashing", "FastInsecure", "--agents", "1"]
    command += ["--state-dir", str(tmp_path), "--", str(FLOOD), "--seconds", "2", "--connections", "600"]
    command += [
        "--p99-ms",
        "2000",
    ]  # tests share their machine; the program judges latencies where it has one of its own
    settings = {**os.environ, "JUICEBOX_HSM_MAX_CONNECTIONS": "400"}  # the crowds must be evicted, too
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_S, check=False, env=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everything recovered" in done.stdout
    assert " 0 evicted" not in done.stdout
