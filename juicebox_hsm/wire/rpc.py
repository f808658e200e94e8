"""Bodies of the internal RPC: requests, replies and refusals (agent.md 2, manager.md 2). Long because it is one list.

Bodies are msgspec arrays (`array_like`), tagged where a reply is a union. Log entries, statements and Noise
messages travel as the byte strings that HSM and store use. Ids are 16 bytes, record ids 32.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

PROTOCOL: Final = 1
FRAME_BYTES_MAX: Final = 1 << 20


class PeerRole(enum.Enum):
    """Who a certificate says the caller is (URI SAN `juicebox:role:ROLE`)."""

    AGENT = "agent"
    LOAD_BALANCER = "lb"
    MANAGER = "manager"
    OPERATOR = "operator"


class RpcCode(enum.Enum):
    """Errors of the RPC layer itself."""

    UNKNOWN_METHOD = "UnknownMethod"
    BAD_REQUEST = "BadRequest"
    FORBIDDEN = "Forbidden"
    OVERLOADED = "Overloaded"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    SHUTTING_DOWN = "ShuttingDown"
    HANDLER_FAILED = "HandlerFailed"


class Refusal(enum.Enum):
    """Every refusal a method may answer; which ones, the specification's table says."""

    NO_HSM = "NoHsm"
    NO_STORE = "NoStore"
    STORE_PRECONDITION_FAILED = "StorePreconditionFailed"
    HAVE_REALM = "HaveRealm"
    HAVE_OTHER_REALM = "HaveOtherRealm"
    INVALID_REALM = "InvalidRealm"
    INVALID_GROUP = "InvalidGroup"
    INVALID_HSM = "InvalidHsm"
    INVALID_CONFIGURATION = "InvalidConfiguration"
    INVALID_STATEMENT = "InvalidStatement"
    TOO_MANY_GROUPS = "TooManyGroups"
    STALE_INDEX = "StaleIndex"
    FUTURE_INDEX = "FutureIndex"
    STEPDOWN_IN_PROGRESS = "StepdownInProgress"
    TIMEOUT = "Timeout"
    NOT_CAPTURED = "NotCaptured"
    NOT_LEADER = "NotLeader"
    BUSY = "Busy"
    HSM_TWICE = "HsmTwice"
    NO_QUORUM = "NoQuorum"
    STORE_DAMAGED = "StoreDamaged"
    INVALID_PROOF = "InvalidProof"
    MISSING_SESSION = "MissingSession"
    SESSION_ERROR = "SessionError"
    DECODING_ERROR = "DecodingError"
    RATE_LIMIT_EXCEEDED = "RateLimitExceeded"
    UNACCEPTABLE_RANGE = "UnacceptableRange"
    OTHER_TRANSFER_PENDING = "OtherTransferPending"
    COMMIT_TIMEOUT = "CommitTimeout"
    NOT_PREPARED = "NotPrepared"
    NOT_OWNER = "NotOwner"
    NOT_OWNED = "NotOwned"
    NOT_ARRIVED = "NotArrived"
    INVALID_NONCE = "InvalidNonce"
    NOT_TRANSFERRING = "NotTransferring"
    TRANSFER_IN_PROGRESS = "TransferInProgress"
    STEP_DOWN_FAILED = "StepDownFailed"
    LEADERSHIP_TRANSFER_ROLLED_BACK = "LeadershipTransferRolledBack"
    LEADERSHIP_TRANSFER_FAILED = "LeadershipTransferFailed"
    STILL_OWNER = "StillOwner"
    RETIRED = "Retired"
    STALE_GENERATION = "StaleGeneration"
    NO_SOURCE_LEADER = "NoSourceLeader"
    NO_DESTINATION_LEADER = "NoDestinationLeader"
    MANAGER_BUSY = "ManagerBusy"
    RPC_ERROR = "RpcError"


class DamageKind(enum.Enum):
    """What of a store is damaged. Travels as its value."""

    NODE = "tree node"
    LOG = "log row"
    CERTIFICATE = "commit certificate"
    EVENT = "event"
    FILE = "file"


class GroupRole(enum.Enum):
    """What an HSM is in a group. Travels as its value, like the direction of a transfer."""

    LEADER = "Leader"
    STEPPING_DOWN = "SteppingDown"
    WITNESS = "Witness"


class Direction(enum.Enum):
    """Which way the range of a pending transfer goes, seen from the group that reports it."""

    IN = "In"
    OUT = "Out"


class TransferStep(enum.Enum):
    """The step of a transfer that is under way; looking for the leaders belongs to the step it is for."""

    PREPARE = "prepare"
    OUT = "out"
    IN = "in"
    COMPLETE = "complete"


class _Body(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Base of every body: a tagged array."""


class Refused(_Body, frozen=True):
    """A refusal. `consumed`: the HSM was given the Noise message. `index`, `detail`: where the table names data."""

    outcome: Refusal
    consumed: bool = False
    index: int | None = None
    detail: str = ""

    def __str__(self) -> str:
        """Return code, index and detail, for logs and whoever has no sentence of their own for it."""
        told = self.outcome.value if self.index is None else f"{self.outcome.value} at {self.index}"
        return f"{told}: {self.detail}" if self.detail else told


class Done(_Body, frozen=True):
    """Success without data."""


class Empty(_Body, frozen=True):
    """A request without fields."""


class Range(_Body, frozen=True):
    """An inclusive range of record ids, 32 bytes each."""

    start: bytes
    end: bytes


class PartitionInfo(_Body, frozen=True):
    """Range and root hash."""

    range: Range
    root_hash: bytes


class RoleInfo(_Body, frozen=True):
    """`starting` is set for a leader and one that steps down."""

    name: GroupRole
    at: int
    starting: int | None = None


class TransferringInfo(_Body, frozen=True):
    """A pending transfer; `peer` is the other group, `root_hash` that of a range on its way out."""

    direction: Direction
    peer: bytes
    range: Range
    at: int
    root_hash: bytes = b""


class LeaderInfo(_Body, frozen=True):
    """What the HSM says as leader; indexes may be uncommitted except `committed`. `retired`: the log has ended."""

    committed: int | None
    last: int
    owned_range: Range | None
    transferring: TransferringInfo | None
    retired: bool = False


class GroupInfo(_Body, frozen=True):
    """One group of an HSM. `captured` is the persisted (index, mac)."""

    id: bytes
    configuration: list[bytes]
    captured: tuple[int, bytes] | None
    leader: LeaderInfo | None
    role: RoleInfo


class RealmInfo(_Body, frozen=True):
    """The realm of an HSM with its realm statement; `generation` counts the groups that the HSM has forgotten."""

    id: bytes
    statement: bytes
    groups: list[GroupInfo]
    generation: int = 0


class HsmInfo(_Body, frozen=True):
    """HSM Status."""

    id: bytes
    realm: RealmInfo | None
    public_key: bytes


class AgentGroupInfo(_Body, frozen=True):
    """The agent's own view of a group; `last_appended` is (index, mac).

    A leader also tells how many members answer it, itself included, how long its entries have waited without progress,
    and how long it could not commit (None while it can), `lacks_store`: because the store fails. An agent of an older
    version tells none of these. `ended`: its HSM captured the retired entry.
    """

    realm: bytes
    group: bytes
    role: RoleInfo
    leading: bool
    waiting_clients: int = 0
    last_appended: tuple[int, bytes] | None = None
    append_queue_len: int = 0
    requests_per_s: float = 0.0
    members_alive: int | None = None
    commit_age_s: float = 0.0
    stalled_s: float | None = None
    ended: bool = False
    lacks_store: bool = False


class LogBehind(_Body, frozen=True):
    """A group whose log in the store ends at `last` (0: there is none) without the entry that the HSM `captured`."""

    group: bytes
    captured: int
    last: int


class StoreDamage(_Body, frozen=True):
    """Something in the store that is not what was written there: `place` says where, `group` is b"" if it has none."""

    kind: DamageKind
    place: str
    group: bytes = b""


class OutboxInfo(_Body, frozen=True):
    """Backlog of unpublished events over the agent's realm."""

    backlog: int
    oldest_s: float
    warning: str = ""


class Told(_Body, frozen=True):
    """A line of a service's about itself, and the word of its code."""

    code: str
    text: str


class AgentStatus(_Body, frozen=True):
    """Reply of `status`. `hsm`: None when the HSM does not answer. `certificate_end_ms`: Unix time, if it has one.

    `instance` is drawn when the process starts, and tells it from one with a copy of its HSM.
    `now_ms` is the agent's wall clock, None from one of an older version. `troubles` are what it tries again and is not
    ready for, but for what other fields tell. `damages` were met in the store within the last half minute.
    `latency_ms` is the mean time of the requests that it answered in the last minute, None when there were none.
    """

    uptime_s: float
    hsm: HsmInfo | None
    name: str
    build: str
    groups: list[AgentGroupInfo]
    outbox: OutboxInfo | None = None
    certificate_end_ms: int | None = None
    instance: bytes = b""
    now_ms: int | None = None
    logs_behind: tuple[LogBehind, ...] = ()
    troubles: tuple[Told, ...] = ()
    damages: tuple[StoreDamage, ...] = ()
    latency_ms: float | None = None


class RealmCreated(_Body, frozen=True):
    """Reply of `realm/new`."""

    realm: bytes
    group: bytes


class RealmJoin(_Body, frozen=True):
    """Request of `realm/join`."""

    realm: bytes
    peer: bytes
    statement: bytes


class RealmJoined(_Body, frozen=True):
    """Reply of `realm/join`."""

    hsm: bytes


class GroupNew(_Body, frozen=True):
    """Request of `group/new`: members with their realm statements; `generations` are theirs, empty when all are 0."""

    realm: bytes
    members: list[tuple[bytes, bytes]]
    generations: tuple[int, ...] = ()


class GroupCreated(_Body, frozen=True):
    """Reply of `group/new`."""

    group: bytes
    statement: bytes


class GroupJoin(_Body, frozen=True):
    """Request of `group/join`."""

    realm: bytes
    group: bytes
    configuration: list[bytes]
    statement: bytes
    generations: tuple[int, ...] = ()


class GroupCall(_Body, frozen=True):
    """Request that names only a group: `stepdown`, `captured`, `group/retire`."""

    realm: bytes
    group: bytes


class BecomeLeaderCall(_Body, frozen=True):
    """Request of `become_leader`; `last` is the index the log must end at, when known."""

    realm: bytes
    group: bytes
    last: int | None = None


class SteppedDown(_Body, frozen=True):
    """Reply of `stepdown`: the final index of that leadership."""

    last: int


class Replicate(_Body, frozen=True):
    """Acknowledged entries (CBOR each) from the leader's agent; none is a heartbeat. `last` is its last index."""

    realm: bytes
    group: bytes
    starting: int
    entries: list[bytes]
    last: int


class CapturedReply(_Body, frozen=True):
    """A member's persisted capture (CBOR) or None; `behind` asks for nothing, the member reads the log itself."""

    captured: bytes | None
    behind: bool = False


class App(_Body, frozen=True):
    """One client request; `encrypted` is the CBOR NoiseRequest, `user` the hashed user id."""

    realm: bytes
    group: bytes
    record_id: bytes
    session_id: int
    handshake_only: bool
    encrypted: bytes
    tenant: str
    user: str


class AppOk(_Body, frozen=True):
    """The released reply: CBOR NoiseResponse."""

    noise: bytes


class TransferPrepare(_Body, frozen=True):
    """Request of `transfer/prepare` and `transfer/cancel_prepare`."""

    realm: bytes
    source: bytes
    destination: bytes
    range: Range


class Prepared(_Body, frozen=True):
    """Reply of `transfer/prepare`."""

    nonce: bytes
    statement: bytes


class TransferOutCall(_Body, frozen=True):
    """Request of `transfer/out`."""

    realm: bytes
    source: bytes
    destination: bytes
    range: Range
    nonce: bytes
    statement: bytes


class TransferredOut(_Body, frozen=True):
    """Reply of `transfer/out`."""

    transferring: PartitionInfo
    at: int
    statement: bytes


class TransferInCall(_Body, frozen=True):
    """Request of `transfer/in`."""

    realm: bytes
    source: bytes
    destination: bytes
    transferring: PartitionInfo
    at: int
    nonce: bytes
    statement: bytes


class TransferComplete(_Body, frozen=True):
    """Request of `transfer/complete`; `at` is the index at which the range left its source."""

    realm: bytes
    source: bytes
    destination: bytes
    range: Range
    at: int


class OwnsCall(_Body, frozen=True):
    """Request of `transfer/owns`."""

    realm: bytes
    group: bytes
    range: Range


class ArrivedCall(_Body, frozen=True):
    """Request of `transfer/arrived`: did a committed entry consume `source` at or above `at`?"""

    realm: bytes
    source: bytes
    destination: bytes
    at: int


class RateState(_Body, frozen=True):
    """Reply of `rate/state`: tenant -> encoded limiter state."""

    tenants: list[tuple[str, bytes]]


class TenantsReloaded(_Body, frozen=True):
    """Reply of `tenants/reload`."""

    tenants: int


class LeaderLost(_Body, frozen=True):
    """A member's hint that its leader is gone."""

    realm: bytes
    group: bytes
    starting: int


class StepdownOrder(_Body, frozen=True):
    """Request of `leader_stepdown`: either an HSM, or a realm and group."""

    hsm: bytes | None = None
    realm: bytes | None = None
    group: bytes | None = None


class Rebalanced(_Body, frozen=True):
    """Reply of `rebalance`; all fields empty means already balanced."""

    realm: bytes = b""
    group: bytes = b""
    source: bytes = b""
    destination: bytes = b""


class LoopRun(_Body, frozen=True):
    """When a loop of a manager last ran (Unix ms), how long it took, and its error, "" when there was none."""

    name: str
    at_ms: int
    took_ms: int
    error: str = ""


class RunningTransfer(_Body, frozen=True):
    """A transfer that runs in this manager, ordered or recovered. `begun_ms` is Unix time.

    `attempt` counts from 1 the tries of prepare to in as one unit, then anew those of complete.
    """

    realm: bytes
    source: bytes
    destination: bytes
    range: Range
    step: TransferStep
    attempt: int
    begun_ms: int
    age_s: float


class PendingTransfer(_Body, frozen=True):
    """A transfer that a group's leader shows as pending, and for how long this manager has seen it."""

    realm: bytes
    group: bytes
    age_s: float


class ManagerStatus(_Body, frozen=True):
    """Reply of `status` at a manager: what it is doing.

    `older` is JSON with the version alone, which is what a reader of an older version takes the whole status from; from
    a manager of an older version it is all there is. `certificate_end_ms` is when its cluster certificate ends, Unix
    time in ms, None without TLS. `announced` are (realm, group) of groups somebody said are leaderless. `now_ms` is its
    wall clock. `uptime_s` is None from one of an older version.
    """

    older: str
    name: str = ""
    version: str = ""
    certificate_end_ms: int | None = None
    loops: tuple[LoopRun, ...] = ()
    held_leases: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    transfers: tuple[RunningTransfer, ...] = ()
    pending: tuple[PendingTransfer, ...] = ()
    announced: tuple[tuple[bytes, bytes], ...] = ()
    now_ms: int | None = None
    uptime_s: float | None = None
