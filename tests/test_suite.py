"""The suite's own rules: any order, no log lines inherited, no program left unchecked."""

from __future__ import annotations

import itertools
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from juicebox_hsm.adapters.observation import logging
from tests.order import shuffled


@dataclass(frozen=True)
class _Test:
    nodeid: str


TESTS = [_Test(f"tests/{file}.py::{name}[{n}]") for file in "abcd" for name in "xyz" for n in range(3)]
CLASSES = [_Test(f"tests/e.py::{group}::{name}[a::b]") for group in ("One", "Two") for name in "xyz"]


def test_a_seed_is_an_order() -> None:
    """One seed gives one order, whatever the order of collection; others give others; no test is lost."""
    first = shuffled(TESTS, 1)
    assert first == shuffled(reversed(TESTS), 1)
    assert sorted(first, key=lambda test: test.nodeid) == sorted(TESTS, key=lambda test: test.nodeid)
    assert len({tuple(shuffled(TESTS, seed)) for seed in range(10)}) == 10


@pytest.mark.parametrize("seed", range(5))
def test_what_shares_fixtures_stays_together(seed: int) -> None:
    """The tests of a file follow each other, and so do those of a class: shared fixtures are made once."""
    order = shuffled([*TESTS, *CLASSES], seed)
    files = [file for file, _ in itertools.groupby(order, lambda test: test.nodeid.split("::")[0])]
    assert sorted(files) == [f"tests/{file}.py" for file in "abcde"]
    groups = [
        group for group, _ in itertools.groupby(order, lambda test: test.nodeid.partition("::")[2].split("::")[0])
    ]
    assert sum(group in {"One", "Two"} for group in groups) == 2


@pytest.mark.parametrize("turn", range(2))
def test_the_log_is_fresh(turn: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever tests before did to logging, a warning appears, in JSON, on stdout, once per second and place."""
    log = logging.get_logger("test")
    for _ in range(2):
        log.warning("here")
    assert capsys.readouterr().out.count('"message": "here"') == 1
    logging.configure("error", json=False)


def test_every_program_is_checked() -> None:
    """Programs without an ending are found by neither ruff nor mypy: pyproject.toml names each for both."""
    root = Path(__file__).parent.parent
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]
    found = [path for path in sorted((root / "scripts").iterdir()) if "python" in path.read_text().split("\n")[0]]
    programs = [f"scripts/{path.name}" for path in found]
    assert settings["ruff"]["extend-include"] == programs
    assert [path for path in settings["mypy"]["files"] if path.startswith("scripts/")] == programs


def test_every_drill_is_run_before_a_release() -> None:
    """A drill nobody starts shows nothing: `scripts/release-checks` runs each, and CONTRIBUTING.md names each."""
    root = Path(__file__).parent.parent
    modules = (root / "tests" / "client").glob("*.py")
    drills = {path.stem for path in modules if '__name__ == "__main__"' in path.read_text()} - {"scenarios"}
    started = set(re.findall(r'drill\("(\w+)"', (root / "scripts" / "release-checks").read_text()))
    (row,) = (line for line in (root / "CONTRIBUTING.md").read_text().splitlines() if "python -m tests.client" in line)
    assert started == drills, "`scenarios` is run by the suite"
    assert set(re.findall(r"`(\w+)`", row)) == drills
