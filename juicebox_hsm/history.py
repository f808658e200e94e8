"""Decide whether a history of client calls can be explained by a realm that counts guesses exactly.

Pure: no I/O, no clock. The history of one user is a list of `Call`s with the times between which each ran. It is
explained when every request of every call can be given one moment, inside its call, such that executing the requests
at those moments on the record of client-protocol.md 9 gives each caller the answer that it got. Users do not share
anything, so each is checked alone.

What is known of a call decides how much freedom it leaves:

* A request that was answered was executed exactly once, between the call's start and its end, and after the answered
  requests of the same call that came before it.
* An attempt that nobody saw answered (a broken connection, `Unavailable`) was executed once or not at all, and maybe
  long after its call ended: it may lie in the buffers of a process that is paused. It was sent after the answer that
  the same call had got before it. `barriers` are moments at which every process of the realm was dead: an attempt of a
  call that ended before a barrier is not executed after it.
* How many attempts went unanswered is counted in `Call.lost`, for each phase of the call. A call without that count is
  taken to have lost as many as a client makes.

The search keeps all configurations (state of the record, unanswered attempts that may still be executed, progress of
the calls that run) that agree with the past, and forgets those whose future another one covers: more attempts that may
still be executed never explain less, because each may also never be executed. It is exact: on calls that do not
overlap and lost nothing there is one configuration, and every wrong answer is a violation. Source: W. Lowe, "Testing
for linearizability" (just-in-time linearization), with the record's state machine as the sequential object.

It speaks of one realm: operations over several realms mix the answers of several records.
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from juicebox_hsm.errors import LocalError

ATTEMPTS_MAX: Final = 5
"""How often a client sends one request before it gives up (client-protocol.md 17)."""

USED_GUESSES_MAX: Final = 255
"""More used guesses cannot be told to a client (client-protocol.md 8), so no record allows more."""

CONFIGURATIONS_MAX: Final = 20_000
"""Where the search gives up: a sequential user has one to a few dozen, two overlapping lanes a few hundred."""


class Op(enum.Enum):
    """What a client was asked to do."""

    REGISTER = "register"
    RECOVER = "recover"
    DELETE = "delete"


class Outcome(enum.Enum):
    """How a call ended. REPLACED: the record got another version in the middle of a recovery; LOST: no answer."""

    OK = "ok"
    INVALID_PIN = "invalid pin"
    NOT_REGISTERED = "not registered"
    REPLACED = "replaced"
    LOST = "lost"


_PHASES: Final = {Op.REGISTER: 2, Op.RECOVER: 3, Op.DELETE: 1}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one user. Times are seconds on one monotonic clock; `end` is infinite if it never returned.

    `secret` is what a register stores or what a successful recover returned; it names the registration, so a history
    gives every register another one. `lost` counts unanswered attempts in each phase that was reached (Register1,
    Register2; Recover1, Recover2, Recover3; Delete): the last item belongs to the phase whose answer ended the call,
    or, for LOST, to the phase that stayed unanswered. None: not known. A request that was refused without being
    executed is no attempt.
    """

    user: str
    op: Op
    start: float
    end: float
    outcome: Outcome
    pin: str = ""
    secret: str = ""
    num_guesses: int = 0
    guesses_remaining: int | None = None
    lost: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse what is not a call. Raises `LocalError`."""
        if not self.start <= self.end:
            raise LocalError(f"a call of {self.user} ends at {self.end} before it starts at {self.start}")
        if self.lost is not None and not (1 <= len(self.lost) <= _PHASES[self.op] and min(self.lost) >= 0):
            raise LocalError(
                f"a {self.op.value} of {self.user} has lost attempts {self.lost}: one count for each phase"
            )

    def __str__(self) -> str:
        """Return one line of a report."""
        end = "never" if math.isinf(self.end) else f"{self.end:.3f}"
        asked = {
            Op.REGISTER: f"register {self.secret} pin={self.pin} guesses={self.num_guesses}",
            Op.RECOVER: f"recover pin={self.pin}",
            Op.DELETE: "delete",
        }[self.op]
        got = self.outcome.value
        if self.outcome is Outcome.INVALID_PIN:
            got += f", {self.guesses_remaining} left"
        if self.outcome is Outcome.OK and self.op is Op.RECOVER:
            got = f"secret {self.secret}"
        lost = ""
        if self.lost is None:
            lost = " (lost attempts unknown)"
        elif any(self.lost) or self.outcome is Outcome.LOST:
            lost = f" (lost attempts {'/'.join(map(str, self.lost))})"
        return f"{self.start:.3f} .. {end}  {asked} -> {got}{lost}"


@dataclass(frozen=True, slots=True)
class Violation:
    """A call that nothing explains: where the record could be when it began and when it ended, and what came before."""

    user: str
    call: Call
    states_before: tuple[str, ...]
    states_after: tuple[str, ...]
    history: tuple[Call, ...]

    def __str__(self) -> str:
        """Return a report of several lines."""
        lines = [
            f"user {self.user}: no order of requests explains the call marked >",
            f"  the record when it began: {' or '.join(self.states_before)}",
            f"  and when it ended, as far as the other calls go: {' or '.join(self.states_after)}",
        ]
        lines += [f"  {'>' if call is self.call else ' '} {call}" for call in self.history]
        return "\n".join(lines)


def check_history(calls: Iterable[Call], barriers: Sequence[float] = ()) -> list[Violation]:
    """Return one violation for each user whose history has no explanation; none if all have.

    `barriers` are times at which no attempt sent before could still be under way. Raises `LocalError` if a user's
    calls overlap so much that the search would not end.
    """
    by_user: dict[str, list[Call]] = {}
    for call in calls:
        by_user.setdefault(call.user, []).append(call)
    found = (check_user(history, barriers) for history in by_user.values())
    return [violation for violation in found if violation is not None]


def check_user(calls: Sequence[Call], barriers: Sequence[float] = ()) -> Violation | None:
    """Return the first call of one user that has no explanation, or None."""
    return _Search(calls, barriers).run()


# --- the record ------------------------------------------------------------------------------------------------


class _Record(NamedTuple):
    """State of the record: `registration` is the index of the register call, or one of the two constants."""

    registration: int
    used: int = 0


_ABSENT: Final = _Record(-1)
_LOCKED: Final = _Record(-2)


class _Kind(enum.IntEnum):
    """Requests that may change a record. Register1 never does."""

    REGISTER2 = 0
    RECOVER1 = 1
    RECOVER2 = 2
    RECOVER3 = 3
    DELETE = 4


class _Attempt(NamedTuple):
    """An attempt that may still be executed; those that cannot be told apart are counted together.

    `registration` is -1 where the request names none; `life` is the number of the barrier that ends it.
    """

    kind: _Kind
    registration: int
    life: int


_Pending = tuple[tuple[_Attempt, int], ...]


class _Running(NamedTuple):
    """How far a call is in one configuration: `phase` answers came before; finished calls have phase _FINISHED."""

    call: int
    phase: int
    registration: int


_FINISHED: Final = -1


class _Configuration(NamedTuple):
    record: _Record
    running: tuple[_Running, ...]
    pending: _Pending


class _Step(NamedTuple):
    """What one answered request did: the record afterwards, and either the call's result or its next phase."""

    record: _Record
    outcome: Outcome | None
    guesses_remaining: int | None = None
    registration: int = -1


class _Search:
    """The configurations of one user, advanced from event to event."""

    def __init__(self, calls: Sequence[Call], barriers: Sequence[float]) -> None:
        self._calls = sorted(calls, key=lambda call: (call.start, call.end))
        self._barriers = sorted(barriers)
        self._configurations = {_Configuration(_ABSENT, (), ())}
        self._limits = [min(call.num_guesses, USED_GUESSES_MAX) for call in self._calls]
        self._lives = [bisect_right(self._barriers, call.end) for call in self._calls]

    def run(self) -> Violation | None:
        """Go through starts, ends and barriers in the order of time."""
        begun: dict[int, tuple[str, ...]] = {}
        for _, what, index in self._events():
            if what == _START:
                begun[index] = self._describe()
                self._start(index)
                self._close()
            elif what == _END:
                before = self._describe()
                self._end(index)
                if not self._configurations:
                    return self._violation(index, begun[index], before)
            else:
                self._drop(index)
        return None

    def _events(self) -> list[tuple[float, int, int]]:
        """Return all events; at one time starts come first and barriers last, which allows the most."""
        events = [(call.start, _START, index) for index, call in enumerate(self._calls)]
        events += [(call.end, _END, index) for index, call in enumerate(self._calls) if not math.isinf(call.end)]
        events += [(time, _BARRIER, index) for index, time in enumerate(self._barriers)]
        return sorted(events)

    def _start(self, index: int) -> None:
        self._configurations = {
            entered for old in self._configurations for entered in self._enter(old, _Running(index, 0, -1))
        }

    def _end(self, index: int) -> None:
        """Keep the configurations in which the call has what it got."""
        kept = set()
        for record, running, pending in self._configurations:
            mine = next(state for state in running if state.call == index)
            if mine.phase == _FINISHED:
                others = tuple(state for state in running if state.call != index)
                kept.add(_Configuration(record, others, self._relevant(record, others, pending)))
        self._configurations = set(_undominated(kept))

    def _drop(self, barrier: int) -> None:
        self._configurations = set(
            _undominated(
                {
                    _Configuration(record, running, tuple(item for item in pending if item[0].life != barrier))
                    for record, running, pending in self._configurations
                }
            )
        )

    def _close(self) -> None:
        """Add every configuration that some requests under way can lead to."""
        best: dict[tuple[_Record, tuple[_Running, ...]], list[_Pending]] = {}
        # first in, first out: what was reached with fewer attempts covers the rest before that is followed up
        waiting = deque(self._configurations)
        expanded = 0
        while waiting:
            configuration = waiting.popleft()
            covered = best.setdefault(configuration[:2], [])
            if not _add_undominated(covered, configuration.pending):
                continue
            expanded += 1
            if expanded > CONFIGURATIONS_MAX:
                raise LocalError(f"the calls of {self._calls[0].user} overlap too much to be checked")
            waiting += self._executed_pending(configuration)
            waiting += self._answered(configuration)
        self._configurations = {
            _Configuration(record, running, pending)
            for (record, running), covered in best.items()
            for pending in covered
        }

    def _executed_pending(self, old: _Configuration) -> Iterator[_Configuration]:
        """Execute one unanswered attempt. Those that change nothing are left out: nobody could tell."""
        for position, (attempt, count) in enumerate(old.pending):
            record = self._execute(old.record, attempt.kind, attempt.registration).record
            if record == old.record:
                continue
            rest = ((attempt, count - 1),) if count > 1 else ()
            pending = (*old.pending[:position], *rest, *old.pending[position + 1 :])
            yield _Configuration(record, old.running, self._relevant(record, old.running, pending))

    def _answered(self, old: _Configuration) -> Iterator[_Configuration]:
        """Execute the next request of a running call, if its answer is one the caller can have got."""
        for state in old.running:
            if state.phase == _FINISHED:
                continue
            call = self._calls[state.call]
            step = self._request(state, old.record)
            others = tuple(other for other in old.running if other.call != state.call)
            is_last = call.lost is None or len(call.lost) == state.phase + 1
            if step.outcome is None:
                if call.lost is None or not is_last:
                    moved = _Configuration(step.record, others, old.pending)
                    yield from self._enter(moved, _Running(state.call, state.phase + 1, step.registration))
            elif is_last and self._is_result(call, step, state.registration):
                running = tuple(sorted((*others, state._replace(phase=_FINISHED))))
                yield _Configuration(step.record, running, self._relevant(step.record, running, old.pending))

    def _is_result(self, call: Call, step: _Step, registration: int) -> bool:
        if call.outcome is not step.outcome:
            return False
        if call.outcome is Outcome.INVALID_PIN:
            return call.guesses_remaining == step.guesses_remaining
        if call.outcome is Outcome.OK and call.op is Op.RECOVER:
            return call.secret == self._calls[registration].secret
        return True

    def _enter(self, old: _Configuration, state: _Running) -> Iterator[_Configuration]:
        """Begin a phase of a call: add the attempts nobody saw answered, and maybe stay without an answer for good."""
        call = self._calls[state.call]
        is_lost = call.outcome is Outcome.LOST
        if call.lost is None:
            if is_lost:
                yield self._with_attempts(old, state._replace(phase=_FINISHED), state, ATTEMPTS_MAX)
                if state.phase + 1 == _PHASES[call.op]:
                    return
            yield self._with_attempts(old, state, state, ATTEMPTS_MAX - 1)
        else:
            stays = is_lost and len(call.lost) == state.phase + 1
            entered = state._replace(phase=_FINISHED) if stays else state
            yield self._with_attempts(old, entered, state, call.lost[state.phase])

    def _with_attempts(self, old: _Configuration, entered: _Running, at: _Running, count: int) -> _Configuration:
        running = tuple(sorted((*(other for other in old.running if other.call != entered.call), entered)))
        pending = dict(old.pending)
        attempt = self._attempt(at)
        if attempt is not None and count:
            pending[attempt] = pending.get(attempt, 0) + count
        return _Configuration(old.record, running, self._relevant(old.record, running, tuple(sorted(pending.items()))))

    def _attempt(self, state: _Running) -> _Attempt | None:
        """Return the request that a call sends in a phase; None for Register1, which changes nothing."""
        life = self._lives[state.call]
        match self._calls[state.call].op, state.phase:
            case Op.REGISTER, 0:
                return None
            case Op.REGISTER, _:
                return _Attempt(_Kind.REGISTER2, state.call, life)
            case Op.DELETE, _:
                return _Attempt(_Kind.DELETE, -1, life)
            case _, 0:
                return _Attempt(_Kind.RECOVER1, -1, life)
            case _, 1:
                return _Attempt(_Kind.RECOVER2, state.registration, life)
            case _:
                return _Attempt(_Kind.RECOVER3, state.registration, life)

    def _relevant(self, record: _Record, running: tuple[_Running, ...], pending: _Pending) -> _Pending:
        """Leave out attempts that can never change anything again: their registration is gone for good."""
        alive = {record.registration}
        alive.update(state.call for state in running)
        alive.update(attempt.registration for attempt, _ in pending if attempt.kind is _Kind.REGISTER2)
        return tuple(
            item
            for item in pending
            if item[0].kind not in {_Kind.RECOVER2, _Kind.RECOVER3} or item[0].registration in alive
        )

    def _request(self, state: _Running, record: _Record) -> _Step:
        """Execute the request of a call's phase and read its answer as the client does."""
        attempt = self._attempt(state)
        if attempt is None:
            return _Step(record, None)
        step = self._execute(record, attempt.kind, attempt.registration)
        if attempt.kind is _Kind.RECOVER2 and step.outcome is None:
            tried, registered = self._calls[state.call], self._calls[state.registration]
            if tried.pin != registered.pin:
                remaining = registered.num_guesses - step.record.used
                return _Step(step.record, Outcome.INVALID_PIN, remaining)
        return step

    def _execute(self, record: _Record, kind: _Kind, registration: int) -> _Step:
        """Apply a request to the record (client-protocol.md 9)."""
        if kind is _Kind.REGISTER2:
            return _Step(_Record(registration), Outcome.OK)
        if kind is _Kind.DELETE:
            return _Step(_ABSENT, Outcome.OK)
        if record == _ABSENT:
            return _Step(record, Outcome.NOT_REGISTERED)
        if record == _LOCKED:
            return _Step(record, Outcome.INVALID_PIN, 0)
        if kind is not _Kind.RECOVER1 and record.registration != registration:
            return _Step(record, Outcome.REPLACED)
        if kind is _Kind.RECOVER3:
            return _Step(_Record(registration), Outcome.OK, None, registration)
        if record.used >= self._limits[record.registration]:
            return _Step(_LOCKED, Outcome.INVALID_PIN, 0)
        if kind is _Kind.RECOVER1:
            return _Step(record, None, None, record.registration)
        return _Step(_Record(registration, record.used + 1), None, None, registration)

    def _describe(self) -> tuple[str, ...]:
        return tuple(self._name(record) for record in sorted({found.record for found in self._configurations}))

    def _name(self, record: _Record) -> str:
        if record == _ABSENT:
            return "not registered"
        if record == _LOCKED:
            return "no guesses left"
        call = self._calls[record.registration]
        return f"{call.secret} with {record.used} of {call.num_guesses} guesses used"

    def _violation(self, index: int, before: tuple[str, ...], after: tuple[str, ...]) -> Violation:
        call = self._calls[index]
        history = tuple(other for other in self._calls if other.start <= call.end)
        return Violation(call.user, call, before, after, history)


_START: Final = 0
_END: Final = 1
_BARRIER: Final = 2


def _covers(more: _Pending, less: _Pending) -> bool:
    """Tell whether every attempt of `less` is also in `more`."""
    counts = dict(more)
    return all(counts.get(attempt, 0) >= count for attempt, count in less)


def _add_undominated(covered: list[_Pending], pending: _Pending) -> bool:
    """Add `pending` unless something covers it; False if so. What it covers is removed."""
    if any(_covers(other, pending) for other in covered):
        return False
    covered[:] = [other for other in covered if not _covers(pending, other)]
    covered.append(pending)
    return True


def _undominated(configurations: Iterable[_Configuration]) -> Iterator[_Configuration]:
    best: dict[tuple[_Record, tuple[_Running, ...]], list[_Pending]] = {}
    for record, running, pending in configurations:
        _add_undominated(best.setdefault((record, running), []), pending)
    for (record, running), covered in best.items():
        for pending in covered:
            yield _Configuration(record, running, pending)
