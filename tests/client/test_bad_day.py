"""The short form of the bad day: dangerous states on real demos, named by everybody who has to name them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.client.bad_day.day import TOLD_S, Channel, Heard, Report
from tests.client.bad_day.running import STATES
from tests.patience import PROGRAM_S

SCRIPT = Path(__file__).parents[2] / "scripts" / "bad-day"
SHORT = ("second-demo", "clock-ahead", "nvram-fails")


@pytest.mark.processes
def test_states_are_named(tmp_path: Path) -> None:
    """Each channel of each state names it, within what the script listens; late on a slow machine is status 5."""
    written = tmp_path / "heard.json"
    chosen = [word for name in SHORT for word in ("--only", name)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *chosen, "--json", str(written)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROGRAM_S, check=False,
    )  # fmt: skip
    reports = json.loads(written.read_text())
    assert [report["state"] for report in reports] == list(SHORT), done.stderr
    for report in reports:
        assert {heard["channel"] for heard in report["heard"]} == set(STATES[report["state"]].says)
        assert all(heard["after_s"] is not None for heard in report["heard"]), done.stdout
    assert done.returncode == (5 if any(report["silent"] for report in reports) else 0), done.stderr


def _report(after_s: float | None, *, mended: bool = False, back_s: float | None = None) -> Report:
    return Report("name", "what", (Heard(Channel.LOG, after_s, "text"),), "client", 0.0, mended, back_s, "amiss")


def test_what_counts_as_silent() -> None:
    """Late, never, and a realm that does not come back are silent; nothing else is."""
    assert _report(TOLD_S).silent == []
    assert _report(TOLD_S + 0.1).silent == ["log"]
    assert _report(None).silent == ["log"]
    assert _report(1.0, mended=True).silent == ["back"]
    assert _report(1.0, mended=True, back_s=50.0).silent == []
    assert "NEVER: amiss" in "\n".join(_report(1.0, mended=True).lines())
