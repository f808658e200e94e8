"""Measuring a realm that is started for it, and comparing what came out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PROGRAM_S

pytestmark = pytest.mark.processes


def test_a_realm_is_measured_and_compared(tmp_path: Path) -> None:
    """`bench hsm` builds a realm, balances it, measures every step without an error and cleans up after itself."""
    program = [sys.executable, "-m", "roles", "bench"]
    result = tmp_path / "result.json"
    ended = subprocess.run(
        [*program, "hsm", "--num-agents", "3", "--groups", "2", "--count", "6", "--json", str(result)],
        capture_output=True, text=True, timeout=PROGRAM_S, check=False, env={"TMPDIR": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(result.read_text())
    assert [(one["op"], one["count"], one["errors"]) for one in figures] == [
        ("register", 6, 0), ("recover", 6, 0), ("delete", 6, 0),
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [result], "the temporary realm is gone"
    compared = subprocess.run(
        [*program, "compare", str(result), str(result)], capture_output=True, text=True, timeout=PROGRAM_S, check=False
    )
    assert compared.returncode == 0, compared.stderr
