"""The chaos harness as its users run it: one short seed against real processes, and proof that it can see a lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from roles.tools.chaos.plan import Action, Kind, Shape, make_plan
from tests.patience import PROGRAM_S

pytestmark = pytest.mark.processes

CHAOS = [sys.executable, "-m", "roles", "chaos"]


def _chaos(*arguments: str | int | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CHAOS, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )


WANTED = (
    {Kind.KILL},
    {Kind.SHORT_PAUSE, Kind.LONG_PAUSE},
    {Kind.RESTART_ALL},
    {Kind.CUT},
    {Kind.DISK_FULL},
    {Kind.NVRAM_FAILS},
    {Kind.DUEL, Kind.BOTH_MANAGERS},
)
"""What a run of the usual size has to do: one of each of these."""

DURATION_S = 30
SHAPE = Shape(agents=3, managers=2, load_balancers=2)


def _kills_an_agent(action: Action) -> bool:
    return action.kind is Kind.KILL and action.target in {"leader", "witness", *SHAPE.agent_names}


def _cuts_two_members(action: Action) -> bool:
    ends = {action.target, action.other}
    return action.kind is Kind.CUT and len(ends) == 2 and ends <= {"leader", "witness", *SHAPE.agent_names}


def _wanted_plan() -> tuple[int, list[Action]]:
    """Return the first seed whose plan has everything, and the plan; a change of the planner only moves the seed."""
    for seed in range(100_000):
        plan = make_plan(seed, DURATION_S, SHAPE)
        kinds = {action.kind for action in plan}
        if (
            all(kinds & wanted for wanted in WANTED)
            and any(map(_kills_an_agent, plan))
            and any(map(_cuts_two_members, plan))
        ):
            return seed, plan
    raise AssertionError("no seed has everything")


def test_a_short_run_has_no_violation(tmp_path: Path) -> None:
    """Kills, pauses, cuts, a full disk, a lost HSM, duels: each guess is counted once, and the realm comes back."""
    seed, plan = _wanted_plan()
    report_file = tmp_path / "report.json"
    result = _chaos(
        "--seed", seed, "--duration", DURATION_S, "--users", 8, "--state-dir", tmp_path / "realm",
        "--json", report_file,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(report_file.read_text())
    assert report["violations"] == []
    assert report["plan"] == [str(action) for action in plan]
    for wanted in WANTED:
        assert any(line.split()[2] in {kind.value for kind in wanted} for line in report["plan"]), wanted
    done = {text.split()[3] for text in report["events"] if "#" in text}
    assert done >= {action.kind.value for action in plan}, "every kind says what it did"
    assert report["barriers"] >= 2, "everything was restarted during the run and after it"
    assert report["counts"]["recover: ok"] > 20
    assert report["counts"]["recover: invalid pin"] > 10
    assert all(line in result.stdout for line in report["plan"]), "the plan is printed"
    assert len(report["events"]) > len(report["plan"]), "every action says what it did, and the end says it is healed"


def test_a_lost_hsm_is_revived(tmp_path: Path) -> None:
    """With nothing but failing NVRAM: agents end with status 75, are started again, and no guess is lost or gained."""
    report_file = tmp_path / "report.json"
    result = _chaos(
        "--seed", 1, "--duration", 15, "--users", 8, "--only", "nvram-fails", "--state-dir", tmp_path / "realm",
        "--json", report_file,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(report_file.read_text())
    assert [text for text in report["exits"] if "exited with status 75" in text], report["events"]
    assert report["violations"] == []
    assert any("lost its HSM" in text for text in report["events"])


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
        timeout=PROGRAM_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 5, result.stdout + result.stderr
    assert "VIOLATION: user user" in result.stdout
    assert "no order of requests explains the call marked >" in result.stdout


@pytest.mark.parametrize("store", [pytest.param("bigtable", marks=pytest.mark.emulator)], indirect=True)
def test_a_short_run_on_bigtable_has_no_violation(tmp_path: Path, store: str) -> None:
    """Kills and appends of unknown outcome on Bigtable: every guess is counted once, and the realm comes back."""
    shape = ("--managers", 1, "--load-balancers", 1, "--users", 4, "--store", store)
    kinds = ("--only", "kill,store-down,lost-replies")
    result = _chaos("--seed", 2, "--duration", 10, *shape, *kinds, "--state-dir", tmp_path / "realm")
    assert result.returncode == 0, result.stdout + result.stderr
