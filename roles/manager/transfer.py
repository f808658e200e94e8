"""Move a key range between two groups: prepare, out, in, complete (manager.md 6.1, 6.2).

Phase A (prepare, out, in) is retried as one unit, phase B (complete) by itself, both under one deadline. Every step is
idempotent for identical parameters, so retrying is always allowed; cancelling a preparation is not: once *out* may
have been accepted, only this destination can take the range.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.progress import Step, TransferProgress, listed
from juicebox_hsm.host.cluster.view import GroupView, Member, owned_range, wire_range
from juicebox_hsm.ids import GroupId, OwnedRange, RealmId, RecordId
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.wire.rpc import (
    AGENT_METHODS,
    ArrivedCall,
    Done,
    OwnsCall,
    Prepared,
    Refusal,
    Refused,
    TransferComplete,
    TransferInCall,
    TransferOutCall,
    TransferPrepare,
    TransferredOut,
)
from roles.manager.context import ManagerContext
from roles.manager.leases import LeaseBusy, LeaseLost, management_lease, ownership_lease
from roles.survey.overview import IDS_TIMEOUT_S, read_overview

Result = TypeVar("Result")

DEADLINE_S: Final = 120.0
STEP_TIMEOUT_S: Final = 65.0  # agents wait up to 60 s for the commit
LEASE_WAIT_S: Final = 1.0
LEASE_PAUSE_S: Final = (0.01, 0.1)
PHASE_A_PAUSE_S: Final = (0.01, 1.1, 0.5)
PHASE_B_PAUSE_S: Final = (0.01, 2.0, 1.0)

RETRIED: Final = frozenset(
    {
        Refusal.NO_SOURCE_LEADER,
        Refusal.NO_DESTINATION_LEADER,
        Refusal.NO_HSM,
        Refusal.NOT_LEADER,
        Refusal.NOT_OWNER,
        Refusal.NOT_PREPARED,
        Refusal.INVALID_NONCE,
        Refusal.RPC_ERROR,
        Refusal.NO_STORE,
    }
)
"""Failures that a fresh look at the leaders may cure."""

CANCELS: Final = frozenset(
    {
        Refusal.UNACCEPTABLE_RANGE,
        Refusal.INVALID_GROUP,
        Refusal.OTHER_TRANSFER_PENDING,
        Refusal.INVALID_PROOF,
    }
)
"""Definite refusals of *out*: nothing left the source, the preparation may be withdrawn."""


@dataclass(frozen=True, slots=True)
class TransferRequest:
    """What to move: `range` from `source` to `destination`, all in `realm`."""

    realm: RealmId
    source: GroupId
    destination: GroupId
    range: OwnedRange

    @staticmethod
    def from_wire(body: TransferPrepare) -> TransferRequest | None:
        """Translate an operator's request; None for a malformed range."""
        wanted = OwnedRange(RecordId(body.range.start), RecordId(body.range.end))
        if not wanted.is_valid:
            return None
        return TransferRequest(RealmId(body.realm), GroupId(body.source), GroupId(body.destination), wanted)

    def to_wire(self) -> TransferPrepare:
        """Return the body of prepare and cancel_prepare."""
        return TransferPrepare(self.realm, self.source, self.destination, wire_range(self.range))

    def progress(self, begun_ms: int) -> TransferProgress:
        """Return the record of a run that begins now."""
        return TransferProgress(self.realm, self.source, self.destination, self.range, begun_ms)

    def __str__(self) -> str:
        """Return realm, groups and range for logs."""
        return f"{self.realm.hex()} {self.source.hex()}->{self.destination.hex()} {self.range.start.hex()}..."


class Arrival(enum.Enum):
    """Whether a range that left its source was taken in, as the destination's committed log says."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class _Leaders:
    """The leaders of both groups as one fresh overview shows them."""

    source: Member
    destination: Member


async def run_requested_transfer(context: ManagerContext, request: TransferRequest) -> Done | Refused:
    """Carry out an operator's `transfer`; waits up to 1 s for the realm's ownership lease."""
    if request.source == request.destination:
        return Refused(Refusal.INVALID_GROUP, detail="source and destination are the same group")
    give_up = trio.current_time() + LEASE_WAIT_S
    pause_s, pause_max_s = LEASE_PAUSE_S
    while True:
        try:
            async with management_lease(context, ownership_lease(request.realm)):
                return await run_transfer(context, request)
        except LeaseBusy:
            if trio.current_time() + pause_s >= give_up:
                return Refused(Refusal.MANAGER_BUSY)
        except LeaseLost as error:
            return Refused(Refusal.MANAGER_BUSY, detail=str(error))
        except StoreUnavailable as error:
            return Refused(Refusal.NO_STORE, detail=str(error))
        await trio.sleep(pause_s)
        pause_s = min(pause_s * 2, pause_max_s)


async def run_transfer(context: ManagerContext, request: TransferRequest) -> Done | Refused:
    """Run all four steps with retries. The caller holds the ownership lease."""
    begun = trio.current_time()
    context.log.info("transfer begins", transfer=str(request))
    outcome: Done | Refused = Refused(Refusal.TIMEOUT)
    with (
        listed(context.state.transfers, request.progress(context.now_ms())) as progress,
        trio.move_on_after(DEADLINE_S),
    ):
        move = partial(_move_range, context, request, progress)
        left = await _retried(context, request, progress, move, PHASE_A_PAUSE_S)
        outcome = left if isinstance(left, Refused) else await _completed(context, request, left, progress)
    result = "ok" if isinstance(outcome, Done) else outcome.outcome.value
    elapsed_ns = round((trio.current_time() - begun) * 1e9)
    context.meter.timing("manager.transfer.time.ns", elapsed_ns, result=result)
    context.log.info("transfer ended", transfer=str(request), result=result)
    return outcome


async def complete_only(context: ManagerContext, request: TransferRequest, at: int) -> Done | Refused:
    """Run only the last step, for a range that left at `at` and has arrived; the deadline is the caller's."""
    context.log.info("completion begins", transfer=str(request), at=at)
    with listed(context.state.transfers, request.progress(context.now_ms())) as progress:
        outcome = await _completed(context, request, at, progress)
    result = "ok" if isinstance(outcome, Done) else outcome.outcome.value
    context.log.info("completion ended", transfer=str(request), at=at, result=result)
    return outcome


async def _completed(
    context: ManagerContext, request: TransferRequest, at: int, progress: TransferProgress
) -> Done | Refused:
    """Run phase B, with retries."""
    progress.step = Step.COMPLETE
    return await _retried(context, request, progress, partial(_complete, context, request, at), PHASE_B_PAUSE_S)


async def _retried(
    context: ManagerContext,
    request: TransferRequest,
    progress: TransferProgress,
    phase: Callable[[], Awaitable[Result | Refused]],
    pause: tuple[float, float, float],
) -> Result | Refused:
    """Repeat a phase with growing pauses until it succeeds, fails for good, or the deadline cancels us."""
    pause_s, factor, pause_max_s = pause
    progress.attempt = 1
    while True:
        outcome = await phase()
        if not isinstance(outcome, Refused) or outcome.outcome not in RETRIED:
            return outcome
        context.log.info(
            "transfer step is retried", transfer=str(request), reason=outcome.outcome.value, detail=outcome.detail
        )
        await trio.sleep(pause_s)
        pause_s = min(pause_s * factor, pause_max_s)
        progress.attempt += 1


async def _groups(
    context: ManagerContext, request: TransferRequest
) -> tuple[GroupView | None, GroupView | None] | Refused:
    """Look both groups up anew; that one does not exist is certain only when every agent answered."""
    try:
        view = await read_overview(context.store, context.rpc, context.now_ms(), IDS_TIMEOUT_S)
    except StoreUnavailable as error:
        return Refused(Refusal.NO_STORE, detail=str(error))
    source, destination = view.group(request.realm, request.source), view.group(request.realm, request.destination)
    if (source is None or destination is None) and all(agent.status is not None for agent in view.agents):
        return Refused(Refusal.INVALID_GROUP, detail="no such group in the realm")
    return source, destination


async def _leaders(context: ManagerContext, request: TransferRequest) -> _Leaders | Refused:
    """Find the leaders of both groups."""
    groups = await _groups(context, request)
    if isinstance(groups, Refused):
        return groups
    source, destination = groups
    if source is None or source.leader is None:
        return Refused(Refusal.NO_SOURCE_LEADER)
    if destination is None or destination.leader is None:
        return Refused(Refusal.NO_DESTINATION_LEADER)
    return _Leaders(source.leader, destination.leader)


async def _call(context: ManagerContext, member: Member, method: str, body: Any) -> Any:
    """Call one step at an agent; RPC trouble becomes `RpcError`, whose outcome is uncertain."""
    try:
        return await context.rpc.call(member.url, AGENT_METHODS[method], body, timeout_s=STEP_TIMEOUT_S)
    except RealmError as error:
        return Refused(Refusal.RPC_ERROR, detail=f"{method} at {member.url}: {error}")


async def _move_range(context: ManagerContext, request: TransferRequest, progress: TransferProgress) -> int | Refused:
    """Run phase A once: prepare at the destination, out at the source, in at the destination.

    Returns the index at which the range left its source, once it has arrived.
    """
    progress.step = Step.PREPARE
    leaders = await _leaders(context, request)
    if isinstance(leaders, Refused):
        return leaders
    arrived = await _already_arrived(context, request, leaders)
    if arrived is not None:
        return arrived
    prepared = await _call(context, leaders.destination, "transfer/prepare", request.to_wire())
    if not isinstance(prepared, Prepared):
        return _refusal(prepared)
    progress.step = Step.OUT
    out_call = TransferOutCall(
        request.realm,
        request.source,
        request.destination,
        wire_range(request.range),
        prepared.nonce,
        prepared.statement,
    )
    out = await _call(context, leaders.source, "transfer/out", out_call)
    if not isinstance(out, TransferredOut):
        refusal = _refusal(out)
        if refusal.outcome is Refusal.NOT_OWNER and await _owns_nothing(context, request, leaders.source):
            refusal = Refused(Refusal.UNACCEPTABLE_RANGE, detail="the source does not own the range")
        if refusal.outcome in CANCELS:
            cancelled = await _call(context, leaders.destination, "transfer/cancel_prepare", request.to_wire())
            context.log.info("preparation withdrawn", transfer=str(request), outcome=str(cancelled))
        return refusal
    progress.step = Step.IN
    in_call = TransferInCall(
        request.realm,
        request.source,
        request.destination,
        out.transferring,
        out.at,
        prepared.nonce,
        out.statement,
    )
    taken = await _call(context, leaders.destination, "transfer/in", in_call)
    return out.at if isinstance(taken, Done) else _refusal(taken)


async def _owns_nothing(context: ManagerContext, request: TransferRequest, source: Member) -> bool:
    """Tell whether the source's committed log says that nothing of the range is there, nor on its way out.

    A deposed leader cannot say so (agent.md 14). Without this a transfer from a group that owns nothing would be tried
    for ever, and its preparation would keep the destination busy.
    """
    body = OwnsCall(request.realm, request.source, wire_range(request.range))
    reply = await _call(context, source, "transfer/owns", body)
    return isinstance(reply, Refused) and reply.outcome is Refusal.NOT_OWNED


async def _already_arrived(context: ManagerContext, request: TransferRequest, leaders: _Leaders) -> int | None:
    """Return the index of an earlier attempt that got the range across, so that only *complete* is missing."""
    leader = leaders.source.info.leader
    marker = None if leader is None else leader.transferring
    if marker is None or marker.direction != "Out" or marker.peer != request.destination:
        return None
    if owned_range(marker.range) != request.range:
        return None
    arrival = await ask_arrived(context, request, leaders.destination, marker.at)
    return marker.at if arrival is Arrival.YES else None


async def ask_arrived(context: ManagerContext, request: TransferRequest, destination: Member, at: int) -> Arrival:
    """Ask whether a committed entry of the destination consumed the source's transfer `at` (manager.md 6.3)."""
    body = ArrivedCall(request.realm, request.source, request.destination, at)
    match await _call(context, destination, "transfer/arrived", body):
        case Done():
            return Arrival.YES
        case Refused(outcome=Refusal.NOT_ARRIVED):
            return Arrival.NO
        case other:
            context.log.info("arrival not known", transfer=str(request), reply=str(other))
            return Arrival.UNKNOWN


async def _complete(context: ManagerContext, request: TransferRequest, at: int) -> Done | Refused:
    """Run phase B once. `NotTransferring` means that an earlier try got through.

    The order names `at`: what arrived may be known from a deposed leader's status, and by the time the order is carried
    out, here or after a delay on the way, the same range may be leaving the same source again.
    """
    groups = await _groups(context, request)
    if isinstance(groups, Refused):
        return groups
    source = groups[0]
    if source is None or source.leader is None:
        return Refused(Refusal.NO_SOURCE_LEADER)
    body = TransferComplete(request.realm, request.source, request.destination, wire_range(request.range), at)
    reply = await _call(context, source.leader, "transfer/complete", body)
    if isinstance(reply, Done):
        return reply
    refusal = _refusal(reply)
    return Done() if refusal.outcome is Refusal.NOT_TRANSFERRING else refusal


def _refusal(reply: Any) -> Refused:
    """Return the refusal a step answered; a bad proof means the range does not fit the tree."""
    if not isinstance(reply, Refused):
        return Refused(Refusal.INVALID_STATEMENT, detail=f"unexpected reply {type(reply).__name__}")
    if reply.outcome is Refusal.INVALID_PROOF:
        return Refused(Refusal.UNACCEPTABLE_RANGE, detail="the proof was refused")
    return reply
