"""The verdict on the cluster as metrics, so that alerts need no command: what a status page shows, every few seconds.

Each manager tells its own view. While nobody can look, what was seen last stays and its age grows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.observation.reason_gauges import ReasonGauges
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.verdict import Evidence, judge

PAUSE_S: Final = 5.0
"""Own: with a look's 3 s for silent services, nothing dangerous is hidden for longer than 10 s."""
LOOK_S_MAX: Final = 10.0
"""Own: a store that hangs must not stop the age."""

_OF_GROUPS: Final = (
    "cluster.group.members",
    "cluster.group.members_alive",
    "cluster.group.losses_tolerated",
    "cluster.group.led",
)


async def tell_health(metrics: Metrics, look: Callable[[], Awaitable[Evidence]]) -> None:
    """Look and tell, for ever."""
    reasons = ReasonGauges(metrics, "cluster.reason")
    seen = trio.current_time()
    while True:
        with trio.move_on_after(LOOK_S_MAX):
            try:
                evidence = await look()
            except RealmError:
                pass  # our own readiness names the store; the verdict's age says that this is not of now
            else:
                seen = trio.current_time()
                reasons.show(found.code for found in judge(evidence).findings)
                tell_groups(metrics, evidence)
        metrics.gauge("cluster.verdict_age", trio.current_time() - seen)
        await trio.sleep(PAUSE_S)


def tell_groups(metrics: Metrics, evidence: Evidence) -> None:
    """Set the gauges of all groups; those of groups that ended are gone."""
    for name in _OF_GROUPS:
        metrics.remove(name)
    for group in evidence.view.groups.values():
        if group.has_ended:
            continue
        tags = {"realm": group.realm.hex(), "group": group.id.hex()}
        metrics.gauge("cluster.group.members", len(group.configuration), **tags)
        metrics.gauge("cluster.group.members_alive", len(group.members), **tags)
        metrics.gauge("cluster.group.losses_tolerated", group.losses_tolerated, **tags)
        metrics.gauge("cluster.group.led", group.leader is not None, **tags)
