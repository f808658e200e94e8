"""Create tables, list realms, and test at start that conditional writes work (storage.md 1, 5)."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, Final

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.cluster import SELF_TEST, SETTINGS, SHARED_TABLES
from juicebox_hsm.adapters.bigtable.codec import AnyValueEquals, DeleteRow, RowExists, SetCell
from juicebox_hsm.adapters.bigtable.driver import CallFailed, Metadata, Transport
from juicebox_hsm.adapters.bigtable.retry import BIGTABLE_RETRY, CallAttempts, NoSuchTable
from juicebox_hsm.adapters.bigtable.table import Endpoint, Table
from juicebox_hsm.adapters.process.threads import in_thread_or_here
from juicebox_hsm.errors import LocalError
from juicebox_hsm.ids import ID_BYTES, RealmId
from juicebox_hsm.ports.errors import StoreAmbiguous, StoreInvalid, StoreUnavailable

CREATE_TABLE: Final = "/google.bigtable.admin.v2.BigtableTableAdmin/CreateTable"
LIST_TABLES: Final = "/google.bigtable.admin.v2.BigtableTableAdmin/ListTables"
CREATE_S: Final = 60.0
"""Creating a table on the service takes seconds."""
DAY_S: Final = 86_400
TOMBSTONE_DAYS: Final = 7
USER_DAYS: Final = 116
USER_VERSIONS: Final = 120
"""Cells of a record that stay whatever their age: one for each day of 116 and today, the newest from before, and two to
spare for late writers (decision record 0022)."""
PAGE_TABLES: Final = 1_000
SELF_TEST_RETRY: Final = replace(BIGTABLE_RETRY, total_s=8.0)


def _messages() -> Any:
    """Import the admin API's messages, which costs 0.4 s: only who creates or lists tables pays."""
    from google.cloud.bigtable_admin_v2.types import bigtable_table_admin

    return bigtable_table_admin


def _families(table: str) -> dict[str, dict[str, Any]]:
    """Return family -> garbage collection rule of a table, by the end of its name."""
    aged = {"gc_rule": {"max_age": {"seconds": TOMBSTONE_DAYS * DAY_S}}}
    match table.rpartition("-")[2]:
        case "log":
            return {"f": {}, "t": aged}
        case "outbox":
            return {"f": {}, "n": {}, "t": aged}
        case "users":
            rules = [{"max_num_versions": USER_VERSIONS}, {"max_age": {"seconds": USER_DAYS * DAY_S}}]
            return {"f": {"gc_rule": {"intersection": {"rules": rules}}}}
        case _:
            return {"f": {}}


class BigtableRealms:
    """`ports.RealmStore` on one instance; `admin` is the transport to the admin API."""

    def __init__(self, endpoint: Endpoint, admin: Transport) -> None:
        self._endpoint = endpoint
        self._admin = admin

    def _headers(self) -> Metadata:
        return (
            ("x-goog-request-params", f"parent={self._endpoint.instance}"),
            *self._endpoint.authorization.metadata(),
        )

    async def _create(self, name: str) -> None:
        """Create a table; one that exists is fine, so a creation that stopped half-way can be repeated."""
        messages = await in_thread_or_here(_messages)
        request = messages.CreateTableRequest.pb()(
            parent=self._endpoint.instance, table_id=name, table={"column_families": _families(name)}
        ).SerializeToString()
        attempts = CallAttempts(f"create table {name}")
        while True:
            try:
                await self._admin.unary(CREATE_TABLE, request, self._headers(), CREATE_S)
                return
            except CallFailed as failure:
                if failure.code == "ALREADY_EXISTS":
                    return
                await attempts.after(failure)

    async def create_shared(self) -> None:
        """Create discovery, leases, tenants, settings and audit, then test conditional writes."""
        for name in SHARED_TABLES:
            if not await self._exists(name):
                await self._create(name)
        self._endpoint.self_test = self.self_test
        await self._endpoint.prove()

    async def _exists(self, name: str) -> bool:
        """Ask the table itself: all but the first process of a cluster are spared the admin API."""
        try:
            await Table(self._endpoint, name).read_row(b"-")
        except NoSuchTable:
            return False
        return True

    async def create_realm(self, realm: RealmId) -> None:
        """Create the log, nodes, users and outbox of a realm."""
        for name in keys.realm_tables(realm):
            await self._create(name)

    async def list_realms(self) -> list[RealmId]:
        """Return the realms that have a log table here, sorted."""
        messages = await in_thread_or_here(_messages)
        found: list[RealmId] = []
        token = ""
        while True:
            request = messages.ListTablesRequest.pb()(
                parent=self._endpoint.instance, page_size=PAGE_TABLES, page_token=token, view=1
            )
            response = messages.ListTablesResponse.pb().FromString(await self._list(request.SerializeToString()))
            for table in response.tables:
                realm = _realm_of(table.name.rpartition("/")[2])
                if realm is not None:
                    found.append(realm)
            token = response.next_page_token
            if not token:
                return sorted(found)

    async def _list(self, request: bytes) -> bytes:
        attempts = CallAttempts("list tables")
        while True:
            try:
                return await self._admin.unary(LIST_TABLES, request, self._headers(), self._endpoint.call_s)
            except CallFailed as failure:
                await attempts.after(failure)

    async def self_test(self) -> bool:
        """Test that the instance decides conditional writes; False if there is no table to test with yet.

        Raises `LocalError` if it does not, `StoreUnavailable` if it does not answer.
        """
        table = Table(self._endpoint, SETTINGS, SELF_TEST_RETRY)
        key = SELF_TEST + os.urandom(8).hex().encode()
        try:
            await table.mutate_row(key, (DeleteRow(),))
        except NoSuchTable:
            return False
        right, wrong = (SetCell("f", b"v", b"right"),), (SetCell("f", b"v", b"wrong"),)
        try:
            answers = (
                await table.check_and_mutate(key, RowExists(), if_match=wrong, if_not=right, is_test=True),
                await table.check_and_mutate(key, RowExists(), if_match=right, if_not=wrong, is_test=True),
                await table.check_and_mutate(key, AnyValueEquals(b"righ"), if_match=wrong, if_not=right, is_test=True),
                await table.check_and_mutate(key, AnyValueEquals(b"right"), if_match=right, if_not=wrong, is_test=True),
            )
        except StoreAmbiguous as error:
            raise StoreUnavailable(str(error)) from None
        except StoreInvalid as error:
            raise LocalError(_PROFILE_HINT.format(error)) from None
        await table.mutate_row(key, (DeleteRow(),))
        if answers != (False, True, False, True):
            raise LocalError(_PROFILE_HINT.format(f"it answered {answers}"))
        return True


_PROFILE_HINT: Final = (
    "the Bigtable instance does not decide conditional writes: {}; use an application profile with single-cluster"
    " routing and single-row transactions"
)


def _realm_of(table: str) -> RealmId | None:
    """Return the realm whose log table this is."""
    name, dash, kind = table.rpartition("-")
    if kind != "log" or not dash or len(name) != 2 * ID_BYTES:
        return None
    try:
        return RealmId(bytes.fromhex(name))
    except ValueError:
        return None
