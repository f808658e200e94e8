"""Move a key range between two groups: prepare, out, in, complete; which step is next (manager.md 6.1, 6.2).

Phase A (prepare, out, in) is retried as one unit, phase B (complete) by itself. Every step is idempotent for identical
parameters, so retrying is always allowed; cancelling a preparation is not: once *out* may have been accepted, only this
destination can take the range.

`move_range` and `complete` are generators: each yields the `Call` to make now and is sent its reply. `RpcError` stands
for a reply that did not come, so that the outcome is uncertain. Looking for the leaders is the caller's, before each
attempt; so are deadlines and pauses.
"""

from __future__ import annotations

import enum
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Final, Generic

from juicebox_hsm.host.cluster.progress import TransferProgress
from juicebox_hsm.host.cluster.view import ClusterView, Member, owned_range, wire_range
from juicebox_hsm.host.retry import FOREVER_S, RetryProfile
from juicebox_hsm.ids import GroupId, OwnedRange, RealmId, RecordId
from juicebox_hsm.wire.methods import (
    TRANSFER_ARRIVED,
    TRANSFER_CANCEL_PREPARE,
    TRANSFER_COMPLETE,
    TRANSFER_IN,
    TRANSFER_OUT,
    TRANSFER_OWNS,
    TRANSFER_PREPARE,
    Method,
    Request,
)
from juicebox_hsm.wire.rpc import (
    ArrivedCall,
    Direction,
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
    TransferStep,
)

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
class Leaders:
    """The leaders of both groups as one fresh look shows them."""

    source: Member
    destination: Member


@dataclass(frozen=True, slots=True)
class Call(Generic[Request]):
    """One step to ask of an agent, `member`; it belongs to `step`."""

    member: Member
    method: Method[Request, Any]
    body: Request
    step: TransferStep


Calls = Generator[Call[Any], object, "int | Refused"]


LEASE_RETRY: Final = RetryProfile(0.01, 0.1, attempts_max=None, total_s=1.0)
"""How long an operator's order waits for the realm's lease."""
PHASE_A_RETRY: Final = RetryProfile(0.01, 0.5, attempts_max=None, total_s=FOREVER_S, factor=1.1)
PHASE_B_RETRY: Final = RetryProfile(0.01, 1.0, attempts_max=None, total_s=FOREVER_S)
"""The deadline over both is the caller's."""


def pause_before_again(outcome: int | Refused, attempt: int, profile: RetryProfile) -> float | None:
    """Return the pause (s) after attempt number `attempt` of a phase ended with `outcome`; None if that is final."""
    if isinstance(outcome, Refused) and outcome.outcome in RETRIED:
        return profile.delay_s(attempt)
    return None


def leaders_of(view: ClusterView, request: TransferRequest) -> Leaders | Refused:
    """Find the leaders of both groups."""
    source = source_leader_of(view, request)
    if isinstance(source, Refused):
        return source
    destination = view.group(request.realm, request.destination)
    if destination is None or destination.leader is None:
        return Refused(Refusal.NO_DESTINATION_LEADER)
    return Leaders(source, destination.leader)


def source_leader_of(view: ClusterView, request: TransferRequest) -> Member | Refused:
    """Find the source's leader; that a group does not exist is certain only when every agent answered."""
    source, destination = view.group(request.realm, request.source), view.group(request.realm, request.destination)
    if (source is None or destination is None) and all(agent.status is not None for agent in view.agents):
        return Refused(Refusal.INVALID_GROUP, detail="no such group in the realm")
    if source is None or source.leader is None:
        return Refused(Refusal.NO_SOURCE_LEADER)
    return source.leader


def move_range(request: TransferRequest, leaders: Leaders) -> Calls:
    """Run phase A once; returns the index at which the range left its source, once it has arrived."""
    left_at = _leaving_at(request, leaders.source)
    if left_at is not None:
        arrived = yield ask_arrived(request, leaders.destination, left_at)
        if arrival_of(arrived) is Arrival.YES:  # an earlier attempt got it across: only *complete* is missing
            return left_at
    prepared = yield Call(leaders.destination, TRANSFER_PREPARE, request.to_wire(), TransferStep.PREPARE)
    if not isinstance(prepared, Prepared):
        return refusal_of(prepared)
    out_call = TransferOutCall(
        request.realm,
        request.source,
        request.destination,
        wire_range(request.range),
        prepared.nonce,
        prepared.statement,
    )
    out = yield Call(leaders.source, TRANSFER_OUT, out_call, TransferStep.OUT)
    if not isinstance(out, TransferredOut):
        return (yield from _out_refused(request, leaders, refusal_of(out)))
    in_call = TransferInCall(
        request.realm,
        request.source,
        request.destination,
        out.transferring,
        out.at,
        prepared.nonce,
        out.statement,
    )
    taken = yield Call(leaders.destination, TRANSFER_IN, in_call, TransferStep.IN)
    return out.at if isinstance(taken, Done) else refusal_of(taken)


def _out_refused(request: TransferRequest, leaders: Leaders, refusal: Refused) -> Calls:
    """Withdraw the preparation if *out* is refused for good; returns the refusal.

    Whether the source owns nothing of the range, nor has it on its way out, only its committed log can say, and a
    deposed leader cannot (agent.md 14). Without that question a transfer from a group that owns nothing would be tried
    for ever, and its preparation would keep the destination busy.
    """
    if refusal.outcome is Refusal.NOT_OWNER:
        body = OwnsCall(request.realm, request.source, wire_range(request.range))
        owns = yield Call(leaders.source, TRANSFER_OWNS, body, TransferStep.OUT)
        if isinstance(owns, Refused) and owns.outcome is Refusal.NOT_OWNED:
            refusal = Refused(Refusal.UNACCEPTABLE_RANGE, detail="the source does not own the range")
    if refusal.outcome in CANCELS:
        yield Call(leaders.destination, TRANSFER_CANCEL_PREPARE, request.to_wire(), TransferStep.OUT)
    return refusal


def _leaving_at(request: TransferRequest, source: Member) -> int | None:
    """Return since which index the source shows this very transfer as outgoing."""
    marker = None if source.info.leader is None else source.info.leader.transferring
    if marker is None or marker.direction is not Direction.OUT or marker.peer != request.destination:
        return None
    return marker.at if owned_range(marker.range) == request.range else None


def ask_arrived(request: TransferRequest, destination: Member, at: int) -> Call[ArrivedCall]:
    """Ask whether a committed entry of the destination consumed the source's transfer `at` (manager.md 6.3)."""
    body = ArrivedCall(request.realm, request.source, request.destination, at)
    return Call(destination, TRANSFER_ARRIVED, body, TransferStep.PREPARE)


def arrival_of(reply: object) -> Arrival:
    """Translate the reply to `ask_arrived`."""
    match reply:
        case Done():
            return Arrival.YES
        case Refused(outcome=Refusal.NOT_ARRIVED):
            return Arrival.NO
        case _:
            return Arrival.UNKNOWN


def complete(request: TransferRequest, source: Member, at: int) -> Calls:
    """Run phase B once; returns `at`. `NotTransferring` means that an earlier try got through.

    The order names `at`: what arrived may be known from a deposed leader's status, and by the time the order is carried
    out, here or after a delay on the way, the same range may be leaving the same source again.
    """
    body = TransferComplete(request.realm, request.source, request.destination, wire_range(request.range), at)
    reply = yield Call(source, TRANSFER_COMPLETE, body, TransferStep.COMPLETE)
    if isinstance(reply, Done):
        return at
    refusal = refusal_of(reply)
    return at if refusal.outcome is Refusal.NOT_TRANSFERRING else refusal


def refusal_of(reply: object) -> Refused:
    """Return the refusal a step answered; a bad proof means the range does not fit the tree."""
    if not isinstance(reply, Refused):
        return Refused(Refusal.INVALID_STATEMENT, detail=f"unexpected reply {type(reply).__name__}")
    if reply.outcome is Refusal.INVALID_PROOF:
        return Refused(Refusal.UNACCEPTABLE_RANGE, detail="the proof was refused")
    return reply
