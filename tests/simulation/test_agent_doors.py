"""Each method of an agent at its door: whatever a peer sends, it is refused as documented and nothing else happens."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from juicebox_hsm.errors import RealmError
from juicebox_hsm.wire.methods import AGENT_METHODS, AGENT_STATUS, REALM_NEW, AnyMethod
from juicebox_hsm.wire.rpc import AppOk, Empty, Refused
from roles.agent.service import FATAL
from tests.bodies import bodies_of
from tests.examples import examples
from tests.simulation.cluster import Caller, simulation

METHODS = [method for method in AGENT_METHODS.values() if method not in (AGENT_STATUS, REALM_NEW)]
ANSWER_S = 60.0
"""On the virtual clock; the longest that a body waits for anything is a transfer's step."""


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@given(data=st.data())
@settings(examples(5), suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_body_is_answered(
    tmp_path_factory: pytest.TempPathFactory, method: AnyMethod, data: st.DataObject
) -> None:
    """An answer of the method's types in limited time; a refusal leaves the HSM's state and the log as they were."""
    path: Path = tmp_path_factory.mktemp("doors")
    async with simulation(path) as sim:
        group = await sim.new_realm(1)
        agent, other = sim.agents[0], await sim.start_agent()
        known = [sim.realm, group, agent.hsm_id, other.hsm_id, bytes(32)]
        for _ in range(8):
            body = data.draw(bodies_of(method, known))
            before = agent.platform.nvram_read(), list(agent.log.appends)
            try:
                with trio.fail_after(ANSWER_S):
                    reply = await agent.handlers[method.name](body, Caller(0, agent.closed))
            except FATAL:
                raise
            except RealmError:
                reply = Refused
            assert agent.crash is None
            if reply is Refused or isinstance(reply, Refused):
                assert (agent.platform.nvram_read(), agent.log.appends) == before
        assert (await agent.call("status", Empty())).hsm is not None
        if sim.leader_of(group) is agent:
            assert isinstance(await agent.call("app", sim.register1(group, "alice")), AppOk)
