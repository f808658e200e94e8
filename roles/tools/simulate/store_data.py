"""What the simulated store holds: plain values, changed only by effects that take no time.

Nothing here waits or draws. `StoreData.settle` brings the content up to a moment: writes that were answered "not seen
to happen" and happened later, and tree nodes whose removal was put off. Dictionaries keep the order of insertion and
no set is ever walked, so what a run sees does not depend on hashing.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

from juicebox_hsm.consensus.types import Certificate, LogEntry
from juicebox_hsm.host.audit import AuditEntry, Phase
from juicebox_hsm.host.events import EventKind, NewEvent, OutboxEvent
from juicebox_hsm.host.log import AppendOutcome, Intent
from juicebox_hsm.host.services import Lease, ServiceKind, TenantLimits
from juicebox_hsm.ids import GroupId, RealmId, RecordId
from juicebox_hsm.merkle.kernel import delta_rows
from juicebox_hsm.merkle.nodes import HASH_BYTES
from juicebox_hsm.ports.errors import StoreInvalid

PAST_KEPT_S: Final = 10.0
"""How old a stale read can be at most."""

T = TypeVar("T")


class Watcher(Protocol):
    """Sees every change of logs and outboxes at the moment it takes effect."""

    def appended(
        self,
        realm: RealmId,
        group: GroupId,
        entries: Sequence[LogEntry],
        intents: Sequence[Intent | None],
        delta: bytes,
    ) -> None:
        """Take in a batch that is now in the log."""

    def recorded(
        self, realm: RealmId, tenant: str, rows: Sequence[OutboxEvent], settled: Mapping[GroupId, int]
    ) -> None:
        """Take in rows that are now in a tenant's outbox, and settled indexes (with the last tenant's rows)."""


@dataclass(slots=True)
class Row:
    """One batch of a log; `entries` is empty for a tombstone."""

    first: int
    entries: tuple[LogEntry, ...]
    intents: tuple[Intent | None, ...]


@dataclass(slots=True)
class GroupLog:
    """A group's log, its certificates and its settled index."""

    rows: list[Row] = field(default_factory=list)
    certificates: Past[dict[int, Certificate]] = field(default_factory=lambda: Past({}))
    settled: int = 0

    @property
    def last(self) -> LogEntry | None:
        """Return the newest entry; the newest row is never compacted."""
        return self.rows[-1].entries[-1] if self.rows else None

    def position(self, index: int) -> int:
        """Return the place of the row that holds `index`, or would."""
        return max(0, bisect_right(self.rows, index, key=lambda row: row.first) - 1)

    def compact(self, firsts: Sequence[int], *, keeps_tombstones: bool) -> None:
        """Empty rows, or remove them; the newest row stays whatever is asked."""
        for first in firsts:
            at = bisect_left(self.rows, first, key=lambda row: row.first)
            if at + 1 < len(self.rows) and self.rows[at].first == first:
                if keeps_tombstones:
                    self.rows[at] = Row(first, (), ())
                else:
                    del self.rows[at]


@dataclass(slots=True)
class TenantRows:
    """A tenant's sequence: rows that are still there by number, and what was counted."""

    rows: dict[int, OutboxEvent] = field(default_factory=dict)
    tail: int = 0
    published: int = 0
    counters: dict[str, dict[EventKind, int]] = field(default_factory=dict)
    acknowledged: set[int] = field(default_factory=set)  # asked, never walked


@dataclass(slots=True)
class RealmData:
    """Everything of one realm. `nodes`: hash -> (encoding, number of the write)."""

    groups: dict[GroupId, GroupLog] = field(default_factory=dict)
    nodes: dict[bytes, tuple[bytes, int]] = field(default_factory=dict)
    doomed: deque[tuple[float, bytes, int]] = field(default_factory=deque)
    tenants: dict[str, TenantRows] = field(default_factory=dict)
    users: dict[tuple[str, RecordId, int], tuple[int, bool]] = field(default_factory=dict)

    def group(self, group: GroupId) -> GroupLog:
        """Return a group's log, making an empty one."""
        return self.groups.setdefault(group, GroupLog())

    def tenant(self, tenant: str) -> TenantRows:
        """Return a tenant's rows, making an empty sequence."""
        return self.tenants.setdefault(tenant, TenantRows())


class Past(Generic[T]):
    """A value that is replaced, never changed, and how it stood during the last seconds."""

    __slots__ = ("_versions",)

    def __init__(self, value: T) -> None:
        self._versions: deque[tuple[float, T]] = deque([(0.0, value)])

    @property
    def now(self) -> T:
        """Return the value."""
        return self._versions[-1][1]

    def at(self, when_s: float) -> T:
        """Return the value as it stood, or the oldest that is remembered."""
        for since_s, value in reversed(self._versions):
            if since_s <= when_s:
                return value
        return self._versions[0][1]

    def replace(self, when_s: float, value: T) -> None:
        """Set the value."""
        versions = self._versions
        versions.append((when_s, value))
        while len(versions) > 2 and versions[1][0] < when_s - PAST_KEPT_S:
            versions.popleft()


class StoreData:
    """The store's content. `removal_s` is how long the removed nodes of an append stay readable."""

    def __init__(self, now: Callable[[], float], *, keeps_tombstones: bool, removal_s: float) -> None:
        self.now = now
        self.keeps_tombstones = keeps_tombstones
        self.watchers: list[Watcher] = []
        self.counts: Counter[str] = Counter()
        self.realms: dict[RealmId, RealmData] = {}
        self.discovery: Past[dict[tuple[ServiceKind, str], int]] = Past({})
        self.leases: Past[dict[str, Lease]] = Past({})
        self.settings: Past[dict[str, bytes]] = Past({})
        self.tenants: Past[dict[str, TenantLimits]] = Past({})
        self.audit: dict[tuple[bytes, Phase], AuditEntry] = {}
        self._removal_s = removal_s
        self._late: list[tuple[float, int, Callable[[], object]]] = []
        self._writes = 0

    def realm(self, realm: RealmId) -> RealmData:
        """Return a realm's data; raises `StoreInvalid` for an unknown one."""
        found = self.realms.get(realm)
        if found is None:
            raise StoreInvalid(f"realm {realm.hex()} has no tables here")
        return found

    # --- time --------------------------------------------------------------------------------------

    def later(self, after_s: float, effect: Callable[[], object]) -> None:
        """Let an effect happen some time from now, whoever still waits for it."""
        self._writes += 1
        heapq.heappush(self._late, (self.now() + after_s, self._writes, effect))

    def settle(self) -> None:
        """Bring the content up to now."""
        now = self.now()
        while self._late and self._late[0][0] <= now:
            heapq.heappop(self._late)[2]()
        for realm in self.realms.values():
            self._remove_due(realm, now)

    # --- the two writes that watchers see ------------------------------------------------------------

    def append(
        self,
        realm_id: RealmId,
        group: GroupId,
        entries: Sequence[LogEntry],
        intents: Sequence[Intent | None],
        delta: bytes,
    ) -> AppendOutcome:
        """Append a batch with its delta, if it follows the log's last entry."""
        realm = self.realm(realm_id)
        log = realm.groups.get(group)
        last = None if log is None else log.last
        tail = None if last is None else (last.index, last.entry_mac)
        first = entries[0]
        if tail != (None if first.index == 1 else (first.index - 1, first.prev_mac)):
            return AppendOutcome.CONFLICT
        self._change_tree(realm, delta)  # refuses a malformed delta before anything is changed
        realm.group(group).rows.append(Row(first.index, tuple(entries), tuple(intents)))
        for watcher in self.watchers:
            watcher.appended(realm_id, group, entries, intents, delta)
        return AppendOutcome.APPENDED

    def _change_tree(self, realm: RealmData, delta: bytes) -> None:
        """Write added nodes; put off the removal of the others, each bound to the write that it removes."""
        rows = delta_rows(delta)
        for row_key, node in rows.adds:
            self._writes += 1
            realm.nodes[row_key[-HASH_BYTES:]] = (node, self._writes)
        now = self.now()
        for row_key in rows.removes:
            found = realm.nodes.get(row_key[-HASH_BYTES:])
            if found is not None:
                realm.doomed.append((now + self._removal_s, row_key[-HASH_BYTES:], found[1]))
        self._remove_due(realm, now)

    def _remove_due(self, realm: RealmData, now: float) -> None:
        """Remove the nodes whose time has come, unless they were written again meanwhile."""
        while realm.doomed and realm.doomed[0][0] <= now:
            _, node, written = realm.doomed.popleft()
            if realm.nodes.get(node, (b"", 0))[1] == written:
                del realm.nodes[node]

    def record(self, realm_id: RealmId, tenant: str, events: Sequence[NewEvent], expected_tail: int | None) -> int:
        """Continue a tenant's sequence, unless it is not where a late writer thought; return the tail."""
        rows = self.realm(realm_id).tenant(tenant)
        if expected_tail is not None and rows.tail != expected_tail:
            return rows.tail
        new = [OutboxEvent(rows.tail + number, event) for number, event in enumerate(events, 1)]
        rows.rows.update({row.seq: row for row in new})
        rows.tail += len(new)
        for watcher in self.watchers:
            watcher.recorded(realm_id, tenant, new, {})
        return rows.tail

    def raise_settled(self, realm_id: RealmId, settled: Mapping[GroupId, int]) -> None:
        """Raise settled indexes; they never fall."""
        realm = self.realm(realm_id)
        for group, index in settled.items():
            log = realm.group(group)
            log.settled = max(log.settled, index)
        if settled:
            for watcher in self.watchers:
                watcher.recorded(realm_id, "", (), settled)
