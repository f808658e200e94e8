"""Whether a member may lead from the end of its log (agent.md 9).

There is no self-election: an agent leads when a manager says so or when it created the group. What keeps it from
leading either passes within moments, and is tried again until the deadline, or does not.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.errors import check
from juicebox_hsm.host.leadership.state import UNCOMMITTED_MAX
from juicebox_hsm.host.retry import FOREVER_S, RetryProfile
from juicebox_hsm.hsm.messages import NotCaptured, Outcome, Response

TRAILING_CAPTURE_MAX: Final = UNCOMMITTED_MAX
"""A candidate this close behind the log's end is waited for; further behind it is refused at once."""


class ObstacleCode(enum.Enum):
    """What keeps a candidate from leading."""

    LOG_NOT_READ = "log not read"
    LOG_EMPTY = "log empty"
    LOG_SHORTER = "log shorter"
    """The asked last entry has not appeared yet."""
    LOG_LONGER = "log longer"
    """Somebody wrote past the asked last entry."""
    CATCHING_UP = "catching up"
    FAR_BEHIND = "far behind"
    STEPPING_DOWN = "stepping down"
    INVALID_REALM = "invalid realm"
    INVALID_GROUP = "invalid group"
    LOG_DAMAGED = "log damaged"
    """The stored last entry cannot be read, or the HSM refuses its MAC."""
    STOPPING = "stopping"


_PASSING: Final = frozenset({ObstacleCode.LOG_NOT_READ, ObstacleCode.LOG_SHORTER, ObstacleCode.CATCHING_UP})
_OUTCOMES: Final = {
    Outcome.STEPDOWN_IN_PROGRESS: ObstacleCode.STEPPING_DOWN,
    Outcome.INVALID_REALM: ObstacleCode.INVALID_REALM,
    Outcome.INVALID_GROUP: ObstacleCode.INVALID_GROUP,
    Outcome.INVALID_MAC: ObstacleCode.LOG_DAMAGED,
}


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What keeps a candidate from leading. `index`: where the log ends, or what the candidate has captured."""

    code: ObstacleCode
    index: int | None = None

    @property
    def may_pass(self) -> bool:
        """Tell whether trying again within the deadline may help."""
        return self.code in _PASSING


LEAD_RETRY: Final = RetryProfile(0.002, 0.05, attempts_max=None, total_s=FOREVER_S)
"""Most obstacles pass within milliseconds; the deadline is the caller's."""


def pause_before_again(obstacle: Obstacle, attempt: int, left_s: float) -> float | None:
    """Return the pause (s) after attempt number `attempt`, None if none is worth while in the `left_s` that remain."""
    pause_s = LEAD_RETRY.delay_s(attempt)
    return pause_s if obstacle.may_pass and pause_s < left_s else None


def judge_tail(last: LogEntry | None, asked_last: int | None, position: int) -> Obstacle | None:
    """Compare the log's last entry with what the manager asked for and with what our HSM captured; None to go on.

    `position` is the next index our HSM has to capture.
    """
    if last is None:
        return Obstacle(ObstacleCode.LOG_EMPTY)
    if asked_last is not None and last.index < asked_last:
        return Obstacle(ObstacleCode.LOG_SHORTER, last.index)
    if asked_last is not None and last.index > asked_last:
        return Obstacle(ObstacleCode.LOG_LONGER, last.index)
    return _behind(position - 1, last) if position <= last.index else None


def judge_refusal(reply: Response, last: LogEntry) -> Obstacle:
    """Return what the HSM's refusal of BecomeLeader at `last` means."""
    if isinstance(reply, NotCaptured):
        return _behind(reply.have or 0, last)
    code = _OUTCOMES.get(reply) if isinstance(reply, Outcome) else None
    check(code is not None, "BecomeLeader answers as specified")
    return Obstacle(code or ObstacleCode.LOG_DAMAGED)


def _behind(have: int, last: LogEntry) -> Obstacle:
    near = have + TRAILING_CAPTURE_MAX >= last.index
    return Obstacle(ObstacleCode.CATCHING_UP if near else ObstacleCode.FAR_BEHIND, have or None)
