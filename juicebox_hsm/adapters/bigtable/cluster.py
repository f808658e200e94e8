"""Keep what the processes of a cluster share: addresses, leases, settings, tenants' limits (storage.md 2.4 to 2.8).

Where one value is meant, the family is deleted and the cell set in one atomic mutation: cells that the service dates
itself would pile up as versions. A missing table reads as empty: it is created when a manager or balancer starts.
"""

from __future__ import annotations

import builtins
import secrets
from typing import Final, NoReturn

import cbor2

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.audit import AUDIT
from juicebox_hsm.adapters.bigtable.codec import (
    EVERYTHING,
    AnyTimestampAtLeast,
    AnyValueEquals,
    DeleteColumn,
    DeleteFamily,
    DeleteRow,
    KeyRange,
    Row,
    RowExists,
    RowSet,
    Selection,
    SetCell,
)
from juicebox_hsm.adapters.bigtable.retry import NoSuchTable
from juicebox_hsm.adapters.bigtable.table import Endpoint, Table
from juicebox_hsm.adapters.observation.logging import get_logger
from juicebox_hsm.errors import DecodingError
from juicebox_hsm.host.services import Lease, ServiceAddress, ServiceKind, TenantLimits
from juicebox_hsm.ids import LOG_INDEX_MAX
from juicebox_hsm.ports.errors import StoreAmbiguous, StoreInvalid, StoreUnavailable
from juicebox_hsm.wire import cbor

DISCOVERY: Final = "discovery"
LEASE: Final = "lease"
SETTINGS: Final = "settings"
TENANTS: Final = "tenants"
SELF_TEST: Final = b"self-test/"
"""Start of the names of passing rows among the settings, which test conditional writes."""
SHARED_TABLES: Final = (DISCOVERY, LEASE, SETTINGS, TENANTS, AUDIT)

_NEWEST: Final = Selection(cells_per_column=1)
_log = get_logger("bigtable")


async def _read(table: Table, wanted: KeyRange, selection: Selection = EVERYTHING) -> list[Row]:
    """Return the rows of a range, none if the table does not exist yet."""
    try:
        return await table.read_rows(RowSet(ranges=(wanted,)), selection=selection)
    except NoSuchTable:
        _log.warning("table does not exist yet", table=table.name)
        return []


class BigtableDiscovery:
    """`ports.Discovery` on one instance."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._table = Table(endpoint, DISCOVERY)

    async def register(self, kind: ServiceKind, url: str, now_ms: int) -> None:
        """Write or renew a registration; its time is the caller's. The store must have passed its test before."""
        await self._endpoint.prove()
        cell = SetCell("f", b"t", b"", now_ms * 1000)
        await self._table.mutate_row(keys.address_key(kind, url), (DeleteFamily("f"), cell))

    async def deregister(self, kind: ServiceKind, url: str) -> None:
        """Remove a registration; absent is fine."""
        await self._table.mutate_row(keys.address_key(kind, url), (DeleteRow(),))

    async def forget(self, address: ServiceAddress) -> None:
        """Remove a registration unless it was renewed since it was read; absent is fine."""
        micros = address.registered_ms * 1000
        cell = DeleteColumn("f", b"t", before=micros + 1000, since=micros)
        await self._table.mutate_row(keys.address_key(address.kind, address.url), (cell,))

    async def list(self, kind: ServiceKind | None = None) -> builtins.list[ServiceAddress]:
        """Return all registrations by kind and URL."""
        wanted = keys.whole_table() if kind is None else keys.address_range(kind)
        return [
            ServiceAddress(ServiceKind(row.key[:1].decode()), row.key[1:].decode(), row.cells[0].timestamp // 1000)
            for row in await _read(self._table, wanted, _NEWEST)
        ]


class BigtableLeases:
    """`ports.Leases` on one instance. Both clocks are the caller's; the expiry is the cells' time."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._table = Table(endpoint, LEASE)

    @staticmethod
    def _cells(lease: Lease) -> tuple[DeleteRow, SetCell, SetCell]:
        micros = lease.expires_ms * 1000
        return (
            DeleteRow(),
            SetCell("f", b"id", lease.id.encode(), micros),
            SetCell("f", b"o", lease.owner.encode(), micros),
        )

    async def _is_stored(self, lease: Lease) -> bool:
        """Read the row after an unknown outcome: is it this grant with this expiry?"""
        row = await self._table.read_row(lease.name.encode())
        return row is not None and _lease(row) == lease

    async def obtain(self, name: str, owner: str, now_ms: int, length_ms: int) -> Lease | None:
        """Obtain the lease unless somebody's expiry is at or after now."""
        lease = Lease(name, owner, secrets.token_hex(16), now_ms + length_ms)
        try:
            held = await self._table.check_and_mutate(
                name.encode(), AnyTimestampAtLeast(now_ms * 1000), if_not=self._cells(lease)
            )
        except StoreAmbiguous as error:
            return lease if await self._is_stored(lease) else _refuse(error)
        return None if held else lease

    async def extend(self, lease: Lease, now_ms: int, length_ms: int) -> Lease | None:
        """Extend a lease that is still ours, even one just expired; None when it is not."""
        extended = Lease(lease.name, lease.owner, lease.id, now_ms + length_ms)
        ours = AnyValueEquals(lease.id.encode())
        try:
            is_ours = await self._table.check_and_mutate(lease.name.encode(), ours, if_match=self._cells(extended))
        except StoreAmbiguous as error:
            return extended if await self._is_stored(extended) else _refuse(error)
        return extended if is_ours else None

    async def terminate(self, lease: Lease) -> None:
        """Give the lease back if it is still ours."""
        ours = AnyValueEquals(lease.id.encode())
        attempts = self._table.attempts("end a lease")
        while True:
            try:
                await self._table.check_and_mutate(lease.name.encode(), ours, if_match=(DeleteRow(),))
                return
            except StoreAmbiguous as error:  # repeating is harmless: the id is only ever ours
                if attempts.exhausted():
                    _refuse(error)
                await attempts.pause()

    async def list(self) -> builtins.list[Lease]:
        """Return all rows, expired ones too, by name."""
        return [_lease(row) for row in await _read(self._table, keys.whole_table(), _NEWEST)]


def _refuse(error: StoreAmbiguous) -> NoReturn:
    """Report an unknown outcome that a later read showed not to have happened (yet); asking again is harmless."""
    raise StoreUnavailable(f"not seen to happen: {error}") from None


def _lease(row: Row) -> Lease:
    values = {cell.qualifier: cell for cell in row.cells}
    if b"id" not in values or b"o" not in values:
        raise StoreInvalid(f"the lease {row.key.decode(errors='replace')} is damaged")
    identity = values[b"id"]
    return Lease(row.key.decode(), values[b"o"].value.decode(), identity.value.decode(), identity.timestamp // 1000)


class BigtableSettings:
    """`ports.Settings` on one instance."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._table = Table(endpoint, SETTINGS)

    async def get(self, name: str) -> bytes | None:
        """Return the value, if set."""
        try:
            row = await self._table.read_row(name.encode(), _NEWEST)
        except NoSuchTable:
            return None
        return None if row is None else row.cells[0].value

    async def claim(self, name: str, value: bytes) -> bytes:
        """Set the value if absent; return the value that stands afterwards."""
        attempts = self._table.attempts("claim a setting")
        while True:
            try:
                if not await self._table.check_and_mutate(
                    name.encode(), RowExists(), if_not=(SetCell("f", b"v", value),)
                ):
                    return value
            except StoreAmbiguous as error:
                if attempts.exhausted():
                    _refuse(error)
            stands = await self.get(name)
            if stands is not None:
                return stands
            await attempts.pause()

    async def put(self, name: str, value: bytes) -> None:
        """Set or replace the value."""
        await self._table.mutate_row(name.encode(), (DeleteFamily("f"), SetCell("f", b"v", value)))

    async def remove(self, name: str) -> None:
        """Remove the value; absent is fine."""
        await self._table.mutate_row(name.encode(), (DeleteRow(),))

    async def list(self, prefix: str) -> dict[str, bytes]:
        """Return name -> value for names with the prefix, by name."""
        start = prefix.encode()
        wanted = KeyRange(start, start + b"\xff" * 8) if start else keys.whole_table()
        rows = await _read(self._table, wanted, _NEWEST)
        return {row.key.decode(): row.cells[0].value for row in rows if not row.key.startswith(SELF_TEST)}


class BigtableTenants:
    """`ports.TenantConfig` on one instance."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._table = Table(endpoint, TENANTS)

    async def list(self) -> dict[str, TenantLimits]:
        """Return all configured tenants, by name."""
        return {row.key.decode(): _limits(row) for row in await _read(self._table, keys.whole_table(), _NEWEST)}

    async def put(self, tenant: str, limits: TenantLimits) -> None:
        """Set or replace a tenant's configuration."""
        value = cbor2.dumps({"capacity_ops_per_sec": limits.capacity_ops_per_s})
        await self._table.mutate_row(keys.check_tenant(tenant), (DeleteFamily("f"), SetCell("f", b"c", value)))

    async def remove(self, tenant: str) -> None:
        """Remove a tenant's configuration; absent is fine."""
        await self._table.mutate_row(keys.check_tenant(tenant), (DeleteRow(),))


def _limits(row: Row) -> TenantLimits:
    try:
        fields = cbor.as_map(cbor.decode(row.cells[0].value))
        return TenantLimits(cbor.as_uint(fields["capacity_ops_per_sec"], LOG_INDEX_MAX))
    except (DecodingError, KeyError):
        raise StoreInvalid(f"the limits of tenant {row.key.decode(errors='replace')} are damaged") from None
