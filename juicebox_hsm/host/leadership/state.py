"""What a leadership knows. Written by the modules of this folder only; others see `Leadership.snapshot`."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from math import inf
from typing import Final

from juicebox_hsm.consensus.types import Captured, Certificate, Leader, LogEntry, RoleStatus
from juicebox_hsm.errors import check
from juicebox_hsm.host.leadership.effects import Answer, Effect
from juicebox_hsm.host.leadership.events import ClientRequest, CommitWait
from juicebox_hsm.host.log import Intent, LogRow
from juicebox_hsm.host.retry import STORE_RETRY, RetryProfile
from juicebox_hsm.ids import GroupId, HsmId, RealmId

APPEND_BATCH_MAX: Final = 100
"""Requests that ride together, and entries of one append (agent.md 6)."""
UNCOMMITTED_MAX: Final = 1000
"""More uncommitted entries than this and requests are Busy (agent.md 6: a certificate's tail must fit one jump)."""
RECENT_ENTRIES_MAX: Final = 2 * UNCOMMITTED_MAX
"""Acknowledged entries kept for pushing; a member further behind reads the log itself."""
RATE_WINDOW_S: Final = 60

Effects = list[Effect]


@dataclass(frozen=True, slots=True)
class Limits:
    """Periods in seconds, and bounds. Tests shorten them."""

    hole_s: float = 5.0
    compact_pause_s: float = 1.0
    uncommitted_max: int = UNCOMMITTED_MAX
    silence_s: float = 1.0
    stall_s: float = 5.0
    retry: RetryProfile = STORE_RETRY


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


@dataclass(frozen=True, slots=True)
class Queued:
    """An entry the HSM made, waiting for its turn in the log. `intent` is None for entries without a client."""

    entry: LogEntry
    delta: bytes
    intent: Intent | None


@dataclass(slots=True)
class Waiting:
    """Whom the reply to an entry is for. `wrote`: the entry changed the tree; `told`: the client has its answer."""

    request: ClientRequest
    index: int
    wrote: bool
    told: bool = False


@dataclass(slots=True)
class Retry:
    """Attempts of one request that met a stale proof or a missing node; the pause of the next may be running."""

    attempts: int
    deadline_s: float
    gone: bool = False
    missing_since_s: float | None = None
    """When a node of its path was first missing; None once there was a proof."""


@dataclass(slots=True)
class Member:
    """How far a member was sent the log, and when it last answered. `asked`, `sent` belong to the push under way."""

    next_index: int
    heard_s: float
    failures: int = 0
    """Pushes that brought nothing since it last answered."""
    asked: int = 0
    sent: int = 0


class Producing(enum.Enum):
    """What the producing lane is at."""

    FREE = "free"
    READING = "reading"
    ASKING = "asking"
    APPENDING = "appending"
    SHOWING = "showing"


class Committing(enum.Enum):
    """What the committing lane is at."""

    FREE = "free"
    ASKING = "asking"
    RECORDING = "recording"


class Housing(enum.Enum):
    """What the house lane is at. A round runs from RESOLVING to RESTING and leaves out what is done or not due."""

    WAITING = "waiting"
    FREE = "free"
    RESOLVING = "resolving"
    LISTING = "listing"
    SETTLING = "settling"
    CERTIFYING = "certifying"
    COMPACTING = "compacting"
    RESTING = "resting"


@dataclass(slots=True)
class House:
    """The housekeeping of a leadership: unknown outcomes, settled index, compaction."""

    at: Housing = Housing.WAITING
    due: bool = False
    failures: int = 0
    listed: bool = False
    resolved: bool = False
    """The intents of earlier leaderships have their rows, so `settled` may be raised."""
    settled: int = 0
    writing: int = 0
    """The settled index that the write under way carries."""
    uncompacted: deque[LogRow] = field(default_factory=deque)
    compacting: int = 0
    """The rows, from the oldest, that the certificate or compaction under way is about."""
    compact_index: int = 0


@dataclass(slots=True)
class State:
    """One leadership of one group, from Leader through SteppingDown. `starting` is the first index it may create."""

    realm: RealmId
    group: GroupId
    configuration: tuple[HsmId, ...]
    starting: int
    role: RoleStatus
    limits: Limits
    own_captured: Captured | None = None
    """Our own HSM's persisted capture."""
    ended: bool = False
    blocked: bool = False
    """Nothing of this leadership may be appended any more: another leader wrote, or the tail is unknown."""
    asked_to_leave: bool = False

    # producing
    producing: Producing = Producing.FREE
    incoming: deque[ClientRequest] = field(default_factory=deque)
    batch: list[ClientRequest] = field(default_factory=list)
    asks: deque[tuple[ClientRequest, bytes]] = field(default_factory=deque)
    asked: ClientRequest | None = None
    asked_index: int = 0
    reading_since_s: float = 0.0
    """When the batch under way asked for its proofs: the time its requests may be tried again counts from there."""
    retries: dict[ClientRequest, Retry] = field(default_factory=dict)
    queue: dict[int, Queued] = field(default_factory=dict)
    appending: list[Queued] = field(default_factory=list)
    next_index: int = 0
    last_appended: LogEntry | None = None
    missing_since_s: float | None = None
    losing: bool = False
    """The step-down under way is over a lost duel."""
    meter: RateMeter = field(default_factory=RateMeter)

    # committing
    committing: Committing = Committing.FREE
    waiters: dict[bytes, Waiting] = field(default_factory=dict)
    votes: dict[HsmId, Captured] = field(default_factory=dict)
    voted: bool = False
    own_macs: dict[int, bytes] = field(default_factory=dict)
    """Entry macs from `committed` on, to tell captures of our branch from others'."""
    certificate: Certificate | None = None
    committed: int | None = None
    recorded: int = 0
    """Every client entry of this leadership up to here has its outbox row."""
    releasing: tuple[Answer, ...] = ()
    """Committed requests whose rows are being written."""
    recording: int | None = None
    """The settled index that goes with those rows."""
    waits: list[CommitWait] = field(default_factory=list)
    waiting_since_s: float | None = None
    """Since when appended entries have waited for a commit without any progress, None while none waits."""
    stalled_since_s: float | None = None
    """Since when nothing can be committed; None while the store works, a majority answers and commits come."""
    store_failing_since_s: float | None = None
    """Since when the store has refused whatever we asked, None while it works; `store_failed_s` is the last time."""
    store_failed_s: float = -inf
    appending_since_s: float = inf
    recording_since_s: float = inf
    """When the write under way began, in the future while there is none."""

    # members
    members: dict[HsmId, Member] = field(default_factory=dict)
    recent: deque[tuple[int, bytes]] = field(default_factory=deque)
    """(index, encoded entry) of acknowledged entries, consecutive; kept only when there are members to push to."""

    house: House = field(default_factory=House)

    def __post_init__(self) -> None:
        self.next_index = self.starting
        self.recorded = self.starting - 1

    @property
    def accepting(self) -> bool:
        """Tell whether requests may be accepted: Leader, not SteppingDown, and the log can still be appended to."""
        return not self.ended and not self.blocked and isinstance(self.role.role, Leader)

    @property
    def uncommitted(self) -> int:
        """Entries made or about to be made and not yet committed."""
        committed = self.starting - 1 if self.committed is None else self.committed
        return max(0, self.next_index - 1 - committed) + len(self.queue) + len(self.incoming)

    def takes(self, index: int) -> bool:
        """Tell whether an entry at `index` may still be queued: the leadership appends and has no such entry yet."""
        return not self.ended and not self.blocked and index >= self.next_index and index not in self.queue

    def enqueue(self, queued: Queued) -> None:
        """Queue an entry for the append; `takes` must hold (agent.md 6)."""
        index = queued.entry.index
        check(self.takes(index), "the HSM makes each index once per leadership")
        self.queue[index] = queued
        self.own_macs[index] = queued.entry.entry_mac

    def inherit(self, entry: LogEntry) -> None:
        """Note the entry this leadership started from, unless something was appended already."""
        if entry.index == self.starting - 1:
            self.own_macs.setdefault(entry.index, entry.entry_mac)
            if self.last_appended is None:
                self.last_appended = entry
