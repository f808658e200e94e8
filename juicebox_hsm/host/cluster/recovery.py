"""What to do about transfers that somebody left half done (manager.md 6.3).

Only committed records of each group's freshest leader count, and a transfer is completed only after the destination's
committed log says that the range arrived.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from juicebox_hsm.host.cluster.transfer import TransferRequest
from juicebox_hsm.host.cluster.view import ClusterView, GroupKey, GroupView, Member, owned_range
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.wire.rpc import Direction, TransferringInfo

PendingKey = tuple[GroupKey, int]
"""A group and the index of its transfer."""


@dataclass(frozen=True, slots=True)
class RunAgain:
    """The destination is prepared: all four steps again, which are idempotent."""

    request: TransferRequest


@dataclass(frozen=True, slots=True)
class AskWhetherArrived:
    """The range left its source at `at`, and no preparation is known: `destination`'s log says what to do."""

    request: TransferRequest
    at: int
    destination: Member


@dataclass(frozen=True, slots=True)
class WaitForLeader:
    """Nothing can be done while nobody leads `group`."""

    request: TransferRequest
    group: GroupId


Work = RunAgain | AskWhetherArrived | WaitForLeader


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


def pending_since(
    before: Mapping[PendingKey, int], found: Iterable[tuple[GroupView, TransferringInfo]], now_ms: int
) -> dict[PendingKey, int]:
    """Return when each pending transfer was first seen; those that are gone are forgotten."""
    return {key: before.get(key, now_ms) for key in ((group.key, marker.at) for group, marker in found)}


def request_of(group: GroupView, marker: TransferringInfo) -> TransferRequest | None:
    """Return the transfer that a marker at `group` belongs to."""
    wanted = owned_range(marker.range)
    if wanted is None:
        return None
    peer = GroupId(marker.peer)
    source, destination = (peer, group.id) if marker.direction is Direction.IN else (group.id, peer)
    return TransferRequest(group.realm, source, destination, wanted)


def plan_recovery(view: ClusterView, realm: RealmId) -> list[Work]:
    """Return what to do in a realm, all of it side by side: first what is prepared, then what is only outgoing.

    `view` was read under the realm's ownership lease. Two transfers to one destination meet at its HSM, which takes
    one; a later pass finishes the other.
    """
    records = [
        (request, marker)
        for group, marker in pending(view, committed_only=True)
        if group.realm == realm and (request := request_of(group, marker)) is not None
    ]
    prepared = {request for request, marker in records if marker.direction is Direction.IN}
    work = [_prepared(view, request) for request in sorted(prepared, key=str)]
    handled = {item.request for item in work if isinstance(item, RunAgain)}
    return work + [
        _outgoing(view, request, marker.at)
        for request, marker in records
        if marker.direction is not Direction.IN and request not in handled
    ]


def _prepared(view: ClusterView, request: TransferRequest) -> Work:
    source = view.group(request.realm, request.source)
    if source is None or source.leader is None:
        return WaitForLeader(request, request.source)
    return RunAgain(request)


def _outgoing(view: ClusterView, request: TransferRequest, at: int) -> Work:
    destination = view.group(request.realm, request.destination)
    if destination is None or destination.leader is None:
        return WaitForLeader(request, request.destination)
    return AskWhetherArrived(request, at, destination.leader)
