"""The drill of range transfers as one short run: a move under load, and one whose manager dies in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest

from juicebox_hsm.host.cluster.view import AgentView, ClusterView, build_view, wire_range
from juicebox_hsm.ids import FULL_RANGE
from juicebox_hsm.wire.rpc import Direction, GroupRole, Range, TransferringInfo
from tests.client.transfers import STEPS, Kill, Plan, drill, gapless, is_settled, plan_kills, step_done
from tests.host.cluster.agents import FakeAgent, group, three

pytestmark = pytest.mark.processes


async def test_ranges_move_under_load_and_without_their_manager(tmp_path: Path) -> None:
    """A range moves while users call; with the manager killed after *out* another one brings it to its destination."""
    plan = Plan((None, Kill("manager", "out")), users=4, agents=3, groups=2, quiet_s=0.5)
    assert await drill(tmp_path, plan) == []


def test_every_victim_dies_after_every_step() -> None:
    """The turns of a drill are all pairs of victim and step, whatever the number of victims."""
    for victims in (["manager"], ["manager", "source"], ["manager", "source", "destination"]):
        turns = len(STEPS) * len(victims)
        assert set(plan_kills(turns, victims)) == {Kill(victim, step) for victim in victims for step in STEPS}
        assert len(plan_kills(turns + 1, victims)) == turns + 1


def test_what_is_owned_exactly_once() -> None:
    """Gaps, overlaps and missing ends are told."""
    low, high = (bytes(32), b"\x7f" + b"\xff" * 31), (b"\x80" + bytes(31), b"\xff" * 32)
    assert gapless({b"a": low, b"b": high})
    assert gapless({b"a": (low[0], high[1])})
    for wrong in ({}, {b"a": low}, {b"b": high}, {b"a": low, b"b": (low[0], high[1])}, {b"a": high, b"b": high}):
        assert not gapless(wrong)


def _view(agents: list[FakeAgent]) -> ClusterView:
    return build_view([AgentView(agent.url, agent.status()) for agent in agents])


def test_a_move_is_over_when_nothing_is_pending() -> None:
    """Committed markers tell the step; with a marker, a group without a leader or a gap the move is not over."""
    agents = three(groups=2)
    source = agents[0].lead(group(1), FULL_RANGE).groups[group(1)]
    destination = agents[1].lead(group(2)).groups[group(2)]
    groups = set(_view(agents).groups)
    bounds: Range = wire_range(FULL_RANGE)

    def told() -> tuple[str | None, bool]:
        view = _view(agents)
        return step_done(view, group(1), group(2)), is_settled(view, groups)

    assert told() == (None, True)
    destination.transferring = TransferringInfo(Direction.IN, group(1), bounds, 6)
    assert told() == (None, False), "not committed yet"
    destination.captured = destination.committed = 6
    assert told() == ("prepare", False)
    source.owned, source.transferring = None, TransferringInfo(Direction.OUT, group(2), bounds, 5, b"h" * 32)
    assert told() == ("out", False)
    destination.owned, destination.transferring = FULL_RANGE, None
    assert told() == ("in", False)
    source.transferring = None
    assert told() == (None, True)
    source.role = GroupRole.WITNESS
    assert told() == (None, False), "nobody leads the source"
    source.role, destination.owned = GroupRole.LEADER, None
    assert told() == (None, False), "nobody owns anything"
