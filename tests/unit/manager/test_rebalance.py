"""Choosing and carrying out moves of leadership."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.adapters.rpc import RpcUnreachable
from juicebox_hsm.host.cluster.view import AgentView, build_view, hsm_work
from juicebox_hsm.ids import OwnedRange
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.wire.rpc import Rebalanced, Refusal, Refused
from roles.manager.appointment import Appointer
from roles.manager.context import ManagerContext, ManagerState
from roles.manager.rebalance import GroupLoad, HsmLoad, Move, describe, is_worthwhile, loads, next_move, rebalance
from tests.unit.manager.fakes import (
    FULL,
    REALM,
    FakeAgent,
    FakeGroup,
    FakeRpc,
    FakeSettings,
    group,
    hsm,
    make_context,
    record,
    three,
)


def _load(number: int, *groups: tuple[int, int, bool, int], drained: bool = False) -> HsmLoad:
    """Make an HSM from (group, work, leads, captured)."""
    return HsmLoad(
        hsm(number),
        tuple(GroupLoad((REALM, group(index)), work, leads, 3, captured) for index, work, leads, captured in groups),
        drained,
    )


def test_only_the_optimal_size_moves() -> None:
    """Among several groups the one whose work comes closest to the excess moves."""
    members = [(1, 1, False, 5), (2, 1, False, 5), (3, 1, False, 5)]
    busiest = _load(1, (1, 3, True, 5), (2, 40, True, 5), (3, 100, True, 5))
    assert next_move([busiest, _load(2, *members), _load(3, *members)]) == Move((REALM, group(3)), hsm(1), hsm(2))


def test_moves_only_to_members() -> None:
    """An idle HSM that is not in the group's configuration is no destination."""
    busiest = _load(1, (1, 50, True, 5), (2, 50, True, 5))
    stranger = _load(2, (9, 0, False, 5))
    member = _load(3, (1, 1, False, 5), (7, 20, True, 5))
    assert next_move([busiest, stranger, member]) == Move((REALM, group(1)), hsm(1), hsm(3))


@pytest.mark.parametrize(("captured", "moves"), [(4000, False), (4001, True), (5000, True)])
def test_not_to_members_that_trail(captured: int, *, moves: bool) -> None:
    """A member 1000 entries or more behind the leader cannot take over."""
    busiest = _load(1, (1, 50, True, 5000), (2, 50, True, 5000))
    trailing = _load(2, (1, 1, False, captured), (2, 1, False, captured))
    assert (next_move([busiest, trailing]) is not None) is moves


def test_busiest_cannot_shed_but_the_next_can() -> None:
    """An HSM whose only group has one member is dropped, and the next busiest considered."""
    alone = HsmLoad(hsm(1), (GroupLoad((REALM, group(9)), 258, True, 1, 5),))
    second = _load(2, (1, 3, True, 5), (2, 3, True, 5))
    third = _load(3, (1, 1, False, 5), (2, 1, False, 5))
    assert next_move([alone, second, third]) == Move((REALM, group(1)), hsm(2), hsm(3))


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_do_with_fewer_than_two(count: int) -> None:
    """No HSM or one HSM: no move."""
    assert next_move([_load(1, (1, 50, True, 5))][:count]) is None


@pytest.mark.parametrize(("idle", "moves"), [(3, False), (2, True)])
def test_every_move_must_improve(idle: int, *, moves: bool) -> None:
    """A destination that would become as busy as the source was gets nothing."""
    busiest = _load(1, (1, 3, True, 5), (2, 3, True, 5))
    other = _load(2, (1, 1, False, 5), (2, 1, False, 5), (7, idle - 2, True, 5))
    assert (next_move([busiest, other]) is not None) is moves


def test_drained_is_no_destination() -> None:
    """A drained HSM gets nothing, however idle."""
    busiest = _load(1, (1, 50, True, 5), (2, 50, True, 5))
    assert next_move([busiest, _load(2, (1, 1, False, 5), (2, 1, False, 5), drained=True)]) is None


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
    counts = [sum(found.role == "Leader" for found in agent.groups.values()) for agent in agents]
    assert counts == [2, 1, 1, 1, 1]


@given(st.data())
def test_every_move_improves_and_the_end_is_reached(data: st.DataObject) -> None:
    """Applying moves lowers the source below its old work and never lifts the destination to it; it ends."""
    hsms = data.draw(st.integers(2, 5))
    groups = data.draw(st.lists(st.tuples(st.integers(0, hsms - 1), st.integers(2, 60)), max_size=6))
    state = [
        _load(
            number + 1,
            *(
                (index, work + 1 if leader == number else 1, leader == number, 5)
                for index, (leader, work) in enumerate(groups)
            ),
        )
        for number in range(hsms)
    ]
    for _ in range(len(groups) * hsms + 1):
        move = next_move(state)
        if move is None:
            return
        assert move == next_move(list(reversed(state))), "two managers choose alike"
        before = {load.hsm: load.work for load in state}
        state = [_apply(load, move, state) for load in state]
        after = {load.hsm: load.work for load in state}
        assert max(after[move.source], after[move.destination]) < before[move.source]
    raise AssertionError("rebalancing does not end")


def _apply(load: HsmLoad, move: Move, state: list[HsmLoad]) -> HsmLoad:
    source = next(other for other in state if other.hsm == move.source)
    moved = source.load_of(move.key)
    assert moved is not None
    changed = []
    for found in load.groups:
        if found.key == move.key and load.hsm == move.source:
            changed.append(GroupLoad(found.key, 1, False, 3, 5))
        elif found.key == move.key and load.hsm == move.destination:
            changed.append(GroupLoad(found.key, moved.work, True, 3, 5))
        else:
            changed.append(found)
    return HsmLoad(load.hsm, tuple(changed), load.drained)


def test_work_counts_membership_leadership_and_width() -> None:
    """A witness costs 1, a leader 3, and the first bytes of its range on top."""
    agents = three(groups=2)
    agents[0].lead(group(1), OwnedRange(record("00"), record("7f", 0xFF)))
    agents[1].lead(group(2), FULL)
    view = build_view([AgentView(agent.url, agent.status()) for agent in agents])
    assert [hsm_work(view, view.hsms[hsm(number)]) for number in (1, 2, 3)] == [1 + 2 + 127 + 1, 1 + 2 + 255 + 1, 2]


def test_measured_load_replaces_width() -> None:
    """From one request a second on, a group's share of the realm's requests counts instead of its range."""
    agents = three(groups=2)
    agents[0].lead(group(1), FULL)
    agents[1].lead(group(2), FULL)
    agents[0].groups[group(1)].requests_per_s = 3.0
    agents[1].groups[group(2)].requests_per_s = 1.0
    view = build_view([AgentView(agent.url, agent.status()) for agent in agents])
    assert hsm_work(view, view.hsms[hsm(1)]) == 1 + 2 + round(255 * 0.75) + 1
    agents[0].groups[group(1)].requests_per_s = 0.5
    agents[1].groups[group(2)].requests_per_s = 0.4
    view = build_view([AgentView(agent.url, agent.status()) for agent in agents])
    assert hsm_work(view, view.hsms[hsm(1)]) == 1 + 2 + 255 + 1


def test_only_the_freshest_claim_counts_as_leading() -> None:
    """A deposed leader that has not noticed cannot be made to move the group."""
    agents = three()
    agents[0].lead(group(1), FULL, starting=6)
    agents[1].lead(group(1), FULL, starting=9)
    view = build_view([AgentView(agent.url, agent.status()) for agent in agents])
    assert [load.groups[0].leads for load in loads(view)] == [False, True, False]


def test_small_gains_are_not_worthwhile() -> None:
    """The periodic pass moves only when the busiest HSM loses a tenth of its work or more."""
    big = _load(1, (1, 11, True, 5), (2, 89, True, 5))
    assert is_worthwhile([big], Move((REALM, group(1)), hsm(1), hsm(2)))
    small = _load(1, (1, 10, True, 5), (2, 90, True, 5))
    assert not is_worthwhile([small], Move((REALM, group(1)), hsm(1), hsm(2)))


def test_dump_marks_what_moves() -> None:
    """The log shows all workloads with the moving group and its destination marked."""
    hsms = [_load(1, (1, 50, True, 5)), _load(2, (1, 1, False, 5))]
    shown = describe(hsms, Move((REALM, group(1)), hsm(1), hsm(2)))
    assert shown.count("[moving]") == 1
    assert shown.count("[destination]") == 1
    assert f"{hsm(1).hex()} work 50" in shown


def _uneven() -> tuple[list[FakeAgent], ManagerContext, FakeRpc]:
    agents = three(groups=2)
    agents[0].lead(group(1)).lead(group(2))
    context = make_context(agents)
    assert isinstance(context.rpc, FakeRpc)
    return agents, context, context.rpc


def _overload(agents: list[FakeAgent], busy: FakeAgent) -> None:
    """Let one HSM lead group 1, and lead another that is only its own, so that group 1 had better move."""
    for agent in agents:
        agent.groups[group(1)].role = "Witness"
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
    assert agents[0].groups[group(1)].role == agents[0].groups[group(2)].role == "Leader"


async def test_rpc_failure_in_the_middle_also_goes_back(autojump_clock: trio.testing.MockClock) -> None:
    """A target that vanishes between the steps does not leave the group leaderless."""
    agents, context, _ = _uneven()
    for agent in agents[1:]:
        agent.refuse["become_leader"] = RpcUnreachable("gone", maybe_delivered=True)
    outcome = await rebalance(context, Appointer(context))
    assert isinstance(outcome, Refused)
    assert outcome.outcome is Refusal.LEADERSHIP_TRANSFER_ROLLED_BACK
    assert agents[0].groups[group(1)].role == "Leader"


async def test_nobody_takes_it_then_the_pass_appoints(autojump_clock: trio.testing.MockClock) -> None:
    """When target and old leader both refuse, the appointment pass gives the group to the third."""
    agents, context, _ = _uneven()
    agents[0].refuse["become_leader"] = agents[1].refuse["become_leader"] = Refused(Refusal.NOT_CAPTURED)
    outcome = await rebalance(context, Appointer(context))
    assert isinstance(outcome, Refused)
    assert outcome.outcome is Refusal.LEADERSHIP_TRANSFER_FAILED
    assert "Leader" in {agents[2].groups[group(number)].role for number in (1, 2)}


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
