"""The search for the agent that answers a request: load-balancer.md 8.3 and 9 without agents, waits or a clock."""

from __future__ import annotations

import pytest

from juicebox_hsm.host.forwarding import (
    PATIENCE_S,
    REQUEST_S,
    SETTLED_S,
    TRY_S,
    Answered,
    Ask,
    AwaitTable,
    LeaderSearch,
    LookAgain,
    NoReply,
)
from juicebox_hsm.host.routing import HOPE_S, AgentSlice, Route, RoutingTable, build_table
from juicebox_hsm.ids import GroupId, OwnedRange, RealmId, RecordId
from juicebox_hsm.wire.client import ClientOutcome
from juicebox_hsm.wire.rpc import AppOk, Refusal, Refused

REALM = RealmId(b"R" * 16)
RECORD = RecordId(b"\x55" * 32)
ALL = OwnedRange(RecordId(bytes(32)), RecordId(b"\xff" * 32))
NOW_S = 1000.0
UNAVAILABLE = Answered(ClientOutcome.UNAVAILABLE)
USED = Refused(outcome=Refusal.NOT_LEADER, consumed=True)
UNUSED = Refused(outcome=Refusal.NOT_LEADER)


def _route(url: str, starting: int = 1, since_s: float = 0.0) -> Route:
    return Route(GroupId(b"G" * 16), ALL, url, starting, 1, since_s)


def _table(*routes: Route) -> RoutingTable:
    return build_table([AgentSlice(REALM, routes)], RoutingTable(), NOW_S)


A, B, C = _route("a", 9), _route("b", 5), _route("c", 1)
ONE, TWO, NOBODY = _table(A), _table(A, B), _table()


def _search(*, transport: bool = True) -> LeaderSearch:
    return LeaderSearch(REALM, RECORD, is_transport=transport, now_s=NOW_S)


def _try(search: LeaderSearch, table: RoutingTable, route: Route, reply: AppOk | Refused | NoReply) -> None:
    """See that `route` is asked next, and answer for it."""
    assert search.next_step(table, NOW_S) == Ask(route, TRY_S)
    search.heard(route, reply, NOW_S)


def test_the_answer_is_passed_on() -> None:
    """An agent's answer ends the search."""
    search = _search()
    _try(search, ONE, A, AppOk(noise=b"noise"))
    assert search.next_step(ONE, NOW_S) == Answered(b"noise")


@pytest.mark.parametrize(
    ("refusal", "outcome"),
    [
        (Refusal.SESSION_ERROR, ClientOutcome.SESSION_ERROR),
        (Refusal.DECODING_ERROR, ClientOutcome.DECODING_ERROR),
        (Refusal.RATE_LIMIT_EXCEEDED, ClientOutcome.RATE_LIMIT_EXCEEDED),
        (Refusal.BUSY, ClientOutcome.UNAVAILABLE),
        (Refusal.MISSING_SESSION, ClientOutcome.MISSING_SESSION),
    ],
)
@pytest.mark.parametrize("transport", [True, False])
def test_final_refusals(refusal: Refusal, outcome: ClientOutcome, *, transport: bool) -> None:
    """These are the answer: nobody else is asked, nor is anybody asked again."""
    search = _search(transport=transport)
    _try(search, ONE, A, Refused(outcome=refusal))
    assert search.next_step(ONE, NOW_S) == Answered(outcome)


@pytest.mark.parametrize("refusal", [Refusal.BUSY, Refusal.RATE_LIMIT_EXCEEDED, Refusal.SESSION_ERROR])
@pytest.mark.parametrize("transport", [True, False])
def test_a_busy_group_is_left_alone(refusal: Refusal, *, transport: bool) -> None:
    """With rivals, too: a request refused for too much work is not carried to the next candidate or asked again."""
    search = _search(transport=transport)
    _try(search, TWO, A, Refused(outcome=refusal))
    assert isinstance(search.next_step(TWO, NOW_S), Answered)


@pytest.mark.parametrize(
    "refusal", [each for each in Refusal if each not in {Refusal.SESSION_ERROR, Refusal.DECODING_ERROR}]
)
def test_every_refusal_has_a_rule(refusal: Refusal) -> None:
    """No refusal, expected here or not, is passed on as success or leaves the search without a next step."""
    search = _search()
    _try(search, TWO, A, Refused(outcome=refusal))
    step = search.next_step(TWO, NOW_S)
    assert step == Ask(B, TRY_S) or isinstance(step, Answered)


def test_two_passes_then_patience() -> None:
    """Every candidate twice, freshest first, a look at all agents between; then only routes not tried, for a second."""
    search = _search()
    _try(search, TWO, A, UNUSED)
    _try(search, TWO, B, UNUSED)
    assert search.next_step(TWO, NOW_S) == LookAgain()
    _try(search, TWO, A, UNUSED)
    _try(search, TWO, B, UNUSED)
    ends_s = NOW_S + PATIENCE_S
    assert search.next_step(TWO, NOW_S) == AwaitTable(ends_s)
    assert search.next_step(TWO, ends_s - 0.01) == AwaitTable(ends_s)
    assert search.next_step(TWO, ends_s) == UNAVAILABLE


def test_a_new_route_is_tried_within_the_patience() -> None:
    """A leader that appears while the request waits is asked; a leadership that begins anew counts as one."""
    search = _search()
    _try(search, ONE, A, UNUSED)
    assert search.next_step(ONE, NOW_S) == LookAgain()
    _try(search, ONE, A, UNUSED)
    assert isinstance(search.next_step(ONE, NOW_S), AwaitTable)
    _try(search, TWO, B, UNUSED)
    assert isinstance(search.next_step(TWO, NOW_S), AwaitTable)
    anew = _route("a", 10)
    _try(search, _table(anew, B), anew, AppOk(noise=b"x"))


def test_nobody_leads() -> None:
    """Soon after a range lost its leader a request has patience, long after it none."""
    search = _search()
    assert search.next_step(NOBODY, NOW_S) == LookAgain()
    assert search.next_step(NOBODY, NOW_S) == AwaitTable(NOW_S + PATIENCE_S)
    later_s = NOW_S + HOPE_S + 0.1
    search = LeaderSearch(REALM, RECORD, is_transport=True, now_s=later_s)
    assert search.next_step(NOBODY, later_s) == LookAgain()
    assert search.next_step(NOBODY, later_s) == UNAVAILABLE


@pytest.mark.parametrize(
    ("reply", "consumed"),
    [
        (UNUSED, False),
        (Refused(outcome=Refusal.NO_HSM), False),
        (Refused(outcome=Refusal.NO_STORE), False),
        (Refused(outcome=Refusal.INVALID_REALM), False),
        (Refused(outcome=Refusal.INVALID_GROUP), False),
        (Refused(outcome=Refusal.INVALID_PROOF), False),
        (NoReply(maybe_delivered=False), False),
        (USED, True),
        (Refused(outcome=Refusal.NO_HSM, consumed=True), True),
        (Refused(outcome=Refusal.NO_STORE, consumed=True), True),
        (Refused(outcome=Refusal.INVALID_PROOF, consumed=True), True),
        (Refused(outcome=Refusal.RPC_ERROR), True),
        (Refused(outcome=Refusal.TIMEOUT), True),
        (NoReply(maybe_delivered=True), True),
    ],
)
def test_replay_rule(reply: Refused | NoReply, *, consumed: bool) -> None:
    """A transport message never goes again to an agent that may have used it, whatever its new leaderships."""
    search = _search()
    _try(search, ONE, A, reply)
    assert search.next_step(ONE, NOW_S) == LookAgain()
    if consumed:
        anew = _table(_route("a", 10))
        assert isinstance(search.next_step(anew, NOW_S), AwaitTable)
        assert isinstance(search.next_step(_table(_route("a", 11)), NOW_S), AwaitTable)
    else:
        _try(search, ONE, A, AppOk(noise=b"x"))


@pytest.mark.parametrize("reply", [USED, NoReply(maybe_delivered=True)])
def test_handshakes_may_be_repeated(reply: Refused | NoReply) -> None:
    """A handshake may be sent to the same agent again, and waits for others after the second pass as well."""
    search = _search(transport=False)
    _try(search, ONE, A, reply)
    assert search.next_step(ONE, NOW_S) == LookAgain()
    _try(search, ONE, A, reply)
    assert isinstance(search.next_step(ONE, NOW_S), AwaitTable)
    _try(search, _table(A, C), C, AppOk(noise=b"x"))


@pytest.mark.parametrize("transport", [True, False])
@pytest.mark.parametrize("reply", [USED, NoReply(maybe_delivered=True)])
@pytest.mark.parametrize(
    "refusal",
    [Refusal.RATE_LIMIT_EXCEEDED, Refusal.SESSION_ERROR, Refusal.MISSING_SESSION, Refusal.DECODING_ERROR],
)
def test_no_refusal_denies_what_another_agent_may_have_done(
    refusal: Refusal, reply: Refused | NoReply, *, transport: bool
) -> None:
    """Once an agent may have executed the request, nobody else's refusal says that it was not executed."""
    search = _search(transport=transport)
    _try(search, TWO, A, reply)
    _try(search, TWO, B, Refused(outcome=refusal))
    assert search.next_step(TWO, NOW_S) == UNAVAILABLE


def test_used_up_after_the_first_pass_is_final() -> None:
    """A transport message that may have been used in the second pass, or while it waited, is given up at once."""
    second = _search()
    _try(second, ONE, A, UNUSED)
    second.next_step(ONE, NOW_S)
    _try(second, ONE, A, USED)
    assert second.next_step(_table(A, C), NOW_S) == UNAVAILABLE

    waiting = _search()
    _try(waiting, ONE, A, UNUSED)
    waiting.next_step(ONE, NOW_S)
    _try(waiting, ONE, A, UNUSED)
    assert isinstance(waiting.next_step(ONE, NOW_S), AwaitTable)
    _try(waiting, TWO, B, USED)
    assert waiting.next_step(_table(A, B, C), NOW_S) == UNAVAILABLE


def test_missing_session_near_a_leadership_change() -> None:
    """A client is told that its session is gone only by a leader that is settled and has no rival (decision 0010)."""

    def outcome(table: RoutingTable, route: Route) -> object:
        search = _search()
        _try(search, table, route, Refused(outcome=Refusal.MISSING_SESSION))
        step = search.next_step(table, NOW_S)
        assert isinstance(step, Answered)
        return step.answer

    young = _route("a", since_s=NOW_S - SETTLED_S + 0.01)
    settled = _route("a", since_s=NOW_S - SETTLED_S)
    assert outcome(_table(young), young) is ClientOutcome.UNAVAILABLE
    assert outcome(_table(settled), settled) is ClientOutcome.MISSING_SESSION
    assert outcome(TWO, A) is ClientOutcome.UNAVAILABLE


def test_a_rival_counts_when_only_it_is_left_to_try() -> None:
    """While the request waits the routes already tried still are rivals."""
    search = _search()
    _try(search, ONE, A, UNUSED)
    search.next_step(ONE, NOW_S)
    _try(search, ONE, A, UNUSED)
    search.next_step(ONE, NOW_S)
    _try(search, TWO, B, Refused(outcome=Refusal.MISSING_SESSION))
    assert search.next_step(TWO, NOW_S) == UNAVAILABLE


def test_the_time_of_a_request() -> None:
    """No agent is waited for longer than 10 s, no request takes longer than 25, its patience included."""
    search = _search(transport=False)
    assert search.next_step(TWO, NOW_S + 1) == Ask(A, TRY_S)
    search.heard(A, NoReply(maybe_delivered=True), NOW_S + 11)
    assert search.next_step(TWO, NOW_S + 24) == Ask(B, 1.0)
    search.heard(B, NoReply(maybe_delivered=True), NOW_S + 24.5)
    assert search.next_step(TWO, NOW_S + 24.5) == LookAgain()
    just_lost = build_table([AgentSlice(REALM)], RoutingTable(), NOW_S + 24)
    assert search.next_step(just_lost, NOW_S + 24.6) == AwaitTable(NOW_S + REQUEST_S)
    assert search.next_step(_table(C), NOW_S + REQUEST_S) == UNAVAILABLE
