"""Small rules: what may be compacted, what is published, when to retry, who is suspect."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any, cast

import pytest
import trio

from juicebox_hsm.adapters.observation.dogstatsd import send_metrics
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.consensus.types import Leader, LogEntry, RoleStatus, Witness
from juicebox_hsm.host.events import EventKind, NewEvent, OutboxEvent
from juicebox_hsm.host.group import Groups, GroupState
from juicebox_hsm.host.leadership.effects import Answer
from juicebox_hsm.host.leadership.events import ClientRequest
from juicebox_hsm.host.log import Intent
from juicebox_hsm.host.outbox import client_event, tenant_event, unknown_events, unrecordable
from juicebox_hsm.hsm.messages import GroupStatus, RealmStatus, ResultKind, ResultType, StatusOk
from juicebox_hsm.ids import GroupId, HsmId, RealmId, RecordId
from juicebox_hsm.ports.errors import HsmGone
from juicebox_hsm.wire.client import TransportRequest, TransportResponse
from roles.agent.context import Agent
from roles.agent.outbox import by_day
from roles.agent.outside import Timings
from roles.agent.watchdog import suspects, watchdog

REALM, GROUP, HSM = RealmId(b"r" * 16), GroupId(b"g" * 16), HsmId(b"h" * 16)


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


def row(seq: int, when_ms: int) -> OutboxEvent:
    new = NewEvent("acme", GROUP, seq, bytes(32), RecordId(bytes(32)), "u", EventKind.DELETE, None, None, when_ms)
    return OutboxEvent(seq, new)


def test_counters_are_cut_at_midnight() -> None:
    """Rows of one cursor move belong to one UTC day; order is kept even if clocks went back."""
    midnight = 1_700_006_400_000
    rows = [row(1, midnight - 1), row(2, midnight), row(3, midnight + 1), row(4, midnight - 1)]
    runs = [(day, [item.seq for item in run]) for day, run in by_day(rows)]
    assert runs == [("20231114", [1]), ("20231115", [2, 3]), ("20231114", [4])]
    assert list(by_day([])) == []


class NullSink:
    """Swallows metrics and log lines."""

    def __getattr__(self, _name: str) -> Any:
        return lambda *_args, **_fields: None


@dataclass
class FewThings:
    """What the rules under test use of an agent."""

    metrics: Any
    log: Any


def status_of(role: Leader | Witness, captured: int) -> StatusOk:
    known = GroupStatus(GROUP, (HSM,), (captured, bytes(32)) if captured else None, None, RoleStatus(role, 9))
    return StatusOk(HSM, RealmStatus(REALM, bytes(32), (known,)), bytes(32))


class AlwaysLeading:
    """An HSM that leads whatever it is asked."""

    async def send(self, _request: object) -> object:
        await trio.lowlevel.checkpoint()
        return status_of(Leader(2), 5)


class WatchedAgent(FewThings):
    """An agent as the watchdog sees it; it cannot make the HSM step down."""

    def __init__(self, hsm: object) -> None:
        super().__init__(NullSink(), NullSink())
        self.hsm = hsm
        self.groups = Groups()
        self.timings = Timings()
        self.steps = 0

    async def step_down(self, _group: object, *, force: bool, why: str) -> None:
        self.steps += 1


def test_suspects() -> None:
    """Suspect is only a group the HSM leads with more than one entry captured and without leader state here."""
    agent = WatchedAgent(None)
    watched = cast("Agent", agent)
    assert suspects(watched, status_of(Leader(2), 2)) == [(REALM, GROUP)]
    assert suspects(watched, status_of(Leader(2), 1)) == []
    assert suspects(watched, status_of(Leader(2), 0)) == []
    assert suspects(watched, status_of(Witness(), 5)) == []
    assert suspects(watched, StatusOk(HSM, None, bytes(32))) == []
    group = GroupState(REALM, GROUP, (HSM,), RoleStatus(Witness(), 0))
    agent.groups.add(group)
    group.adopt(RoleStatus(Leader(2), 9))
    assert suspects(watched, status_of(Leader(2), 2)) == []


async def test_the_watchdogs_last_words_are_heard(autojump_clock: trio.testing.MockClock) -> None:
    """The count and the event of a triggered watchdog reach DogStatsD although they are made as the process ends."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as statsd:
        statsd.bind(("127.0.0.1", 0))
        statsd.settimeout(5)
        environment = {"DD_AGENT_HOST": "127.0.0.1", "DD_DOGSTATSD_PORT": str(statsd.getsockname()[1])}
        agent = WatchedAgent(AlwaysLeading())
        agent.metrics = Metrics()
        with pytest.RaisesGroup(HsmGone):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send_metrics, agent.metrics, {"service": "agent"}, environment)
                nursery.start_soon(watchdog, cast("Agent", agent))
        said = statsd.recv(2000).decode()
    assert "agent.watchdog.crash:1|c|#service:agent" in said
    text = f"HSM and agent disagree about group {GROUP.hex()} for 5 checks"
    assert f"_e{{24,{len(text)}}}:Agent watchdog triggered|{text}|#service:agent" in said


async def test_watchdog_ends_the_process_at_the_fifth_check(autojump_clock: trio.testing.MockClock) -> None:
    """Two step-downs are tried first; if the HSM goes on leading, the fifth check in a row is the end."""
    agent = WatchedAgent(AlwaysLeading())
    agent.groups.add(GroupState(REALM, GROUP, (HSM,), RoleStatus(Witness(), 0)))
    began = trio.current_time()
    with pytest.raises(HsmGone):
        await watchdog(cast("Agent", agent))
    assert trio.current_time() - began == pytest.approx(5.0)
    assert agent.steps == 2


def test_an_intent_no_row_can_carry_holds_up_nothing() -> None:
    """Empty, over-long and unprintable tenants of earlier leaders are set aside; the others get their rows."""
    entries = [LogEntry(index, None, None, bytes(32), bytes([index]) * 32, HsmId(bytes(16))) for index in range(1, 6)]
    names = ("", "a" * 257, "acme", "a\x00", "\ud800")
    left = [(entry, Intent(name, "u" * 64, RecordId(bytes(32)), 0)) for entry, name in zip(entries, names, strict=True)]
    assert [event.index for event in unknown_events(GroupId(bytes(16)), left, set(), 42)] == [3]
    assert unrecordable(left) == [1, 2, 4, 5]
