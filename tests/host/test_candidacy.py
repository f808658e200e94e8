"""What keeps a candidate from leading, and which of it may pass (agent.md 9)."""

from __future__ import annotations

import pytest

from juicebox_hsm.errors import InvariantViolation
from juicebox_hsm.host.candidacy import (
    TRAILING_CAPTURE_MAX,
    Obstacle,
    ObstacleCode,
    judge_refusal,
    judge_tail,
    pause_before_again,
)
from juicebox_hsm.hsm.messages import NotCaptured, Outcome
from tests.host.script import entry

FAR = TRAILING_CAPTURE_MAX + 10


@pytest.mark.parametrize(
    ("last", "asked", "position", "expected"),
    [
        (None, None, 1, Obstacle(ObstacleCode.LOG_EMPTY)),
        (7, 8, 8, Obstacle(ObstacleCode.LOG_SHORTER, 7)),
        (7, 6, 8, Obstacle(ObstacleCode.LOG_LONGER, 7)),
        (7, 7, 8, None),
        (7, None, 8, None),
        (7, None, 7, Obstacle(ObstacleCode.CATCHING_UP, 6)),
        (7, None, 1, Obstacle(ObstacleCode.CATCHING_UP)),
        (FAR, None, 11, Obstacle(ObstacleCode.CATCHING_UP, 10)),
        (FAR, None, 10, Obstacle(ObstacleCode.FAR_BEHIND, 9)),
    ],
)
def test_where_the_log_ends(last: int | None, asked: int | None, position: int, expected: Obstacle | None) -> None:
    """The asked end, the log's end and what our HSM captured decide, in this order."""
    assert judge_tail(None if last is None else entry(str(last)), asked, position) == expected


def test_what_may_pass() -> None:
    """Only the store, a log that is still growing and a capture close behind are worth another try."""
    passing = {code for code in ObstacleCode if Obstacle(code).may_pass}
    assert passing == {ObstacleCode.LOG_NOT_READ, ObstacleCode.LOG_SHORTER, ObstacleCode.CATCHING_UP}


def test_what_may_pass_is_tried_until_the_deadline() -> None:
    """Pauses grow from 2 ms to 50 ms; a pause that would outlast the deadline is none, nor is one for nothing."""
    passing, lasting = Obstacle(ObstacleCode.CATCHING_UP), Obstacle(ObstacleCode.FAR_BEHIND)
    assert [pause_before_again(passing, attempt, 5.0) for attempt in (1, 2, 5, 6, 99)] == [
        0.002, 0.004, 0.032, 0.05, 0.05,
    ]  # fmt: skip
    assert pause_before_again(passing, 99, 0.05) is None
    assert pause_before_again(passing, 1, -1.0) is None
    assert pause_before_again(lasting, 1, 5.0) is None


def test_what_the_hsm_says() -> None:
    """Each refusal of the HSM has its code; any other answer is a bug."""
    last = entry("7")
    assert judge_refusal(NotCaptured(2), last) == Obstacle(ObstacleCode.CATCHING_UP, 2)
    assert judge_refusal(NotCaptured(None), last) == Obstacle(ObstacleCode.CATCHING_UP)
    assert judge_refusal(Outcome.STEPDOWN_IN_PROGRESS, last).code is ObstacleCode.STEPPING_DOWN
    assert judge_refusal(Outcome.INVALID_MAC, last).code is ObstacleCode.LOG_DAMAGED
    with pytest.raises(InvariantViolation):
        judge_refusal(Outcome.BUSY, last)
