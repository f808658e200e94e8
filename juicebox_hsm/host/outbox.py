"""Which tenant event a committed request is, and how many may wait (agent.md 11).

With each append go the *intents* of its client entries; after commit one *row* per request is recorded. `settled` is
the index at or below which every intent has its row. A new leader resolves what its predecessors left: intents
without a row become `unknown`, so an auditor sees "one request of unconfirmed outcome", never silence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.host.events import Backlog, EventKind, NewEvent, is_recordable
from juicebox_hsm.host.leadership.effects import Answer
from juicebox_hsm.host.log import Intent
from juicebox_hsm.hsm.messages import ResultKind, ResultType
from juicebox_hsm.ids import GroupId

BACKLOG_WARN_ROWS: Final = 100_000
BACKLOG_WARN_S: Final = 60.0
BACKLOG_BOUND_ROWS: Final = 10_000_000

_KINDS: Final = {kind: EventKind(kind.value.lower()) for kind in ResultKind}


@dataclass(frozen=True, slots=True)
class Unpublished:
    """Events of a realm that wait for publication, the oldest for `oldest_s`."""

    rows: int = 0
    oldest_s: float = 0.0

    @property
    def is_full(self) -> bool:
        """Tell whether it stops requests: refusing is better than losing an audit record."""
        return self.rows >= BACKLOG_BOUND_ROWS

    @property
    def is_long(self) -> bool:
        """Tell whether an operator should look at it."""
        return self.rows >= BACKLOG_WARN_ROWS or self.oldest_s >= BACKLOG_WARN_S


def unpublished(backlog: Backlog, now_ms: int) -> Unpublished:
    """Return what a backlog that the store told is at `now_ms`."""
    oldest_s = 0.0 if backlog.oldest_ms is None else max(0.0, (now_ms - backlog.oldest_ms) / 1000)
    return Unpublished(backlog.rows, oldest_s)


def client_event(group: GroupId, answer: Answer) -> NewEvent:
    """Return the outbox row of a released request."""
    request, result = answer.request, answer.result
    accounting = None
    if answer.wrote and result.kind is ResultKind.REGISTER2:
        accounting = "registered"
    elif answer.wrote and result.kind is ResultKind.DELETE:
        accounting = "deleted"
    return NewEvent(
        tenant=request.tenant,
        group=group,
        index=answer.index,
        mac=answer.mac,
        record_id=request.record_id,
        user=request.user,
        kind=_KINDS[result.kind],
        event=tenant_event(result),
        accounting=accounting,
        when_ms=request.when_ms,
    )


def tenant_event(result: ResultType) -> Mapping[str, str | int] | None:
    """Return the tenant's event without the user, None for requests that publish nothing."""
    match result.kind:
        case ResultKind.REGISTER2:
            return {"event": "registered"}
        case ResultKind.RECOVER2 if result.num_guesses is not None and result.guess_count is not None:
            return {"event": "guess_used", "num_guesses": result.num_guesses, "guess_count": result.guess_count}
        case ResultKind.RECOVER3 if result.recovered:
            return {"event": "share_recovered"}
        case ResultKind.DELETE:
            return {"event": "deleted"}
        case _:
            return None


def unknown_events(
    group: GroupId,
    left: Sequence[tuple[LogEntry, Intent]],
    recorded: Collection[tuple[int, bytes]],
    now_ms: int,
) -> list[NewEvent]:
    """Return the rows for intents of earlier leaderships that have none, in the order of the log.

    Those no row can carry are left out (`unrecordable` counts them): one must not hold up what follows it.
    """
    events = [
        NewEvent(
            tenant=intent.tenant,
            group=group,
            index=entry.index,
            mac=entry.entry_mac,
            record_id=intent.record_id,
            user=intent.user,
            kind=EventKind.UNKNOWN,
            event={"event": "unknown"},
            accounting=None,
            when_ms=now_ms,
        )
        for entry, intent in left
        if (entry.index, entry.entry_mac) not in recorded and is_recordable(intent.tenant)
    ]
    return sorted(events, key=lambda event: event.index)


def unrecordable(left: Sequence[tuple[LogEntry, Intent]]) -> list[int]:
    """Return the log indexes of intents that are set aside: their tenants' names fit no row."""
    return [entry.index for entry, intent in left if not is_recordable(intent.tenant)]
