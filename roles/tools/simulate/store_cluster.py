"""Small shared facts of the simulated store: addresses, leases, settings, tenants' limits, realms."""

from __future__ import annotations

import builtins
from dataclasses import replace
from typing import Final

from juicebox_hsm.host.audit import AuditEntry
from juicebox_hsm.host.services import Lease, ServiceAddress, ServiceKind, TenantLimits
from juicebox_hsm.ids import RealmId
from roles.tools.simulate.store_data import RealmData
from roles.tools.simulate.store_gate import Gate

LEASE_ID_BITS: Final = 128


class SimulatedDiscovery:
    """`ports.Discovery` for one process."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def register(self, kind: ServiceKind, url: str, now_ms: int) -> None:
        """Write or renew a registration."""
        data = self._gate.data
        await self._gate.write(
            "register", lambda: data.discovery.replace(data.now(), data.discovery.now | {(kind, url): now_ms})
        )

    async def deregister(self, kind: ServiceKind, url: str) -> None:
        """Remove a registration; absent is fine."""
        data = self._gate.data

        def write() -> None:
            kept = {key: when for key, when in data.discovery.now.items() if key != (kind, url)}
            data.discovery.replace(data.now(), kept)

        await self._gate.write("deregister", write)

    async def forget(self, address: ServiceAddress) -> None:
        """Remove a registration unless it was renewed since it was read; absent is fine."""
        data = self._gate.data
        gone = ((address.kind, address.url), address.registered_ms)

        def write() -> None:
            data.discovery.replace(data.now(), dict(item for item in data.discovery.now.items() if item != gone))

        await self._gate.write("forget", write)

    async def list(self, kind: ServiceKind | None = None) -> builtins.list[ServiceAddress]:
        """Return all registrations sorted by kind and URL."""
        found = await self._gate.read_past("discovery", lambda: self._gate.data.discovery)
        addresses = [ServiceAddress(of, url, when) for (of, url), when in found.items() if kind is None or of is kind]
        return sorted(addresses, key=lambda address: (address.kind.value, address.url))


class SimulatedLeases:
    """`ports.Leases` for one process. Both clocks are the caller's."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def obtain(self, name: str, owner: str, now_ms: int, length_ms: int) -> Lease | None:
        """Obtain the lease unless somebody's expiry is at or after now."""
        data = self._gate.data
        lease = Lease(name, owner, f"{self._gate.token(LEASE_ID_BITS):032x}", now_ms + length_ms)

        def write() -> Lease | None:
            held = data.leases.now.get(name)
            if held is not None and held.expires_ms >= now_ms:
                return None
            data.leases.replace(data.now(), data.leases.now | {name: lease})
            return lease

        return await self._gate.write("obtain", write)

    async def extend(self, lease: Lease, now_ms: int, length_ms: int) -> Lease | None:
        """Extend a lease that is still ours, even one just expired; None when it is not."""
        data = self._gate.data
        extended = replace(lease, expires_ms=now_ms + length_ms)

        def write() -> Lease | None:
            held = data.leases.now.get(lease.name)
            if held is None or held.id != lease.id:
                return None
            data.leases.replace(data.now(), data.leases.now | {lease.name: extended})
            return extended

        return await self._gate.write("extend", write)

    async def terminate(self, lease: Lease) -> None:
        """Give the lease back if it is still ours."""
        data = self._gate.data

        def write() -> None:
            kept = {name: held for name, held in data.leases.now.items() if held.id != lease.id or name != lease.name}
            data.leases.replace(data.now(), kept)

        await self._gate.write("terminate", write)

    async def list(self) -> builtins.list[Lease]:
        """Return all rows, expired ones too, by name."""
        found = await self._gate.read_past("leases", lambda: self._gate.data.leases)
        return sorted(found.values(), key=lambda lease: lease.name)


class SimulatedSettings:
    """`ports.Settings` for one process."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def get(self, name: str) -> bytes | None:
        """Return the value, if set."""
        return await self._gate.read("settings_get", lambda: self._gate.data.settings.now.get(name))

    async def claim(self, name: str, value: bytes) -> bytes:
        """Set the value if absent; return the value that stands afterwards."""
        data = self._gate.data

        def write() -> bytes:
            if name not in data.settings.now:
                data.settings.replace(data.now(), data.settings.now | {name: value})
            return data.settings.now[name]

        return await self._gate.write("settings_claim", write)

    async def put(self, name: str, value: bytes) -> None:
        """Set or replace the value."""
        data = self._gate.data
        await self._gate.write(
            "settings_put", lambda: data.settings.replace(data.now(), data.settings.now | {name: value})
        )

    async def remove(self, name: str) -> None:
        """Remove the value; absent is fine."""
        data = self._gate.data

        def write() -> None:
            kept = {key: value for key, value in data.settings.now.items() if key != name}
            data.settings.replace(data.now(), kept)

        await self._gate.write("settings_remove", write)

    async def list(self, prefix: str) -> dict[str, bytes]:
        """Return name -> value for names with the prefix, by name."""
        found = await self._gate.read_past("settings_list", lambda: self._gate.data.settings)
        return {name: value for name, value in sorted(found.items()) if name.startswith(prefix)}


class SimulatedTenants:
    """`ports.TenantConfig` for one process."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def list(self) -> dict[str, TenantLimits]:
        """Return all configured tenants, by name."""
        found = await self._gate.read_past("tenants_list", lambda: self._gate.data.tenants)
        return dict(sorted(found.items()))

    async def put(self, tenant: str, limits: TenantLimits) -> None:
        """Set or replace a tenant's configuration."""
        data = self._gate.data
        await self._gate.write(
            "tenants_put", lambda: data.tenants.replace(data.now(), data.tenants.now | {tenant: limits})
        )

    async def remove(self, tenant: str) -> None:
        """Remove a tenant's configuration; absent is fine."""
        data = self._gate.data

        def write() -> None:
            kept = {name: limits for name, limits in data.tenants.now.items() if name != tenant}
            data.tenants.replace(data.now(), kept)

        await self._gate.write("tenants_remove", write)


class SimulatedAudit:
    """`ports.AuditTrail` for one process."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def add(self, entry: AuditEntry) -> None:
        """Add an entry; of one change and phase the first one stands."""
        kept = self._gate.data.audit
        await self._gate.write("audit_add", lambda: kept.setdefault((entry.change, entry.phase), entry))

    async def read(self, since_ms: int, entries_max: int) -> builtins.list[AuditEntry]:
        """Return the newest entries since then, oldest first."""
        kept = await self._gate.read("audit_read", lambda: builtins.list(self._gate.data.audit.values()))
        found = sorted((entry for entry in kept if entry.when_ms >= since_ms), key=lambda entry: entry.when_ms)
        return found[-entries_max:]


class SimulatedRealms:
    """`ports.RealmStore` for one process."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def create_shared(self) -> None:
        """Do nothing more: the shared tables exist from the start."""
        await self._gate.read("create_shared", lambda: None)

    async def create_realm(self, realm: RealmId) -> None:
        """Make a realm known."""
        await self._gate.write("create_realm", lambda: self._gate.data.realms.setdefault(realm, RealmData()))

    async def list_realms(self) -> list[RealmId]:
        """Return the realms, sorted."""
        return await self._gate.read("list_realms", lambda: sorted(self._gate.data.realms))
