"""Finish transfers that somebody left half done (manager.md 6.3).

Reports of pending transfers are hints: they are read a second time under the ownership lease, only committed records
of each group's freshest leader count, and a transfer is completed only after the destination's committed log says that
the range arrived.
"""

from __future__ import annotations

from typing import Final

from juicebox_hsm.cluster_view import ClusterView, GroupView, owned_range
from juicebox_hsm.errors import RealmError
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.wire.rpc import TransferringInfo
from roles.manager.context import ManagerContext, ManagerState
from roles.manager.leases import LeaseBusy, management_lease, ownership_lease
from roles.manager.overview import STATUS_TIMEOUT_S, read_overview
from roles.manager.transfer import Arrival, TransferRequest, ask_arrived, complete_only, run_transfer

INCOMING: Final = "In"


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


async def recover_transfers(context: ManagerContext) -> None:
    """Run one pass over all realms; a realm that fails does not stop the others."""
    view = await read_overview(context.store, context.rpc, context.now_ms(), STATUS_TIMEOUT_S)
    found = pending(view, committed_only=False)
    context.meter.gauge("manager.transfer.pending", len(found))
    remember_pending(context.state, found, context.now_ms())
    for realm in sorted({group.realm for group, _ in found}):
        try:
            async with management_lease(context, ownership_lease(realm)):
                await _recover_realm(context, realm)
        except LeaseBusy:
            context.log.debug("transfers of the realm are being worked on", realm=realm.hex())
        except RealmError as error:
            context.meter.count("manager.loop.errors", loop="transfers")
            context.log.warning("transfer recovery failed", realm=realm.hex(), error=str(error))


async def _recover_realm(context: ManagerContext, realm: RealmId) -> None:
    """Read again under the lease, then finish what was prepared, then what is outgoing without a preparation."""
    view = await read_overview(context.store, context.rpc, context.now_ms(), STATUS_TIMEOUT_S)
    records = [(group, marker) for group, marker in pending(view, committed_only=True) if group.realm == realm]
    handled: set[TransferRequest] = set()
    for group, marker in records:
        request = request_of(group, marker)
        if marker.direction != INCOMING or request is None:
            continue
        source = view.group(realm, request.source)
        if source is None or source.leader is None:
            context.log.warning("prepared transfer waits for its source's leader", transfer=str(request))
            continue
        handled.add(request)
        await run_transfer(context, request)
    for group, marker in records:
        request = request_of(group, marker)
        if marker.direction == INCOMING or request is None or request in handled:
            continue
        await _recover_outgoing(context, view, request, marker)


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
            await complete_only(context, request)
        case Arrival.NO:
            await run_transfer(context, request)
        case Arrival.UNKNOWN:
            context.log.warning("arrival not known, trying again later", transfer=str(request))
