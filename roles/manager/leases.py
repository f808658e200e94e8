"""Management leases held by a context manager with its own renewer (manager.md 1.2).

When the lease may not be relied on any longer the body, and only the body, is cancelled and `LeaseLost` is raised.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.leases import LEASE_MS, RENEW_AGAIN_S, RENEW_EVERY_S, usable_until_s
from juicebox_hsm.host.services import Lease
from roles.manager.context import ManagerContext

TERMINATE_TIMEOUT_S: Final = 2.0


class LeaseBusy(RealmError):
    """Somebody else holds the lease: they are working on it."""

    retryable = True


class LeaseLost(RealmError):
    """The lease could not be renewed in time; the work under it was cancelled."""

    retryable = True


@asynccontextmanager
async def management_lease(context: ManagerContext, name: str) -> AsyncIterator[Lease]:
    """Hold lease `name` for the body. Raises `LeaseBusy`, `StoreUnavailable`, or `LeaseLost` after cancelling it."""
    leases, standing = context.store.leases, context.state.standing
    standing.look(await leases.list(), trio.current_time())
    sent = trio.current_time()
    at_ms = standing.obtain_ms(name, context.now_ms(), sent)
    lease = None if at_ms is None else await leases.obtain(name, context.name, at_ms, LEASE_MS)
    if lease is None:
        context.meter.count("manager.lease.busy")
        raise LeaseBusy(f"lease {name} is held by another manager")
    context.meter.count("manager.lease.obtained")
    context.state.held_leases[name] = lease.expires_ms
    held = [lease]
    failure: Exception | None = None
    body = trio.CancelScope(deadline=usable_until_s(sent))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_renew, context, held, body)
            with body:
                try:
                    yield lease
                except Exception as error:  # noqa: BLE001 -- leaves the nursery unwrapped, below
                    failure = error
            nursery.cancel_scope.cancel()
    finally:
        context.state.held_leases.pop(name, None)
        await _give_back(context, held[0])
    if failure is not None:
        raise failure
    if body.cancelled_caught:
        context.meter.count("manager.lease.lost")
        raise LeaseLost(f"lease {name} was lost")


async def _renew(context: ManagerContext, held: list[Lease], body: trio.CancelScope) -> None:
    """Extend the lease every second; the body's deadline moves along, or passes."""
    pause_s = RENEW_EVERY_S
    while True:
        await trio.sleep(pause_s)
        sent = trio.current_time()
        try:
            extended = await context.store.leases.extend(held[0], context.now_ms(), LEASE_MS)
        except RealmError:  # whatever ails the store, the body's deadline decides
            pause_s = RENEW_AGAIN_S
            continue
        if extended is None:
            body.cancel()
            return
        held[0] = extended
        body.deadline = usable_until_s(sent)
        pause_s = RENEW_EVERY_S


async def _give_back(context: ManagerContext, lease: Lease) -> None:
    """Terminate the lease even while being cancelled, but not for long: it expires by itself."""
    with trio.move_on_after(TERMINATE_TIMEOUT_S) as scope:
        scope.shield = True
        try:
            await context.store.leases.terminate(lease)
        except RealmError as error:
            context.log.warning("lease not given back, it will expire", lease=lease.name, error=str(error))
