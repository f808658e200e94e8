"""Carrying out moves of leadership."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
import trio.testing

from juicebox_hsm.adapters.rpc import RpcUnreachable
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.wire.rpc import GroupRole, Rebalanced, Refusal, Refused
from roles.manager.appointment import Appointer
from roles.manager.context import ManagerContext, ManagerState
from roles.manager.rebalance import rebalance
from tests.host.cluster.agents import REALM, FakeAgent, FakeGroup, group, hsm, three
from tests.unit.manager.fakes import FakeRpc, FakeSettings, make_context


def _six_groups_over_five() -> list[FakeAgent]:
    ids: list[bytes] = [hsm(number) for number in range(1, 6)]
    agents = [
        FakeAgent(f"tls://a{number}", hsm(number), groups={group(g): FakeGroup(list(ids)) for g in range(1, 7)})
        for number in range(1, 6)
    ]
    for number in range(1, 7):
        agents[0].lead(group(number))
    return agents


async def test_six_groups_over_five_hsms(autojump_clock: trio.testing.MockClock) -> None:
    """Six groups led by one of five HSMs: exactly four moves to 2,1,1,1,1, then already balanced."""
    agents = _six_groups_over_five()
    context = make_context(agents)
    appointer = Appointer(context)
    for _ in range(4):
        moved = await rebalance(context, appointer)
        assert isinstance(moved, Rebalanced)
        assert moved.group
    assert await rebalance(context, appointer) == Rebalanced()
    counts = [sum(found.role is GroupRole.LEADER for found in agent.groups.values()) for agent in agents]
    assert counts == [2, 1, 1, 1, 1]


def _uneven() -> tuple[list[FakeAgent], ManagerContext, FakeRpc]:
    agents = three(groups=2)
    agents[0].lead(group(1)).lead(group(2))
    context = make_context(agents)
    assert isinstance(context.rpc, FakeRpc)
    return agents, context, context.rpc


def _overload(agents: list[FakeAgent], busy: FakeAgent) -> None:
    """Let one HSM lead group 1, and lead another that is only its own, so that group 1 had better move."""
    for agent in agents:
        agent.groups[group(1)].role = GroupRole.WITNESS
        agent.groups.pop(group(9), None)
    busy.groups[group(9)] = FakeGroup([busy.hsm])
    busy.lead(group(1)).lead(group(9))


async def test_target_refuses_then_old_leader_is_back(autojump_clock: trio.testing.MockClock) -> None:
    """A move that fails in the middle gives the leadership back."""
    agents, context, _ = _uneven()
    agents[1].refuse["become_leader"] = agents[2].refuse["become_leader"] = Refused(Refusal.NOT_CAPTURED)
    outcome = await rebalance(context, Appointer(context))
    assert isinstance(outcome, Refused)
    assert outcome.outcome is Refusal.LEADERSHIP_TRANSFER_ROLLED_BACK
    assert agents[0].groups[group(1)].role == agents[0].groups[group(2)].role is GroupRole.LEADER


async def test_rpc_failure_in_the_middle_also_goes_back(autojump_clock: trio.testing.MockClock) -> None:
    """A target that vanishes between the steps does not leave the group leaderless."""
    agents, context, _ = _uneven()
    for agent in agents[1:]:
        agent.refuse["become_leader"] = RpcUnreachable("gone", maybe_delivered=True)
    outcome = await rebalance(context, Appointer(context))
    assert isinstance(outcome, Refused)
    assert outcome.outcome is Refusal.LEADERSHIP_TRANSFER_ROLLED_BACK
    assert agents[0].groups[group(1)].role is GroupRole.LEADER


async def test_nobody_takes_it_then_the_pass_appoints(autojump_clock: trio.testing.MockClock) -> None:
    """When target and old leader both refuse, the appointment pass gives the group to the third."""
    agents, context, _ = _uneven()
    agents[0].refuse["become_leader"] = agents[1].refuse["become_leader"] = Refused(Refusal.NOT_CAPTURED)
    outcome = await rebalance(context, Appointer(context))
    assert isinstance(outcome, Refused)
    assert outcome.outcome is Refusal.LEADERSHIP_TRANSFER_FAILED
    assert GroupRole.LEADER in {agents[2].groups[group(number)].role for number in (1, 2)}


async def test_busy_lease(autojump_clock: trio.testing.MockClock) -> None:
    """A group somebody else works on is reported as busy and left alone."""
    _, context, rpc = _uneven()
    for number in (1, 2):
        await context.store.leases.obtain(f"{REALM.hex()}-{group(number).hex()}", "x", context.now_ms(), 3000)
    outcome = await rebalance(context, Appointer(context))
    assert isinstance(outcome, Refused)
    assert outcome.outcome is Refusal.BUSY
    assert not rpc.methods("stepdown")


async def test_pause_stops_only_the_periodic_pass(autojump_clock: trio.testing.MockClock) -> None:
    """While paused the loop does nothing, and an operator's request still works."""
    _, context, rpc = _uneven()
    settings = context.store.settings
    assert isinstance(settings, FakeSettings)
    settings.rows["rebalance/paused"] = b"me"
    assert await rebalance(context, Appointer(context), periodic=True) == Rebalanced()
    assert not rpc.calls
    moved = await rebalance(context, Appointer(context))
    assert isinstance(moved, Rebalanced)
    assert moved.group


async def test_periodic_pass_lets_a_moved_group_settle(autojump_clock: trio.testing.MockClock) -> None:
    """A group that moved stays for five minutes, whatever the load says meanwhile, and whichever manager looks."""
    agents = three()
    first = make_context(agents, now_ms=lambda: round(trio.current_time() * 1000))
    second = replace(first, name="manager2", state=ManagerState(), now_ms=lambda: first.now_ms() - 5_000)
    _overload(agents, agents[0])
    moved = await rebalance(first, Appointer(first), periodic=True)
    assert isinstance(moved, Rebalanced)
    assert moved.group
    _overload(agents, next(agent for agent in agents if agent.hsm == moved.destination))
    for context in (first, second):
        assert await rebalance(context, Appointer(context), periodic=True) == Rebalanced()
    explicit = await rebalance(second, Appointer(second))
    assert isinstance(explicit, Rebalanced)
    assert explicit.group, "an operator's request does not wait"
    _overload(agents, next(agent for agent in agents if agent.hsm == explicit.destination))
    assert await rebalance(first, Appointer(first), periodic=True) == Rebalanced(), "that move counts, too"
    await trio.sleep(306)
    again = await rebalance(second, Appointer(second), periodic=True)
    assert isinstance(again, Rebalanced)
    assert again.group


@pytest.mark.parametrize("value", [b"", b"never", b"9" * 20, b"\xff"])
async def test_strange_times_of_a_move_do_not_hold_a_group(
    autojump_clock: trio.testing.MockClock, value: bytes
) -> None:
    """A time far in the future, or something else altogether, does not keep a group from ever moving again."""
    agents = three()
    context = make_context(agents)
    _overload(agents, agents[0])
    await context.store.settings.put(f"rebalance/moved/{REALM.hex()}/{group(1).hex()}", value)
    moved = await rebalance(context, Appointer(context), periodic=True)
    assert isinstance(moved, Rebalanced)
    assert moved.group


async def test_move_stands_when_it_cannot_be_remembered(autojump_clock: trio.testing.MockClock) -> None:
    """A store that fails right after a move does not make it a failure."""
    _, context, _ = _uneven()
    settings = context.store.settings
    assert isinstance(settings, FakeSettings)

    async def fail(name: str, value: bytes) -> None:
        await trio.lowlevel.checkpoint()
        raise StoreUnavailable("down")

    settings.put = fail  # type: ignore[method-assign]
    moved = await rebalance(context, Appointer(context))
    assert isinstance(moved, Rebalanced)
    assert moved.group


@pytest.mark.parametrize("who", ["target", "old leader"])
async def test_the_next_leader_is_told_where_the_log_ends(autojump_clock: trio.testing.MockClock, who: str) -> None:
    """The index the old leader stopped at reaches whoever leads next, so that it waits for exactly that entry."""
    agents, context, rpc = _uneven()
    for number in (1, 2):
        agents[0].groups[group(number)].captured = 42
    if who == "old leader":
        agents[1].refuse["become_leader"] = agents[2].refuse["become_leader"] = Refused(Refusal.NOT_CAPTURED)
    asked = []
    original = rpc._become_leader
    rpc._become_leader = lambda agent, body: asked.append(body.last) or original(agent, body)  # type: ignore[method-assign,func-returns-value]
    outcome = await rebalance(context, Appointer(context))
    assert isinstance(outcome, Rebalanced if who == "target" else Refused)
    assert asked == [42]


async def test_a_step_down_of_unknown_outcome_names_no_end(autojump_clock: trio.testing.MockClock) -> None:
    """Where the log ends is not known then: the old leader is asked to lead without waiting for an entry."""
    agents, context, rpc = _uneven()
    agents[0].refuse["stepdown"] = RpcUnreachable("gone", maybe_delivered=True)
    asked = []
    original = rpc._become_leader
    rpc._become_leader = lambda agent, body: asked.append((agent.url, body.last)) or original(agent, body)  # type: ignore[method-assign,func-returns-value]
    outcome = await rebalance(context, Appointer(context))
    assert isinstance(outcome, Refused)
    assert outcome.outcome is Refusal.LEADERSHIP_TRANSFER_ROLLED_BACK
    assert asked == [("tls://a1", None)]
