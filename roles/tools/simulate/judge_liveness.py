"""What must be true some time after the last trouble: every range is led, all are served, nothing waits or grows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from juicebox_hsm.ids import GroupId, OwnedRange, RealmId, RecordId, uncovered
from juicebox_hsm.wire.rpc import AgentStatus, GroupRole
from roles.tools.simulate.judge_rules import require
from roles.tools.simulate.store_data import StoreData


@dataclass(frozen=True, slots=True)
class Quiet:
    """What the world found when it had been quiet for long enough.

    `statuses`: agent's URL -> its answer to `status`. `failed`: recoveries that honest clients asked for during the
    quiet and did not get. `complaints`: what a manager, balancer or agent still reports as not healthy. `died`: tasks
    and processes that ended though nobody ended them. `sizes`: queues and maps with (what they hold, their bound).
    """

    statuses: Mapping[str, AgentStatus] = field(default_factory=dict)
    failed: Sequence[str] = ()
    complaints: Sequence[str] = ()
    died: Sequence[str] = ()
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)


DUEL_S: Final = 20.0
LEADERSHIPS_MAX: Final = 8
"""Leaderships of one group that may begin in the last `DUEL_S` of a quiet: some for balance; an endless duel has one
a second (record 0018)."""


def check_duels(began: Sequence[tuple[float, GroupId]], now_s: float) -> None:
    """Check that leadership has come to rest; `began` is when leaderships of which group began."""
    late = Counter(group for at_s, group in began if at_s >= now_s - DUEL_S)
    for group, count in late.items():
        require("liveness.duels", count <= LEADERSHIPS_MAX, f"{count} leaderships of {group.hex()} began in quiet")


def check_quiet(quiet: Quiet, data: StoreData) -> None:
    """Check everything; raises `BrokenRule` with a rule named `liveness.` and what is missing."""
    require("liveness.died", not quiet.died, lambda: "; ".join(quiet.died))
    for realm in data.realms:
        led = led_ranges(realm, quiet.statuses.values())
        gaps = uncovered(led)
        require("liveness.leader", not gaps, lambda gaps=gaps: f"nobody leads {gaps[0].start.hex()} and on")  # type: ignore[misc]
    require("liveness.recover", not quiet.failed, lambda: f"{len(quiet.failed)} failed: {quiet.failed[0]}")
    for realm_data in data.realms.values():
        for tenant, rows in realm_data.tenants.items():
            left = rows.tail - rows.published
            require("liveness.outbox", not left, f"{left} events of {tenant} wait for publication")
    require("liveness.status", not quiet.complaints, lambda: "; ".join(quiet.complaints))
    for name, (size, bound) in quiet.sizes.items():
        require("liveness.growth", size <= bound, f"{name} holds {size}, more than {bound}")


def led_ranges(realm: RealmId, statuses: Iterable[AgentStatus]) -> list[OwnedRange]:
    """Return the ranges that leaders claim; read from the statuses alone, not by the balancers' rules.

    Two leaders of a group in which nobody writes may stand side by side: the next append decides (record 0018).
    """
    return [
        OwnedRange(RecordId(group.leader.owned_range.start), RecordId(group.leader.owned_range.end))
        for status in statuses
        if status.hsm is not None and status.hsm.realm is not None and status.hsm.realm.id == realm
        for group in status.hsm.realm.groups
        if group.role.name is GroupRole.LEADER and group.leader is not None and group.leader.owned_range is not None
    ]
