"""What a simulated realm is made of, drawn from the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

HSMS: Final = (3, 3, 3, 3, 4, 4, 5, 5)
GROUPS: Final = (1, 1, 1, 1, 2, 2, 2, 3)
"""Drawn from; the smaller ones more often, for twice the events cost twice the time and find little more."""
REMOVAL_S: Final = (0.0, 1.0, 5.0)


@dataclass(frozen=True, slots=True)
class Shape:
    """HSMs, the sizes of the groups that share the key space, and which back end the store is like."""

    hsms: int
    sizes: tuple[int, ...]
    keeps_tombstones: bool
    removal_s: float
    lazy_settled: bool

    @classmethod
    def draw(cls, chance: random.Random, groups: Sequence[int] = GROUPS) -> Self:
        """Draw a shape; the number of groups is one of `groups`."""
        hsms = chance.choice(HSMS)
        count = chance.choice(groups)
        return cls(
            hsms,
            tuple(chance.choice([size for size in (3, 3, 5) if size <= hsms]) for _ in range(count)),
            keeps_tombstones=chance.random() < 0.5,
            removal_s=chance.choice(REMOVAL_S),
            lazy_settled=chance.random() < 0.5,
        )
