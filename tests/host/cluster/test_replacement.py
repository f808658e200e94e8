"""Replacing lost HSMs one step at a time, whatever was done before."""

from __future__ import annotations

import pytest

from juicebox_hsm.host.cluster.replacement import (
    Join,
    Make,
    Move,
    ReplacementRefused,
    ReplacementStep,
    Retire,
    next_step,
    pending_towards,
    propose,
)
from juicebox_hsm.host.cluster.view import AgentView, ClusterView, build_view
from juicebox_hsm.ids import FULL_RANGE, OwnedRange, RealmId
from juicebox_hsm.wire import rpc
from tests.host.cluster.agents import OTHER_REALM, REALM, FakeAgent, FakeGroup, group, hsm, record, three

NEW = "tls://new"
LOW, HIGH = OwnedRange(record("00"), record("7f", 0xFF)), OwnedRange(record("80"), record("ff", 0xFF))


def _view(agents: list[FakeAgent]) -> ClusterView:
    return build_view([AgentView(a.url, None, "down") if a.down else AgentView(a.url, a.status()) for a in agents])


def _realm() -> list[FakeAgent]:
    """Return three agents, the third dead, in two groups that own half each, and a fresh one."""
    agents = three(groups=2)
    agents[0].lead(group(1), LOW)
    agents[1].lead(group(2), HIGH)
    agents[2].down = True
    return [*agents, FakeAgent(NEW, hsm(4))]


def _step(agents: list[FakeAgent]) -> ReplacementStep | None:
    return next_step(_view(agents), REALM, {hsm(3): NEW})


def _carry_out(agents: list[FakeAgent], step: ReplacementStep, number: int) -> None:
    """Change the realm as a step would; a made group gets this number."""
    match step:
        case Make(urls=urls):
            members = sorted(agent.hsm for agent in agents if agent.url in urls)
            for agent in agents:
                if agent.url in urls:
                    agent.groups[group(number)] = FakeGroup(list(members))
            next(agent for agent in agents if agent.url == urls[0]).lead(group(number))
        case Move(old=old, new=new, range=moved):
            for agent in agents:
                for key, owned in ((old, None), (new, moved)):
                    if key in agent.groups and agent.groups[key].role is rpc.GroupRole.LEADER:
                        agent.groups[key].owned = owned
        case Retire(group=ended):
            for agent in agents:
                if not agent.down:
                    agent.groups.pop(ended, None)


def test_all_groups_of_a_lost_hsm_are_replaced() -> None:
    """Every step follows from what is there: two groups are made, take over and the old ones end; then nothing is left.

    A run that is broken off goes on, because each step is found from a fresh look.
    """
    agents = _realm()
    agents[3].realm = REALM
    taken = []
    for number in range(10, 30):
        step = _step(agents)
        if step is None:
            break
        taken.append(type(step))
        _carry_out(agents, step, number)
    assert taken == [Make, Move, Retire] * 2
    view = _view(agents)
    serving = [found for found in view.groups_of(REALM) if found.owned_range is not None]
    assert [found.configuration for found in serving] == [(hsm(1), hsm(2), hsm(4))] * 2
    assert {found.owned_range for found in serving} == {LOW, HIGH}
    assert all(hsm(3) not in found.configuration for found in view.groups_of(REALM))


def test_the_new_hsm_joins_first() -> None:
    """A new HSM in no realm joins; one of another realm, a silent one and one that is itself replaced are refused."""
    agents = _realm()
    fresh = agents[3].status()
    assert fresh.hsm is not None
    homeless = rpc.AgentStatus(1.0, rpc.HsmInfo(fresh.hsm.id, None, b"k" * 32), NEW, "build", [])
    view = build_view([*(AgentView(a.url, a.status()) for a in agents[:2]), AgentView(NEW, homeless)])
    assert next_step(view, REALM, {hsm(3): NEW}) == Join(NEW)
    agents[3].realm = OTHER_REALM
    with pytest.raises(ReplacementRefused, match="can never leave"):
        _step(agents)
    agents[3].realm = REALM
    with pytest.raises(ReplacementRefused, match="one of those"):
        next_step(_view(agents), REALM, {hsm(3): NEW, hsm(4): "tls://a1"})
    agents[3].down = True
    with pytest.raises(ReplacementRefused, match="no answer"):
        _step(agents)


def test_what_must_be_seen_to_first() -> None:
    """A group without a leader, one in a transfer, and another silent member are named, each with what to do."""
    agents = _realm()
    agents[0].groups[group(1)].role = rpc.GroupRole.WITNESS
    with pytest.raises(ReplacementRefused, match="no leader"):
        _step(agents)
    agents[0].lead(group(1), LOW)
    marker = rpc.TransferringInfo(rpc.Direction.OUT, group(2), rpc.Range(LOW.start, LOW.end), 5, b"h" * 32)
    agents[0].groups[group(1)].transferring = marker
    with pytest.raises(ReplacementRefused, match="transfer pending"):
        _step(agents)
    agents[0].groups[group(1)].transferring = None
    for agent in agents[:3]:
        agent.groups[group(1)].configuration = [hsm(1), hsm(2), hsm(3), hsm(8), hsm(9)]
    with pytest.raises(ReplacementRefused, match=f"{hsm(8).hex()}, another member"):
        _step(agents)


def test_two_lost_hsms_are_replaced_together() -> None:
    """A group that lost two of five gets both new ones at once; the leader's agent leads the new group."""
    members: list[bytes] = [hsm(number) for number in (1, 2, 3, 8, 9)]
    agents = [FakeAgent(f"tls://a{n}", hsm(n), groups={group(1): FakeGroup(list(members))}) for n in (1, 2, 3)]
    agents[1].lead(group(1), FULL_RANGE)
    agents += [FakeAgent("tls://x", hsm(4)), FakeAgent("tls://y", hsm(5))]
    step = next_step(_view(agents), REALM, {hsm(8): "tls://x", hsm(9): "tls://y"})
    assert isinstance(step, Make)
    assert step.urls[0] == "tls://a2"
    assert set(step.urls) == {agent.url for agent in agents}


def test_a_group_is_not_ended_while_a_transfer_names_it() -> None:
    """An emptied group that another group's transfer goes to is not retired: the range would be stranded."""
    agents = _realm()
    agents[1].groups[group(2)].owned = None
    marker = rpc.TransferringInfo(rpc.Direction.OUT, group(2), rpc.Range(LOW.start, LOW.end), 5, b"h" * 32)
    for agent in agents[:2]:
        agent.groups[group(1)].configuration = [hsm(1), hsm(2), hsm(7)]
    agents[0].groups[group(1)].transferring = marker
    with pytest.raises(ReplacementRefused, match="names group"):
        _step(agents)
    assert pending_towards(_view(agents), REALM, group(2)) == group(1)
    assert pending_towards(_view(agents), RealmId(bytes(16)), group(2)) is None


def test_a_group_without_majority_that_nobody_misses_is_left() -> None:
    """A group that can never end, as its majority is gone, does not keep the others from being replaced."""
    agents = _realm()
    agents[0].groups[group(0)] = FakeGroup([hsm(1), hsm(3), hsm(9)])
    step = _step(agents)
    assert isinstance(step, Make)
    assert step.old == group(1)
    agents[1].groups[group(2)].owned = None
    with pytest.raises(ReplacementRefused, match="no leader"):
        _step(agents)


def test_replacements_are_proposed_for_lost_hsms() -> None:
    """A member that no registered agent has is proposed for replacement, by the least busy HSM outside its groups."""
    agents = _realm()
    agents[3].realm = REALM
    view = _view([agent for agent in agents if not agent.down])
    spare = [view.hsms[hsm(number)] for number in (1, 2, 4)]
    assert propose(view, REALM, spare) == {hsm(3): NEW}
    assert propose(view, REALM, spare[:2]) == {hsm(3): None}, "the others are in its groups already"
    assert propose(view, OTHER_REALM, spare) == {}
    agents[2].down = False
    assert propose(_view(agents), REALM, spare) == {}
    for agent in agents[:3]:
        for known in agent.groups.values():
            known.ended = True
    agents[2].down = True
    assert propose(_view([agent for agent in agents if not agent.down]), REALM, spare) == {}, "ended groups miss nobody"
