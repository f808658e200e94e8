"""The Bigtable back end keeps the contract of the ports, on the real emulator."""

from __future__ import annotations

import pytest

from tests.emulator import contract
from tests.emulator.bigtable_backend import BigtableBackend
from tests.emulator.contract import ClusterContract, LogContract, NodeContract
from tests.emulator.contract_audit import AuditContract
from tests.emulator.contract_bus import BusContract
from tests.emulator.contract_dispatch import DispatchContract
from tests.emulator.contract_outbox import AccountingContract, OutboxContract

pytestmark = pytest.mark.emulator
store = contract.store


@pytest.fixture
def backend(bigtable_emulator: str) -> BigtableBackend:
    """Name an instance that has no tables yet."""
    return BigtableBackend(bigtable_emulator)


class TestLog(LogContract):
    """Logs in one instance."""


class TestNodes(NodeContract):
    """Trees in one instance."""


class TestCluster(ClusterContract):
    """Cluster facts in one instance."""


class TestOutbox(OutboxContract):
    """Outbox in one instance."""


class TestAccounting(AccountingContract):
    """Accounting in one instance."""


class TestDispatch(DispatchContract):
    """Two dispatchers on one instance."""


class TestBus(BusContract):
    """The embedded bus on one instance."""


class TestAudit(AuditContract):
    """The audit trail on one instance."""
