"""The program that measures large stores, on a small one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.processes]

SCRIPT = Path(__file__).parents[2] / "scripts" / "store-scale"


def test_a_worn_store_is_whole_small_and_its_damage_is_found(tmp_path: Path) -> None:
    """After 10,000 requests of 2,000 users the check finds nothing but each planted damage, and no row is left over."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--records", "2000", "--mutations", "10000", "--json", "--directory", tmp_path],
        capture_output=True, text=True, timeout=600, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["problems"] == []
    assert figures["checked"]["records"] == 2000
    assert figures["checked"]["verified_macs"] == figures["checked"]["entries"] > 0
    assert len(figures["damage"]) == 5
    assert all(one["found"] for one in figures["damage"].values())
    assert list(tmp_path.iterdir()) == [], "its files are gone"
