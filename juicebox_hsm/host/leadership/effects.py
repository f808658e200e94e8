"""What a leadership wants done. Quick effects are done on the spot; a long one occupies the lane that is handed it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from juicebox_hsm.consensus.types import Captured, Certificate, LogEntry, Partition, RoleStatus
from juicebox_hsm.host.events import NewEvent
from juicebox_hsm.host.leadership.events import ClientRequest, CommitWait, Lane
from juicebox_hsm.host.log import Intent, LogRow
from juicebox_hsm.hsm.messages import ResultType
from juicebox_hsm.ids import HsmId
from juicebox_hsm.merkle.walk import Lost
from juicebox_hsm.wire.client import NoiseResponse
from juicebox_hsm.wire.rpc import Refusal

# --- quick -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """A released reply and what it answers. `wrote`: the record changed; `told`: the client was answered before."""

    request: ClientRequest
    index: int
    mac: bytes
    noise: NoiseResponse
    result: ResultType
    wrote: bool
    told: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """Answer these requests: their entries are committed and their rows written."""

    answers: Sequence[Answer]


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer a request with a refusal. `consumed`: the HSM was given its message."""

    request: ClientRequest
    refusal: Refusal
    consumed: bool = False


@dataclass(frozen=True, slots=True)
class RetryLater:
    """Tell `RetryDue` after `delay_s`."""

    request: ClientRequest
    delay_s: float


@dataclass(frozen=True, slots=True)
class Adopt:
    """Apply the role clock rule to a role the HSM reported, and tell the group's leadership what came of it."""

    role: RoleStatus


@dataclass(frozen=True, slots=True)
class Wake:
    """Give a lane, or a member's pusher, its turn soon. Until then more work may come; waking twice is once."""

    lane: Lane | HsmId


@dataclass(frozen=True, slots=True)
class SetDeadline:
    """Give the producing lane its turn at `at_s` unless it has one before."""

    at_s: float


@dataclass(frozen=True, slots=True)
class ReadLog:
    """Wake the group's log watcher: the log holds something that is not ours."""


@dataclass(frozen=True, slots=True)
class WaitOver:
    """Tell a waiting caller; None for success."""

    wait: CommitWait
    refusal: Refusal | None


class Noted(enum.Enum):
    """Something worth counting that no other effect shows."""

    RETRIES_EXHAUSTED = "retries exhausted"
    REPLY_UNASKED = "reply nobody asked for"
    QUORUM_LOST = "cannot commit"
    QUORUM_BACK = "commits again"


@dataclass(frozen=True, slots=True)
class Note:
    """Count or log something; nothing depends on it."""

    what: Noted


@dataclass(frozen=True, slots=True)
class TellDamaged:
    """Tell of a tree node that stays missing under a root that stays current: the store is damaged."""

    node: Lost


Quick = Release | Refuse | RetryLater | Adopt | Wake | SetDeadline | ReadLog | WaitOver | Note | TellDamaged


# --- long: producing -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReadTail:
    """Read the log's last entry."""


@dataclass(frozen=True, slots=True)
class ReadProofs:
    """Read the proofs of these requests' records in `partition`; what fails is tried again for at most `within_s`."""

    partition: Partition
    requests: Sequence[ClientRequest]
    within_s: float


@dataclass(frozen=True, slots=True)
class AskHsm:
    """Give a request to the HSM with its proof, which belongs to the entry at `index`."""

    request: ClientRequest
    proof: bytes
    index: int


@dataclass(frozen=True, slots=True)
class Append:
    """Append to the log, with the squashed delta and the intents, atomically. MUST NOT be cancelled."""

    entries: Sequence[LogEntry]
    intents: Sequence[Intent | None]
    delta: bytes


@dataclass(frozen=True, slots=True)
class ShowOwn:
    """Let our own HSM capture acknowledged entries, and have them persisted."""

    entries: Sequence[LogEntry]


class StepDownCode(enum.Enum):
    """Why a leadership is given up."""

    ASKED = "asked"
    SHUTTING_DOWN = "shutting_down"
    LOST_DUEL = "lost_duel"
    HOLE = "hole"
    APPEND_AMBIGUOUS = "append_ambiguous"
    APPEND_REFUSED = "append_refused"
    OUTBOX_FAILED = "outbox_failed"


@dataclass(frozen=True, slots=True)
class StepDown:
    """Ask the HSM to leave leadership, by force when what was begun cannot be finished."""

    code: StepDownCode
    forced: bool
    index: int = 0
    why: str = ""


# --- long: committing ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AskCommit:
    """Ask the HSM to commit what these captures prove."""

    captures: tuple[Captured, ...]


@dataclass(frozen=True, slots=True)
class WriteOutbox:
    """Write the rows of committed requests in one write, with the settled index if given. MUST NOT be cancelled."""

    events: Sequence[NewEvent]
    settled: int | None


# --- long: members ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Push:
    """Send a member what it may lack (nothing: a heartbeat). `last` is the last index it should have then."""

    member: HsmId
    entries: Sequence[bytes]
    last: int


class Pausing(enum.Enum):
    """Why a pusher pauses."""

    UNREACHABLE = "unreachable"
    REFUSED = "refused"
    BEHIND = "behind"


@dataclass(frozen=True, slots=True)
class Pause:
    """Let the member's next turn wait."""

    member: HsmId
    why: Pausing


# --- long: house -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReadUnsettled:
    """Read the settled index, the intents above it up to `last`, and which of them have rows."""

    last: int


@dataclass(frozen=True, slots=True)
class WriteUnknown:
    """Record the requests of unconfirmed outcome, with the settled index. `set_aside`: indexes nothing can record."""

    events: Sequence[NewEvent]
    settled: int
    set_aside: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class ListRows:
    """List the log's rows below an index."""

    below: int


@dataclass(frozen=True, slots=True)
class WriteSettled:
    """Raise the settled index."""

    index: int


@dataclass(frozen=True, slots=True)
class WriteCertificate:
    """Store the proof of a commit above what is about to be compacted."""

    certificate: Certificate


@dataclass(frozen=True, slots=True)
class CompactRows:
    """Replace these rows, whose entries are all at or below `index`, by tombstones."""

    rows: Sequence[LogRow]
    index: int


@dataclass(frozen=True, slots=True)
class Rest:
    """Tell `HouseRested` after `pause_s`. `failures` in a row make it longer; 0 after a round that went well."""

    pause_s: float
    failures: int = 0


Long = (
    ReadTail | ReadProofs | AskHsm | Append | ShowOwn | StepDown | AskCommit | WriteOutbox | Push | Pause
    | ReadUnsettled | WriteUnknown | ListRows | WriteSettled | WriteCertificate | CompactRows | Rest
)  # fmt: skip

Effect = Quick | Long
