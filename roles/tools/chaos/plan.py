"""What a chaos run does to the realm and when: a seed gives one plan, printed before it is carried out. Pure.

Who leads is not known beforehand, so a plan says `leader` and `witness`; the run says whom that meant.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass
from random import Random
from typing import Final

FIRST_S: Final = 3.0
"""Undisturbed load before the first fault."""

LAST_S: Final = 4.0
"""Undisturbed load after the last one has begun, at least."""

SHORT_PAUSE_S: Final = (0.3, 1.5)
LONG_PAUSE_S: Final = (4.0, 9.0)
"""Shorter and longer than the managers' leases, which last 3 s, and than the silence that counts as a lost leader."""

PLANNED_RESTART_MIN_S: Final = 20.0
"""A run at least this long contains a full restart, whatever the seed says."""


class Kind(enum.Enum):
    """Every kind of trouble; the value is its name in plans and for --only."""

    KILL = "kill"
    TERMINATE = "terminate"
    SHORT_PAUSE = "short-pause"
    LONG_PAUSE = "long-pause"
    RESTART_ALL = "restart-all"
    SLOW_STORE = "slow-store"
    STORE_DOWN = "store-down"
    LOST_REPLIES = "lost-replies"
    DISK_FULL = "disk-full"
    NVRAM_FAILS = "nvram-fails"
    CLOCK_JUMP = "clock-jump"
    CUT = "cut"
    DELAY = "delay"
    ISOLATE = "isolate"
    STEPDOWN_MANAGER = "stepdown-manager"
    STEPDOWN_DIRECT = "stepdown-direct"
    DUEL = "duel"
    BOTH_MANAGERS = "both-managers"
    TRANSFER = "transfer"
    RIVAL_MANAGERS = "rival-managers"


_WEIGHTS: Final = {
    Kind.KILL: 5,
    Kind.TERMINATE: 2,
    Kind.SHORT_PAUSE: 3,
    Kind.LONG_PAUSE: 2,
    Kind.RESTART_ALL: 1,
    Kind.SLOW_STORE: 2,
    Kind.STORE_DOWN: 2,
    Kind.LOST_REPLIES: 2,
    Kind.DISK_FULL: 2,
    Kind.NVRAM_FAILS: 2,
    Kind.CLOCK_JUMP: 2,
    Kind.CUT: 3,
    Kind.DELAY: 2,
    Kind.ISOLATE: 2,
    Kind.STEPDOWN_MANAGER: 2,
    Kind.STEPDOWN_DIRECT: 2,
    Kind.DUEL: 3,
    Kind.BOTH_MANAGERS: 2,
    Kind.TRANSFER: 3,
    Kind.RIVAL_MANAGERS: 2,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """How many of what run."""

    agents: int
    managers: int
    load_balancers: int
    groups: int = 1

    @property
    def agent_names(self) -> list[str]:
        """Return the agents' names."""
        return [f"agent{number + 1}" for number in range(self.agents)]

    @property
    def manager_names(self) -> list[str]:
        """Return the managers' names."""
        return [f"manager{number + 1}" for number in range(self.managers)]

    @property
    def balancer_names(self) -> list[str]:
        """Return the load balancers' names."""
        return [f"lb{number + 1}" for number in range(self.load_balancers)]


@dataclass(frozen=True, slots=True)
class Action:
    """One fault: from `at_s` after the load's start, for `for_s`; `amount` is in milliseconds where it means time."""

    number: int
    at_s: float
    kind: Kind
    target: str = ""
    other: str = ""
    for_s: float = 0.0
    amount: int = 0

    def __str__(self) -> str:
        """Return its line in the plan."""
        subject = f"{self.target}, {self.other}" if self.other else self.target
        details = [f"for {self.for_s:.1f} s"] if self.for_s else []
        if self.kind is Kind.LONG_PAUSE:
            details.append("even inside a store transaction" if self.amount else "outside of store transactions")
        elif self.kind in {Kind.CUT, Kind.ISOLATE}:
            details.append("resets connections" if self.amount else "holds everything back")
        elif self.amount:
            details.append(f"{self.amount:+d} ms")
        return f"{self.at_s:7.1f} s  {self.kind.value:<17}{subject:<22}{', '.join(details)}".rstrip()


def possible_kinds(shape: Shape) -> list[Kind]:
    """Return the kinds that make sense for a realm of this shape."""
    alone = {Kind.DUEL, Kind.RIVAL_MANAGERS} if shape.agents == 1 else set()
    if shape.groups == 1:
        alone.add(Kind.TRANSFER)
    if shape.managers == 1:
        alone |= {Kind.BOTH_MANAGERS, Kind.RIVAL_MANAGERS}
    return [kind for kind in Kind if kind not in alone]


def make_plan(seed: int, duration_s: float, shape: Shape, only: Collection[Kind] = ()) -> list[Action]:
    """Return the actions of a seed, in the order of time. `only` restricts the kinds; nothing means all."""
    random = Random(seed)  # noqa: S311 -- a repeatable plan
    kinds = [kind for kind in possible_kinds(shape) if not only or kind in only]
    weights = [_WEIGHTS[kind] for kind in kinds]
    actions: list[Action] = []
    restart_due = Kind.RESTART_ALL in kinds and duration_s >= PLANNED_RESTART_MIN_S
    at_s = FIRST_S
    while kinds and at_s <= duration_s - LAST_S:
        kind = random.choices(kinds, weights)[0]
        if restart_due and at_s >= duration_s / 2:
            kind = Kind.RESTART_ALL
        restart_due = restart_due and kind is not Kind.RESTART_ALL
        actions.append(_action(random, len(actions) + 1, round(at_s, 1), kind, shape))
        at_s += random.uniform(3.0, 6.0) if kind is Kind.RESTART_ALL else random.uniform(0.8, 3.5)
    return actions


def _action(  # noqa: C901, PLR0912 -- one arm a kind
    random: Random, number: int, at_s: float, kind: Kind, shape: Shape
) -> Action:
    def some(low: float, high: float) -> float:
        return round(random.uniform(low, high), 1)

    agents = ["leader", "leader", *(["witness"] if shape.agents > 1 else []), *shape.agent_names]
    everyone = [*agents, *shape.manager_names, *shape.balancer_names]
    make = Action(number, at_s, kind)
    target, other, for_s, amount = make.target, make.other, make.for_s, make.amount
    match kind:
        case Kind.KILL | Kind.TERMINATE:
            target, for_s = random.choice(everyone), some(0.1, 4.0)
        case Kind.SHORT_PAUSE:
            target, for_s = random.choice(everyone), some(*SHORT_PAUSE_S)
        case Kind.LONG_PAUSE:
            target, for_s, amount = random.choice(everyone), some(*LONG_PAUSE_S), random.choice([0, 0, 1])
        case Kind.RESTART_ALL:
            for_s = some(0.0, 1.0)
        case Kind.SLOW_STORE:
            target, for_s, amount = random.choice(everyone), some(2, 6), random.choice([20, 100, 400])
        case Kind.STORE_DOWN | Kind.DISK_FULL:
            target, for_s = random.choice(everyone), some(1, 6)
        case Kind.LOST_REPLIES | Kind.NVRAM_FAILS:
            target, for_s = random.choice(agents), some(0.5, 3)
        case Kind.CLOCK_JUMP:
            target, for_s = random.choice(everyone), some(2, 8)
            amount = random.choice([-10_000, -3_000, 3_000, 10_000])
        case Kind.CUT | Kind.DELAY:
            target = random.choice(agents)
            other = random.choice([*shape.agent_names, *shape.manager_names, *shape.balancer_names])
            for_s = some(1, 6)
            amount = random.choice([0, 1]) if kind is Kind.CUT else random.choice([10, 50, 300])
        case Kind.ISOLATE:
            target, for_s, amount = random.choice(agents), some(1, 6), random.choice([0, 1])
        case Kind.STEPDOWN_MANAGER | Kind.TRANSFER:
            target = random.choice(shape.manager_names)
        case Kind.STEPDOWN_DIRECT:
            target = "leader"
        case Kind.DUEL:
            target = random.choice(["one witness", "every witness"])
        case Kind.BOTH_MANAGERS:
            target, other = random.sample(shape.manager_names, 2)
        case Kind.RIVAL_MANAGERS:
            (target, other), for_s = random.sample(shape.manager_names, 2), some(2, 5)
    return Action(number, at_s, kind, target, other, for_s, amount)
