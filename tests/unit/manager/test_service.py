"""The manager's RPC handlers."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio.testing

from juicebox_hsm.adapters.tls.certificate_end import to_unix_ms
from juicebox_hsm.wire.methods import MANAGER_METHODS
from juicebox_hsm.wire.rpc import (
    Done,
    Empty,
    GroupRole,
    LeaderLost,
    Range,
    Rebalanced,
    Refusal,
    Refused,
    StepdownOrder,
    TransferPrepare,
    TransferStep,
)
from roles.manager.appointment import Appointer
from roles.manager.context import ManagerContext
from roles.manager.service import ManagerService
from roles.survey.evidence import read_manager_status
from tests.host.cluster.agents import FULL, REALM, FakeAgent, group, hsm, three
from tests.unit.manager.fakes import FakeLeases, make_context


@asynccontextmanager
async def _service(agents: list[FakeAgent]) -> AsyncIterator[tuple[ManagerService, ManagerContext]]:
    context = make_context(agents)
    async with trio.open_nursery() as nursery:
        yield ManagerService(context, Appointer(context), nursery), context


async def test_every_method_has_a_handler() -> None:
    """The table of methods and the handlers agree."""
    async with _service([]) as (service, _):
        assert service.handlers().keys() == MANAGER_METHODS.keys()


async def test_status_tells_the_end_of_the_certificate() -> None:
    """What others judge the manager's cluster certificate by is in the reply, as it stands at that moment."""
    end: dt.datetime | None = dt.datetime(2026, 11, 20, tzinfo=dt.UTC)
    context = dataclasses.replace(make_context(three()), certificate_end=lambda: end)
    async with trio.open_nursery() as nursery:
        handlers = ManagerService(context, Appointer(context), nursery).handlers()
        assert read_manager_status("tls://m", await handlers["status"](Empty(), None)).certificate_end_ms == to_unix_ms(
            end
        )
        end = None
        assert read_manager_status("tls://m", await handlers["status"](Empty(), None)).certificate_end_ms is None


async def test_status_shows_what_is_under_way(autojump_clock: trio.testing.MockClock) -> None:
    """Loops, leases and actions are one JSON document; a finished action is gone from it."""
    agents = three()
    agents[0].lead(group(1), FULL)
    async with _service(agents) as (service, context):
        handlers = service.handlers()
        seen = []

        async def slow_terminate(_: object) -> None:
            seen.extend((await handlers["status"](Empty(), None)).actions)

        leases = context.store.leases
        assert isinstance(leases, FakeLeases)
        leases.terminate = slow_terminate  # type: ignore[method-assign,assignment]
        assert await handlers["leader_stepdown"](StepdownOrder(hsm=hsm(1)), None) == Done()
        assert seen == [f"stepdown of HSM {hsm(1).hex()}"]
        assert (await handlers["status"](Empty(), None)).actions == ()


async def test_hints_are_answered_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """leader_lost returns before anything is done, and the leader stands soon after."""
    agents = three()
    async with _service(agents) as (service, _):
        assert await service.handlers()["leader_lost"](LeaderLost(REALM, group(1), 6), None) == Done()
        assert all(agent.groups[group(1)].role is GroupRole.WITNESS for agent in agents)
        await trio.sleep(1)
        assert [agent.groups[group(1)].role for agent in agents].count(GroupRole.LEADER) == 1


async def test_store_trouble_is_a_refusal(autojump_clock: trio.testing.MockClock) -> None:
    """Without the store, callers get NoStore, not a broken stream."""
    agents = three()
    agents[0].lead(group(1), FULL)
    async with _service(agents) as (service, context):
        leases = context.store.leases
        assert isinstance(leases, FakeLeases)
        leases.broken = True
        answer = await service.handlers()["leader_stepdown"](StepdownOrder(hsm=hsm(1)), None)
        assert isinstance(answer, Refused)
        assert answer.outcome is Refusal.NO_STORE


async def test_transfer_and_rebalance_answer(autojump_clock: trio.testing.MockClock) -> None:
    """Both reach their implementation; a malformed range is refused first."""
    agents = three(groups=2)
    agents[0].lead(group(1), FULL)
    agents[1].lead(group(2))
    async with _service(agents) as (service, _):
        handlers = service.handlers()
        whole = Range(FULL.start, FULL.end)
        assert await handlers["transfer"](TransferPrepare(REALM, group(1), group(2), whole), None) == Done()
        assert agents[1].groups[group(2)].owned == FULL
        bad = TransferPrepare(REALM, group(1), group(2), Range(b"", b""))
        answer = await handlers["transfer"](bad, None)
        assert isinstance(answer, Refused)
        assert answer.outcome is Refusal.UNACCEPTABLE_RANGE
        assert await handlers["rebalance"](Empty(), None) == Rebalanced()


async def test_status_shows_how_far_a_transfer_is(autojump_clock: trio.testing.MockClock) -> None:
    """While a transfer runs, `status` tells its step; afterwards it lists none."""
    agents = three(groups=2)
    agents[0].lead(group(1), FULL)
    agents[1].lead(group(2))
    agents[1].hang.add("transfer/in")
    async with _service(agents) as (service, _), trio.open_nursery() as nursery:
        handlers = service.handlers()
        body = TransferPrepare(REALM, group(1), group(2), Range(FULL.start, FULL.end))
        nursery.start_soon(handlers["transfer"], body, None)
        await trio.sleep(1)
        [running] = (await handlers["status"](Empty(), None)).transfers
        assert (running.step, running.attempt, running.source) == (TransferStep.IN, 1, group(1))
        nursery.cancel_scope.cancel()
    assert (await handlers["status"](Empty(), None)).transfers == ()
