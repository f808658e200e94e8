"""The SQLite back end keeps the contract of the ports."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.ports.store import Store
from tests.emulator import contract
from tests.emulator.contract import ClusterContract, LogContract, NodeContract
from tests.emulator.contract_audit import AuditContract
from tests.emulator.contract_bus import BusContract
from tests.emulator.contract_dispatch import DispatchContract
from tests.emulator.contract_outbox import AccountingContract, OutboxContract

store = contract.store


class SqliteBackend:
    """One file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> AbstractAsyncContextManager[Store]:
        """Open the file."""
        return open_store(f"sqlite:{self.path}")


@pytest.fixture
def backend(tmp_path: Path) -> SqliteBackend:
    """Name a file that does not exist yet."""
    return SqliteBackend(tmp_path / "realm.db")


class TestLog(LogContract):
    """Logs in one file."""


class TestNodes(NodeContract):
    """Trees in one file."""


class TestCluster(ClusterContract):
    """Cluster facts in one file."""


class TestOutbox(OutboxContract):
    """Outbox in one file."""


class TestAccounting(AccountingContract):
    """Accounting in one file."""


class TestDispatch(DispatchContract):
    """Two dispatchers on one file."""


class TestBus(BusContract):
    """The embedded bus on one file."""


class TestAudit(AuditContract):
    """The audit trail in one file."""
