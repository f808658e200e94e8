"""A store in memory that keeps the contract of the ports and may fail in every way they allow.

`SimulatedStore` is what the processes of one simulated cluster share; each of them has a `StoreView`, whose `faults`
are that process's trouble with the store. What was acknowledged stays; what was not may be lost, be done, or be done
later (`store_gate`). The same contract suite runs on it as on the real back ends.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import trio

from juicebox_hsm.adapters.stores.embedded_bus import EmbeddedBus
from juicebox_hsm.ports.store import Store
from roles.tools.simulate.store_cluster import (
    SimulatedAudit,
    SimulatedDiscovery,
    SimulatedLeases,
    SimulatedRealms,
    SimulatedSettings,
    SimulatedTenants,
)
from roles.tools.simulate.store_data import StoreData, Watcher
from roles.tools.simulate.store_gate import Gate, Sleep, StoreFaults
from roles.tools.simulate.store_log import SimulatedLog, SimulatedNodes
from roles.tools.simulate.store_outbox import SimulatedAccounting, SimulatedOutbox, SimulatedPublished


class StoreView:
    """One process's handle on the store."""

    __slots__ = ("_gate", "faults", "store")

    def __init__(self, name: str, gate: Gate, faults: StoreFaults) -> None:
        self._gate = gate
        self.faults = faults
        self.store = Store(
            log=SimulatedLog(gate),
            nodes=SimulatedNodes(gate),
            outbox=SimulatedOutbox(gate),
            accounting=SimulatedAccounting(gate),
            discovery=SimulatedDiscovery(gate),
            leases=SimulatedLeases(gate),
            settings=SimulatedSettings(gate),
            tenants=SimulatedTenants(gate),
            realms=SimulatedRealms(gate),
            audit=SimulatedAudit(gate),
            description=f"simulated:{name}",
            bus=EmbeddedBus(SimulatedPublished(gate)),
        )

    def crash(self) -> None:
        """End the process: every call, under way or to come, is answered at once without having been acknowledged."""
        self._gate.crash()

    def freeze(self) -> None:
        """Let some of the calls under way take effect while the process stands still; it learns of them afterwards."""
        self._gate.freeze()


class SimulatedStore:
    """The store of one simulated cluster.

    `chance` is drawn from in the order of calls. `keeps_tombstones`: compacted rows stay as tombstones. `removal_s`:
    how long removed nodes stay readable. `lazy_settled`: settled indexes follow their rows a moment later, and not at
    all if the process ends meanwhile. Real back ends differ in the three. `sleep`: see `store_gate.Gate`.
    """

    def __init__(
        self,
        chance: random.Random,
        *,
        keeps_tombstones: bool = False,
        removal_s: float = 5.0,
        lazy_settled: bool = False,
        now: Callable[[], float] = trio.current_time,
        sleep: Sleep | None = None,
    ) -> None:
        self.data = StoreData(now, keeps_tombstones=keeps_tombstones, removal_s=removal_s)
        self._chance = chance
        self._lazy_settled = lazy_settled
        self._sleep = sleep

    @property
    def watchers(self) -> list[Watcher]:
        """Return who is told of every change of logs and outboxes; append to it."""
        return self.data.watchers

    @property
    def counts(self) -> Counter[str]:
        """Return how often each port's operations came to what."""
        return self.data.counts

    def view(self, process: str, faults: StoreFaults | None = None) -> StoreView:
        """Return the handle for one life of a process."""
        own = StoreFaults() if faults is None else faults
        gate = Gate(self.data, self._chance, own, lazy_settled=self._lazy_settled, sleep=self._sleep)
        return StoreView(process, gate, own)
