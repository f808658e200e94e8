"""Who is asked to lead, and in which order."""

from __future__ import annotations

import pytest

from juicebox_hsm.host.cluster.appointment import candidates
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
