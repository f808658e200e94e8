"""Random schedules of a malicious host: which actions there are, how often each happens, and one run of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection

from tests.fakes.counter_nvram import CounterPlatform
from tests.fakes.hsm import MemoryPlatform
from tests.property.hsm.adversary import Adversary

Action = Callable[[Adversary, random.Random], None]

ACTION_WEIGHTS: list[tuple[Action, int]] = [
    (Adversary.act_client, 10),
    (Adversary.act_capture, 8),
    (Adversary.act_persist, 4),
    (Adversary.act_commit, 6),
    (Adversary.act_settle, 8),
    (Adversary.act_lead, 5),
    (Adversary.act_step_down, 2),
    (Adversary.act_jump, 3),
    (Adversary.act_splice, 4),
    (Adversary.act_crash, 1),
    (Adversary.act_crash_in_write, 1),
    (Adversary.act_restore, 1),
    (Adversary.act_replay, 2),
    (Adversary.act_forge, 3),
    (Adversary.act_tamper, 5),
    (Adversary.act_rival, 4),
    (Adversary.act_transfer, 6),
    (Adversary.act_move, 3),
    (Adversary.act_retire, 3),
    (Adversary.act_forget, 2),
    (Adversary.act_come_back, 2),
]
ACTIONS = [action for action, _ in ACTION_WEIGHTS]
UNALTERED_ACTIONS = [action for action in ACTIONS if action not in {Adversary.act_forge, Adversary.act_tamper}]
ENDING_ACTIONS = [
    Adversary.act_client,
    Adversary.act_capture,
    Adversary.act_settle,
    Adversary.act_rival,
    Adversary.act_move,
    Adversary.act_retire,
    Adversary.act_forget,
    Adversary.act_come_back,
]
MOVING_ACTIONS = [Adversary.act_client, Adversary.act_settle, Adversary.act_transfer, Adversary.act_move]
WEIGHTS = [weight for _, weight in ACTION_WEIGHTS]


def run(
    seed: int,
    steps: int,
    *,
    size: int = 0,
    groups: int = 0,
    actions: Collection[Action] = (),
    platform: type[MemoryPlatform] = CounterPlatform,
) -> Adversary:
    """Run one random schedule; raises `AssertionError` when an invariant breaks.

    Each schedule draws its own weights (swarm testing): attacks need runs in which the disturbing actions are rare.
    `size` (HSMs) and `groups` are drawn too unless given. Only these `actions` happen; all when empty.
    """
    chooser = random.Random(seed)
    size = size or chooser.choice([1, 2, 3, 3, 3, 4, 5])
    groups = groups or chooser.choice([1, 2, 2, 3, 3])
    world = Adversary(size, seed, platform=platform, groups=groups)
    weights = [weight * chooser.choice((0, 1, 1, 4)) for weight in WEIGHTS]
    weights[0] += 1
    if actions:
        weights = [weight * (action in actions) for action, weight in zip(ACTIONS, weights, strict=True)]
    world.withheld = chooser.choice([None, *world.logs])
    world.neglected = chooser.choice([None, None, *range(size)])
    for _ in range(steps):
        [action] = chooser.choices(ACTIONS, weights)
        world.steps += 1
        action(world, chooser)
    return world
