"""Recovery of half-done transfers over several realms: nothing that is stuck holds anything else up."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from juicebox_hsm.host.cluster.transfer import TransferRequest
from juicebox_hsm.ids import RealmId
from juicebox_hsm.wire.rpc import Done, Refusal, Refused, TransferStep
from roles.manager.context import ManagerContext
from roles.manager.recovery import PASS_S, REALMS_AT_ONCE_MAX, Recovery
from roles.manager.transfer import run_requested_transfer
from tests.host.cluster.agents import FULL, OTHER_REALM, REALM, FakeAgent, group, three
from tests.unit.manager.fakes import FakeRpc, make_context, recover_transfers


def _pair(realm: RealmId, first: int, groups: int = 2) -> list[FakeAgent]:
    """Return a realm of three agents whose odd groups own everything and lie at the first, even ones at the second."""
    agents = three(groups, realm, first)
    for number in range(1, groups + 1, 2):
        agents[0].lead(group(number), FULL)
        agents[1].lead(group(number + 1))
    return agents


def _prepare(context: ManagerContext, destination: FakeAgent, realm: RealmId, source: int = 1) -> None:
    """Leave a prepared transfer of everything from group `source` to the one after it."""
    assert isinstance(context.rpc, FakeRpc)
    request = TransferRequest(realm, group(source), group(source + 1), FULL)
    context.rpc._transfer_prepare(destination, request.to_wire())


def _has_moved(agents: list[FakeAgent], source: int = 1) -> bool:
    before, after = agents[0].groups[group(source)], agents[1].groups[group(source + 1)]
    return before.owned is None and after.owned == FULL and before.transferring is after.transferring is None


@pytest.mark.parametrize("trouble", ["refuses", "hangs", "does not answer its status"])
async def test_a_stuck_realm_stops_no_other(autojump_clock: trio.testing.MockClock, trouble: str) -> None:
    """A realm whose destination is stuck costs the other realm no time, and is finished once it can be."""
    stuck, healthy = _pair(REALM, 1), _pair(OTHER_REALM, 4)
    context = make_context([*stuck, *healthy])
    _prepare(context, stuck[1], REALM)
    _prepare(context, healthy[1], OTHER_REALM)
    if trouble == "refuses":
        stuck[1].refuse["transfer/prepare"] = Refused(Refusal.NOT_LEADER)
    else:
        stuck[1].hang.add("transfer/prepare")
    if trouble == "does not answer its status":
        stuck[2].hang.add("status")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recover_transfers, context)
        await trio.sleep(11.5 if trouble == "does not answer its status" else 1)
        assert _has_moved(healthy)
        assert not _has_moved(stuck)
    stuck[1].refuse.clear()
    stuck[1].hang.clear()
    await recover_transfers(context)
    assert _has_moved(stuck)


async def test_a_pass_ends_and_gives_the_lease_back(autojump_clock: trio.testing.MockClock) -> None:
    """A pass over a stuck realm ends after `PASS_S`, is counted, and leaves the lease to whoever comes next."""
    agents = _pair(REALM, 1)
    context = make_context(agents)
    _prepare(context, agents[1], REALM)
    agents[0].hang.add("transfer/out")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recover_transfers, context)
        await trio.sleep(5)
        assert [progress.step for progress in context.state.transfers] == [TransferStep.OUT], (
            "it is shown like an ordered one"
        )
    assert context.state.transfers == []
    assert trio.current_time() == pytest.approx(PASS_S)
    assert await context.store.leases.list() == []
    assert 'manager_loop_errors_total{loop="transfers"} 1' in context.meter.render()  # type: ignore[attr-defined]
    agents[0].hang.clear()
    assert await run_requested_transfer(context, TransferRequest(REALM, group(1), group(2), FULL)) == Done()


async def test_later_passes_do_not_wait_for_a_stuck_realm(autojump_clock: trio.testing.MockClock) -> None:
    """A transfer left half done while another realm is stuck is finished by the next pass, not after the stuck one."""
    stuck, later = _pair(REALM, 1), _pair(OTHER_REALM, 4)
    context = make_context([*stuck, *later])
    _prepare(context, stuck[1], REALM)
    stuck[1].hang.add("transfer/prepare")
    async with trio.open_nursery() as nursery:
        recovery = Recovery(context, nursery)
        await recovery.run_pass()
        await trio.sleep(1)
        _prepare(context, later[1], OTHER_REALM)
        await recovery.run_pass()
        await trio.testing.wait_all_tasks_blocked()
        assert _has_moved(later)
        assert isinstance(context.rpc, FakeRpc)
        assert len(context.rpc.methods("transfer/prepare")) == 2, "one task works on the stuck realm"
        nursery.cancel_scope.cancel()


async def test_a_stuck_transfer_stops_no_other_of_its_realm(autojump_clock: trio.testing.MockClock) -> None:
    """Two groups that cannot finish do not keep two others of the realm from doing so."""
    agents = _pair(REALM, 1, groups=2)
    others = three(2, REALM, 4)
    for agent in others:  # groups 3 and 4 at HSMs of their own
        agent.groups = {group(number + 2): agent.groups[group(number)] for number in (1, 2)}
    others[0].lead(group(3), FULL)
    others[1].lead(group(4))
    context = make_context([*agents, *others])
    _prepare(context, agents[1], REALM)
    _prepare(context, others[1], REALM, source=3)
    agents[1].hang.add("transfer/prepare")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recover_transfers, context)
        await trio.sleep(1)
        assert _has_moved(others, source=3)


async def test_every_realm_gets_its_turn(autojump_clock: trio.testing.MockClock) -> None:
    """With more stuck realms than are worked on at once, the last one still has its turn when the first passes end."""
    realms = [RealmId(bytes([number]) * 16) for number in range(1, REALMS_AT_ONCE_MAX + 2)]
    clusters = [_pair(realm, 3 * number + 1) for number, realm in enumerate(realms)]
    context = make_context([agent for agents in clusters for agent in agents])
    for realm, agents in zip(realms[:-1], clusters[:-1], strict=True):
        _prepare(context, agents[1], realm)
        agents[1].hang.add("transfer/prepare")
    async with trio.open_nursery() as nursery:
        recovery = Recovery(context, nursery)
        await recovery.run_pass()
        _prepare(context, clusters[-1][1], realms[-1])
        await recovery.run_pass()
        await trio.sleep(2)
        assert not _has_moved(clusters[-1])
        assert len(context.state.held_leases) == REALMS_AT_ONCE_MAX
        await trio.sleep(PASS_S)
        assert _has_moved(clusters[-1])
        nursery.cancel_scope.cancel()


async def test_a_busy_realm_is_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    """A realm whose lease somebody else holds is left to them, and the other is finished."""
    first, second = _pair(REALM, 1), _pair(OTHER_REALM, 4)
    context = make_context([*first, *second])
    _prepare(context, first[1], REALM)
    _prepare(context, second[1], OTHER_REALM)
    await context.store.leases.obtain(f"{REALM.hex()}-ownership", "other", context.now_ms(), 60_000)
    await recover_transfers(context)
    assert not _has_moved(first)
    assert _has_moved(second)
