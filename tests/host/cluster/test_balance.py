"""Choosing moves of leadership."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.host.cluster.balance import (
    AskToLead,
    AskToLeave,
    GroupLoad,
    HsmLoad,
    Move,
    carry_out,
    is_worthwhile,
    leaves_a_leader,
    loads,
    next_move,
)
from juicebox_hsm.host.cluster.view import hsm_work
from juicebox_hsm.ids import OwnedRange
from juicebox_hsm.wire.rpc import Rebalanced, Refusal, Refused
from roles.words import describe_loads
from tests.host.cluster.agents import FULL, REALM, group, hsm, record, three, view_of


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
    view = view_of(agents)
    assert [hsm_work(view, view.hsms[hsm(number)]) for number in (1, 2, 3)] == [1 + 2 + 127 + 1, 1 + 2 + 255 + 1, 2]


def test_measured_load_replaces_width() -> None:
    """From one request a second on, a group's share of the realm's requests counts instead of its range."""
    agents = three(groups=2)
    agents[0].lead(group(1), FULL)
    agents[1].lead(group(2), FULL)
    agents[0].groups[group(1)].requests_per_s = 3.0
    agents[1].groups[group(2)].requests_per_s = 1.0
    view = view_of(agents)
    assert hsm_work(view, view.hsms[hsm(1)]) == 1 + 2 + round(255 * 0.75) + 1
    agents[0].groups[group(1)].requests_per_s = 0.5
    agents[1].groups[group(2)].requests_per_s = 0.4
    view = view_of(agents)
    assert hsm_work(view, view.hsms[hsm(1)]) == 1 + 2 + 255 + 1


def test_only_the_freshest_claim_counts_as_leading() -> None:
    """A deposed leader that has not noticed cannot be made to move the group."""
    agents = three()
    agents[0].lead(group(1), FULL, starting=6)
    agents[1].lead(group(1), FULL, starting=9)
    view = view_of(agents)
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
    shown = describe_loads(hsms, Move((REALM, group(1)), hsm(1), hsm(2)))
    assert shown.count("[moving]") == 1
    assert shown.count("[destination]") == 1
    assert f"{hsm(1).hex()} work 50" in shown


MOVE = Move((REALM, group(1)), hsm(1), hsm(2))


def _carried_out(*answers: int | Refused | str) -> tuple[list[object], Rebalanced | Refused]:
    """Carry a move out with these answers; returns what was asked, and the outcome."""
    steps, asked = carry_out(MOVE), list[object]()
    asked.append(next(steps))
    for answer in answers[:-1]:
        asked.append(steps.send(answer))
    with pytest.raises(StopIteration) as end:
        steps.send(answers[-1])
    outcome: Rebalanced | Refused = end.value.value
    return asked, outcome


def test_a_move_asks_the_old_leader_back_when_it_fails() -> None:
    """The new leader is asked with the old one's last index; whoever does not take it, the old one is asked again."""
    asked, outcome = _carried_out(7, "")
    assert asked == [AskToLeave(), AskToLead(hsm(2), 7)]
    assert outcome == Rebalanced(realm=REALM, group=group(1), source=hsm(1), destination=hsm(2))
    asked, outcome = _carried_out(7, "busy", "")
    assert asked == [AskToLeave(), AskToLead(hsm(2), 7), AskToLead(hsm(1), 7)]
    assert outcome == Refused(Refusal.LEADERSHIP_TRANSFER_ROLLED_BACK, detail="busy")
    _, lost = _carried_out(7, "busy", "busy, too")
    assert lost == Refused(Refusal.LEADERSHIP_TRANSFER_FAILED, detail="busy")
    assert (leaves_a_leader(outcome), leaves_a_leader(lost)) == (True, False)


def test_a_step_down_that_may_have_happened_is_undone() -> None:
    """Without an answer somebody has to be asked to lead; after a refusal the old leader still does."""
    silent = Refused(Refusal.RPC_ERROR, detail="timeout")
    asked, outcome = _carried_out(silent, "")
    assert asked == [AskToLeave(), AskToLead(hsm(1), None)]
    assert outcome == Refused(Refusal.LEADERSHIP_TRANSFER_ROLLED_BACK, detail="timeout")
    assert _carried_out(silent, "dead")[1] == Refused(Refusal.LEADERSHIP_TRANSFER_FAILED, detail="timeout")
    asked, outcome = _carried_out(Refused(Refusal.NOT_LEADER))
    assert (asked, outcome) == ([AskToLeave()], Refused(Refusal.STEP_DOWN_FAILED, detail="NotLeader"))
    assert leaves_a_leader(outcome)
