"""The order of tests: shuffled in continuous integration, so that no test comes to rely on those before it.

Files are shuffled, and tests within each file; a file's tests stay together, so that what its fixtures share is made
once. `--shuffle-seed N` gives the same order again.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable
from typing import Protocol, TypeVar


class Placed(Protocol):
    """What is needed of a test."""

    @property
    def nodeid(self) -> str:
        """Return `FILE::CLASS::NAME`, with the class where there is one."""
        ...


T = TypeVar("T", bound=Placed)


def shuffled(items: Iterable[T], seed: int) -> list[T]:
    """Return the tests in the order of `seed`, which depends on nothing else but which tests there are."""
    chance = random.Random(seed)
    ordered = sorted(items, key=lambda item: item.nodeid)
    chance.shuffle(ordered)
    files: dict[Hashable, dict[Hashable, list[T]]] = {}
    for item in ordered:
        file, _, rest = item.nodeid.partition("::")
        group = rest.partition("[")[0].rpartition("::")[0]  # parameters may contain anything
        files.setdefault(file, {}).setdefault(group, []).append(item)
    return [item for groups in files.values() for group in groups.values() for item in group]
