"""Compare a tenant's event log with what the clients saw: nothing missing, nothing invented, in order per user (pure).

Calls of one user follow each other. Each request that was answered has exactly its event; an attempt nobody saw
answered has at most one, now or later. An `unknown` stands for at most one such attempt.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

GUESS: Final = "guess_used"
EVENT_OF: Final = {"register": ("registered",), "recover": (GUESS, "share_recovered"), "delete": ("deleted",)}


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
class Must:
    """An event that has to be there; `left` None for a guess whose count nobody was told."""

    event: str
    left: int | None = None

    def fits(self, logged: Logged) -> bool:
        """Tell whether `logged` is this event."""
        if logged.event != self.event:
            return False
        if self.left is None or logged.num_guesses is None or logged.guess_count is None:
            return self.left is None
        return logged.num_guesses - logged.guess_count == self.left


def musts(call: Made) -> list[Must]:
    """Return the events of the answered requests of one call."""
    if call.op == "recover":
        # The second answer is the evaluation that a guess pays for; from it a client learns that its PIN is wrong.
        found = [Must(GUESS, call.left)] if call.answered >= 2 and call.outcome != "none" else []
        return [*found, Must("share_recovered")] if call.outcome == "success" else found
    return [Must(EVENT_OF[call.op][0])] if call.outcome == "success" else []


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
        true = [each for each in dict.fromkeys(came) if each.event != "unknown"]
        if sorted(true, key=lambda each: each.seq) != sorted(true, key=lambda each: each.index):
            problems.append(f"user {user}: sequence and log disagree about the order")
    return problems


def match_problems(user: str, calls: Sequence[Made], came: Iterable[Logged]) -> list[str]:
    """Compare one user's distinct events with its calls; returns what does not fit, nothing when all does."""
    distinct = sorted(dict.fromkeys(came), key=lambda each: each.index)
    refs = Counter(each.ref for each in distinct if each.event != "unknown")
    problems = [f"user {user}: {ref} has {count} events" for ref, count in refs.items() if count > 1]
    unknown = sum(each.event == "unknown" and each.ref not in refs for each in distinct)
    lost = sum(call.lost for call in calls)
    wanted: list[Must] = []
    may: list[dict[str, int]] = [defaultdict(int)]  # how many lost attempts were begun before wanted[i] is due
    for call in calls:
        for event in EVENT_OF[call.op]:
            may[-1][event] += call.lost
        for must in musts(call):
            wanted.append(must)
            may.append(may[-1].copy())
    true = [each for each in distinct if each.event != "unknown"]
    used = _match(wanted, may, true)
    if isinstance(used, str):
        return [*problems, f"user {user}: {used}"]
    if unknown + used > lost:
        problems.append(f"user {user}: {unknown} unknown and {used} unanswered events, but {lost} attempts were lost")
    return problems


def _match(wanted: Sequence[Must], may: Sequence[Mapping[str, int]], true: Sequence[Logged]) -> int | str:
    """Return the fewest events of lost attempts that explain `true`, or what cannot be explained."""
    states: set[tuple[int, tuple[tuple[str, int], ...]]] = {(0, ())}
    for logged in true:
        following = set()
        for done, spent in states:
            if done < len(wanted) and wanted[done].fits(logged):
                following.add((done + 1, spent))
            counts = dict(spent)
            if counts.get(logged.event, 0) < may[done].get(logged.event, 0):
                counts[logged.event] = counts.get(logged.event, 0) + 1
                following.add((done, tuple(sorted(counts.items()))))
        if not following:
            due = {str(wanted[done]) for done, _ in states if done < len(wanted)}
            return f"{logged} is not explained; due was {sorted(due) or 'nothing'}"
        states = following
    whole = [sum(count for _, count in spent) for done, spent in states if done == len(wanted)]
    if not whole:
        done = max(done for done, _ in states)
        return f"missing: {wanted[done]} (number {done + 1} of {len(wanted)})"
    return min(whole)
