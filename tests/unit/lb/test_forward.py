"""Forwarding: every row of the table in load-balancer.md 9, the replay rule, refresh-and-retry, patience."""

from __future__ import annotations

import pytest
import trio

from juicebox_hsm.adapters.rpc import RpcUnreachable
from juicebox_hsm.wire.client import ClientOutcome
from juicebox_hsm.wire.rpc import Range, Refusal, RpcCode
from tests.unit.lb.harness import (
    GROUP,
    NOISE,
    REALM,
    Balancer,
    FakeAgent,
    Script,
    failed,
    job,
    ok,
    owned,
    refuse,
    unreachable,
)

UNAVAILABLE = ClientOutcome.UNAVAILABLE


def _pair(first: Script, second: Script = ok) -> tuple[FakeAgent, FakeAgent]:
    """Return two agents that both claim the record; the first has the fresher claim."""
    return FakeAgent("tls://a", starting=9, script=[first]), FakeAgent("tls://b", starting=5, script=[second])


async def test_ok(nursery: trio.Nursery, autojump_clock: object) -> None:
    """The agent gets the request untouched and its answer is passed on."""
    agent = FakeAgent("tls://a")
    balancer = Balancer(agent)
    await balancer.start(nursery)
    assert await balancer.forwarder.forward(job()) == NOISE
    (app,) = agent.asked
    assert (app.realm, app.group, app.record_id, app.encrypted) == (REALM, GROUP, b"\x55" * 32, b"noise")
    assert (app.session_id, app.tenant, app.user, app.handshake_only) == (7, "test-acme", "00" * 32, False)


@pytest.mark.parametrize(
    ("refusal", "outcome"),
    [
        (Refusal.SESSION_ERROR, ClientOutcome.SESSION_ERROR),
        (Refusal.DECODING_ERROR, ClientOutcome.DECODING_ERROR),
        (Refusal.RATE_LIMIT_EXCEEDED, ClientOutcome.RATE_LIMIT_EXCEEDED),
        (Refusal.MISSING_SESSION, ClientOutcome.MISSING_SESSION),
        (Refusal.BUSY, UNAVAILABLE),
    ],
)
async def test_final_refusals(
    nursery: trio.Nursery, autojump_clock: object, refusal: Refusal, outcome: ClientOutcome
) -> None:
    """These are the answer; nobody is asked twice."""
    agent = FakeAgent("tls://a", script=[refuse(refusal)])
    balancer = Balancer(agent)
    await balancer.start(nursery)
    assert await balancer.forwarder.forward(job()) is outcome
    assert len(agent.asked) == 1


@pytest.mark.parametrize(
    "script",
    [
        refuse(Refusal.NOT_LEADER),
        refuse(Refusal.INVALID_REALM),
        refuse(Refusal.INVALID_GROUP),
        refuse(Refusal.NO_HSM),
        refuse(Refusal.NO_STORE),
        refuse(Refusal.INVALID_PROOF),
        unreachable(maybe_delivered=False),
        unreachable(maybe_delivered=True),
        failed(RpcCode.OVERLOADED),
        failed(RpcCode.SHUTTING_DOWN),
        failed(RpcCode.FORBIDDEN),
        failed(RpcCode.HANDLER_FAILED),
        failed(RpcCode.DEADLINE_EXCEEDED),
        refuse(Refusal.NOT_LEADER, consumed=True),
        refuse(Refusal.RPC_ERROR),
    ],
)
async def test_next_candidate(nursery: trio.Nursery, autojump_clock: object, script: Script) -> None:
    """These send the request to the next candidate, the older claim."""
    first, second = _pair(script)
    balancer = Balancer(first, second)
    await balancer.start(nursery)
    assert await balancer.forwarder.forward(job()) == NOISE
    assert (len(first.asked), len(second.asked)) == (1, 1)
    assert balancer.recorder.counts["load_balancer.retries"] == 0


@pytest.mark.parametrize(
    ("script", "consumed"),
    [
        (refuse(Refusal.NOT_LEADER), False),
        (refuse(Refusal.NO_HSM), False),
        (refuse(Refusal.NO_STORE), False),
        (refuse(Refusal.INVALID_REALM), False),
        (refuse(Refusal.INVALID_GROUP), False),
        (refuse(Refusal.INVALID_PROOF), False),
        (unreachable(maybe_delivered=False), False),
        (failed(RpcCode.OVERLOADED), False),
        (refuse(Refusal.NOT_LEADER, consumed=True), True),
        (refuse(Refusal.NO_HSM, consumed=True), True),
        (refuse(Refusal.NO_STORE, consumed=True), True),
        (refuse(Refusal.RPC_ERROR), True),
        (unreachable(maybe_delivered=True), True),
        (failed(RpcCode.HANDLER_FAILED), True),
        (failed(RpcCode.DEADLINE_EXCEEDED), True),
    ],
)
async def test_replay_rule(nursery: trio.Nursery, autojump_clock: object, script: Script, consumed: bool) -> None:
    """A transport message never goes again to an agent that may have used it; otherwise one retry follows a refresh."""
    agent = FakeAgent("tls://a", script=[script, ok])
    balancer = Balancer(agent)
    await balancer.start(nursery)
    began = trio.current_time()
    answer = await balancer.forwarder.forward(job())
    if consumed:
        assert answer is UNAVAILABLE
        assert len(agent.asked) == 1
        assert 1 <= trio.current_time() - began < 1.5  # it waited for another route
    else:
        assert answer == NOISE
        assert len(agent.asked) == 2
    assert balancer.recorder.counts["load_balancer.retries"] == 1


@pytest.mark.parametrize(
    "script",
    [refuse(Refusal.NOT_LEADER, consumed=True), failed(RpcCode.DEADLINE_EXCEEDED), unreachable(maybe_delivered=True)],
)
async def test_handshakes_may_be_repeated(nursery: trio.Nursery, autojump_clock: object, script: Script) -> None:
    """A handshake, with or without a request in it, may be sent to the same agent again."""
    agent = FakeAgent("tls://a", script=[script, ok])
    balancer = Balancer(agent)
    await balancer.start(nursery)
    assert await balancer.forwarder.forward(job(transport=False)) == NOISE
    assert len(agent.asked) == 2


async def test_at_most_one_retry(nursery: trio.Nursery, autojump_clock: object) -> None:
    """A leader that refuses for ever is asked twice, and then the client hears Unavailable after the patience."""
    agent = FakeAgent("tls://a", script=[refuse(Refusal.NOT_LEADER)])
    balancer = Balancer(agent)
    await balancer.start(nursery)
    began = trio.current_time()
    assert await balancer.forwarder.forward(job()) is UNAVAILABLE
    assert len(agent.asked) == 2
    assert 1 <= trio.current_time() - began < 1.5


async def test_consumed_in_second_pass_is_final(nursery: trio.Nursery, autojump_clock: object) -> None:
    """A transport message that may have been used in the second pass is given up at once."""
    agent = FakeAgent("tls://a", script=[refuse(Refusal.NOT_LEADER), refuse(Refusal.NOT_LEADER, consumed=True)])
    balancer = Balancer(agent)
    await balancer.start(nursery)
    began = trio.current_time()
    assert await balancer.forwarder.forward(job()) is UNAVAILABLE
    assert trio.current_time() - began < 0.5


async def test_who_waits_hurries_the_polls(nursery: trio.Nursery, autojump_clock: object) -> None:
    """While requests wait for a range to arrive somewhere, agents are asked every 50 ms, however many requests wait."""
    losing, gaining = FakeAgent("tls://a", script=[refuse(Refusal.NOT_LEADER)]), FakeAgent("tls://b", leads=False)
    balancer = Balancer(losing, gaining)
    await balancer.start(nursery)
    losing.range = None
    answers = []

    async def forward() -> None:
        answers.append(await balancer.forwarder.forward(job()))

    async with trio.open_nursery() as waiting:
        for _ in range(20):
            waiting.start_soon(forward)
        await trio.sleep(0.5)
        assert answers == []
        polls = gaining.polls
        await trio.sleep(0.3)
        assert 6 <= gaining.polls - polls <= 11
        gaining.leads, gaining.starting = True, 2
        began = trio.current_time()
    assert answers == [NOISE] * 20
    assert trio.current_time() - began <= 0.06


async def test_new_leader_within_patience(nursery: trio.Nursery, autojump_clock: object) -> None:
    """A request that finds no willing leader gets through when one appears within a second."""
    old = FakeAgent("tls://a", script=[refuse(Refusal.NOT_LEADER)])
    new = FakeAgent("tls://b", leads=False, starting=50)
    balancer = Balancer(old, new)
    await balancer.start(nursery)

    async def elect() -> None:
        await trio.sleep(0.6)
        old.leads = False
        new.leads = True

    nursery.start_soon(elect)
    assert await balancer.forwarder.forward(job(transport=False)) == NOISE
    assert len(new.asked) == 1


async def test_no_leader_at_all(nursery: trio.Nursery, autojump_clock: object) -> None:
    """Soon after a range lost its leader a request waits a second for the next; later it is refused at once."""
    balancer = Balancer(FakeAgent("tls://a", leads=False))
    await balancer.start(nursery, settle=False)
    began = trio.current_time()
    assert await balancer.forwarder.forward(job()) is UNAVAILABLE
    assert 1 <= trio.current_time() - began < 1.5
    await trio.sleep(5)
    began = trio.current_time()
    assert await balancer.forwarder.forward(job()) is UNAVAILABLE
    assert trio.current_time() - began < 0.1


async def test_a_dead_group_costs_its_own_records_only(nursery: trio.Nursery, autojump_clock: object) -> None:
    """A range that has long been without a leader takes no patience from records of another group."""
    low, high = owned(0x00, 0x7F), owned(0x80, 0xFF)
    leader = FakeAgent("tls://a", range=Range(low.start, low.end), script=[refuse(Refusal.NOT_LEADER)])
    balancer = Balancer(leader)
    await balancer.start(nursery)
    assert balancer.poller.table.is_hopeless(REALM, high.start, trio.current_time())
    began = trio.current_time()
    assert await balancer.forwarder.forward(job()) is UNAVAILABLE
    assert 1 <= trio.current_time() - began < 1.5


async def test_missing_session_near_a_leadership_change(nursery: trio.Nursery, autojump_clock: object) -> None:
    """A leadership younger than 10 s answers Unavailable instead; later the client is told to reopen."""
    agent = FakeAgent("tls://a", script=[refuse(Refusal.MISSING_SESSION)])
    balancer = Balancer(agent)
    await balancer.start(nursery, settle=False)
    assert await balancer.forwarder.forward(job()) is UNAVAILABLE
    assert len(agent.asked) == 1
    await trio.sleep(11)
    assert await balancer.forwarder.forward(job()) is ClientOutcome.MISSING_SESSION
    agent.starting = 77  # the same agent, leading anew
    await trio.sleep(0.5)
    assert await balancer.forwarder.forward(job()) is UNAVAILABLE


async def test_missing_session_while_claims_compete(nursery: trio.Nursery, autojump_clock: object) -> None:
    """With several candidates the client is not told that its session is gone."""
    first, second = _pair(refuse(Refusal.MISSING_SESSION))
    balancer = Balancer(first, second)
    await balancer.start(nursery)
    assert await balancer.forwarder.forward(job()) is UNAVAILABLE


async def test_dueling_leaders(nursery: trio.Nursery, autojump_clock: object) -> None:
    """Of two claims the later leadership is tried first, and of equal ones the one that committed more."""
    stale = FakeAgent("tls://a", starting=5, committed=900, script=[refuse(Refusal.NOT_LEADER)])
    fresh = FakeAgent("tls://b", starting=9, committed=10)
    balancer = Balancer(stale, fresh)
    await balancer.start(nursery)
    assert await balancer.forwarder.forward(job()) == NOISE
    assert stale.asked == []
    stale.starting = 9
    await trio.sleep(0.5)
    assert await balancer.forwarder.forward(job()) == NOISE
    assert len(stale.asked) == 1  # 900 > 10, but it refused


async def test_budget_of_a_request(nursery: trio.Nursery, autojump_clock: object) -> None:
    """Agents that hang cost 10 s each and no request takes more than 25 s."""

    async def hang(_: object) -> None:
        await trio.sleep_forever()

    agents = [FakeAgent(f"tls://{index}", starting=index, script=[hang]) for index in range(5)]
    balancer = Balancer(*agents)
    await balancer.start(nursery)
    began = trio.current_time()
    assert await balancer.forwarder.forward(job(transport=False)) is UNAVAILABLE
    assert 24.5 <= trio.current_time() - began <= 25.5


async def test_refresh_is_shared(nursery: trio.Nursery, autojump_clock: object) -> None:
    """Many requests in trouble at once cause one forced refresh, and the next comes at least 50 ms later."""
    agent = FakeAgent("tls://a", leads=False)
    balancer = Balancer(agent)
    await balancer.start(nursery)
    before = balancer.recorder.counts["load_balancer.refresh.time.ns"]
    async with trio.open_nursery() as requests:
        for _ in range(100):
            requests.start_soon(balancer.forwarder.forward, job())
    assert balancer.recorder.counts["load_balancer.refresh.time.ns"] == before + 1
    began = trio.current_time()
    for _ in range(4):
        await balancer.poller.refresh()
    assert trio.current_time() - began >= 0.15


async def test_lost_agent_is_skipped(nursery: trio.Nursery, autojump_clock: object) -> None:
    """An agent whose stream breaks loses its routes at once."""
    first, second = _pair(ok)
    balancer = Balancer(first, second)
    await balancer.start(nursery)
    first.status_error = RpcUnreachable("reset", maybe_delivered=True)
    await trio.sleep(0.2)
    assert [route.url for route in balancer.poller.table.candidates(REALM, job().record)] == ["tls://b"]
