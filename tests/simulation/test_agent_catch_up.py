"""Catch-up of members that fell behind compaction: every turn a jump can take before it succeeds (agent.md 7)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import trio

from juicebox_hsm.consensus.types import Certificate
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.log import Compacted
from juicebox_hsm.host.readiness import Trouble
from juicebox_hsm.ids import GroupId
from juicebox_hsm.wire.rpc import AppOk, Done
from roles.agent.registration import readyz
from tests.simulation.cluster import QUICK, SimAgent, Simulation, simulation, until
from tests.simulation.test_agent_groups import all_at_end
from tests.simulation.test_agent_leaders import blind


async def compacted_past(sim: Simulation, group: GroupId, leader: SimAgent, position: int) -> None:
    """Let the leader write until `position` is compacted."""
    with trio.fail_after(8):
        while not isinstance(await sim.store.log.read_from(sim.realm, group, position, 10), Compacted):
            assert isinstance(await leader.call("app", sim.register1(group, "alice")), AppOk)
            await trio.sleep(0.01)


def alone(sim: Simulation, member: SimAgent) -> set[frozenset[str]]:
    """Return the links between one agent and all others."""
    return {frozenset((member.name, other.name)) for other in sim.agents if other is not member}


def jumps(member: SimAgent, result: str) -> int:
    """Return how many jumps of an agent ended as `ok` or `retry`."""
    return member.metrics.counter("agent.catchup.jump", result=result).value


class Certificates:
    """What a member reads as its group's certificate: first the `answers`, then what the store holds."""

    def __init__(self, member: SimAgent, answers: list[Certificate | None]) -> None:
        self._member = member
        self._read = member.log.read_certificate
        self.answers = answers
        self.asked = trio.Event()
        self.proceed = trio.Event()
        self.proceed.set()
        member.log.read_certificate = self.read  # type: ignore[attr-defined]

    async def read(self, realm: object, group: object) -> Certificate | None:
        self.asked.set()
        await self.proceed.wait()
        if self.answers:
            return self.answers.pop(0)
        certificate: Certificate | None = await self._read(realm, group)
        return certificate


async def with_one_behind(sim: Simulation) -> tuple[GroupId, SimAgent, SimAgent, int]:
    """Cut a member off, from its log too, until that is compacted past it; returns group, leader, member, position."""
    group = await sim.new_realm(3)
    await sim.settle_peers()
    await all_at_end(sim, group)
    sim.manager.appoints = False
    leader = sim.leader_of(group)
    assert leader is not None
    behind = next(member for member in sim.agents if member is not leader)
    blind(behind)
    sim.cut |= alone(sim, behind)
    position = behind.group(group).position
    await compacted_past(sim, group, leader, position)
    return group, leader, behind, position


def unblind(member: SimAgent) -> None:
    """Let an agent see its log again."""
    del member.log.read_from


async def test_leader_behind_compaction_is_forced_down_and_jumps(tmp_path: Path) -> None:
    """A leader that slept while another one wrote and compacted leaves leadership at once, though it saw no entry."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        await sim.settle_peers()
        await all_at_end(sim, group)
        sim.manager.appoints = False
        old = sim.leader_of(group)
        assert old is not None
        blind(old)
        sim.cut |= alone(sim, old)
        new = next(member for member in sim.agents if member is not old)
        assert isinstance(await sim.become_leader(new, group), Done)
        position = old.group(group).position
        await compacted_past(sim, group, new, position)
        assert old.group(group).is_leader
        unblind(old)
        await until(lambda: old.group(group).position == new.group(group).leader.next_index)
        assert old.group(group).leader is None
        assert old.metrics.counter("agent.stepdown", forced="true").value == 1
        assert jumps(old, "ok") == 1


async def test_jump_without_a_certificate_waits_for_one(tmp_path: Path) -> None:
    """A member that finds no certificate tries again and catches up when there is one."""
    async with simulation(tmp_path) as sim:
        group, leader, behind, _ = await with_one_behind(sim)
        Certificates(behind, [None, None])
        unblind(behind)
        await until(lambda: behind.group(group).position == leader.group(group).leader.next_index)
        assert (jumps(behind, "retry"), jumps(behind, "ok")) == (2, 1)


async def test_jump_needs_a_majority(tmp_path: Path) -> None:
    """Captures of too few members move nobody; the member stays where it is until there are more."""
    async with simulation(tmp_path) as sim:
        group, leader, behind, position = await with_one_behind(sim)
        real = await sim.store.log.read_certificate(sim.realm, group)
        assert real is not None
        few = Certificates(behind, [dataclasses.replace(real, captures=real.captures[:1])] * 2)
        unblind(behind)
        await until(lambda: len(few.answers) == 1)
        assert behind.group(group).position == position
        await until(lambda: behind.group(group).position == leader.group(group).leader.next_index)
        assert jumps(behind, "ok") == 1


async def test_jump_that_comes_too_late_changes_nothing(tmp_path: Path) -> None:
    """A member that is pushed past the certificate while it reads it keeps what it captured and follows on."""
    async with simulation(tmp_path) as sim:
        group, leader, behind, _ = await with_one_behind(sim)
        certificates = Certificates(behind, [])
        certificates.proceed = trio.Event()
        unblind(behind)
        await certificates.asked.wait()
        sim.cut.clear()
        end = leader.group(group).leader.next_index
        await until(lambda: behind.group(group).position == end)
        certificates.proceed.set()
        await until(lambda: jumps(behind, "retry"))
        assert isinstance(await leader.call("app", sim.register1(group, "bob")), AppOk)
        await all_at_end(sim, group)
        assert jumps(behind, "ok") == 0


async def test_certificate_whose_rows_are_gone_is_read_again(tmp_path: Path) -> None:
    """Rows compacted between the certificate and their reading mean that there is a newer certificate."""
    async with simulation(tmp_path) as sim:
        group, leader, behind, _ = await with_one_behind(sim)
        old = await sim.store.log.read_certificate(sim.realm, group)
        assert old is not None
        await compacted_past(sim, group, leader, max(captured.index for captured in old.captures))
        Certificates(behind, [old])
        unblind(behind)
        await until(lambda: behind.group(group).position == leader.group(group).leader.next_index)
        assert (jumps(behind, "retry"), jumps(behind, "ok")) == (1, 1)


async def test_member_that_cannot_jump_for_long_is_not_ready(tmp_path: Path) -> None:
    """Catch-up may take its time unseen; past the limit the agent says so, and forgets it once it follows the log."""
    async with simulation(tmp_path, dataclasses.replace(QUICK, catch_up_unready_s=1.0)) as sim:
        group, leader, behind, _ = await with_one_behind(sim)
        nothing = Certificates(behind, [None] * 1000)
        unblind(behind)
        await until(lambda: len(nothing.answers) <= 998)
        assert not behind.agent.troubles
        await until(lambda: behind.agent.troubles)
        (trouble,) = (await readyz(behind.agent)).reasons
        assert isinstance(trouble, Trouble)
        assert (trouble.code, trouble.group) == (Code.LOG_NOT_FOLLOWED, group)
        assert "is compacted and no certificate helps yet" in trouble.said
        nothing.answers.clear()
        await until(lambda: behind.group(group).position == leader.group(group).leader.next_index)
        await until(lambda: not behind.agent.troubles)
