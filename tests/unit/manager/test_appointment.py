"""Appointing leaders: who is chosen, when the pass acts, and what a hint does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from juicebox_hsm.adapters.faults.store import with_faults
from juicebox_hsm.adapters.faults.switch import ENVIRONMENT, Faults, FaultSwitch
from juicebox_hsm.host.cluster.view import AgentView, build_view
from juicebox_hsm.ids import OwnedRange, RecordId
from juicebox_hsm.wire.rpc import GroupRole, LeaderLost, Rebalanced, Refusal, Refused
from roles.manager.appointment import Appointer
from roles.manager.context import ManagerContext
from roles.manager.rebalance import rebalance
from tests.host.cluster.agents import FULL, REALM, FakeAgent, FakeGroup, group, hsm, record, three
from tests.unit.manager.fakes import FakeLeases, FakeRpc, FakeSettings, make_context


def _leaders(agents: list[FakeAgent], number: int = 1) -> list[int]:
    return [agent.hsm[0] for agent in agents if agent.groups[group(number)].role is GroupRole.LEADER]


def _rpc(context: ManagerContext) -> FakeRpc:
    assert isinstance(context.rpc, FakeRpc)
    return context.rpc


async def test_leaderless_group_gets_one_leader(autojump_clock: trio.testing.MockClock) -> None:
    """When every member answers and none leads, the first pass appoints exactly one."""
    agents = three()
    await Appointer(make_context(agents)).run_pass()
    assert _leaders(agents) == [1]


async def test_led_groups_are_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    """A group with a leader is never asked to change."""
    agents = three()
    agents[1].lead(group(1), FULL)
    context = make_context(agents)
    for _ in range(3):
        await Appointer(context).run_pass()
        await trio.sleep(2)
    assert not _rpc(context).methods("become_leader", "stepdown")


async def test_one_lost_reply_starts_no_duel(autojump_clock: trio.testing.MockClock) -> None:
    """A leader that is silent in one read keeps its leadership; silent in two, it is replaced."""
    agents = three()
    agents[0].lead(group(1), FULL)
    context = make_context(agents)
    appointer = Appointer(context)
    agents[0].down = True
    await appointer.run_pass()
    assert not _rpc(context).methods("become_leader")
    agents[0].down = False
    await trio.sleep(2)
    await appointer.run_pass()
    agents[0].down = True
    await trio.sleep(2)
    await appointer.run_pass()
    assert not _rpc(context).methods("become_leader")
    await trio.sleep(2)
    await appointer.run_pass()
    assert _leaders(agents[1:]) == [2]


async def test_busy_lease_is_respected(autojump_clock: trio.testing.MockClock) -> None:
    """While another manager holds the group's lease, this one does nothing."""
    agents = three()
    context = make_context(agents)
    leases = context.store.leases
    assert isinstance(leases, FakeLeases)
    await leases.obtain(f"{REALM.hex()}-{group(1).hex()}", "other", context.now_ms(), 3000)
    await Appointer(context).run_pass()
    assert not _rpc(context).methods("become_leader")


async def test_looks_again_under_the_lease(autojump_clock: trio.testing.MockClock) -> None:
    """A leader that another manager appointed between the first look and the lease is not deposed."""
    agents = three()
    context = make_context(agents)
    seen = 0

    def appoint_meanwhile(_: str, method: str) -> None:
        nonlocal seen
        seen += method == "status"
        if seen == 4:  # the first look took three calls
            agents[2].lead(group(1), FULL)

    _rpc(context).on_call = appoint_meanwhile
    await Appointer(context).run_pass()
    assert not _rpc(context).methods("become_leader")


async def test_orphans_are_spread(autojump_clock: trio.testing.MockClock) -> None:
    """Several orphaned groups are not all given to the same idle HSM."""
    agents = three(groups=3)
    await Appointer(make_context(agents)).run_pass()
    assert sorted(_leaders(agents, 1) + _leaders(agents, 2) + _leaders(agents, 3)) == [1, 2, 3]


async def test_refusals_pass_to_the_next_candidate(autojump_clock: trio.testing.MockClock) -> None:
    """A member that refuses, or does not answer, does not end the search."""
    agents = three()
    agents[0].refuse["become_leader"] = Refused(Refusal.NOT_CAPTURED, index=3)
    context = make_context(agents)
    await Appointer(context).run_pass()
    assert _leaders(agents) == [2]


async def test_all_refuse_then_one_recovers(autojump_clock: trio.testing.MockClock) -> None:
    """When nobody can lead the pass ends in peace, and the next one tries again."""
    agents = three()
    for agent in agents:
        agent.refuse["become_leader"] = Refused(Refusal.NO_STORE)
    appointer = Appointer(make_context(agents))
    await appointer.run_pass()
    assert _leaders(agents) == []
    agents[1].refuse.clear()
    await appointer.run_pass()
    assert _leaders(agents) == [2]


async def test_one_failing_group_does_not_stop_the_others(autojump_clock: trio.testing.MockClock) -> None:
    """A group whose member is unreachable at the wrong moment leaves the other groups their leader."""
    agents = [*three(), FakeAgent("tls://a4", hsm(4), groups={group(9): FakeGroup([hsm(4)])})]
    agents[3].refuse["become_leader"] = Refused(Refusal.TIMEOUT)
    await Appointer(make_context(agents)).run_pass()
    assert _leaders(agents[:3]) == [1]


async def test_hint_appoints_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """A member's report replaces a killed leader without waiting for a second read."""
    agents = three()
    agents[0].lead(group(1), FULL, starting=6)
    agents[0].down = True
    context = make_context(agents)
    await Appointer(context).leader_lost(LeaderLost(REALM, group(1), 6))
    assert _leaders(agents[1:]) == [2]
    assert trio.current_time() < 0.6


async def test_hint_about_an_old_leadership_is_ignored(autojump_clock: trio.testing.MockClock) -> None:
    """A late report does not depose the leader that came after the lost one."""
    agents = three()
    agents[2].lead(group(1), FULL, starting=20)
    context = make_context(agents)
    await Appointer(context).leader_lost(LeaderLost(REALM, group(1), 6))
    assert not _rpc(context).methods("become_leader")


async def test_false_alarm_changes_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """A leader that answers with the very leadership that was called lost stays."""
    agents = three()
    agents[2].lead(group(1), FULL, starting=6)
    context = make_context(agents)
    await Appointer(context).leader_lost(LeaderLost(REALM, group(1), 6))
    assert not _rpc(context).methods("become_leader")


async def test_older_claim_does_not_hide_a_loss(autojump_clock: trio.testing.MockClock) -> None:
    """A deposed leader that has not noticed, while others captured what beat it, does not count as a leader."""
    agents = three()
    agents[0].lead(group(1), FULL, starting=3)
    agents[1].lead(group(1), FULL, starting=6)
    agents[1].down = True
    agents[2].groups[group(1)].captured = 6
    context = make_context(agents)
    await Appointer(context).leader_lost(LeaderLost(REALM, group(1), 6))
    assert len(_rpc(context).methods("become_leader")) == 1


@pytest.mark.parametrize(("written", "captured"), [(6, 6), (5, 5), (9, 12)])
async def test_older_leader_that_was_not_beaten_stays(
    autojump_clock: trio.testing.MockClock, written: int, captured: int
) -> None:
    """A leader that beat the reported one, or whom it never wrote past, is left in place."""
    agents = three()
    agents[0].groups[group(1)].captured = written
    agents[0].lead(group(1), FULL, starting=3)
    agents[2].groups[group(1)].captured = captured  # a status asked a moment later may be ahead
    context = make_context(agents)
    context.state.announced.add((REALM, group(1)))
    await Appointer(context).leader_lost(LeaderLost(REALM, group(1), 6))
    assert not _rpc(context).methods("become_leader")
    assert not context.state.announced


def test_what_a_leader_wrote_comes_from_its_agent() -> None:
    """The agent knows what the store acknowledged; an HSM's last entry may never have been written."""
    agent = three()[0].lead(group(1), FULL, starting=3)
    status = agent.status()
    own = msgspec.structs.replace(status.groups[0], last_appended=(17, bytes(32)))
    for groups, written in (([own], 17), (status.groups, 5), ([], 5)):
        view = build_view([AgentView(agent.url, msgspec.structs.replace(status, groups=groups))])
        assert view.groups[REALM, group(1)].members[0].written_index == written


async def test_a_leader_stepping_down_may_finish(autojump_clock: trio.testing.MockClock) -> None:
    """While a leader releases what it has in flight nobody is put in its place, but not for ever."""
    agents = three()
    agents[0].lead(group(1), FULL)
    agents[0].groups[group(1)].role = GroupRole.STEPPING_DOWN
    context = make_context(agents)
    appointer = Appointer(context)
    await appointer.run_pass()
    assert not _rpc(context).methods("become_leader")
    await trio.sleep(1)
    await appointer.run_pass()
    assert len(_rpc(context).methods("become_leader")) == 1


async def test_hints_are_coalesced(autojump_clock: trio.testing.MockClock) -> None:
    """All members report the same loss; one leader is appointed, once."""
    agents = three()
    context = make_context(agents)
    appointer = Appointer(context)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(appointer.leader_lost, LeaderLost(REALM, group(1), 6))
    assert len(_rpc(context).methods("become_leader")) == 1


async def test_hint_is_tried_again_when_all_refuse(autojump_clock: trio.testing.MockClock) -> None:
    """A candidate that needs a moment to catch up is asked again soon."""
    agents = three()
    context = make_context(agents)
    for agent in agents:
        agent.refuse["become_leader"] = Refused(Refusal.NOT_CAPTURED)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Appointer(context).leader_lost, LeaderLost(REALM, group(1), 6))
        await trio.sleep(0.3)
        agents[2].refuse.clear()
    assert _leaders(agents) == [3]
    assert trio.current_time() < 1.0


async def test_drained_hsm_is_appointed_only_when_nothing_else_is_left(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A drained HSM leads rather than nobody."""
    agents = three()
    context = make_context(agents)
    settings = context.store.settings
    assert isinstance(settings, FakeSettings)
    settings.rows[f"drain/{hsm(1).hex()}"] = b"operator"
    await Appointer(context).run_pass()
    assert _leaders(agents) == [2]
    agents[1].groups[group(1)].role = GroupRole.WITNESS
    agents[1].refuse["become_leader"] = agents[2].refuse["become_leader"] = Refused(Refusal.NO_STORE)
    await Appointer(context).run_pass()
    assert _leaders(agents) == [1]


async def test_an_announcement_that_came_to_nothing_is_forgotten(autojump_clock: trio.testing.MockClock) -> None:
    """A group once announced as leaderless and led all the same gets the patience of any other group back."""
    agents = three()
    agents[0].lead(group(1), FULL)
    context = make_context(agents)
    context.state.announced.add((REALM, group(1)))
    appointer = Appointer(context)
    await appointer.run_pass()
    agents[0].down = True
    await appointer.run_pass()
    agents[0].down = False
    await appointer.run_pass()
    assert _leaders(agents) == [1]
    assert not _rpc(context).methods("become_leader")


@pytest.mark.parametrize("bad", [OwnedRange(RecordId(b""), RecordId(b"")), OwnedRange(record("80"), record("7f"))])
async def test_malformed_ranges_of_an_agent_disturb_nobody(
    autojump_clock: trio.testing.MockClock, bad: OwnedRange
) -> None:
    """An agent that reports nonsense as its range cannot end the passes of a manager."""
    agents = three(groups=2)
    agents[0].lead(group(1), bad)
    context = make_context(agents)
    await Appointer(context).run_pass()
    assert _leaders(agents, 2)
    assert isinstance(await rebalance(context, Appointer(context)), Rebalanced)


def _rivals(agents: list[FakeAgent], faults_dir: Path) -> tuple[ManagerContext, ManagerContext]:
    """Return two managers of one realm, the second with the opposite taste; neither minds leases."""
    first = make_context(agents)
    contexts = []
    for name, faults in (
        ("manager1", Faults(ignores_leases=True)),
        ("manager2", Faults(ignores_leases=True, reversed_candidates=True)),
    ):
        (faults_dir / f"{name}.json").write_text(faults.to_json())
        switch = FaultSwitch.from_environment(name)
        contexts.append(replace(first, name=name, store=with_faults(first.store, switch), faults=switch))
    return contexts[0], contexts[1]


@pytest.mark.parametrize("faulty", [True, False])
async def test_rival_managers_appoint_different_leaders(
    autojump_clock: trio.testing.MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faulty: bool
) -> None:
    """Two managers at one group's loss: with leases one of them acts, without they make two members lead at once."""
    if faulty:
        monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    agents = three()
    managers = _rivals(agents, tmp_path)
    async with trio.open_nursery() as nursery:
        for manager in managers:
            nursery.start_soon(Appointer(manager).leader_lost, LeaderLost(REALM, group(1), 6))
    assert _leaders(agents) == ([1, 3] if faulty else [1])
    asked = [url for url, _ in _rpc(managers[0]).methods("become_leader")]
    assert sorted(asked) == (["tls://a1", "tls://a3"] if faulty else ["tls://a1"])


async def test_a_group_with_two_leaders_is_left_to_its_log(
    autojump_clock: trio.testing.MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Managers that see both leaders of a duel add no third one, neither in a pass nor for a report."""
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    agents = three()
    agents[0].lead(group(1), FULL, starting=6)
    agents[2].lead(group(1), FULL, starting=6)
    for manager in _rivals(agents, tmp_path):
        appointer = Appointer(manager)
        await appointer.run_pass()
        await appointer.leader_lost(LeaderLost(REALM, group(1), 6))
        assert not _rpc(manager).methods("become_leader")
