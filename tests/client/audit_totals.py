"""Compare what is added up at the end of the audit drill: counters, rows, accounting and the clients' calls (pure)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from juicebox_hsm.host.events import EventKind
from tests.client.audit_match import GUESS, UNKNOWN, Logged, Made

PHASES: Final = {
    "register": (EventKind.REGISTER1, EventKind.REGISTER2),
    "recover": (EventKind.RECOVER1, EventKind.RECOVER2, EventKind.RECOVER3),
    "delete": (EventKind.DELETE,),
}
KIND_OF: Final = {
    "registered": EventKind.REGISTER2,
    GUESS: EventKind.RECOVER2,
    "share_recovered": EventKind.RECOVER3,
    "deleted": EventKind.DELETE,
    UNKNOWN: EventKind.UNKNOWN,
}
ALWAYS_WITH_EVENT: Final = (EventKind.REGISTER2, EventKind.DELETE, EventKind.UNKNOWN)


@dataclass(frozen=True)
class Totals:
    """What the store says of one tenant when nothing waits any more.

    `counters` are the requests by kind, `rows` how many outbox rows there ever were, `kept` those with an event, which
    stay for a week, by kind; `users` how many have a secret.
    """

    counters: Mapping[EventKind, int]
    rows: int
    kept: Mapping[EventKind, int]
    users: int


def totals_problems(
    calls: Mapping[str, Sequence[Made]], logs: Mapping[str, Iterable[Logged]], totals: Totals
) -> list[str]:
    """Compare the store's totals with all users' calls and with the events that were read."""
    distinct = {user: sorted(set(came), key=lambda each: each.index) for user, came in logs.items()}
    events = Counter(KIND_OF[each.event] for came in distinct.values() for each in came)
    problems = []
    if sum(totals.counters.values()) != totals.rows:
        problems.append(
            f"the counters tell {sum(totals.counters.values())} requests, the outbox had {totals.rows} rows"
        )
    for kind in EventKind:
        counted, read, kept = totals.counters.get(kind, 0), events[kind], totals.kept.get(kind, 0)
        if kept != read:
            problems.append(f"{kind.value}: {kept} rows have an event, {read} were read")
        if counted < read or (kind in ALWAYS_WITH_EVENT and counted > read):
            problems.append(f"{kind.value}: {counted} requests are counted, {read} have an event")
    registered = sum(_has_secret(came) for came in distinct.values())
    if totals.users != registered:
        problems.append(f"{totals.users} users have a secret by the accounting, {registered} by their events")
    return problems + _calls_problems([call for made in calls.values() for call in made], totals.counters)


def _has_secret(log: Sequence[Logged]) -> bool:
    """Tell whether the last event that changes it is a registration."""
    changes = [each.event for each in log if each.event in {"registered", "deleted"}]
    return bool(changes) and changes[-1] == "registered"


def _calls_problems(calls: Sequence[Made], counters: Mapping[EventKind, int]) -> list[str]:
    """Compare counters with calls: every answered request counts once, one without an answer at most once."""
    problems = []
    unexplained = counters.get(EventKind.UNKNOWN, 0)
    for op, kinds in PHASES.items():
        made = [call for call in calls if call.op == op]
        lost = sum(call.lost for call in made)
        more = 0
        for phase, kind in enumerate(kinds):
            answered, counted = sum(call.answered > phase for call in made), counters.get(kind, 0)
            if counted < answered:
                problems.append(f"{kind.value}: {counted} requests are counted, {answered} were answered")
            more += counted - answered
        if more > lost:
            problems.append(f"{op}: {more} requests more are counted than were answered, but {lost} attempts were lost")
        unexplained += more
    lost = sum(call.lost for call in calls)
    if unexplained > lost:
        problems.append(f"{unexplained} requests more are counted than were answered, but {lost} attempts were lost")
    return problems
