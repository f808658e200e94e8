"""An agent on Bigtable and what a balancer sends: an odd tenant or user is no row key there, and ended a leadership."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from juicebox_hsm.host.log import Compacted
from juicebox_hsm.wire.rpc import AppOk, BecomeLeaderCall, Empty, GroupCall, Refusal
from tests.emulator.bigtable_backend import BigtableBackend
from tests.simulation.cluster import simulation, until
from tests.simulation.test_agent_edges import GARBAGE, refusal

pytestmark = pytest.mark.emulator
WAIT_S = 60.0


@pytest.fixture
def url(bigtable_emulator: str) -> str:
    """An instance of its own."""
    return f"bigtable:{BigtableBackend(bigtable_emulator).rest}"


async def test_a_bad_tenant_or_user_is_refused_before_the_hsm_is_asked(tmp_path: Path, url: str) -> None:
    """The leader refuses it, appends nothing and goes on leading."""
    async with simulation(tmp_path, url=url) as sim:
        group = await sim.new_realm(1)
        agent, good = sim.agents[0], sim.register1(group, "alice")
        for field in ("tenant", "user"):
            for value in GARBAGE[field]:
                reply = await agent.call("app", msgspec.structs.replace(good, **{field: value}))
                assert refusal(reply) is Refusal.DECODING_ERROR
        assert agent.log.appends == [1]
        assert sim.leader_of(group) is agent
        assert isinstance(await agent.call("app", good), AppOk)


async def test_an_intent_that_no_row_can_carry_blocks_nothing(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that an agent of an earlier version left is set aside, told, counted, and the log is compacted past it."""
    async with simulation(tmp_path, url=url) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        with monkeypatch.context() as earlier:  # it asked the HSM first and looked at the tenant afterwards
            earlier.setattr("roles.agent.app.is_well_formed", lambda _request: True)
            await agent.call("app", msgspec.structs.replace(sim.register1(group, "alice"), tenant=""))
        last = await sim.store.log.read_last(sim.realm, group)
        assert last is not None
        await agent.call_and_forget("stepdown", GroupCall(sim.realm, group))
        await until(lambda: sim.leader_of(group) is None, WAIT_S)
        await agent.call("become_leader", BecomeLeaderCall(sim.realm, group))
        await until(lambda: agent.agent.set_aside > 0, WAIT_S)
        assert agent.metrics.counter("agent.outbox.set_aside").value == 1
        assert "were set aside" in (await agent.call("status", Empty())).outbox.warning
        number = 0
        while not isinstance(await sim.store.log.read_from(sim.realm, group, last.index, 1), Compacted):
            assert isinstance(await agent.call("app", sim.register1(group, f"user {number}")), AppOk)
            number += 1
            assert number < 500, "the log is not compacted past the intent"
