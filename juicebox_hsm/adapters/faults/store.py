"""A store that misbehaves when told to: the ports of `ports.Store` around those of a real back end.

Each operation first waits and may be refused; log appends may also be applied and then reported as ambiguous. What the
back end itself would answer is never changed, so whatever happens to the realm could happen with a bad disk or network.
Leases are the exception: they may be granted to everybody who asks, which is what clocks far apart amount to.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import fields, replace
from typing import Any, Final, cast

import trio

from juicebox_hsm.adapters.faults.switch import FaultSwitch
from juicebox_hsm.host.services import Lease
from juicebox_hsm.ports.errors import StoreAmbiguous, StoreUnavailable
from juicebox_hsm.ports.leases import Leases
from juicebox_hsm.ports.store import Store

_VALUES: Final = frozenset({"description", "is_new"})
"""Fields of a store that are no ports."""
_AMBIGUOUS: Final = frozenset({"append"})
_UNSHARED_ID: Final = "0" * 32
"""The id of a lease the store knows nothing of; real ones are random."""


def with_faults(store: Store, switch: FaultSwitch) -> Store:
    """Return a store whose operations suffer the faults of `switch`; `store` itself when none can be asked for."""
    if not switch.is_configured:
        return store
    ports: dict[str, Any] = {
        field.name: _FaultyPort(getattr(store, field.name), switch)
        for field in fields(store)
        if field.name not in _VALUES and getattr(store, field.name) is not None
    }
    ports["leases"] = _FaultyLeases(ports["leases"], switch)
    return replace(store, **ports)


class _FaultyPort:
    """Stands for one port: its coroutine methods pass a gate, everything else is the port's own."""

    def __init__(self, port: Any, switch: FaultSwitch) -> None:
        self._port = port
        self._switch = switch

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._port, name)
        if not inspect.iscoroutinefunction(found):
            return found
        gated = _gated(found, self._switch, loses_replies=name in _AMBIGUOUS)
        self.__dict__[name] = gated  # next time without this detour
        return gated


class _FaultyLeases:
    """Leases that are also granted without the store, when told to; such a grant ends with the fault."""

    def __init__(self, leases: Leases, switch: FaultSwitch) -> None:
        self._leases = leases
        self._switch = switch

    async def obtain(self, name: str, owner: str, now_ms: int, length_ms: int) -> Lease | None:
        if not self._switch.now.ignores_leases:
            return await self._leases.obtain(name, owner, now_ms, length_ms)
        await trio.lowlevel.checkpoint()
        return Lease(name, owner, _UNSHARED_ID, now_ms + length_ms)

    async def extend(self, lease: Lease, now_ms: int, length_ms: int) -> Lease | None:
        if lease.id != _UNSHARED_ID:
            return await self._leases.extend(lease, now_ms, length_ms)
        await trio.lowlevel.checkpoint()
        return replace(lease, expires_ms=now_ms + length_ms) if self._switch.now.ignores_leases else None

    async def terminate(self, lease: Lease) -> None:
        if lease.id == _UNSHARED_ID:
            await trio.lowlevel.checkpoint()
        else:
            await self._leases.terminate(lease)

    async def list(self) -> list[Lease]:
        if not self._switch.now.ignores_leases:
            return await self._leases.list()
        await trio.lowlevel.checkpoint()
        return []


def _gated(operation: Any, switch: FaultSwitch, *, loses_replies: bool) -> Any:
    @functools.wraps(operation)
    async def gated(*args: Any, **kwargs: Any) -> Any:
        faults = switch.now
        if faults.store_delay_ms:
            await trio.sleep(faults.store_delay_ms / 1000)
        if faults.store_refuses:
            await trio.lowlevel.checkpoint()
            raise StoreUnavailable("the store refuses everything (asked for by a chaos run)")
        result = await operation(*args, **kwargs)
        if loses_replies and faults.store_loses_replies:
            raise StoreAmbiguous("the store's reply was lost (asked for by a chaos run)")
        return result

    return cast("Any", gated)
