"""Ports: what the realm asks of the outside, in its own words (own: decision record 0003, storage.md part A).

Each back end implements these natively and passes the same contract suite (`tests/emulator/contract.py`).
Failures: every method may raise `StoreUnavailable` (nothing was applied, or the call is idempotent: try again).
`LogStore.append` may also raise `StoreAmbiguous` once its own attempts to find out are exhausted.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from juicebox_hsm.consensus.types import Certificate, LogEntry, Partition
from juicebox_hsm.errors import RealmError
from juicebox_hsm.event_bus import EventBus
from juicebox_hsm.hsm.messages import Request, Response
from juicebox_hsm.ids import GroupId, RealmId, RecordId
from juicebox_hsm.table_stats import TableStats


class StoreUnavailable(RealmError):
    """The store did not answer or refused for a passing reason; nothing is known to be applied."""

    retryable = True


class StoreAmbiguous(RealmError):
    """A write may or may not have happened and the store could not be asked; the log tail is unknown."""


class StoreInvalid(RealmError):
    """The store's content or version is not ours: the message says what and where."""


class MissingNode(RealmError):
    """A node of the asked tree is not in the store: the root moved on. Read the log tail and try again."""

    retryable = True


class HsmGone(RealmError):
    """The HSM is lost or poisoned. The agent that fronts it must end (exit 75)."""


# --- log ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Intent:
    """Who a client's log entry is for, stored with the entry (agent.md 11).

    `user` is the hashed user id (64 hex digits); `hint` is the tenant's next outbox sequence as the writer knew it.
    """

    tenant: str
    user: str
    record_id: RecordId
    hint: int


class AppendOutcome(enum.Enum):
    """What became of an append."""

    APPENDED = "Appended"
    CONFLICT = "Conflict"


@dataclass(frozen=True, slots=True)
class Compacted:
    """The entry at `index` is no longer in the log (or a range of rows is missing from there on)."""

    index: int


@dataclass(frozen=True, slots=True)
class LogRow:
    """One row (batch) of the log, by the index of its first entry."""

    first_index: int
    is_tombstone: bool


class LogStore(Protocol):
    """A group's log: appended in batches by whoever holds the tail, read by all members."""

    async def append(
        self,
        realm: RealmId,
        group: GroupId,
        entries: Sequence[LogEntry],
        intents: Sequence[Intent | None],
        delta: bytes,
    ) -> AppendOutcome:
        """Append a batch of 1..100 chained entries with its tree delta (squashed, merkle.md 3.3) atomically.

        CONFLICT unless the entry before the first is the last entry of the log with the mac that the batch names.
        `intents` is parallel to `entries`. After APPENDED the nodes are readable and the removed ones may be gone.
        """
        ...

    async def read_last(self, realm: RealmId, group: GroupId) -> LogEntry | None:
        """Return the last entry, None for an empty log. Reads its own writes."""
        ...

    async def read_from(
        self, realm: RealmId, group: GroupId, index: int, entries_max: int
    ) -> list[LogEntry] | Compacted:
        """Return up to about `entries_max` consecutive entries from `index`; [] at the end of the log."""
        ...

    async def read_intents(
        self, realm: RealmId, group: GroupId, first: int, last: int
    ) -> list[tuple[LogEntry, Intent]]:
        """Return the entries with an intent whose index is in first..last and that are still in the log."""
        ...

    async def list_rows(self, realm: RealmId, group: GroupId, below: int) -> list[LogRow]:
        """Return the rows that start below index `below`, oldest first, leading tombstones stripped."""
        ...

    async def compact(self, realm: RealmId, group: GroupId, rows: Sequence[LogRow]) -> None:
        """Replace rows by tombstones (or remove them). Idempotent."""
        ...

    async def write_certificate(self, realm: RealmId, group: GroupId, certificate: Certificate) -> None:
        """Store the certificate in a row of its own, then delete those with a smaller index."""
        ...

    async def read_certificate(self, realm: RealmId, group: GroupId) -> Certificate | None:
        """Return the certificate with the highest index, if any."""
        ...

    async def list_groups(self, realm: RealmId) -> list[GroupId]:
        """Return the groups that have a log in this realm."""
        ...


# --- tree nodes --------------------------------------------------------------------------------------


class TreeSide(enum.Enum):
    """Which edge of a tree to walk."""

    LEFT = "left"
    RIGHT = "right"


class NodeStore(Protocol):
    """The tree nodes of a realm; written only through `LogStore.append`."""

    async def read_proofs(
        self, realm: RealmId, partition: Partition, records: Sequence[RecordId]
    ) -> list[bytes | None]:
        """Return for each record an encoded read proof (merkle.md 3.2) against the partition's root.

        None where a node is missing because the root is no longer current. One snapshot for the call.
        """
        ...

    async def read_edge_proof(self, realm: RealmId, partition: Partition, side: TreeSide) -> bytes:
        """Return the encoded edge proof (merkle.md 4.2). Raises `MissingNode`."""
        ...


# --- outbox ------------------------------------------------------------------------------------------


class EventKind(enum.Enum):
    """What an outbox row records: the request type, or `UNKNOWN` for an unconfirmed outcome."""

    REGISTER1 = "register1"
    REGISTER2 = "register2"
    RECOVER1 = "recover1"
    RECOVER2 = "recover2"
    RECOVER3 = "recover3"
    DELETE = "delete"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class NewEvent:
    """One committed request, before it has a sequence number.

    `event` is the tenant event's JSON body without the user, as a mapping, or None; `accounting` is
    "registered", "deleted" or None; `when_ms` is Unix milliseconds.
    """

    tenant: str
    group: GroupId
    index: int
    mac: bytes
    record_id: RecordId
    user: str
    kind: EventKind
    event: Mapping[str, str | int] | None
    accounting: str | None
    when_ms: int


@dataclass(frozen=True, slots=True)
class OutboxEvent:
    """A recorded event with its dense sequence number (from 1 per realm and tenant)."""

    seq: int
    new: NewEvent


@dataclass(frozen=True, slots=True)
class TenantCursor:
    """How far a tenant's events are published. `published` and `tail` are sequence numbers, 0 for none."""

    tenant: str
    published: int
    tail: int


@dataclass(frozen=True, slots=True)
class Backlog:
    """Unpublished rows of a realm; `oldest_ms` is the Unix time in ms of the oldest, None when empty."""

    rows: int
    oldest_ms: int | None


EVENT_KEPT_MS: Final = 7 * 86_400_000
"""How long published rows with an event stay at least, for readers of the embedded bus and auditors who come late."""


class EventOutbox(Protocol):
    """Tenant events between commit and publication (agent.md 11, storage.md 2.7)."""

    async def record(
        self, realm: RealmId, events: Sequence[NewEvent], settled: Mapping[GroupId, int]
    ) -> dict[str, int]:
        """Append events, each tenant's dense sequence continued, and raise settled indexes; one atomic write.

        Returns for each tenant in `events` its new tail.
        """
        ...

    async def settled(self, realm: RealmId, group: GroupId) -> int:
        """Return the highest index at or below which every intent has its row; 0 when never written."""
        ...

    async def read(self, realm: RealmId, tenant: str, after_seq: int, limit: int) -> list[OutboxEvent]:
        """Return events with seq > after_seq in order."""
        ...

    async def cursors(self, realm: RealmId) -> list[TenantCursor]:
        """Return every tenant with rows, sorted by name."""
        ...

    async def advance(
        self,
        realm: RealmId,
        tenant: str,
        from_seq: int,
        to_seq: int,
        day: str,
        counts: Mapping[EventKind, int],
    ) -> bool:
        """Move the cursor from `from_seq` and add to the counters of `day` (YYYYMMDD) in one conditional write.

        False when another dispatcher moved it first; nothing is written then.
        """
        ...

    async def remove_published(self, realm: RealmId, now_ms: int, limit: int, *, kept_ms: int = EVENT_KEPT_MS) -> int:
        """Remove up to `limit` rows that are published, settled and (with an event) at least `kept_ms` old."""
        ...

    async def backlog(self, realm: RealmId) -> Backlog:
        """Return the unpublished rows and the age of the oldest."""
        ...

    async def counters(self, realm: RealmId, tenant: str) -> dict[str, dict[EventKind, int]]:
        """Return day -> kind -> count."""
        ...


class AccountingEvent(NamedTuple):
    """A record came or went: `seq` is the event's number in the tenant's outbox, `when_ms` says the UTC day."""

    tenant: str
    record: RecordId
    seq: int
    when_ms: int
    registered: bool


class Accounting(Protocol):
    """Which records existed when, per tenant and day (storage.md 2.3)."""

    async def write(self, realm: RealmId, events: Sequence[AccountingEvent]) -> None:
        """Write events; of one record and UTC day the one with the highest `seq` counts, in whatever order they come.

        So an event that is written again, or late by a dispatcher that was overtaken, changes nothing.
        """
        ...

    async def count_users(self, realm: RealmId, start_ms: int, end_ms: int) -> dict[str, int]:
        """Return tenant -> users with a secret at any time in [start, end) (storage.md 4.6)."""
        ...


# --- cluster -----------------------------------------------------------------------------------------


class ServiceKind(enum.Enum):
    """Who registers in discovery."""

    AGENT = "a"
    MANAGER = "c"
    LOAD_BALANCER = "l"


@dataclass(frozen=True, slots=True)
class ServiceAddress:
    """One registration; `registered_ms` is the registrant's Unix time in ms."""

    kind: ServiceKind
    url: str
    registered_ms: int


DISCOVERY_EXPIRY_S = 1260.0


class Discovery(Protocol):
    """Where services are. Entries older than 21 minutes are not returned and are removed."""

    async def register(self, kind: ServiceKind, url: str, now_ms: int) -> None:
        """Write or renew a registration."""
        ...

    async def deregister(self, kind: ServiceKind, url: str) -> None:
        """Remove a registration; absent is fine."""
        ...

    async def list(self, now_ms: int, kind: ServiceKind | None = None) -> list[ServiceAddress]:
        """Return unexpired registrations sorted by kind and URL."""
        ...


@dataclass(frozen=True, slots=True)
class Lease:
    """A granted lease; `id` is 32 hex digits, fresh per grant."""

    name: str
    owner: str
    id: str
    expires_ms: int


class Leases(Protocol):
    """Advisory leases (manager.md 1.2): they save duplicated work, correctness never depends on them."""

    async def obtain(self, name: str, owner: str, now_ms: int, length_ms: int) -> Lease | None:
        """Obtain the lease unless somebody's expiry is at or after now."""
        ...

    async def extend(self, lease: Lease, now_ms: int, length_ms: int) -> Lease | None:
        """Extend a lease that is still ours; None when it is not."""
        ...

    async def terminate(self, lease: Lease) -> None:
        """Give the lease back if it is still ours."""
        ...

    async def list(self) -> list[Lease]:
        """Return all rows, expired ones too, sorted by name."""
        ...


class Settings(Protocol):
    """Small shared facts by name (storage.md 2.8)."""

    async def get(self, name: str) -> bytes | None:
        """Return the value, if set."""
        ...

    async def claim(self, name: str, value: bytes) -> bytes:
        """Set the value if absent; return the value that stands afterwards."""
        ...

    async def put(self, name: str, value: bytes) -> None:
        """Set or replace the value."""
        ...

    async def remove(self, name: str) -> None:
        """Remove the value; absent is fine."""
        ...

    async def list(self, prefix: str) -> dict[str, bytes]:
        """Return name -> value for names with the prefix."""
        ...


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """A tenant's configuration; `capacity_ops_per_s` 0 blocks the tenant."""

    capacity_ops_per_s: int


class TenantConfig(Protocol):
    """Tenants' limits (storage.md 2.6)."""

    async def list(self) -> dict[str, TenantLimits]:
        """Return all configured tenants."""
        ...

    async def put(self, tenant: str, limits: TenantLimits) -> None:
        """Set or replace a tenant's configuration."""
        ...

    async def remove(self, tenant: str) -> None:
        """Remove a tenant's configuration; absent is fine."""
        ...


@dataclass(frozen=True, slots=True)
class Store:
    """All ports of one opened store, and how to create what a realm needs."""

    log: LogStore
    nodes: NodeStore
    outbox: EventOutbox
    accounting: Accounting
    discovery: Discovery
    leases: Leases
    settings: Settings
    tenants: TenantConfig
    realms: RealmStore
    description: str = field(default="")
    stats: TableStats | None = None
    bus: EventBus | None = None


class RealmStore(Protocol):
    """Creation of shared and per-realm tables; both are idempotent."""

    async def create_shared(self) -> None:
        """Create discovery, leases, tenants and settings."""
        ...

    async def create_realm(self, realm: RealmId) -> None:
        """Create the log, nodes, users and outbox of a realm."""
        ...

    async def list_realms(self) -> list[RealmId]:
        """Return the realms that have tables here."""
        ...


class OpenStore(Protocol):
    """A back end's constructor: `async with open_store(url) as store`."""

    def __call__(self, url: str) -> AbstractAsyncContextManager[Store]:
        """Open the store named by `url` (`sqlite:PATH` or `bigtable:PROJECT/INSTANCE`)."""
        ...


# --- HSM ---------------------------------------------------------------------------------------------


class HsmTransport(Protocol):
    """The one way to an HSM (decision record 0004): requests are strictly serialised."""

    async def send(self, request: Request) -> Response:
        """Run one request. Raises `HsmGone` when the HSM is lost or poisoned.

        Cancelling the caller never cancels a request that was begun.
        """
        ...
