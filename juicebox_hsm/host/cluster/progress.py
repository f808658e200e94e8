"""How far a manager's running transfers are: for `status`, the status page and the command line (manager.md 2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from juicebox_hsm.host.cluster.view import wire_range
from juicebox_hsm.ids import GroupId, OwnedRange, RealmId
from juicebox_hsm.wire.rpc import RunningTransfer, TransferPrepare, TransferStep


@dataclass(slots=True, eq=False)
class TransferProgress:
    """One running transfer. `begun_ms` is Unix time in ms; `attempt` counts from 1 the tries of prepare to in as one
    unit, then anew those of complete."""

    realm: RealmId
    source: GroupId
    destination: GroupId
    range: OwnedRange
    begun_ms: int
    step: TransferStep = TransferStep.PREPARE
    attempt: int = 1

    def to_wire(self, now_ms: int) -> RunningTransfer:
        """Return what the manager's status says of it."""
        return RunningTransfer(
            realm=self.realm,
            source=self.source,
            destination=self.destination,
            range=wire_range(self.range),
            step=self.step,
            attempt=self.attempt,
            begun_ms=self.begun_ms,
            age_s=max(0, now_ms - self.begun_ms) / 1000,
        )


@contextmanager
def listed(running: list[TransferProgress], progress: TransferProgress) -> Iterator[TransferProgress]:
    """Keep a transfer in the list of those that run for as long as the body."""
    running.append(progress)
    try:
        yield progress
    finally:
        running.remove(progress)


def is_same(running: RunningTransfer, wanted: TransferPrepare) -> bool:
    """Tell whether a running transfer is the one that somebody asked for."""
    asked = (wanted.realm, wanted.source, wanted.destination, wanted.range)
    return (running.realm, running.source, running.destination, running.range) == asked
