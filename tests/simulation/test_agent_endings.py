"""Groups end: they are retired, their members' HSMs forget them by themselves, late ones too (agent.md 16)."""

from __future__ import annotations

from pathlib import Path

import trio

from juicebox_hsm.adapters.sqlite.check import check_file
from juicebox_hsm.consensus.macs import Macs
from juicebox_hsm.ids import GroupId
from juicebox_hsm.wire.rpc import Done, Empty, GroupCall, Range, Refusal, Refused
from tests.simulation.cluster import SimAgent, Simulation, simulation, until

FULL = Range(bytes(32), b"\xff" * 32)


async def retire(sim: Simulation, group: GroupId) -> None:
    """Retire a group at its leader; early on the leader asks for patience."""
    while True:
        leader = sim.leader_of(group)
        assert leader is not None
        done = await leader.call("group/retire", GroupCall(sim.realm, group))
        if isinstance(done, Done):
            return
        assert done.outcome is Refusal.BUSY, done
        await trio.sleep(0.05)


def knows(agent: SimAgent, group: GroupId) -> bool:
    """Tell whether an agent, and so its HSM, is a member."""
    return agent.agent.groups.get(agent.sim.realm, group) is not None


async def forgotten(sim: Simulation, group: GroupId, agents: list[SimAgent], timeout_s: float = 20.0) -> None:
    """Wait until these agents' HSMs have forgotten the group."""
    await until(lambda: not any(knows(agent, group) for agent in agents), timeout_s)
    for agent in agents:
        status = await agent.call("status", Empty())
        assert group not in [known.id for known in status.hsm.realm.groups]
        assert status.hsm.realm.generation > 0


async def test_a_retired_group_is_forgotten_by_all(tmp_path: Path) -> None:
    """All members forget a retired group, one row and the certificate stay, and the realm goes on."""
    async with simulation(tmp_path) as sim:
        first = await sim.new_realm(3)
        client = sim.client("alice")
        await client.register(b"1234", b"secret", b"", 3)
        second = await sim.new_group(sim.agents)
        await sim.transfer(first, second)
        await retire(sim, first)
        await forgotten(sim, first, sim.agents)
        assert len(await sim.store.log.list_rows(sim.realm, first, 2**40)) == 1, "the rest of the log is gone"
        last = await sim.store.log.read_last(sim.realm, first)
        certificate = await sim.store.log.read_certificate(sim.realm, first)
        assert last is not None
        assert certificate is not None
        assert last.retired
        assert certificate.index == last.index
        assert await client.recover(b"1234", b"") == b"secret"
        again = await sim.leader_of(second).call("group/retire", GroupCall(sim.realm, second))  # type: ignore[union-attr]
        assert again.outcome is Refusal.STILL_OWNER
        macs = {sim.realm: Macs(sim.keys.mac_key.expose())}
    report = check_file(tmp_path / "realm.db", macs, lambda *_: None)
    assert report.findings == [], "what is left of it is whole, and no range or tree is missed"
    assert report.groups == 3, "the one that the realm began with among them"


async def test_a_member_that_was_away_forgets_when_it_comes_back(tmp_path: Path) -> None:
    """An HSM that missed the end of its group, and much of the log, forgets it on its own once it is back."""
    async with simulation(tmp_path) as sim:
        first = await sim.new_realm(3)
        away = sim.agents[2]
        others = [agent for agent in sim.agents if agent is not away]
        away.kill()
        await away.closed.wait()
        for number in range(3):
            await sim.client(f"user{number}").register(b"1234", b"secret", b"", 3)
        second = await sim.new_group(others)
        await sim.transfer(first, second)
        await retire(sim, first)
        await forgotten(sim, first, others)
        await sim.restart(away)
        await forgotten(sim, first, [away])


async def test_a_leader_that_dies_after_the_end_is_not_needed(tmp_path: Path) -> None:
    """The leader is lost once the retired entry is committed: the others forget without one, and it when back."""
    async with simulation(tmp_path) as sim:
        sim.manager.appoints = False
        first = await sim.new_realm(3)
        second = await sim.new_group(sim.agents)
        await sim.transfer(first, second)
        await retire(sim, first)
        leader = sim.leader_of(first)
        assert leader is not None
        leader.kill()
        await leader.closed.wait()
        others = [agent for agent in sim.agents if agent is not leader]
        await forgotten(sim, first, others)
        await sim.restart(leader)
        await forgotten(sim, first, [leader])


async def test_a_member_is_replaced_twenty_times(tmp_path: Path) -> None:
    """Twenty replacements of a dead member: more groups than an HSM's sixteen places, and every guess still counts."""
    async with simulation(tmp_path) as sim:
        serving = await sim.new_realm(3)
        client = sim.client("alice")
        await client.register(b"1234", b"secret", b"", 3)
        stable = sim.agents[:2]
        last = sim.agents[2]
        for _ in range(20):
            last.kill()
            await last.closed.wait()
            sim.agents.remove(last)
            last = await sim.start_agent()
            replaced = serving
            serving = await sim.new_group([*stable, last])
            await sim.transfer(replaced, serving)
            await retire(sim, replaced)
            await forgotten(sim, replaced, stable)
        status = await stable[0].call("status", Empty())
        assert status.hsm.realm.generation == 20
        assert len(status.hsm.realm.groups) <= 2, "the realm's first group, and the one that serves"
        assert await client.recover(b"1234", b"") == b"secret"


async def test_nothing_is_retired_before_old_requests_are_recorded(tmp_path: Path) -> None:
    """A leader that has not yet resolved what its predecessors left refuses, so that no outcome is lost."""
    async with simulation(tmp_path) as sim:
        first = await sim.new_realm(3)
        second = await sim.new_group(sim.agents)
        await sim.transfer(first, second)
        leader = sim.leader_of(first)
        assert leader is not None
        away = next(agent for agent in sim.agents if agent is not leader)
        away.kill()
        await away.closed.wait()
        successor = await sim.hand_over_group(leader, first)
        assert successor is not None
        refused = await successor.call("group/retire", GroupCall(sim.realm, first))
        assert isinstance(refused, Refused)
        assert refused.outcome is Refusal.BUSY
        await retire(sim, first)
