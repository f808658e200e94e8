"""Compare a tenant's event log with what the clients saw: nothing missing, nothing invented, in order per user (pure).

Calls of one user follow each other. Each request that was answered has exactly its event; an attempt nobody saw
answered has at most one, now or later. An `unknown` stands for at most one such attempt.

The log must also agree with itself: in the order of their indexes a user's events tell what its record was, and every
event has to fit that. A guess follows the one before it, a share is recovered of something registered; so an event
that is missing shows even if nobody saw its request answered, unless an `unknown` stands in its place.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

GUESS: Final = "guess_used"
UNKNOWN: Final = "unknown"
OP_OF: Final = {"registered": "register", GUESS: "recover", "share_recovered": "recover", "deleted": "delete"}
NOTHING: Final = "nothing"
SPENT: Final = "spent"


@dataclass(frozen=True)
class Made:
    """One call. `answered` are its answered requests, `lost` its attempts without an answer.

    `outcome` is "success", "wrong" (a PIN), "none" (not registered) or "lost"; `left` are the guesses remaining after
    a wrong PIN.
    """

    op: str
    outcome: str
    answered: int
    lost: int
    left: int | None = None


@dataclass(frozen=True)
class Logged:
    """One event as a reader got it, without what names the delivery."""

    seq: int
    ref: str
    event: str
    num_guesses: int | None = None
    guess_count: int | None = None

    @property
    def index(self) -> int:
        """Return the log index, which orders the events of a realm with one group."""
        return int(self.ref.rpartition(":")[2])


@dataclass(frozen=True)
class Record:
    """What a user's record is as far as its events tell: `limit` is known from the first guess on."""

    guess_count: int = 0
    limit: int | None = None

    @property
    def is_spent(self) -> bool:
        """Tell whether no guess may be left."""
        return self.guess_count >= self.limit if self.limit is not None else self.guess_count > 0


@dataclass(frozen=True)
class Must:
    """An event that has to be there; `left` None for a guess whose count nobody was told.

    Two things that clients see have no event of their own: that nothing is registered (`nothing`), and that all guesses
    are spent, where a request that did not spend the last one itself says the same as the one that did (`left` 0).
    """

    event: str
    left: int | None = None

    def fits_without_event(self, record: Record | None) -> bool:
        """Tell whether the client may have seen this of `record`, by a request that has no event."""
        if self.event == NOTHING:
            return record is None
        return self.event in {SPENT, GUESS} and self.left == 0 and record is not None and record.is_spent

    def fits(self, logged: Logged) -> bool:
        """Tell whether `logged` is this event."""
        if logged.event != self.event:
            return False
        if self.left is None or logged.num_guesses is None or logged.guess_count is None:
            return self.left is None
        return logged.num_guesses - logged.guess_count == self.left


def musts(call: Made) -> list[Must]:
    """Return what the log has to say about the answered requests of one call."""
    if call.op != "recover":
        return [Must("registered" if call.op == "register" else "deleted")] if call.outcome == "success" else []
    nothing = [Must(NOTHING)] if call.outcome == "none" else []
    # The second answer is the evaluation that a guess pays for; from it a client learns that its PIN is wrong.
    if call.answered - len(nothing) < 2:
        return [Must(SPENT, 0)] if call.outcome == "wrong" else nothing
    recovered = [Must("share_recovered")] if call.outcome == "success" else []
    return [Must(GUESS, call.left), *recovered, *nothing]


def deliveries_problems(deliveries: Mapping[str, Sequence[Logged]]) -> list[str]:
    """Judge deliveries per user in the order they came: one content per seq, first ones in order."""
    problems = []
    contents: dict[int, Logged] = {}
    owners: dict[int, str] = {}
    for user, came in deliveries.items():
        latest = 0
        for logged in came:
            known = contents.get(logged.seq)
            if known is None:
                contents[logged.seq] = logged
                if logged.seq < latest:
                    problems.append(f"user {user}: seq {logged.seq} came first after {latest}")
                latest = max(latest, logged.seq)
            elif known != logged or owners[logged.seq] != user:
                problems.append(f"user {user}: seq {logged.seq} is {known} and {logged}")
            owners.setdefault(logged.seq, user)
        true = [each for each in dict.fromkeys(came) if each.event != UNKNOWN]
        if sorted(true, key=lambda each: each.seq) != sorted(true, key=lambda each: each.index):
            problems.append(f"user {user}: sequence and log disagree about the order")
    return problems


def match_problems(user: str, calls: Sequence[Made], came: Iterable[Logged]) -> list[str]:
    """Compare one user's distinct events with its calls; returns what does not fit, nothing when all does."""
    distinct = sorted(dict.fromkeys(came), key=lambda each: each.index)
    refs = Counter(each.ref for each in distinct if each.event != UNKNOWN)
    problems = [f"user {user}: {ref} has {count} events" for ref, count in refs.items() if count > 1]
    unknown = {each.ref: each for each in distinct if each.event == UNKNOWN and each.ref not in refs}
    wanted: list[Must] = []
    may: list[dict[str, int]] = [defaultdict(int)]  # how many lost attempts were begun before wanted[i] is due
    for call in calls:
        may[-1][call.op] += call.lost
        for must in musts(call):
            wanted.append(must)
            may.append(may[-1].copy())
    telling = [each for each in distinct if each.event != UNKNOWN or unknown.get(each.ref) is each]
    problem = _match(wanted, may, telling)
    return [*problems, f"user {user}: {problem}"] if problem else problems


@dataclass(frozen=True)
class _State:
    """One way to explain the events so far: `done` of what is wanted, `spent` lost attempts per operation."""

    done: int
    record: Record | None
    spent: tuple[tuple[str, int], ...] = ()

    def spend(self, op: str, may: Mapping[str, int], record: Record | None) -> Iterator[_State]:
        """Yield the state after an event of a lost attempt, if one of `op` is left."""
        spent = dict(self.spent)
        if spent.get(op, 0) < may.get(op, 0):
            spent[op] = spent.get(op, 0) + 1
            yield _State(self.done, record, tuple(sorted(spent.items())))


def _match(wanted: Sequence[Must], may: Sequence[Mapping[str, int]], events: Sequence[Logged]) -> str | None:
    """Return None if some way explains `events`, else what cannot be explained."""
    states = _with_looks({_State(0, None)}, wanted)
    for logged in events:
        following = {new for state in states for new in _after(state, wanted, may[state.done], logged)}
        if not following:
            due = {str(wanted[state.done]) for state in states if state.done < len(wanted)}
            records = {str(state.record) for state in states}
            return f"{logged} is not explained; the record was {sorted(records)}, due was {sorted(due) or 'nothing'}"
        states = _with_looks(following, wanted)
    done = max(state.done for state in states)
    if done < len(wanted):
        records = {str(state.record) for state in states if state.done == done}
        return f"missing: {wanted[done]} (number {done + 1} of {len(wanted)}), the record is {sorted(records)}"
    return None


def _with_looks(states: set[_State], wanted: Sequence[Must]) -> set[_State]:
    """Add what becomes of `states` when what comes next was seen without an event."""
    found = set(states)
    for first in states:
        state = first
        while state.done < len(wanted) and wanted[state.done].fits_without_event(state.record):
            state = _State(state.done + 1, state.record, state.spent)
            found.add(state)
    return found


def _after(state: _State, wanted: Sequence[Must], may: Mapping[str, int], logged: Logged) -> Iterator[_State]:
    """Yield the states that `logged` can lead to."""
    if logged.event == UNKNOWN:
        for op in may:
            for record in _records_after(state.record, op):
                yield from state.spend(op, may, record)
        return
    match logged.event, state.record:
        case "registered", _:
            after: Record | None = Record()
        case "deleted", _:
            after = None
        case "share_recovered", Record() as before:
            after = Record(0, before.limit)
        case "guess_used", Record() as before if before.guess_count + 1 == logged.guess_count:
            after = Record(logged.guess_count, logged.num_guesses)
        case _:
            return
    if state.done < len(wanted) and wanted[state.done].fits(logged):
        yield _State(state.done + 1, after, state.spent)
    yield from state.spend(OP_OF[logged.event], may, after)


def _records_after(before: Record | None, op: str) -> Iterator[Record | None]:
    """Yield what a record may be after one request of `op` that nobody knows more about."""
    yield before  # not every request changes something
    match op, before:
        case "register", _:
            yield Record()
        case "delete", _:
            yield None
        case "recover", Record():
            yield Record(0, before.limit)
            if before.limit is None or before.guess_count < before.limit:
                yield Record(before.guess_count + 1, before.limit)
