"""The leadership machine against its transcripts: what it does is read as text, and changes as a diff.

`pytest tests/host/test_transcripts.py --update-transcripts` writes what comes out.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from juicebox_hsm.host.leadership import events
from juicebox_hsm.host.leadership.machine import _HANDLERS
from tests.host.script import play

SCENARIOS = sorted((Path(__file__).parent / "transcripts").glob("*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_transcript(path: Path, request: pytest.FixtureRequest) -> None:
    """The machine does what its transcript says, and every step keeps the contract that `script` checks."""
    played = play(path)
    if request.config.getoption("--update-transcripts"):
        path.write_text(played, encoding="utf-8")
    assert played == path.read_text(encoding="utf-8")


def test_every_event_is_handled_and_told_of() -> None:
    """Each event has its handler, and occurs in some transcript."""
    known = {kind.__name__ for kind in events.Event.__args__}
    assert {kind.__name__ for kind in _HANDLERS} == known
    told = {line.split()[1] for path in SCENARIOS for line in path.read_text().splitlines() if line.startswith("> ")}
    assert told == known
