"""The majority of groups that this agent leads: fields of log lines, and gauges per group."""

from __future__ import annotations

from typing import Final

from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.host.cluster.ranges import show_range
from juicebox_hsm.host.group import Groups, GroupState
from juicebox_hsm.host.leadership.machine import Leadership

MEMBERS: Final = "agent.group.members"
ALIVE: Final = "agent.group.members_alive"
COMMIT_AGE: Final = "agent.group.commit_age"
STALLED: Final = "agent.group.stalled"


def _range(leader: Leadership) -> str:
    last = leader.last_appended
    return "no range" if last is None or last.partition is None else show_range(last.partition.range)


def about(group: GroupState, leader: Leadership, now: float) -> dict[str, object]:
    """Return what a log line says of a leadership's majority."""
    quorum = leader.quorum(now)
    return {
        "realm": group.realm.hex(),
        "group": group.group.hex(),
        "range": _range(leader),
        "members_alive": quorum.alive,
        "members": quorum.members,
        "commit_age_s": round(quorum.commit_age_s, 1),
    }


def sample(groups: Groups, metrics: Metrics, now: float) -> None:
    """Set the gauges of the groups that this agent leads; those of groups it leads no more are gone."""
    for name in (MEMBERS, ALIVE, COMMIT_AGE, STALLED):
        metrics.remove(name)
    for group in groups:
        if group.leader is None:
            continue
        quorum = group.leader.quorum(now)
        tags = {"realm": group.realm.hex(), "group": group.group.hex()}
        metrics.gauge(MEMBERS, quorum.members, **tags)
        metrics.gauge(ALIVE, quorum.alive, **tags)
        metrics.gauge(COMMIT_AGE, quorum.commit_age_s, **tags)
        metrics.gauge(STALLED, 0 if quorum.stalled_s is None else 1, **tags)
