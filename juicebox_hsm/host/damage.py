"""What a service lately met that is damaged in the store: told once in a while, shown until it was long not met.

Damage does not heal and does not end a service: what else is stored goes on being served. Times are monotonic seconds.
"""

from __future__ import annotations

from typing import Final

from juicebox_hsm.merkle.walk import Lost
from juicebox_hsm.wire.rpc import StoreDamage

SHOWN_S: Final = 30.0
"""How long damage is shown after it was met (own): long enough for a person or a probe to see."""
KEPT_MAX: Final = 16
"""Places that are remembered: a destroyed store has millions, and the first tell enough."""


def node_place(node: Lost) -> str:
    """Return how a tree node is named: by the depth that it hangs at, and by its hash."""
    return f"at depth {node.depth} with hash {node.hash.hex()}"


class Damages:
    """Damaged places by when they were met last, and when they were told."""

    def __init__(self) -> None:
        self._met: dict[StoreDamage, tuple[float, float]] = {}

    def met(self, damage: StoreDamage, now: float) -> bool:
        """Note a place; tell whether it should be told: it is new, or was told long ago."""
        self._forget(now)
        _, told_s = self._met.get(damage, (now, float("-inf")))
        is_due = now - told_s >= SHOWN_S
        if damage in self._met or len(self._met) < KEPT_MAX:
            self._met[damage] = (now, now if is_due else told_s)
            return is_due
        return False

    def lately(self, now: float) -> tuple[StoreDamage, ...]:
        """Return the places that were met within `SHOWN_S`, the first one first."""
        self._forget(now)
        return tuple(self._met)

    def _forget(self, now: float) -> None:
        for damage, (met_s, _) in list(self._met.items()):
            if now - met_s >= SHOWN_S:
                del self._met[damage]
