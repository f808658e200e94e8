"""Groups of five and nine members: how many may be lost, and what happens beyond that."""

from __future__ import annotations

from pathlib import Path

import trio
import trio.testing

from juicebox_hsm.wire.rpc import AppOk
from tests.simulation.cluster import SimAgent, Simulation, simulation, until
from tests.simulation.test_agent_groups import all_at_end


async def lose(*members: SimAgent) -> None:
    """Kill agents and wait for their ends."""
    for member in members:
        member.kill()
        await member.closed.wait()


async def bring_back(sim: Simulation, *members: SimAgent) -> None:
    """Start killed agents again with their NVRAM."""
    for member in members:
        await sim.restart(member)


async def test_five_members_survive_two_and_wait_for_the_third(tmp_path: Path) -> None:
    """Two of five may go; without the third nothing commits and nothing is lost; one that returns lets all go on."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(5)
        await sim.settle_peers()
        client = sim.client("alice")
        await client.register(b"1234", b"secret", b"info", 3)
        leader = sim.leader_of(group)
        assert leader is not None
        first, second, third, fourth = (member for member in sim.agents if member is not leader)
        await lose(first, second)
        assert await client.recover(b"1234", b"info") == b"secret"
        await all_at_end(sim, group)
        await lose(third)
        state = leader.group(group).leader._state
        await until(lambda: state.committed == state.next_index - 1)
        committed = state.committed
        replies: list[object] = []

        async def ask() -> None:
            replies.append(await leader.call("app", sim.register1(group, "bob")))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await until(lambda: fourth.group(group).captured.index == committed + 1)
            await until(lambda: len(state.votes) == 5 and state.votes[fourth.hsm_id].index == committed + 1)
            await trio.testing.wait_all_tasks_blocked()
            assert (state.committed, replies) == (committed, [])
            await bring_back(sim, second)
            with trio.fail_after(5):
                while not replies:  # noqa: ASYNC110 - tests look from outside
                    await trio.sleep(0.01)
        assert isinstance(replies[0], AppOk)
        assert await client.recover(b"1234", b"info") == b"secret"
        await bring_back(sim, first, third)
        await all_at_end(sim, group)


async def test_nine_members_survive_four_with_their_leader(tmp_path: Path) -> None:
    """The largest group goes on with five of nine, under a new leader, and all nine follow the log in the end."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(9)
        await sim.settle_peers()
        sim.patience_s = 5.0
        client = sim.client("alice")
        await client.register(b"1234", b"secret", b"info", 3)
        leader = sim.leader_of(group)
        assert leader is not None
        lost = [leader, *[member for member in sim.agents if member is not leader][:3]]
        await lose(*lost)
        assert await client.recover(b"1234", b"info") == b"secret"
        assert sim.leader_of(group) not in lost
        await bring_back(sim, *lost)
        await all_at_end(sim, group)
        assert await client.recover(b"1234", b"info") == b"secret"
