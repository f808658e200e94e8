"""The simulated store keeps the contract of the ports, so that what it shows a simulated realm could happen."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from juicebox_hsm.ports.store import Store
from roles.tools.simulate.store import SimulatedStore
from roles.tools.simulate.store_gate import StoreFaults
from tests.emulator import contract
from tests.emulator.contract import ClusterContract, LogContract, NodeContract
from tests.emulator.contract_audit import AuditContract
from tests.emulator.contract_bus import BusContract
from tests.emulator.contract_dispatch import DispatchContract
from tests.emulator.contract_outbox import AccountingContract, OutboxContract

store = contract.store


class SimulatedBackend:
    """One content; each opening is another process."""

    def __init__(self, shared: SimulatedStore, latency_s: float) -> None:
        self.shared = shared
        self.latency_s = latency_s
        self.opened = 0

    def open(self) -> AbstractAsyncContextManager[Store]:
        """Open a view."""
        return self._opened()

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[Store]:
        self.opened += 1
        yield self.shared.view(f"process-{self.opened}", StoreFaults(latency_s=(0.0, self.latency_s))).store


@pytest.fixture(params=["like-sqlite", "like-bigtable"])
def backend(request: pytest.FixtureRequest) -> SimulatedBackend:
    """Return an empty store: transactions and no tombstones, or the opposite with operations that overlap."""
    chance = random.Random(1)
    if request.param == "like-sqlite":
        return SimulatedBackend(SimulatedStore(chance, removal_s=0.0), 0.0)
    return SimulatedBackend(SimulatedStore(chance, keeps_tombstones=True, removal_s=5.0), 0.0001)


class TestLog(LogContract):
    """Logs in memory."""


class TestNodes(NodeContract):
    """Trees in memory."""


class TestCluster(ClusterContract):
    """Cluster facts in memory."""


class TestOutbox(OutboxContract):
    """Outbox in memory."""


class TestAccounting(AccountingContract):
    """Accounting in memory."""


class TestDispatch(DispatchContract):
    """Two dispatchers in memory."""


class TestBus(BusContract):
    """The embedded bus on the rows in memory."""


class TestAudit(AuditContract):
    """The audit trail in memory."""
