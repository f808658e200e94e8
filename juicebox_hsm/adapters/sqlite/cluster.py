"""Keep what the processes of a cluster share: addresses, leases, settings, tenants' limits (storage.md 2.4 to 2.8)."""

from __future__ import annotations

import builtins
import secrets

import apsw

from juicebox_hsm.adapters.sqlite.reads import Reads, fetch, fetch_one, realm_number
from juicebox_hsm.adapters.sqlite.schema import REALMS_MAX
from juicebox_hsm.adapters.sqlite.writer import Writer
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.services import Lease, ServiceAddress, ServiceKind, TenantLimits
from juicebox_hsm.ids import RealmId

_LIVE = "SELECT name, owner, id, expires_ms FROM leases"


class SqliteDiscovery:
    """`ports.Discovery` on one file."""

    def __init__(self, writer: Writer, reads: Reads) -> None:
        self._writer = writer
        self._reads = reads

    async def register(self, kind: ServiceKind, url: str, now_ms: int) -> None:
        """Write or renew a registration."""
        await self._writer.run(
            lambda db: db.execute("INSERT OR REPLACE INTO discovery VALUES (?, ?, ?)", (kind.value, url, now_ms))
        )

    async def deregister(self, kind: ServiceKind, url: str) -> None:
        """Remove a registration; absent is fine."""
        await self._writer.run(
            lambda db: db.execute("DELETE FROM discovery WHERE kind = ? AND url = ?", (kind.value, url))
        )

    async def forget(self, address: ServiceAddress) -> None:
        """Remove a registration unless it was renewed since it was read; absent is fine."""
        await self._writer.run(
            lambda db: db.execute(
                "DELETE FROM discovery WHERE kind = ? AND url = ? AND registered_ms = ?",
                (address.kind.value, address.url, address.registered_ms),
            )
        )

    async def list(self, kind: ServiceKind | None = None) -> builtins.list[ServiceAddress]:
        """Return all registrations by kind and URL."""
        rows = self._reads.inline(
            lambda db: fetch(db, "SELECT kind, url, registered_ms FROM discovery ORDER BY kind, url")
        )
        return [
            ServiceAddress(ServiceKind(found), url, registered_ms)
            for found, url, registered_ms in rows
            if kind is None or found == kind.value
        ]


def obtain_lease(db: apsw.Connection, name: str, owner: str, now_ms: int, length_ms: int) -> Lease | None:
    """Take a lease inside a transaction unless somebody's expiry is at or after now."""
    held = fetch_one(db, "SELECT 1 FROM leases WHERE name = ? AND expires_ms >= ?", (name, now_ms))
    if held is not None:
        return None
    lease = Lease(name, owner, secrets.token_hex(16), now_ms + length_ms)
    db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)", (name, owner, lease.id, lease.expires_ms))
    return lease


class SqliteLeases:
    """`ports.Leases` on one file. Both clocks are the caller's."""

    def __init__(self, writer: Writer, reads: Reads) -> None:
        self._writer = writer
        self._reads = reads

    async def obtain(self, name: str, owner: str, now_ms: int, length_ms: int) -> Lease | None:
        """Obtain the lease unless somebody's expiry is at or after now."""
        return await self._writer.run(lambda db: obtain_lease(db, name, owner, now_ms, length_ms))

    async def extend(self, lease: Lease, now_ms: int, length_ms: int) -> Lease | None:
        """Extend a lease that is still ours, even one just expired; None when it is not."""
        extended = Lease(lease.name, lease.owner, lease.id, now_ms + length_ms)

        def write(db: apsw.Connection) -> Lease | None:
            db.execute(
                "UPDATE leases SET expires_ms = ? WHERE name = ? AND id = ?",
                (extended.expires_ms, lease.name, lease.id),
            )
            return extended if db.changes() else None

        return await self._writer.run(write)

    async def terminate(self, lease: Lease) -> None:
        """Give the lease back if it is still ours."""
        await self._writer.run(
            lambda db: db.execute("DELETE FROM leases WHERE name = ? AND id = ?", (lease.name, lease.id))
        )

    async def list(self) -> builtins.list[Lease]:
        """Return all rows, expired ones too, by name."""
        return [Lease(*row) for row in self._reads.inline(lambda db: fetch(db, _LIVE + " ORDER BY name"))]


class SqliteSettings:
    """`ports.Settings` on one file."""

    def __init__(self, writer: Writer, reads: Reads) -> None:
        self._writer = writer
        self._reads = reads

    async def get(self, name: str) -> bytes | None:
        """Return the value, if set."""
        value: bytes | None = self._reads.inline(
            lambda db: fetch_one(db, "SELECT value FROM settings WHERE name = ?", (name,))
        )
        return value

    async def claim(self, name: str, value: bytes) -> bytes:
        """Set the value if absent; return the value that stands afterwards."""

        def write(db: apsw.Connection) -> bytes:
            db.execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (name, value))
            stands: bytes = fetch_one(db, "SELECT value FROM settings WHERE name = ?", (name,))
            return stands

        return await self._writer.run(write)

    async def put(self, name: str, value: bytes) -> None:
        """Set or replace the value."""
        await self._writer.run(lambda db: db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value)))

    async def remove(self, name: str) -> None:
        """Remove the value; absent is fine."""
        await self._writer.run(lambda db: db.execute("DELETE FROM settings WHERE name = ?", (name,)))

    async def list(self, prefix: str) -> dict[str, bytes]:
        """Return name -> value for names with the prefix, by name."""
        rows = self._reads.inline(
            lambda db: fetch(
                db, "SELECT name, value FROM settings WHERE substr(name, 1, ?) = ? ORDER BY name", (len(prefix), prefix)
            )
        )
        return dict(rows)


class SqliteTenants:
    """`ports.TenantConfig` on one file."""

    def __init__(self, writer: Writer, reads: Reads) -> None:
        self._writer = writer
        self._reads = reads

    async def list(self) -> dict[str, TenantLimits]:
        """Return all configured tenants, by name."""
        rows = self._reads.inline(lambda db: fetch(db, "SELECT * FROM tenants ORDER BY tenant"))
        return {tenant: TenantLimits(capacity) for tenant, capacity in rows}

    async def put(self, tenant: str, limits: TenantLimits) -> None:
        """Set or replace a tenant's configuration."""
        await self._writer.run(
            lambda db: db.execute("INSERT OR REPLACE INTO tenants VALUES (?, ?)", (tenant, limits.capacity_ops_per_s))
        )

    async def remove(self, tenant: str) -> None:
        """Remove a tenant's configuration; absent is fine."""
        await self._writer.run(lambda db: db.execute("DELETE FROM tenants WHERE tenant = ?", (tenant,)))


class SqliteRealms:
    """`ports.RealmStore` on one file: the tables exist from the first opening, a realm is a row."""

    def __init__(self, writer: Writer, reads: Reads) -> None:
        self._writer = writer
        self._reads = reads

    async def create_shared(self) -> None:
        """Do nothing more: whoever opened the file first made all tables."""

    async def create_realm(self, realm: RealmId) -> None:
        """Make a realm known; raises `LocalError` when the file has no room for one more."""

        def write(db: apsw.Connection) -> None:
            db.execute("INSERT OR IGNORE INTO realms (realm) VALUES (?)", (realm,))
            if realm_number(db, realm) > REALMS_MAX:
                raise LocalError(f"one file holds at most {REALMS_MAX} realms; use another file")

        await self._writer.run(write)

    async def list_realms(self) -> list[RealmId]:
        """Return the realms of this file, sorted."""
        rows = self._reads.inline(lambda db: fetch(db, "SELECT realm FROM realms ORDER BY realm"))
        return [RealmId(realm) for (realm,) in rows]
