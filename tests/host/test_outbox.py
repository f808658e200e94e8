"""Which tenant event a committed request is, and which intents of earlier leaders get a row (agent.md 11)."""

from __future__ import annotations

import pytest

from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.host.leadership.effects import Answer
from juicebox_hsm.host.leadership.events import ClientRequest
from juicebox_hsm.host.log import Intent
from juicebox_hsm.host.outbox import client_event, tenant_event, unknown_events, unrecordable
from juicebox_hsm.hsm.messages import ResultKind, ResultType
from juicebox_hsm.ids import GroupId, HsmId, RecordId
from juicebox_hsm.wire.client import TransportRequest, TransportResponse

GROUP = GroupId(b"g" * 16)


@pytest.mark.parametrize(
    ("result", "event"),
    [
        (ResultType(ResultKind.REGISTER1), None),
        (ResultType(ResultKind.REGISTER2), {"event": "registered"}),
        (ResultType(ResultKind.RECOVER1), None),
        (ResultType(ResultKind.RECOVER2), None),
        (ResultType(ResultKind.RECOVER2, 5, 2), {"event": "guess_used", "num_guesses": 5, "guess_count": 2}),
        (ResultType(ResultKind.RECOVER3), None),
        (ResultType(ResultKind.RECOVER3, recovered=True), {"event": "share_recovered"}),
        (ResultType(ResultKind.DELETE), {"event": "deleted"}),
    ],
)
def test_published_events(result: ResultType, event: dict[str, str | int] | None) -> None:
    """Each committed kind publishes exactly what the table of agent.md 11 says."""
    assert tenant_event(result) == event


@pytest.mark.parametrize(
    ("kind", "wrote", "accounting"),
    [
        (ResultKind.REGISTER2, True, "registered"),
        (ResultKind.DELETE, True, "deleted"),
        (ResultKind.DELETE, False, None),
        (ResultKind.RECOVER2, True, None),
    ],
)
def test_accounting_needs_a_change(kind: ResultKind, wrote: bool, accounting: str | None) -> None:
    """Deleting what does not exist is not accounted, though its event is published."""
    request = ClientRequest(RecordId(bytes(32)), 1, TransportRequest(b""), "acme", "u" * 64, 42, lambda _answer: None)
    answer = Answer(request, 3, bytes(32), TransportResponse(b""), ResultType(kind), wrote)
    event = client_event(GROUP, answer)
    assert event.accounting == accounting
    assert (event.tenant, event.user, event.index, event.when_ms) == ("acme", "u" * 64, 3, 42)


def test_an_intent_no_row_can_carry_holds_up_nothing() -> None:
    """Empty, over-long and unprintable tenants of earlier leaders are set aside; the others get their rows."""
    entries = [LogEntry(index, None, None, bytes(32), bytes([index]) * 32, HsmId(bytes(16))) for index in range(1, 6)]
    names = ("", "a" * 257, "acme", "a\x00", "\ud800")
    left = [(entry, Intent(name, "u" * 64, RecordId(bytes(32)), 0)) for entry, name in zip(entries, names, strict=True)]
    assert [event.index for event in unknown_events(GroupId(bytes(16)), left, set(), 42)] == [3]
    assert unrecordable(left) == [1, 2, 4, 5]
