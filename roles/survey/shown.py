"""What `cluster status` and the status page say of groups and services, in the same words."""

from __future__ import annotations

from typing import Final

from juicebox_hsm.host.cluster.verdict import cannot_commit
from juicebox_hsm.host.cluster.view import GroupView
from juicebox_hsm.wire.rpc import AgentStatus
from roles.words import counted

SHORT_DIGITS: Final = 8
"""Own: enough for the some hundred ids of a cluster."""


def short(value: bytes) -> str:
    """Return the beginning of an id; commands take any unambiguous one."""
    return value.hex()[:SHORT_DIGITS]


def tolerance(group: GroupView) -> str:
    """Return how many more members a group may lose, or that it lost too many."""
    left = group.losses_tolerated
    if left < 0:
        return f"no majority: {len(group.members)} of {counted(len(group.configuration), 'member')} answer"
    if cannot_commit(group):
        return "its leader reaches no majority"
    return "tolerates 1 more loss" if left == 1 else f"tolerates {left or 'no'} more losses"


def led_by(group: GroupView) -> str:
    """Return who leads a group."""
    return "nobody leads" if group.leader is None else f"led by {group.leader.name}"


def agent_pace(status: AgentStatus) -> tuple[float, float | None]:
    """Return requests/s of the groups that an agent leads, and the mean time of its answers in ms, None without any."""
    rates = (info.requests_per_s for info in status.groups if info.leading)
    return sum(rates), status.latency_ms


def pace(rate: float, latency_ms: float | None) -> str:
    """Return a rate and what one of these takes."""
    told = f"{rate:,.1f} requests/s"
    return told if latency_ms is None else f"{told}, {latency_ms:,.1f} ms each"


def clock(offset_s: float | None) -> str:
    """Return how far a clock is off, "" when nobody could read it."""
    return "" if offset_s is None else f"{round(offset_s, 1) or 0.0:+.1f} s"
