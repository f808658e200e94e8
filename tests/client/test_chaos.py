"""The chaos harness as its users run it: one short seed against real processes, and proof that it can see a lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

CHAOS = [sys.executable, "-m", "roles", "chaos"]


def _chaos(*arguments: str | int | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CHAOS, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_a_short_run_of_a_fixed_seed_has_no_violation(tmp_path: Path) -> None:
    """Kills, pauses, cuts, a bad store and duels for 20 s: every guess is counted once, and the realm comes back."""
    report_file = tmp_path / "report.json"
    result = _chaos(
        "--seed", 7, "--duration", 20, "--users", 8, "--state-dir", tmp_path / "realm", "--json", report_file
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(report_file.read_text())
    assert report["violations"] == []
    assert report["barriers"] >= 2, "everything was restarted during the run and after it"
    assert report["counts"]["recover: ok"] > 50
    assert report["counts"]["recover: invalid pin"] > 20
    assert all(line in result.stdout for line in report["plan"]), "the plan is printed"
    assert len(report["events"]) > len(report["plan"]), "every action says what it did, and the end says it is healed"


_SABOTAGE = """
import sys
if "agent" in sys.orig_argv:
    from juicebox_hsm.hsm import records
    honest, calls = records._recover2, []
    def forgetful(record, *rest):
        effect = honest(record, *rest)
        calls.append(1)
        return records.Effect(effect.reply, effect.result, record) if len(calls) % 2 == 0 else effect
    records._recover2 = forgetful
"""


def test_a_realm_that_forgets_guesses_is_found_out(tmp_path: Path) -> None:
    """With an HSM that forgets every other guess, the run ends with exit status 5 and shows the user's history."""
    (tmp_path / "sitecustomize.py").write_text(_SABOTAGE)
    result = subprocess.run(
        [*CHAOS, "--seed", "1", "--duration", "6", "--agents", "1", "--users", "8", "--only", "slow-store"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 5, result.stdout + result.stderr
    assert "VIOLATION: user user" in result.stdout
    assert "no order of requests explains the call marked >" in result.stdout
