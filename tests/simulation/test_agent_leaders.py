"""Who counts as the leader when several lead: members that hear them, and what they tell the managers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import trio

from juicebox_hsm.ids import GroupId
from juicebox_hsm.wire.rpc import AppOk, Done
from roles.agent.lost import LEADERSHIPS_MAX, LeaderWatch
from roles.agent.state import Claim
from tests.simulation.cluster import QUICK, Caller, SimAgent, Simulation, simulation, until
from tests.simulation.test_agent_groups import all_at_end

HEARTBEATS_PER_SILENCE = round(QUICK.silence_s / QUICK.heartbeat_s)


async def heartbeats(member: SimAgent, count: int) -> None:
    """Wait until `member` was called `count` times by leaders."""
    handler = member.handlers["replicate"]
    called = 0

    async def counting(body: object, caller: object) -> object:
        nonlocal called
        called += 1
        return await handler(body, caller)

    member.handlers = {**member.handlers, "replicate": counting}
    await until(lambda: called >= count)
    member.handlers = {**member.handlers, "replicate": handler}


async def with_rival(sim: Simulation, entries: int = 3) -> tuple[GroupId, SimAgent, SimAgent, SimAgent]:
    """Make a rival whose leadership began after the old one's; returns group, old leader, rival, the third."""
    group = await sim.new_realm(3)
    await sim.settle_peers()
    old = sim.leader_of(group)
    assert old is not None
    rival, third = (member for member in sim.agents if member is not old)
    for number in range(entries):
        assert isinstance(await old.call("app", sim.register1(group, f"user{number}")), AppOk)
    await all_at_end(sim, group)
    sim.manager.appoints = False
    assert isinstance(await sim.become_leader(rival, group), Done)
    await heartbeats(third, 4)
    sim.manager.hints.clear()
    return group, old, rival, third


async def test_older_leader_that_wins_a_duel_is_not_lost(tmp_path: Path) -> None:
    """An idle rival that began later and was beaten leaves the group with the older leader, whom nobody reports."""
    async with simulation(tmp_path) as sim:
        group, old, rival, third = await with_rival(sim)
        assert rival.group(group).leader.starting > old.group(group).leader.starting
        assert isinstance(await old.call("app", sim.register1(group, "winner")), AppOk)
        await until(lambda: rival.group(group).leader is None)
        async with trio.open_nursery() as nursery:
            for member in (rival, third):
                nursery.start_soon(heartbeats, member, 3 * HEARTBEATS_PER_SILENCE)
        assert old.group(group).leader is not None
        assert sim.manager.hints == []


async def test_idle_rival_that_dies_leaves_the_older_leader(tmp_path: Path) -> None:
    """When the later of two idle leaders dies, the older one leads and is not reported, until it dies too."""
    async with simulation(tmp_path) as sim:
        group, old, rival, third = await with_rival(sim)
        started = rival.group(group).leader.starting
        rival.kill()
        await rival.closed.wait()
        await heartbeats(third, 3 * HEARTBEATS_PER_SILENCE)
        assert sim.manager.hints == []
        old.kill()
        await until(lambda: sim.manager.hints)
        assert sim.manager.hints[0] == (group, started)


async def test_beaten_leader_that_has_not_noticed_does_not_hide_a_loss(tmp_path: Path) -> None:
    """A leader that was beaten and cannot see it speaks on; the one that beat it is missed all the same."""
    async with simulation(tmp_path) as sim:
        group, old, rival, third = await with_rival(sim)
        sim.cut.add(frozenset((old.name, rival.name)))
        blind(old)
        assert isinstance(await rival.call("app", sim.register1(group, "winner")), AppOk)
        started = rival.group(group).leader.starting
        rival.kill()
        await until(lambda: sim.manager.hints)
        assert sim.manager.hints[0] == (group, started)
        assert old.group(group).leader is not None
        assert third.group(group).leader is None


def blind(member: SimAgent) -> None:
    """Let an agent see nothing new in its log, as behind a store that hangs."""

    async def nothing(*_: object) -> list[object]:
        await trio.lowlevel.checkpoint()
        return []

    member.log.read_from = nothing  # type: ignore[attr-defined]


class Watched:
    """One member's `LeaderWatch` with a clock and streams of its own, over a real agent that leads nothing."""

    def __init__(self, member: SimAgent, group: GroupId) -> None:
        self.agent = member.agent
        self.group = member.group(group)
        self.watch = LeaderWatch(member.agent)

    def hears(self, last: int, starting: int) -> trio.Event:
        """Hear a leadership now; returns the event that ends its stream."""
        caller = Caller(1, trio.Event())
        self.watch.heard(self.group, Claim(last, starting), caller)
        return caller.closed

    def due(self, later_s: float = 0.0) -> int | None:
        """Return the leadership that is reported after `later_s` without a word."""
        return self.watch._due(self.group, trio.current_time() + later_s)


@dataclasses.dataclass
class Left:
    """A case of a leadership of our own that ended unasked as `left`, after `heard` and before `later`."""

    left: Claim
    heard: Claim | None
    later: Claim | None
    reported: int | None


@pytest.mark.parametrize(
    "case",
    [
        Left(Claim(8, 6), heard=None, later=None, reported=6),
        Left(Claim(8, 6), heard=Claim(5, 3), later=None, reported=6),  # its last words were before our time
        Left(Claim(8, 6), heard=Claim(8, 3), later=None, reported=6),  # ranks below us
        Left(Claim(8, 6), heard=Claim(8, 9), later=None, reported=None),  # began after us and speaks
        Left(Claim(5, 6), heard=Claim(6, 3), later=None, reported=None),  # older, and wrote past us
        Left(Claim(8, 6), heard=Claim(5, 3), later=Claim(7, 3), reported=6),  # speaks on, though we wrote past it
        Left(Claim(8, 6), heard=None, later=Claim(8, 3), reported=None),  # speaks on, and may still write
    ],
)
async def test_a_leadership_left_unasked_is_reported_unless_another_speaks(tmp_path: Path, case: Left) -> None:
    """No hint while a leader that may still write speaks; and one at once when only older words are known."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        member = next(a for a in sim.agents if a is not sim.leader_of(group))
        watched = Watched(member, group)
        if case.heard is not None:
            watched.hears(*case.heard)
        watched.agent.lost_hints[sim.realm, group] = case.left
        if case.later is not None:
            watched.hears(*case.later)
        assert watched.due() == case.reported
        assert ((sim.realm, group) in watched.agent.lost_hints) == (case.reported is not None)


async def test_members_fall_back_to_whoever_still_speaks(tmp_path: Path) -> None:
    """Leaders that may write next count in any order; one that is silent, closed or beaten does not."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        member = next(a for a in sim.agents if a is not sim.leader_of(group))
        watched = Watched(member, group)
        first = watched.hears(8, 3)
        second = watched.hears(8, 9)
        second.set()
        assert watched.due() == 9  # the older one has not spoken since
        watched.hears(8, 3)
        assert watched.due() is None
        assert watched.due(QUICK.silence_s) == 9
        first.set()
        watched.hears(9, 9)
        watched.hears(8, 3).set()  # beaten: nothing it says counts
        assert watched.due() is None
        assert watched.due(QUICK.silence_s) == 9
        assert watched.due(QUICK.silence_s) is None  # not again before its time
        assert watched.due(QUICK.silence_s + QUICK.leader_hint_again_s) == 9


async def test_made_up_leaderships_are_bounded(tmp_path: Path) -> None:
    """A peer that invents leaderships fills no memory and hides no real one."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        member = next(a for a in sim.agents if a is not sim.leader_of(group))
        watched = Watched(member, group)
        for starting in range(1000, 0, -1):
            watched.hears(1000, starting)
        [heard] = watched.watch._heard.values()
        assert len(heard.spoke) == LEADERSHIPS_MAX
        watched.hears(1001, 1002)
        assert list(heard.spoke) == [1002]
