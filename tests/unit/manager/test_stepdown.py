"""Hand-over on request."""

from __future__ import annotations

import trio
import trio.testing

from juicebox_hsm.adapters.rpc import RpcUnreachable
from juicebox_hsm.wire.rpc import Done, GroupRole, Refusal, Refused, StepdownOrder
from roles.manager.context import ManagerContext
from roles.manager.stepdown import hand_over
from tests.host.cluster.agents import FULL, OTHER_REALM, REALM, FakeAgent, FakeGroup, group, hsm, three
from tests.unit.manager.fakes import FakeLeases, FakeRpc, make_context


def _cluster(groups: int = 2) -> tuple[list[FakeAgent], ManagerContext, FakeRpc]:
    agents = three(groups)
    for number in range(1, groups + 1):
        agents[0].lead(group(number), FULL if number == 1 else None)
    context = make_context(agents)
    assert isinstance(context.rpc, FakeRpc)
    return agents, context, context.rpc


async def _refusal(context: ManagerContext, order: StepdownOrder) -> Refusal:
    outcome = await hand_over(context, order)
    assert isinstance(outcome, Refused)
    return outcome.outcome


async def test_by_hsm_moves_everything_it_leads(autojump_clock: trio.testing.MockClock) -> None:
    """Every group the HSM led has another leader afterwards, and no lease is left."""
    agents, context, _ = _cluster()
    assert await hand_over(context, StepdownOrder(hsm=hsm(1))) == Done()
    assert all(found.role is GroupRole.WITNESS for found in agents[0].groups.values())
    for number in (1, 2):
        assert sum(agent.groups[group(number)].role is GroupRole.LEADER for agent in agents) == 1
    assert await context.store.leases.list() == []


async def test_by_group_moves_only_that_group(autojump_clock: trio.testing.MockClock) -> None:
    """The other groups of the HSM stay where they are."""
    agents, context, _ = _cluster()
    assert await hand_over(context, StepdownOrder(realm=REALM, group=group(2))) == Done()
    assert agents[0].groups[group(1)].role is GroupRole.LEADER
    assert agents[0].groups[group(2)].role is GroupRole.WITNESS


async def test_the_new_leader_is_told_where_the_log_ends(autojump_clock: trio.testing.MockClock) -> None:
    """The index the old leader stopped at reaches the new one, so that it waits for exactly that entry."""
    agents, context, rpc = _cluster(1)
    agents[0].groups[group(1)].captured = 42
    asked = []
    original = rpc._become_leader
    rpc._become_leader = lambda agent, body: asked.append(body.last) or original(agent, body)  # type: ignore[method-assign,func-returns-value]
    assert await hand_over(context, StepdownOrder(hsm=hsm(1))) == Done()
    assert asked == [42]


async def test_single_member_group_leads_again(autojump_clock: trio.testing.MockClock) -> None:
    """A group of one has nobody else: its member steps down and leads anew."""
    agent = FakeAgent("tls://a1", hsm(1), groups={group(1): FakeGroup([hsm(1)])}).lead(group(1), FULL)
    context = make_context([agent])
    assert await hand_over(context, StepdownOrder(hsm=hsm(1))) == Done()
    assert agent.groups[group(1)].role is GroupRole.LEADER


async def test_unknown_ids_are_named(autojump_clock: trio.testing.MockClock) -> None:
    """Wrong ids are refused with what is wrong about them, not answered with Ok."""
    _, context, _ = _cluster()
    assert await _refusal(context, StepdownOrder(hsm=hsm(9))) is Refusal.INVALID_HSM
    assert await _refusal(context, StepdownOrder(hsm=hsm(2))) is Refusal.NOT_LEADER
    assert await _refusal(context, StepdownOrder(realm=OTHER_REALM, group=group(1))) is Refusal.INVALID_REALM
    assert await _refusal(context, StepdownOrder(realm=REALM, group=group(9))) is Refusal.INVALID_GROUP


async def test_silent_hsm_is_an_rpc_error(autojump_clock: trio.testing.MockClock) -> None:
    """An HSM that may be the one that does not answer is not called invalid."""
    agents, context, _ = _cluster()
    agents[0].down = True
    assert await _refusal(context, StepdownOrder(hsm=hsm(1))) is Refusal.RPC_ERROR


async def test_busy_releases_all_leases(autojump_clock: trio.testing.MockClock) -> None:
    """If one of several groups is being worked on nothing is touched, and the other leases are given back."""
    agents, context, rpc = _cluster()
    leases = context.store.leases
    assert isinstance(leases, FakeLeases)
    await leases.obtain(f"{REALM.hex()}-{group(2).hex()}", "other", context.now_ms(), 3000)
    assert await _refusal(context, StepdownOrder(hsm=hsm(1))) is Refusal.BUSY
    assert [lease.owner for lease in await leases.list()] == ["other"]
    assert not rpc.methods("stepdown")
    assert agents[0].groups[group(1)].role is GroupRole.LEADER


async def test_failed_assignment_is_reported(autojump_clock: trio.testing.MockClock) -> None:
    """Ok means that there is a new leader; otherwise the caller learns that there is none."""
    agents, context, _ = _cluster(1)
    for agent in agents:
        agent.refuse["become_leader"] = Refused(Refusal.NO_STORE)
    assert await _refusal(context, StepdownOrder(hsm=hsm(1))) is Refusal.LEADERSHIP_TRANSFER_FAILED
    assert (REALM, group(1)) in context.state.announced, "the next pass acts at once"


async def test_unreachable_leader(autojump_clock: trio.testing.MockClock) -> None:
    """A leader that vanishes while stepping down is reported and announced to the appointment pass."""
    agents, context, _ = _cluster(1)
    agents[0].refuse["stepdown"] = RpcUnreachable("gone", maybe_delivered=True)
    assert await _refusal(context, StepdownOrder(hsm=hsm(1))) is Refusal.RPC_ERROR
    assert (REALM, group(1)) in context.state.announced


async def test_lost_lease_stops_the_hand_over(autojump_clock: trio.testing.MockClock) -> None:
    """Losing the lease while the leader takes its time ends the work with Busy, and only this work."""
    agents, context, rpc = _cluster(1)
    leases = context.store.leases
    assert isinstance(leases, FakeLeases)
    original = rpc.call

    async def slow(url: str, method: object, body: object, *, timeout_s: float, **_: object) -> object:
        if getattr(method, "name", "") == "stepdown":
            leases.broken = True
            await trio.sleep(30)
        return await original(url, method, body, timeout_s=timeout_s)  # type: ignore[arg-type]

    rpc.call = slow  # type: ignore[method-assign]
    assert await _refusal(context, StepdownOrder(hsm=hsm(1))) is Refusal.BUSY
    assert trio.current_time() < 10
    assert agents[0].groups[group(1)].role is GroupRole.LEADER
