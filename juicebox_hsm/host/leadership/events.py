"""What can happen to a leadership. Each event is told once, by the lane that the contract in `machine` names.

Nothing here is trusted further than the host trusts it: what members and the HSM sign is checked by HSMs.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from juicebox_hsm.consensus.types import Captured, LogEntry, RoleStatus
from juicebox_hsm.host.log import Intent, LogRow
from juicebox_hsm.hsm.messages import Response
from juicebox_hsm.ids import HsmId, RecordId
from juicebox_hsm.merkle.walk import Lost
from juicebox_hsm.wire.client import NoiseRequest
from juicebox_hsm.wire.rpc import AppOk, Refusal, Refused


class Lane(enum.Enum):
    """A task of the driver that carries out one long effect at a time. Each member's pusher is a lane of its own."""

    PRODUCE = "produce"
    COMMIT = "commit"
    HOUSE = "house"


class Steps(Protocol):
    """Who is told what a request goes through: nobody but a trace."""

    def enter(self, name: str) -> None:
        """Tell that the step `name` of ARCHITECTURE.md's life of a request begins."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ClientRequest:
    """One client request. `when_ms` is its arrival in Unix ms.

    `reply` and `steps`, of a request that is traced, are the driver's; the machine never calls them.
    """

    record_id: RecordId
    session_id: int
    encrypted: NoiseRequest
    tenant: str
    user: str
    when_ms: int
    reply: Callable[[AppOk | Refused], None]
    steps: Steps | None = None


@dataclass(frozen=True, slots=True, eq=False)
class CommitWait:
    """Somebody waits until `index`, made at role clock `clock`, is committed and recorded; `reply` is the driver's."""

    index: int
    clock: int
    reply: Callable[[Refusal | None], None]


class AppendResult(enum.Enum):
    """What is known of an append. AMBIGUOUS is not a failure: the entries may be in the log."""

    APPENDED = "appended"
    CONFLICT = "conflict"
    AMBIGUOUS = "ambiguous"
    REFUSED = "refused"


# --- roles and turns ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Turn:
    """A lane is free and looks for work: after a `Wake`, when its deadline passed, or at any time."""

    lane: Lane


@dataclass(frozen=True, slots=True)
class RoleAdopted:
    """The group's role was looked at again and this leadership goes on, perhaps stepping down."""

    role: RoleStatus


@dataclass(frozen=True, slots=True)
class Ended:
    """The role clock rule ended this leadership."""


@dataclass(frozen=True, slots=True)
class Inherited:
    """The log's entry this leadership began after."""

    entry: LogEntry


@dataclass(frozen=True, slots=True)
class HandoverAsked:
    """A manager, an operator or the end of the process wants this leadership to end in order."""

    by_others: bool
    """Whoever asked also looks for a successor."""


@dataclass(frozen=True, slots=True)
class SteppedDown:
    """The HSM answered a `StepDown`; its role was adopted before."""


# --- producing -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A client's request passed the checks that need no leadership. `outbox_full`: the backlog is at its bound."""

    request: ClientRequest
    outbox_full: bool = False


@dataclass(frozen=True, slots=True)
class RequestGone:
    """Nobody waits for the request any more."""

    request: ClientRequest


@dataclass(frozen=True, slots=True)
class RetryDue:
    """The pause of a `RetryLater` is over."""

    request: ClientRequest


@dataclass(frozen=True, slots=True)
class TailRead:
    """The log's last entry, None for an empty log."""

    entry: LogEntry | None


@dataclass(frozen=True, slots=True)
class TailFailed:
    """The log's tail could not be read, retries included."""


@dataclass(frozen=True, slots=True)
class ProofsRead:
    """Proofs in the order of the requests, or the node that was missing."""

    proofs: Sequence[bytes | Lost]


@dataclass(frozen=True, slots=True)
class ProofsFailed:
    """No proofs could be read."""


@dataclass(frozen=True, slots=True)
class HsmAnswered:
    """The HSM's reply to an `AskHsm`. `hint` is the tenant's next outbox sequence as far as the agent knows."""

    request: ClientRequest
    reply: Response
    hint: int


@dataclass(frozen=True, slots=True)
class StoreFailed:
    """The store refused an append, or rows of events; that is tried again."""


@dataclass(frozen=True, slots=True)
class AppendFinished:
    """What became of an `Append`; `why` are the store's words, passed on and never looked at."""

    result: AppendResult
    why: str = ""


@dataclass(frozen=True, slots=True)
class OwnShown:
    """Our own HSM was shown the acknowledged entries."""


@dataclass(frozen=True, slots=True)
class TransferMade:
    """A transfer's request to the HSM succeeded: it made `entry`, if any, and its caller waits for a commit."""

    wait: CommitWait
    entry: LogEntry | None = None
    delta: bytes = b""


@dataclass(frozen=True, slots=True)
class WaitTimedOut:
    """The caller of a `CommitWait` has no more time."""

    wait: CommitWait


# --- committing ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CaptureHeard:
    """Our own HSM persisted this capture and signed it."""

    captured: Captured


@dataclass(frozen=True, slots=True)
class CommitAnswered:
    """The HSM's reply to an `AskCommit`."""

    reply: Response


@dataclass(frozen=True, slots=True)
class OutboxWritten:
    """The rows of a `WriteOutbox`, with its settled index, are durable."""


@dataclass(frozen=True, slots=True)
class OutboxFailed:
    """The rows of a `WriteOutbox` may or may not be written; `why` are the store's words."""

    why: str = ""


# --- members ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemberTurn:
    """A member's pusher is free. `heartbeat`: it has said nothing for a heartbeat."""

    member: HsmId
    heartbeat: bool = False


@dataclass(frozen=True, slots=True)
class PushAnswered:
    """A member answered a `Push`; `captured` is None when it has none or could not be read."""

    member: HsmId
    captured: Captured | None
    behind: bool


@dataclass(frozen=True, slots=True)
class PushFailed:
    """A `Push` brought no capture: the member was not `reached`, or refused."""

    member: HsmId
    reached: bool


# --- house -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PredecessorsQuiet:
    """Every other member reports Witness with no answer due, or their time to record is over."""


@dataclass(frozen=True, slots=True)
class UnsettledRead:
    """What earlier leaderships left above `settled`, and which of it has its row, by (index, mac)."""

    settled: int
    left: Sequence[tuple[LogEntry, Intent]]
    recorded: Collection[tuple[int, bytes]]
    now_ms: int


@dataclass(frozen=True, slots=True)
class UnknownWritten:
    """The rows of a `WriteUnknown`, with its settled index, are durable."""


@dataclass(frozen=True, slots=True)
class RowsListed:
    """The log's rows below the leadership, oldest first."""

    rows: Sequence[LogRow]


@dataclass(frozen=True, slots=True)
class SettledWritten:
    """The settled index of a `WriteSettled` is durable."""


@dataclass(frozen=True, slots=True)
class CertificateWritten:
    """The certificate of a `WriteCertificate` is durable."""


@dataclass(frozen=True, slots=True)
class RowsCompacted:
    """The rows of a `CompactRows` are gone."""


@dataclass(frozen=True, slots=True)
class HouseFailed:
    """The store failed the house lane's last effect, which may be done or not."""


@dataclass(frozen=True, slots=True)
class HouseRested:
    """The pause of a `Rest` is over."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """The lanes of an ended leadership have ended."""


Event = (
    Turn | RoleAdopted | Ended | Inherited | HandoverAsked | SteppedDown
    | RequestArrived | RequestGone | RetryDue | TailRead | TailFailed | ProofsRead | ProofsFailed | HsmAnswered
    | StoreFailed | AppendFinished | OwnShown | TransferMade | WaitTimedOut
    | CaptureHeard | CommitAnswered | OutboxWritten | OutboxFailed
    | MemberTurn | PushAnswered | PushFailed
    | PredecessorsQuiet | UnsettledRead | UnknownWritten | RowsListed | SettledWritten | CertificateWritten
    | RowsCompacted | HouseFailed | HouseRested | Leaving
)  # fmt: skip
