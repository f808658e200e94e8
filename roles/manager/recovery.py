"""Finish transfers that somebody left half done (manager.md 6.3).

Reports of pending transfers are hints: they are read a second time under the ownership lease, only committed records
of each group's freshest leader count, and a transfer is completed only after the destination's committed log says that
the range arrived.

Realms, and the transfers of a realm, do not wait for each other: each range that is stuck is stuck for a reason of its
own, and every range between its groups is out of service until it is done.
"""

from __future__ import annotations

from typing import Final

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.view import ClusterView, GroupView, owned_range
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.wire.rpc import TransferringInfo
from roles.manager.context import ManagerContext, ManagerState
from roles.manager.leases import LeaseBusy, management_lease, ownership_lease
from roles.manager.transfer import Arrival, TransferRequest, ask_arrived, complete_only, run_transfer
from roles.survey.overview import IDS_TIMEOUT_S, STATUS_TIMEOUT_S, read_overview

INCOMING: Final = "In"

REALMS_AT_ONCE_MAX: Final = 16
"""Realms worked on at once; the others wait for their turn. Bounds this process's calls and leases (own)."""

PASS_S: Final = 10.0
"""How long one pass may work on a realm. Own: a member that hangs costs three looks of 2 s, the four steps take well
under a second, and the next pass is 2 s away. What an agent has begun goes on without us, so a store that needs longer
still gets a step further in each pass; and an operator's request finds the lease taken for this long, not for 120 s."""


def pending(view: ClusterView, *, committed_only: bool) -> list[tuple[GroupView, TransferringInfo]]:
    """Return the pending transfers that the freshest leaders report, in order of group id."""
    found = []
    for _, group in sorted(view.groups.items()):
        leader = group.leader
        info = None if leader is None else leader.info.leader
        if info is None or info.transferring is None:
            continue
        if committed_only and (info.committed is None or info.committed < info.transferring.at):
            continue
        found.append((group, info.transferring))
    return found


def remember_pending(state: ManagerState, found: list[tuple[GroupView, TransferringInfo]], now_ms: int) -> None:
    """Keep when each pending transfer was first seen; forget those that are gone."""
    seen = [(group.key, marker.at) for group, marker in found]
    state.pending = {key: state.pending.get(key, now_ms) for key in seen}


def request_of(group: GroupView, marker: TransferringInfo) -> TransferRequest | None:
    """Return the transfer that a marker at `group` belongs to."""
    wanted = owned_range(marker.range)
    if wanted is None:
        return None
    peer = GroupId(marker.peer)
    source, destination = (peer, group.id) if marker.direction == INCOMING else (group.id, peer)
    return TransferRequest(group.realm, source, destination, wanted)


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
        view = await read_overview(context.store, context.rpc, context.now_ms(), STATUS_TIMEOUT_S)
        found = pending(view, committed_only=False)
        context.meter.gauge("manager.transfer.pending", len(found))
        remember_pending(context.state, found, context.now_ms())
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
    """Read again under the lease, then finish side by side what is prepared and what is outgoing without a preparation.

    Two transfers to one destination meet at its HSM, which takes one; a later pass finishes the other.
    """
    view = await read_overview(context.store, context.rpc, context.now_ms(), IDS_TIMEOUT_S)
    records = [
        (request, marker)
        for group, marker in pending(view, committed_only=True)
        if group.realm == realm and (request := request_of(group, marker)) is not None
    ]
    prepared = {request for request, marker in records if marker.direction == INCOMING}
    handled: set[TransferRequest] = set()
    async with trio.open_nursery() as nursery:
        for request in sorted(prepared, key=str):
            source = view.group(realm, request.source)
            if source is None or source.leader is None:
                context.log.warning("prepared transfer waits for its source's leader", transfer=str(request))
                continue
            handled.add(request)
            nursery.start_soon(run_transfer, context, request)
        for request, marker in records:
            if marker.direction != INCOMING and request not in handled:
                nursery.start_soon(_recover_outgoing, context, view, request, marker)


async def _recover_outgoing(
    context: ManagerContext, view: ClusterView, request: TransferRequest, marker: TransferringInfo
) -> None:
    """Complete a range that arrived; bring one that is still in flight to its destination."""
    destination = view.group(request.realm, request.destination)
    if destination is None or destination.leader is None:
        context.log.warning("outgoing transfer waits for its destination's leader", transfer=str(request))
        return
    match await ask_arrived(context, request, destination.leader, marker.at):
        case Arrival.YES:
            await complete_only(context, request, marker.at)
        case Arrival.NO:
            await run_transfer(context, request)
        case Arrival.UNKNOWN:
            context.log.warning("arrival not known, trying again later", transfer=str(request))
