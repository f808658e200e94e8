"""What a witness's host keeps of one group: how far its HSM captured, and how it gets on (agent.md 7, hsm.md H1).

Entries reach the HSM three ways: read from the log, pushed by the leader's agent, or fed by our own appender. Only the
HSM decides what it captures; here is decided what it is given. The caller MUST

* let one step at a time run from a decision (`pushed`, `read`) to the HSM's answer to it (`fed`, `jumped`);
* give `pushed` only entries that the store acknowledged: an HSM that captured an entry the store then refused could
  never follow the log again;
* tell an operator when the HSM refuses a row *read from the store*, which is damaged then: `head` tells what was
  captured, and it is read again later. A refused *push* is dropped, and the log is read instead.

A crash between any two steps loses nothing: the position is the HSM's captured index, which it knows itself. Times are
monotonic seconds, arguments.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from juicebox_hsm.consensus.types import Captured, Certificate, LogEntry
from juicebox_hsm.errors import check
from juicebox_hsm.host.log import Compacted
from juicebox_hsm.host.retry import STORE_RETRY
from juicebox_hsm.hsm.messages import CaptureJumpOk, NotWitness, Outcome, Response, RoleOk

JUMP_PAUSE_FIRST_S: Final = 0.05
JUMP_PAUSE_PART: Final = 0.25
"""A jump is tried again after this part of the time since the first one: a certificate may come soon, or late (own)."""

_REFUSED: Final = (Outcome.INVALID_MAC, Outcome.INVALID_CHAIN, Outcome.MISSING_PREV)
_LATER: Final = (Outcome.NO_QUORUM, Outcome.STALE_INDEX, Outcome.MISSING_ENTRIES)


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a log with nothing new is read, and when catching up is trouble; seconds."""

    idle_first_s: float = 0.025
    idle_max_s: float = 1.0
    unready_s: float = 30.0


DEFAULT_PACE: Final = Pace()


def position_after(captured: int | None) -> int:
    """Return the next index to capture for an HSM that captured up to `captured`, None for nothing."""
    return 1 if captured is None else captured + 1


@dataclass(frozen=True, slots=True)
class Feed:
    """Give the HSM these entries (CaptureNext): they are consecutive and begin at the position."""

    entries: tuple[LogEntry, ...]


@dataclass(frozen=True, slots=True)
class Persist:
    """Nothing of this is new; what was captured before may still have to be persisted."""


@dataclass(frozen=True, slots=True)
class ReadLog:
    """Read the log from the position on."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Wait for a wake-up, at most `seconds`, and tell `waited`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Jump:
    """Try a CaptureJump over the compacted entry `missing`. `is_first`: of this catching up."""

    missing: int
    is_first: bool
    is_trouble: bool


class Jumped(enum.Enum):
    """What became of a CaptureJump."""

    MOVED = "moved"
    LEADS = "leads"
    """Our HSM leads the group, and a jump needs a witness: it must leave leadership by force."""
    CORRUPTED = "corrupted"
    """The HSM refuses rows of the stored log."""
    LATER = "later"
    """Not with these captures and entries; others may come."""


class Following:
    """One group's position and how its log is followed; see the module."""

    def __init__(self, position: int = 1, pace: Pace = DEFAULT_PACE) -> None:
        """`position` is what `position_after` says of the HSM's captured index."""
        self._pace = pace
        self._position = position
        self._idle_s = pace.idle_first_s
        self._failures = 0
        self._jumping_since: float | None = None

    @property
    def position(self) -> int:
        """The next index the HSM has to capture."""
        return self._position

    @property
    def is_catching_up(self) -> bool:
        """Tell whether the entry at the position was compacted when the log was last read."""
        return self._jumping_since is not None

    # --- what comes --------------------------------------------------------------------------------------

    def pushed(self, entries: Sequence[LogEntry]) -> Feed | Persist | ReadLog:
        """Say what to do with acknowledged entries, at least one."""
        first = entries[0].index
        if first > self._position or any(later.index != earlier.index + 1 for earlier, later in pairwise(entries)):
            return ReadLog()
        fresh = tuple(entries[self._position - first :])
        return Feed(fresh) if fresh else Persist()

    def read(self, found: Sequence[LogEntry] | Compacted, now: float) -> Feed | ReadLog | Idle | Jump:
        """Say what to do with what the log has at the position; that may have moved while it was read."""
        self._failures = 0
        if isinstance(found, Compacted):
            return self._compacted(found.index, now)
        self._jumping_since = None
        if not found:
            return Idle(self._idle_s)
        self._idle_s = self._pace.idle_first_s
        fresh = tuple(entry for entry in found if entry.index >= self._position)
        return Feed(fresh) if fresh and fresh[0].index == self._position else ReadLog()

    def _compacted(self, missing: int, now: float) -> ReadLog | Jump:
        if missing < self._position:
            return ReadLog()  # a push went past it meanwhile
        is_first = self._jumping_since is None
        since = now if self._jumping_since is None else self._jumping_since
        self._jumping_since = since
        return Jump(missing, is_first, is_trouble=now - since > self._pace.unready_s)

    def read_failed(self) -> float:
        """Return how long to wait until the log is read again after the store failed."""
        self._failures += 1
        return STORE_RETRY.delay_s(self._failures)

    def waited(self, *, woken: bool) -> None:
        """Note how an `Idle` ended: the wait doubles while nothing happens."""
        self._idle_s = self._pace.idle_first_s if woken else min(2 * self._idle_s, self._pace.idle_max_s)

    # --- what the HSM says -------------------------------------------------------------------------------

    def fed(self, entries: Sequence[LogEntry], reply: Response) -> Outcome | None:
        """Take the HSM's answer to a `Feed`; returns why it refused, None if it captured them."""
        if isinstance(reply, RoleOk):
            self._position = entries[-1].index + 1
            return None
        check(reply in _REFUSED, "CaptureNext answers as specified")
        return reply if isinstance(reply, Outcome) else Outcome.INVALID_CHAIN

    def head(self, captured: Captured | None) -> None:
        """Adopt what the HSM has captured and persisted: after a jump, and of a push that it refused in the middle."""
        self._position = position_after(None if captured is None else captured.index)

    # --- jumps (H1) --------------------------------------------------------------------------------------

    def jumped(self, reply: Response) -> Jumped:
        """Say what the HSM's answer to a CaptureJump means; after `MOVED` the caller tells `head`."""
        match reply:
            case CaptureJumpOk():
                return Jumped.MOVED
            case NotWitness():
                return Jumped.LEADS
            case Outcome.INVALID_MAC | Outcome.INVALID_CHAIN:
                return Jumped.CORRUPTED
        check(reply in _LATER, "CaptureJump answers as specified")
        return Jumped.LATER

    def caught_up(self, now: float) -> float:
        """End catching up after a jump that moved; returns how long it took in seconds."""
        took_s = 0.0 if self._jumping_since is None else now - self._jumping_since
        self._jumping_since = None
        return took_s

    def jump_pause_s(self, now: float) -> float:
        """Return how long to wait after a jump that did not move."""
        since = now if self._jumping_since is None else self._jumping_since
        return min(STORE_RETRY.cap_s, JUMP_PAUSE_FIRST_S + (now - since) * JUMP_PAUSE_PART)


class Evidence:
    """What a jump is made of: a certificate's captures with those of living members, and the rows they are about.

    The rows go from the certificate's index to the highest capture. They are never compacted while this is the newest
    certificate; when they are gone there is a newer one.
    """

    def __init__(self, certificate: Certificate, live: Sequence[Captured]) -> None:
        self.captures = (*certificate.captures, *live)
        self._last = max((captured.index for captured in self.captures), default=0)
        self._certified = max((captured.index for captured in certificate.captures), default=0)
        self._entries: list[LogEntry] = []
        self._next: int | None = certificate.index if certificate.index <= self._last else None

    @property
    def wanted(self) -> int | None:
        """The index to read the log from, None when there is nothing more to read."""
        return self._next

    @property
    def entries(self) -> tuple[LogEntry, ...]:
        """The rows as far as they were there; none: this evidence is worth nothing."""
        return tuple(self._entries)

    @property
    def is_complete(self) -> bool:
        """Tell whether all entries that the certificate's own captures are about were there: a majority is proven."""
        return bool(self._entries) and self._entries[-1].index >= self._certified

    def add(self, found: Sequence[LogEntry] | Compacted) -> None:
        """Take what the log has at `wanted`."""
        if isinstance(found, Compacted):
            self._entries.clear()
            self._next = None
        elif not found:
            self._next = None
        else:
            self._entries.extend(entry for entry in found if entry.index <= self._last)
            following = found[-1].index + 1
            self._next = following if following <= self._last else None
