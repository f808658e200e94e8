"""How far a manager's running transfers are: for `status`, the status page and the command line (manager.md 2)."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from juicebox_hsm.ids import GroupId, OwnedRange, RealmId


class Step(enum.Enum):
    """The step that is under way; looking for the leaders belongs to the step it is for."""

    PREPARE = "prepare"
    OUT = "out"
    IN = "in"
    COMPLETE = "complete"


@dataclass(slots=True, eq=False)
class TransferProgress:
    """One running transfer. `begun_ms` is Unix time in ms; `attempt` counts from 1 the tries of prepare to in as one
    unit, then anew those of complete."""

    realm: RealmId
    source: GroupId
    destination: GroupId
    range: OwnedRange
    begun_ms: int
    step: Step = Step.PREPARE
    attempt: int = 1

    def to_json(self, now_ms: int) -> dict[str, Any]:
        """Return the entry of `transfers` in the manager's status."""
        return {
            "realm": self.realm.hex(),
            "source": self.source.hex(),
            "destination": self.destination.hex(),
            "start": self.range.start.hex(),
            "end": self.range.end.hex(),
            "step": self.step.value,
            "attempt": self.attempt,
            "begun_ms": self.begun_ms,
            "age_s": max(0, now_ms - self.begun_ms) / 1000,
        }


@contextmanager
def listed(running: list[TransferProgress], progress: TransferProgress) -> Iterator[TransferProgress]:
    """Keep a transfer in the list of those that run for as long as the body."""
    running.append(progress)
    try:
        yield progress
    finally:
        running.remove(progress)


def describe(entry: Mapping[str, Any]) -> str:
    """Return how far the transfer of an entry of `transfers` is, in words.

    Raises `KeyError`, `TypeError` or `ValueError` when it is not one.
    """
    return f"{entry['step']}, attempt {int(entry['attempt'])}, {float(entry['age_s']):.1f} s"
