"""Each method of a manager at its door: whatever a peer sends, it is answered, and nothing escalates."""

from __future__ import annotations

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from juicebox_hsm.errors import RealmError
from juicebox_hsm.wire.methods import MANAGER_METHODS, AnyMethod
from roles.manager.appointment import Appointer
from roles.manager.service import ManagerService
from tests.bodies import bodies_of
from tests.examples import examples
from tests.host.cluster.agents import REALM, group, three
from tests.unit.manager.fakes import make_context

ANSWER_S = 600.0
"""On the virtual clock."""


@pytest.mark.usefixtures("autojump_clock")
@pytest.mark.parametrize("method", MANAGER_METHODS.values(), ids=lambda method: method.name)
@given(data=st.data())
@settings(examples(20), suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_body_is_answered(method: AnyMethod, data: st.DataObject) -> None:
    """An answer or an operational error; what a hint starts in the background ends no manager either."""
    context = make_context(three())
    with trio.fail_after(ANSWER_S):
        async with trio.open_nursery() as nursery:
            service = ManagerService(context, Appointer(context), nursery)
            for _ in range(5):
                body = data.draw(bodies_of(method, [REALM, group(1), bytes(32)]))
                try:
                    await service.handlers()[method.name](body, None)
                except RealmError:
                    pass
    assert not context.state.actions
