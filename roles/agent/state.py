"""What an agent knows of its groups, and the rule by which roles are adopted (agent.md 1).

Nothing here survives a restart and nothing here is needed for safety. Every function is synchronous: with one Trio
thread the state lock is simply the absence of a checkpoint between reading and writing.

Life of a leadership: a reply of the HSM with role Leader or SteppingDown creates `LeaderState`; requests enter
`incoming`, the producer turns them into `queue` (by index) and `waiters` (by entry mac), an append moves `next_index`
and `last_appended`, votes raise `committed`, the outbox raises `recorded`; role Witness ends it and drops who waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from juicebox_hsm.consensus.types import (
    Captured,
    Certificate,
    Leader,
    LogEntry,
    Role,
    RoleStatus,
    SteppingDown,
    Witness,
)
from juicebox_hsm.errors import check
from juicebox_hsm.host.log import Intent, LogRow
from juicebox_hsm.ids import GroupId, HsmId, RealmId, RecordId
from juicebox_hsm.wire.client import NoiseRequest
from juicebox_hsm.wire.rpc import AppOk, Refusal, Refused
from roles.agent.oneshot import Signal, Slot

APPEND_BATCH_MAX: Final = 100
UNCOMMITTED_MAX: Final = 1000
"""More uncommitted entries than this and `app` answers Busy (agent.md 6: a certificate's tail must fit one jump)."""
RECENT_ENTRIES_MAX: Final = 2 * UNCOMMITTED_MAX
"""Acknowledged entries kept for pushing; a member further behind reads the log itself."""
RATE_WINDOW_S: Final = 60


class PendingRequest(Slot[AppOk | Refused]):
    """One client request on its way through a leadership, with the slot its RPC task waits on."""

    __slots__ = (
        "attempts",
        "encrypted",
        "record_id",
        "retry_deadline",
        "session_id",
        "tenant",
        "user",
        "when_ms",
        "wrote",
    )

    def __init__(
        self, record_id: RecordId, session_id: int, encrypted: NoiseRequest, tenant: str, user: str, when_ms: int
    ) -> None:
        super().__init__()
        self.record_id = record_id
        self.session_id = session_id
        self.encrypted = encrypted
        self.tenant = tenant
        self.user = user
        self.when_ms = when_ms
        self.attempts = 0
        self.retry_deadline: float | None = None
        self.wrote = False

    def refuse(self, outcome: Refusal, *, consumed: bool = False) -> None:
        """Answer with a refusal."""
        self.fill(Refused(outcome, consumed=consumed))


@dataclass(frozen=True, slots=True)
class Queued:
    """An entry the HSM made, waiting for its turn in the log. `intent` is None for entries without a client."""

    entry: LogEntry
    delta: bytes
    intent: Intent | None


class RateMeter:
    """Requests per second as the mean of the last 60 whole seconds."""

    __slots__ = ("_counts", "_second")

    def __init__(self) -> None:
        self._counts = [0] * RATE_WINDOW_S
        self._second = 0

    def add(self, now_s: float, count: int) -> None:
        """Count `count` requests at monotonic time `now_s`."""
        self._advance(int(now_s))
        self._counts[self._second % RATE_WINDOW_S] += count

    def per_second(self, now_s: float) -> float:
        """Return the mean rate over the window."""
        self._advance(int(now_s))
        return sum(self._counts) / RATE_WINDOW_S

    def _advance(self, second: int) -> None:
        for passed in range(self._second + 1, min(second, self._second + RATE_WINDOW_S) + 1):
            self._counts[passed % RATE_WINDOW_S] = 0
        if second > self._second + RATE_WINDOW_S:
            self._counts = [0] * RATE_WINDOW_S
        self._second = max(self._second, second)


class Claim(NamedTuple):
    """What tells the leaderships of a group apart, in the order in which they count (record 0018).

    `last` is the last index it wrote, or the one it began after; `starting` is the first it may create.
    """

    last: int
    starting: int


@dataclass(slots=True)
class LeaderState:
    """One leadership of one group, from Leader through SteppingDown. `starting` is the first index it may create."""

    starting: int
    next_index: int = 0
    incoming: deque[PendingRequest] = field(default_factory=deque)
    queue: dict[int, Queued] = field(default_factory=dict)
    waiters: dict[bytes, PendingRequest] = field(default_factory=dict)
    last_appended: LogEntry | None = None
    committed: int | None = None
    recorded: int = 0
    """Every client entry of this leadership up to here has its outbox row."""
    resolved: bool = False
    """The intents of earlier leaderships have their rows, so `settled` may be raised."""
    settled: int = 0
    votes: dict[HsmId, Captured] = field(default_factory=dict)
    own_macs: dict[int, bytes] = field(default_factory=dict)
    """Entry macs from `committed` on, to tell captures of our branch from others'."""
    certificate: Certificate | None = None
    uncompacted: deque[LogRow] = field(default_factory=deque)
    recent: deque[tuple[int, bytes]] = field(default_factory=deque)
    """(index, encoded entry) of acknowledged entries, consecutive; filled only when there are members to push to."""
    append_blocked: bool = False
    """After a conflict nothing of this leadership may be appended any more."""
    asked_to_leave: bool = False
    """A manager or operator asked for the step-down: no `leader_lost` hint when it ends."""
    meter: RateMeter = field(default_factory=RateMeter)
    work: Signal = field(default_factory=Signal)
    voted: Signal = field(default_factory=Signal)
    compactible: Signal = field(default_factory=Signal)
    member_signals: dict[HsmId, Signal] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.next_index = self.starting
        self.recorded = self.starting - 1

    @property
    def uncommitted(self) -> int:
        """Entries made or about to be made and not yet committed."""
        committed = self.starting - 1 if self.committed is None else self.committed
        return max(0, self.next_index - 1 - committed) + len(self.queue) + len(self.incoming)

    @property
    def claim(self) -> Claim:
        """How this leadership ranks among others."""
        return Claim(self.next_index - 1, self.starting)

    def is_new(self, index: int) -> bool:
        """Tell whether nothing of this leadership has `index` yet."""
        return index >= self.next_index and index not in self.queue

    def enqueue(self, queued: Queued) -> None:
        """Queue an entry for the append; the index must be new (agent.md 6)."""
        index = queued.entry.index
        check(self.is_new(index), "the HSM makes each index once per leadership")
        self.queue[index] = queued
        self.own_macs[index] = queued.entry.entry_mac

    def take_batch(self) -> list[Queued]:
        """Remove and return the entries that continue the log, at most 100."""
        batch: list[Queued] = []
        index = self.next_index
        while len(batch) < APPEND_BATCH_MAX and index in self.queue:
            batch.append(self.queue.pop(index))
            index += 1
        return batch

    def appended(self, batch: list[Queued]) -> None:
        """Note that the store acknowledged `batch`."""
        first, last = batch[0].entry, batch[-1].entry
        check(first.index == self.next_index, "batches are appended in order")
        self.next_index = last.index + 1
        self.last_appended = last
        self.uncompacted.append(LogRow(first.index, is_tombstone=False))

    def inherit(self, entry: LogEntry) -> None:
        """Note the entry this leadership started from, unless something was appended already."""
        if entry.index == self.starting - 1:
            self.own_macs.setdefault(entry.index, entry.entry_mac)
            if self.last_appended is None:
                self.last_appended = entry

    def block_appends(self) -> None:
        """Forget the queue for good: another leader wrote, or the log tail is unknown."""
        self.append_blocked = True
        self.queue.clear()

    def vote(self, captured: Captured) -> bool:
        """Adopt a member's capture if it is newer than the known one; tell whether it was."""
        known = self.votes.get(captured.hsm)
        if known is not None and known.index >= captured.index:
            return False
        self.votes[captured.hsm] = captured
        self.voted.set()
        return True

    def raise_committed(self, index: int) -> None:
        """Note a commit; forget the macs below it."""
        if self.committed is not None and index <= self.committed:
            return
        first = self.starting - 1 if self.committed is None else self.committed
        for passed in range(first, index):
            self.own_macs.pop(passed, None)
        self.committed = index

    def certify(self, index: int) -> Certificate:
        """Return the captures of our branch at or above `index` as a commit certificate (agent.md 10)."""
        captures = tuple(c for c in self.votes.values() if c.index >= index and self.own_macs.get(c.index) == c.mac)
        return Certificate(index, captures)

    def drop_waiters(self) -> None:
        """Refuse everybody who waits: NotLeader, with `consumed` for those whose message the HSM was given."""
        for request in self.waiters.values():
            request.refuse(Refusal.NOT_LEADER, consumed=True)
        self.waiters.clear()
        for request in self.incoming:
            request.refuse(Refusal.NOT_LEADER)
        self.incoming.clear()

    def recent_from(self, index: int, entries_max: int) -> list[bytes] | None:
        """Return encoded entries from `index` on ([] at the end); None when `index` is no longer kept."""
        if index >= self.next_index:
            return []
        if not self.recent or index < self.recent[0][0]:
            return None
        offset = index - self.recent[0][0]
        return [self.recent[at][1] for at in range(offset, min(offset + entries_max, len(self.recent)))]

    def wake_all(self) -> None:
        """Wake every task of this leadership so that it can see its end."""
        self.work.set()
        self.voted.set()
        self.compactible.set()
        for signal in self.member_signals.values():
            signal.set()


@dataclass(frozen=True, slots=True)
class RoleChange:
    """What adopting a role did: at most one of `started` and `ended`; `stale` when it was not adopted."""

    started: LeaderState | None = None
    ended: LeaderState | None = None
    stale: bool = False


_UNCHANGED: Final = RoleChange()
_STALE: Final = RoleChange(stale=True)


@dataclass(slots=True)
class GroupState:
    """One group this agent's HSM is a member of. `position` is the next index its HSM has to capture."""

    realm: RealmId
    group: GroupId
    configuration: tuple[HsmId, ...]
    role: RoleStatus
    position: int = 1
    leader: LeaderState | None = None
    captured: Captured | None = None
    """The HSM's own persisted capture, from the last PersistState."""
    releasing: int = 0
    """Committed requests whose rows and answers are not out yet, also of a leadership that has ended."""

    @property
    def is_leader(self) -> bool:
        """Tell whether requests may be accepted: Leader, not SteppingDown, and the log can still be appended to."""
        leader = self.leader
        return leader is not None and isinstance(self.role.role, Leader) and not leader.append_blocked

    def adopt(self, status: RoleStatus) -> RoleChange:
        """Apply the role clock rule (agent.md 1): only a greater clock is adopted, an equal one must be equal."""
        if status.at < self.role.at:
            return _STALE
        if status.at == self.role.at:
            check(status.role == self.role.role, "equal role clocks mean equal roles")
            return _UNCHANGED
        self.role = status
        starting = leadership_start(status.role)
        if starting is None:
            ended, self.leader = self.leader, None
            if ended is None:
                return _UNCHANGED
            ended.block_appends()
            ended.drop_waiters()
            ended.wake_all()
            return RoleChange(ended=ended)
        kept = self.leader is not None and self.leader.starting == starting and isinstance(status.role, SteppingDown)
        if kept:
            return _UNCHANGED
        previous, self.leader = self.leader, LeaderState(starting)
        if previous is not None:
            previous.block_appends()
            previous.drop_waiters()
            previous.wake_all()
        return RoleChange(started=self.leader, ended=previous)


def leadership_start(role: Role) -> int | None:
    """Return the first index of the leadership, None for a witness."""
    match role:
        case Leader(starting):
            return starting
        case SteppingDown(leader_starting):
            return leader_starting
        case Witness():
            return None


class Groups:
    """All groups of the agent by (realm, group)."""

    __slots__ = ("_by_key",)

    def __init__(self) -> None:
        self._by_key: dict[tuple[bytes, bytes], GroupState] = {}

    def __iter__(self) -> Iterator[GroupState]:
        return iter(list(self._by_key.values()))

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, group: GroupState) -> None:
        """Insert a group that is not there yet."""
        key = (group.realm, group.group)
        check(key not in self._by_key, "a group is inserted once")
        self._by_key[key] = group

    def get(self, realm: bytes, group: bytes) -> GroupState | None:
        """Return the group, if the HSM is a member."""
        return self._by_key.get((realm, group))

    def find(self, realm: bytes, group: bytes) -> GroupState | Refusal:
        """Return the group, or the refusal that names what is wrong."""
        found = self._by_key.get((realm, group))
        if found is not None:
            return found
        known_realm = any(key[0] == realm for key in self._by_key)
        return Refusal.INVALID_GROUP if known_realm else Refusal.INVALID_REALM

    @property
    def realms(self) -> Mapping[RealmId, None]:
        """The realms of the groups, in order of first appearance (an HSM has at most one)."""
        return dict.fromkeys(group.realm for group in self._by_key.values())
