"""Finish transfers that somebody left half done (manager.md 6.3).

Reports of pending transfers are hints: they are read a second time under the ownership lease, and what to do about them
is decided there (`host.cluster.recovery`).

Realms, and the transfers of a realm, do not wait for each other: each range that is stuck is stuck for a reason of its
own, and every range between its groups is out of service until it is done.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.leases import ownership_lease
from juicebox_hsm.host.cluster.ranges import show_range
from juicebox_hsm.host.cluster.recovery import (
    AskWhetherArrived,
    RunAgain,
    WaitForLeader,
    pending,
    pending_since,
    plan_recovery,
)
from juicebox_hsm.host.cluster.transfer import Arrival, TransferRequest, arrival_of, ask_arrived
from juicebox_hsm.ids import RealmId
from juicebox_hsm.wire.rpc import Done, Refused
from roles.manager.context import ManagerContext
from roles.manager.leases import LeaseBusy, management_lease
from roles.manager.transfer import call_step, complete_only, run_transfer
from roles.survey.overview import IDS_TIMEOUT_S, STATUS_TIMEOUT_S, read_overview

REALMS_AT_ONCE_MAX: Final = 16
"""Realms worked on at once; the others wait for their turn. Bounds this process's calls and leases (own)."""

PASS_S: Final = 10.0
"""How long one pass may work on a realm. Own: a member that hangs costs three looks of 2 s, the four steps take well
under a second, and the next pass is 2 s away. What an agent has begun goes on without us, so a store that needs longer
still gets a step further in each pass; and an operator's request finds the lease taken for this long, not for 120 s."""


class Recovery:
    """Finishes transfers in tasks of its own in `nursery`, one for each realm; a realm that stalls stops no other."""

    def __init__(self, context: ManagerContext, nursery: trio.Nursery) -> None:
        self._context = context
        self._nursery = nursery
        self._turns = trio.CapacityLimiter(REALMS_AT_ONCE_MAX)  # first come, first served: no realm starves
        self._busy: set[RealmId] = set()

    async def run_pass(self) -> None:
        """Look for pending transfers and start on realms that nothing runs for. Raises `StoreUnavailable`."""
        context = self._context
        view = await read_overview(context.store, context.rpc, STATUS_TIMEOUT_S)
        found = pending(view, committed_only=False)
        context.meter.gauge("manager.transfer.pending", len(found))
        context.state.pending = pending_since(context.state.pending, found, context.now_ms())
        for realm in sorted({group.realm for group, _ in found} - self._busy):
            self._busy.add(realm)
            self._nursery.start_soon(self._take_turn, realm)

    async def _take_turn(self, realm: RealmId) -> None:
        try:
            async with self._turns:
                await recover_realm(self._context, realm)
        finally:
            self._busy.discard(realm)


async def recover_realm(context: ManagerContext, realm: RealmId) -> None:
    """Work on one realm for up to `PASS_S`; trouble is counted and logged, and the lease is given back."""
    with trio.move_on_after(PASS_S) as scope:
        try:
            async with management_lease(context, ownership_lease(realm)):
                await _finish_transfers(context, realm)
        except LeaseBusy:
            context.log.debug("transfers of the realm are being worked on", realm=realm.hex())
        except RealmError as error:
            context.meter.count("manager.loop.errors", loop="transfers")
            context.log.warning("transfer recovery failed", realm=realm.hex(), error=str(error))
    if scope.cancelled_caught:
        context.meter.count("manager.loop.errors", loop="transfers")
        context.log.warning("transfer recovery took too long, the next pass goes on", realm=realm.hex(), limit_s=PASS_S)


async def _finish_transfers(context: ManagerContext, realm: RealmId) -> None:
    """Read again under the lease, then finish side by side what can be finished."""
    view = await read_overview(context.store, context.rpc, IDS_TIMEOUT_S)
    async with trio.open_nursery() as nursery:
        for work in plan_recovery(view, realm):
            match work:
                case WaitForLeader(request=request, group=group):
                    context.log.warning("transfer waits for a leader", transfer=str(request), group=group.hex())
                case RunAgain(request=request):
                    nursery.start_soon(_noted, context, request, run_transfer)
                case AskWhetherArrived():
                    nursery.start_soon(_recover_outgoing, context, work)


async def _recover_outgoing(context: ManagerContext, work: AskWhetherArrived) -> None:
    """Complete a range that arrived; bring one that is still in flight to its destination."""
    request = work.request
    match arrival_of(await call_step(context, ask_arrived(request, work.destination, work.at))):
        case Arrival.YES:
            await _noted(context, request, partial(complete_only, at=work.at))
        case Arrival.NO:
            await _noted(context, request, run_transfer)
        case Arrival.UNKNOWN:
            context.log.warning("arrival not known, trying again later", transfer=str(request))


async def _noted(
    context: ManagerContext,
    request: TransferRequest,
    finish: Callable[[ManagerContext, TransferRequest], Awaitable[Done | Refused]],
) -> None:
    """Finish a transfer that somebody began, and tell the audit trail."""
    if isinstance(await finish(context, request), Done):
        ids = {"realm": request.realm, "source": request.source, "destination": request.destination}
        named = {name: value.hex() for name, value in ids.items()}
        await context.note("finish-transfer", **named, range=show_range(request.range))
