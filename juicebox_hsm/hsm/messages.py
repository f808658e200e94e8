"""Requests to the HSM core and its responses (hsm.md 8-13).

In process these objects are passed as they are; `hsm.codec` gives the CBOR form for an HSM in another process.
A refusal without data is an `Outcome`; refusals with data are the small classes below.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from juicebox_hsm.consensus.types import Captured, LogEntry, Partition, RoleStatus, Transferring
from juicebox_hsm.ids import GroupId, HsmId, OwnedRange, RealmId, RecordId
from juicebox_hsm.wire.client import NoiseRequest, NoiseResponse


class Outcome(enum.Enum):
    """Refusals that carry nothing but their name."""

    INVALID_REALM = "InvalidRealm"
    INVALID_GROUP = "InvalidGroup"
    INVALID_CONFIGURATION = "InvalidConfiguration"
    INVALID_STATEMENT = "InvalidStatement"
    TOO_MANY_GROUPS = "TooManyGroups"
    HAVE_REALM = "HaveRealm"
    HAVE_OTHER_REALM = "HaveOtherRealm"
    INVALID_MAC = "InvalidMac"
    INVALID_CHAIN = "InvalidChain"
    MISSING_PREV = "MissingPrev"
    MISSING_ENTRIES = "MissingEntries"
    NO_QUORUM = "NoQuorum"
    STALE_INDEX = "StaleIndex"
    STEPDOWN_IN_PROGRESS = "StepdownInProgress"
    NOT_OWNER = "NotOwner"
    STALE_PROOF = "StaleProof"
    INVALID_PROOF = "InvalidProof"
    MISSING_PROOF = "MissingProof"
    MISSING_PROOFS = "MissingProofs"
    UNACCEPTABLE_RANGE = "UnacceptableRange"
    OTHER_TRANSFER_PENDING = "OtherTransferPending"
    NOT_TRANSFERRING = "NotTransferring"
    NOT_PREPARED = "NotPrepared"
    INVALID_NONCE = "InvalidNonce"
    BUSY = "Busy"
    SESSION_ERROR = "SessionError"
    MISSING_SESSION = "MissingSession"
    DECODING_ERROR = "DecodingError"
    INVALID_RECORD_DATA = "InvalidRecordData"
    STILL_OWNER = "StillOwner"
    RETIRED = "Retired"
    NOT_RETIRED = "NotRetired"
    STALE_GENERATION = "StaleGeneration"


@dataclass(frozen=True, slots=True)
class NotLeader:
    """The HSM does not lead the group; `role` is its role where the request's table says so."""

    role: RoleStatus | None = None


@dataclass(frozen=True, slots=True)
class NotWitness:
    """Jumping is for witnesses only."""

    role: RoleStatus


@dataclass(frozen=True, slots=True)
class NotCaptured:
    """The persisted captured pair is not the asked last entry; `have` is the captured index."""

    have: int | None


class ResultKind(enum.Enum):
    """What a released reply was about; telemetry for the host, withheld until commit."""

    REGISTER1 = "Register1"
    REGISTER2 = "Register2"
    RECOVER1 = "Recover1"
    RECOVER2 = "Recover2"
    RECOVER3 = "Recover3"
    DELETE = "Delete"


@dataclass(frozen=True, slots=True)
class ResultType:
    """The kind with its data: guesses only when Recover2 spent one, `recovered` only for Recover3."""

    kind: ResultKind
    num_guesses: int | None = None
    guess_count: int | None = None
    recovered: bool = False


# --- requests and their successes -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Status:
    """Ask for the status."""


@dataclass(frozen=True, slots=True)
class LeaderStatus:
    """What a leader says of its log; values may be uncommitted."""

    committed: int | None
    last: LogEntry
    owned_range: OwnedRange | None
    transferring: Transferring | None


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """One group of the HSM; `captured` is the persisted (index, mac)."""

    id: GroupId
    configuration: tuple[HsmId, ...]
    captured: tuple[int, bytes] | None
    leader: LeaderStatus | None
    role: RoleStatus


@dataclass(frozen=True, slots=True)
class RealmStatus:
    """The realm the HSM is in, with its own hsmrealm statement; `generation` counts the groups it has forgotten."""

    id: RealmId
    statement: bytes
    groups: tuple[GroupStatus, ...]
    generation: int = 0


@dataclass(frozen=True, slots=True)
class StatusOk:
    """Id, realm and the public communication key (32 bytes)."""

    id: HsmId
    realm: RealmStatus | None
    public_key: bytes


@dataclass(frozen=True, slots=True)
class NewRealm:
    """Create a realm with one group of this HSM alone."""


@dataclass(frozen=True, slots=True)
class NewRealmOk:
    """Entry 1 is not captured yet; `delta` holds the empty tree's root."""

    realm: RealmId
    group: GroupId
    entry: LogEntry
    delta: bytes
    role: RoleStatus


@dataclass(frozen=True, slots=True)
class JoinRealm:
    """Join `realm`, proven by the hsmrealm statement of `peer`."""

    realm: RealmId
    peer: HsmId
    statement: bytes


@dataclass(frozen=True, slots=True)
class JoinRealmOk:
    """Joined, or already in it."""

    hsm: HsmId


@dataclass(frozen=True, slots=True)
class NewGroup:
    """Create a group of `members` (id, hsmrealm statement), this HSM included.

    `generations` are the members' in the same order, or empty when all are 0.
    """

    realm: RealmId
    members: tuple[tuple[HsmId, bytes], ...]
    generations: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class NewGroupOk:
    """Group without a partition, led by this HSM."""

    group: GroupId
    statement: bytes
    entry: LogEntry
    role: RoleStatus


@dataclass(frozen=True, slots=True)
class JoinGroup:
    """Join a group another HSM created, proven by its groupcfg statement over configuration and `generations`."""

    realm: RealmId
    group: GroupId
    configuration: tuple[HsmId, ...]
    statement: bytes
    generations: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RoleOk:
    """Success of JoinGroup, CaptureNext and BecomeLeader."""

    role: RoleStatus


@dataclass(frozen=True, slots=True)
class BecomeLeader:
    """Lead from `last_entry`, which must be the persisted captured head."""

    realm: RealmId
    group: GroupId
    last_entry: LogEntry


@dataclass(frozen=True, slots=True)
class StepDown:
    """Stop leading; `force` drops what is unreleased."""

    realm: RealmId
    group: GroupId
    force: bool


@dataclass(frozen=True, slots=True)
class StepDownOk:
    """`last` is the final index of this leadership."""

    last: int
    role: RoleStatus


@dataclass(frozen=True, slots=True)
class CaptureNext:
    """Capture stored entries in order."""

    realm: RealmId
    group: GroupId
    entries: tuple[LogEntry, ...]


@dataclass(frozen=True, slots=True)
class CaptureJump:
    """Jump over compacted entries with proof of a strict majority (H1)."""

    realm: RealmId
    group: GroupId
    entries: tuple[LogEntry, ...]
    captures: tuple[Captured, ...]


@dataclass(frozen=True, slots=True)
class CaptureJumpOk:
    """The captured head moved to the elected entry."""


@dataclass(frozen=True, slots=True)
class PersistState:
    """Make captures durable, then sign them."""


@dataclass(frozen=True, slots=True)
class PersistStateOk:
    """One signed statement per group that captured anything."""

    captured: tuple[Captured, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """Commit what `captures` prove, releasing replies."""

    realm: RealmId
    group: GroupId
    captures: tuple[Captured, ...]


@dataclass(frozen=True, slots=True)
class CommitOk:
    """Released replies by entry mac, and the macs of entries that will never commit here."""

    committed: int
    responses: tuple[tuple[bytes, NoiseResponse, ResultType], ...]
    abandoned: tuple[bytes, ...]
    role: RoleStatus


@dataclass(frozen=True, slots=True)
class PrepareTransfer:
    """Reserve `range` from `source` at the destination's leader."""

    realm: RealmId
    source: GroupId
    destination: GroupId
    range: OwnedRange


@dataclass(frozen=True, slots=True)
class PrepareTransferOk:
    """`entry` is None when the same preparation stands already; `clock` is the role clock to wait under."""

    nonce: bytes
    entry: LogEntry | None
    wait_til_committed: int
    clock: int
    statement: bytes


@dataclass(frozen=True, slots=True)
class CancelPreparedTransfer:
    """Withdraw a preparation."""

    realm: RealmId
    source: GroupId
    destination: GroupId
    range: OwnedRange


@dataclass(frozen=True, slots=True)
class TransferEntryOk:
    """Success of CancelPreparedTransfer and CompleteTransfer."""

    entry: LogEntry
    clock: int


@dataclass(frozen=True, slots=True)
class RetireGroup:
    """End a group that owns nothing, at its leader."""

    realm: RealmId
    group: GroupId


@dataclass(frozen=True, slots=True)
class RetireGroupOk:
    """`entry` is None when the log ends with a retired entry already; `wait_til_committed` is that entry's index."""

    entry: LogEntry | None
    wait_til_committed: int
    clock: int


@dataclass(frozen=True, slots=True)
class ForgetGroup:
    """Leave a group for good, proven by its retired entry and captures of it by a strict majority."""

    realm: RealmId
    group: GroupId
    entry: LogEntry
    captures: tuple[Captured, ...]


@dataclass(frozen=True, slots=True)
class ForgetGroupOk:
    """The group is gone; `generation` is this HSM's new one."""

    generation: int


@dataclass(frozen=True, slots=True)
class TransferOut:
    """Give `range` away at the source's leader. `proof` is an encoded read proof at the split key, or None."""

    realm: RealmId
    source: GroupId
    destination: GroupId
    range: OwnedRange
    nonce: bytes
    statement: bytes
    proof: bytes | None


@dataclass(frozen=True, slots=True)
class TransferOutOk:
    """`entry` is None when the transfer is under way already."""

    entry: LogEntry | None
    delta: bytes
    partition: Partition
    wait_til_committed: int
    clock: int


@dataclass(frozen=True, slots=True)
class TransferStatement:
    """Ask the source's leader for the signed transfer."""

    realm: RealmId
    source: GroupId
    destination: GroupId
    nonce: bytes


@dataclass(frozen=True, slots=True)
class TransferStatementOk:
    """transfer2 statement and the index of the Out marker."""

    statement: bytes
    at: int


@dataclass(frozen=True, slots=True)
class TransferIn:
    """Take `transferring` in at the destination. `proofs` are the encoded edge proofs (owned, transferring)."""

    realm: RealmId
    source: GroupId
    destination: GroupId
    transferring: Partition
    at: int
    proofs: tuple[bytes, bytes] | None
    nonce: bytes
    statement: bytes


@dataclass(frozen=True, slots=True)
class TransferInOk:
    """Entry with the enlarged partition."""

    entry: LogEntry
    delta: bytes
    clock: int


@dataclass(frozen=True, slots=True)
class CompleteTransfer:
    """Forget the Out marker at the source."""

    realm: RealmId
    source: GroupId
    destination: GroupId
    range: OwnedRange


@dataclass(frozen=True, slots=True)
class Handshake:
    """Open a session (wire name `HandshakeRequest`)."""

    realm: RealmId
    group: GroupId
    record_id: RecordId
    session_id: int
    client_ephemeral_public: bytes
    payload_ciphertext: bytes


@dataclass(frozen=True, slots=True)
class HandshakeOk:
    """The handshake answer, with the session lifetime inside."""

    noise: NoiseResponse


@dataclass(frozen=True, slots=True)
class AppRequest:
    """Run one client request. `proof` is an encoded read proof made at log index `index`."""

    realm: RealmId
    group: GroupId
    record_id: RecordId
    session_id: int
    encrypted: NoiseRequest
    proof: bytes
    index: int


@dataclass(frozen=True, slots=True)
class AppRequestOk:
    """The entry to append and the tree delta (encoded, merkle.md 3.3); the reply stays inside until commit."""

    entry: LogEntry
    delta: bytes


Request = (
    Status | NewRealm | JoinRealm | NewGroup | JoinGroup | BecomeLeader | StepDown | CaptureNext | CaptureJump
    | PersistState | Commit | PrepareTransfer | CancelPreparedTransfer | TransferOut | TransferStatement
    | TransferIn | CompleteTransfer | Handshake | AppRequest | RetireGroup | ForgetGroup
)  # fmt: skip

Response = (
    StatusOk | NewRealmOk | JoinRealmOk | NewGroupOk | RoleOk | StepDownOk | CaptureJumpOk | PersistStateOk
    | CommitOk | PrepareTransferOk | TransferEntryOk | TransferOutOk | TransferStatementOk | TransferInOk
    | HandshakeOk | AppRequestOk | RetireGroupOk | ForgetGroupOk | Outcome | NotLeader | NotWitness | NotCaptured
)  # fmt: skip
