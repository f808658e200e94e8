"""`scripts/fuzz`: what it finds is kept and tried first by the next run, and what it did not finish is not passed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.scripts import FOLDER, load_script

FUZZ = load_script("fuzz")
ROOT = FOLDER.parent
OK, FOUND, CUT_OFF = FUZZ.Outcome.OK, FUZZ.Outcome.FOUND, FUZZ.Outcome.CUT_OFF

PLANTED = '''
"""A target with a bug."""

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

TRIED = Path(__file__).with_name("tried")


@given(st.integers(0, 2**32))
def test_planted(number):
    """Fail for large numbers."""
    with TRIED.open("a") as tried:
        tried.write(f"{number}\\n")
    if number > 1_000_000 and os.environ.get("PLANTED") == "bug":
        raise ValueError(number)
    if number > 1_000_000 and os.environ.get("PLANTED") == "death":
        if Path(__file__).with_name("died").exists():
            os._exit(9)
        Path(__file__).with_name("died").touch()
        raise ValueError(number)
'''


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Write the target."""
    path = tmp_path / "test_planted.py"
    path.write_text(PLANTED)
    return path


def _tried(planted: Path) -> list[int]:
    """Return the numbers tried since the last time, in order."""
    path = planted.with_name("tried")
    numbers = [int(line) for line in path.read_text().splitlines()]
    path.unlink()
    return numbers


def _round(planted: Path, limit_s: float = 250.0) -> object:
    fuzz = FUZZ.Fuzz(sys.executable, planted.parent / "found")
    return fuzz.round("planted", str(planted), 500, limit_s)


def test_what_is_found_is_kept_and_replayed(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest failing example is the first that the next round tries, and the first of an ordinary test run."""
    assert _round(planted) is OK
    assert len(_tried(planted)) >= 400
    monkeypatch.setenv("PLANTED", "bug")
    assert _round(planted) is FOUND
    smallest = min(number for number in _tried(planted) if number > 1_000_000)
    (report,) = (planted.parent / "found").glob("planted-*.txt")
    assert f"number={smallest}" in report.read_text()

    assert _round(planted) is FOUND
    assert _tried(planted)[0] == smallest

    ordinary = [sys.executable, "-m", "pytest", "-q", "-p", "tests.examples", "-p", "no:cacheprovider"]
    ordinary += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), str(planted)]
    environment = {**os.environ, "FUZZ_FOUND": str(planted.parent / "found"), "HYPOTHESIS_PROFILE": "default"}
    done = subprocess.run(ordinary, cwd=ROOT, env=environment, capture_output=True, timeout=250, check=False)
    assert done.returncode == 1
    assert _tried(planted)[0] == smallest


def test_a_round_that_dies_is_a_finding(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends before it could tell has found something, and kept it."""
    monkeypatch.setenv("PLANTED", "death")
    assert _round(planted) is FOUND
    assert FUZZ.Fuzz("", planted.parent / "found").kept()


def test_a_round_cut_off_is_not_passed(planted: Path) -> None:
    """A target that does not end within its share of the time says nothing; if no round ends, the run fails."""
    planted.write_text('def test_hangs():\n    """Hang."""\n    import time\n    time.sleep(600)\n')
    tally = FUZZ.run_rounds(FUZZ.Fuzz(sys.executable, planted.parent / "found"), {"planted": str(planted)}, 0.05)
    assert tally == {"planted": Counter({CUT_OFF: 1})}
    assert FUZZ.report(tally) == 1


def test_verdicts() -> None:
    """An example kept by a round that was cut off is a finding; any other code than 0 is one, too."""
    assert FUZZ.verdict(None, is_new=False) is CUT_OFF
    assert FUZZ.verdict(None, is_new=True) is FOUND
    assert [FUZZ.verdict(code, is_new=False) for code in (0, 1, 2, 3, 4, 5, -9)] == [OK, *[FOUND] * 6]
    assert FUZZ.report({"one": Counter({OK: 3, CUT_OFF: 2}), "two": Counter({OK: 1})}) == 0
    assert FUZZ.report({"one": Counter({OK: 3}), "two": Counter({CUT_OFF: 1})}) == 1
    assert FUZZ.report({"one": Counter({OK: 3, FOUND: 1})}) == 1


def test_rounds_fit_the_time() -> None:
    """Rounds grow while they take a small part of the target's share of the time, and shrink when cut off."""
    assert FUZZ.next_examples(100, OK, took_s=1.0, share_s=30.0) == 200
    assert FUZZ.next_examples(4000, OK, took_s=1.0, share_s=30.0) == FUZZ.EXAMPLES_MAX
    assert FUZZ.next_examples(100, OK, took_s=10.0, share_s=30.0) == 100
    assert FUZZ.next_examples(100, CUT_OFF, took_s=30.0, share_s=30.0) == 50
    assert FUZZ.next_examples(1, CUT_OFF, took_s=30.0, share_s=30.0) == 1


def test_no_target_fixes_its_examples() -> None:
    """A fixed number of examples would hold in the long profile, too: targets say it with `tests.examples`."""
    for path in (ROOT / "tests").rglob("*.py"):
        assert path.name == "examples.py" or "max_examples=" not in path.read_text() or path == Path(__file__), path


def test_every_target_exists() -> None:
    """A target that was renamed is not left out in silence."""
    for path in FUZZ.TARGETS.values():
        assert (ROOT / path).exists(), path
