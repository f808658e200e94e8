"""How rough a run is: which tricks may happen, and how much of each the seed may draw (simulation.md 2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from roles.tools.simulate.shape import GROUPS


@dataclass(frozen=True, slots=True)
class Profile:
    """What a run is made of. Times in virtual seconds; `tricks` are names of `tricks.TRICKS` with their weights.

    `trouble_s`: how long tricks go on; `quiet_s`: how long all is well afterwards until every user
    must be served; the judge looks 5 s later.
    `groups`: the numbers of groups that the seed draws one of. `rate`: requests per second and tenant.
    `pause_s`: the mean pause between two tricks, before the seed's own factor.
    """

    name: str
    tricks: dict[str, float] = field(default_factory=dict)
    trouble_s: float = 30.0
    quiet_s: float = 25.0
    pause_s: float = 1.5
    users: int = 8
    user_pause_s: float = 3.1
    rate: int = 1000
    rebalance_s: float = 20.0
    groups: tuple[int, ...] = GROUPS


_PROCESSES: Final = {"crash": 3.0, "machine": 1.0, "pause": 2.0, "clock": 1.0, "stop": 1.0, "all_at_once": 0.4}
_HSM: Final = {"nvram": 1.0, "slow_persist": 1.0}
_NETWORK: Final = {"reset": 2.0, "cut": 2.0, "cut_one_way": 1.0, "isolate": 1.0, "slow_peer": 1.0, "bad_weather": 1.0}
_STORE: Final = {"store_slow": 1.0, "store_refuses": 1.0, "store_ambiguous": 2.0, "store_stale": 1.0, "store_cut": 1.0}
_OPERATORS: Final = {
    "transfer": 2.0, "new_group": 0.3, "stepdown": 1.5, "drain": 0.5, "tenant_limit": 0.5, "spare": 0.3,
    "managers_disagree": 0.7, "rebalance": 0.5,
}  # fmt: skip
_CLIENTS: Final = {"duel": 1.0}

PROFILES: Final = {
    profile.name: profile
    for profile in (
        Profile("calm"),
        Profile("storm", _PROCESSES | _HSM | _NETWORK | _STORE | _OPERATORS | _CLIENTS),
        Profile("crashes", _PROCESSES | _HSM, pause_s=1.2),
        Profile("network", _NETWORK | {"duel": 1.0, "stepdown": 1.0}, pause_s=1.0),
        Profile("store", _STORE | {"crash": 1.0, "duel": 1.0, "transfer": 1.0}, pause_s=1.0),
        Profile(
            "transfers",
            _OPERATORS | {"crash": 1.5, "cut": 1.0, "store_ambiguous": 1.0, "pause": 1.0, "transfer": 6.0},
            groups=(2, 2, 3),
        ),
    )
}
MIXED: Final = ("storm", "storm", "crashes", "network", "store", "transfers", "storm", "calm")
"""What `--profile mixed` takes in turn."""
