"""Who is asked to lead, and in which order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from juicebox_hsm.host.cluster.appointment import candidates
from juicebox_hsm.host.cluster.balance import loads
from tests.host.cluster.agents import FULL, REALM, FakeAgent, FakeGroup, group, hsm, three, view_of


@pytest.mark.parametrize(
    ("captured", "expected"),
    [((5, 9, 7), [2, 3, 1]), ((None, 9, 7), [2, 3, 1]), ((5, 5, 5), [1, 2, 3]), ((0, None, 0), [1, 3, 2])],
)
def test_candidate_order(captured: tuple[int | None, ...], expected: list[int]) -> None:
    """Equal work: the freshest capture first, none last, then the lowest id."""
    agents = three()
    for agent, index in zip(agents, captured, strict=True):
        agent.groups[group(1)].captured = index
    view = view_of(agents)
    chosen = candidates(view, view.groups[REALM, group(1)])
    assert [member.hsm[0] for member in chosen] == expected


def test_candidates_prefer_idle_and_undrained() -> None:
    """Less work goes first whatever the capture; drained HSMs come last; an excluded one not at all."""
    agents = three(groups=2)
    agents[0].lead(group(2), FULL)
    view = view_of(agents)
    wanted = view.groups[REALM, group(1)]
    assert [member.hsm[0] for member in candidates(view, wanted)] == [2, 3, 1]
    assert [member.hsm[0] for member in candidates(view, wanted, drained={hsm(2)})] == [3, 1, 2]
    assert [member.hsm[0] for member in candidates(view, wanted, exclude=hsm(3))] == [2, 1]


def test_exclusion_is_dropped_for_a_group_of_one() -> None:
    """A group with a single member gets it back even when it is excluded."""
    agent = FakeAgent("tls://a1", hsm(1), groups={group(1): FakeGroup([hsm(1)])})
    view = view_of([agent])
    assert [member.hsm[0] for member in candidates(view, view.groups[REALM, group(1)], exclude=hsm(1))] == [1]


def test_an_hsm_with_a_copy_is_not_appointed() -> None:
    """Neither the original nor the copy is asked to lead, even if nobody else is left; its leadership is still seen."""
    agents = three()
    agents[0].lead(group(1), FULL)
    view = view_of([*agents, replace(agents[1], url="tls://copy"), FakeAgent("tls://zz", agents[0].hsm)])
    wanted = view.groups[REALM, group(1)]
    assert [member.hsm[0] for member in candidates(view, wanted)] == [3]
    assert wanted.leader is not None
    assert wanted.leader.url == agents[0].url, "the copy's silence about the group hides no leader"
    view = view_of([agents[1], replace(agents[1], url="tls://copy")])
    assert candidates(view, view.groups[REALM, group(1)]) == []
    assert [load.hsm for load in loads(view) if load.drained] == [hsm(2)], "nor is a leadership moved to it"
