"""Orders to agents and managers: who is silent costs 5 s, and what would be refused is known before it is tried."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.adapters.rpc import RpcFailed
from juicebox_hsm.host.cluster.view import AgentView, ClusterView, build_view
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ids import FULL_RANGE, OwnedRange, RealmId
from juicebox_hsm.wire.methods import REBALANCE, AnyMethod
from juicebox_hsm.wire.rpc import (
    Direction,
    Done,
    Empty,
    GroupRole,
    ManagerStatus,
    Range,
    Refusal,
    Refused,
    RpcCode,
    TransferringInfo,
)
from roles.tools.cluster.change import check_transfer
from roles.tools.cluster.leaders import still_led
from roles.tools.session import COMMAND_TIMEOUT_S, Session, ToolFailure, call_manager, refused
from tests.host.cluster.agents import REALM, FakeAgent, FakeGroup, group, hsm, record, three
from tests.unit.manager.fakes import FakeDiscovery

LOW, HIGH = OwnedRange(record("00"), record("7f", 0xFF)), OwnedRange(record("80"), record("ff", 0xFF))
WORK_S = 20.0  # longer than an answer may take, shorter than the work may


class _Managers:
    """Managers by URL: True answers and works for a while, False is silent."""

    def __init__(self, managers: dict[str, bool]) -> None:
        self.managers = managers
        self.worked: list[str] = []

    async def call(self, url: str, method: AnyMethod, body: object, *, timeout_s: float, **_options: object) -> Any:
        if not self.managers[url]:
            await trio.sleep(timeout_s)
            raise RpcFailed(RpcCode.DEADLINE_EXCEEDED, f"from {url}")
        if method.name == "status":
            return ManagerStatus("{}")
        await trio.sleep(WORK_S)
        self.worked.append(url)
        return Done()


def _session(managers: dict[str, bool]) -> tuple[Session, _Managers]:
    discovery, rpc = FakeDiscovery(), _Managers(managers)
    for url in managers:
        discovery.rows[ServiceKind.MANAGER, url] = 0
    return Session(SimpleNamespace(discovery=discovery), rpc), rpc


async def _order(session: Session, url: str | None = None) -> Any:
    return await call_manager(session, url, REBALANCE, Empty(), timeout_s=COMMAND_TIMEOUT_S)


async def test_a_silent_manager_costs_five_seconds(autojump_clock: trio.testing.MockClock) -> None:
    """A hung manager is left for the next one after 5 s; the work of one that answers may take longer."""
    session, rpc = _session({"tls://a": False, "tls://b": False, "tls://c": True})
    assert await _order(session) == Done()
    assert rpc.worked == ["tls://c"]
    assert WORK_S <= autojump_clock.current_time() <= WORK_S + 2 * 5


async def test_no_manager_answers(autojump_clock: trio.testing.MockClock) -> None:
    """One that is named and silent is exit 4 after 5 s, and nothing was asked of it that it might still do."""
    session, _ = _session({"tls://a": False})
    with pytest.raises(ToolFailure, match="tls://a: no answer within 5 s") as failed:
        await _order(session, "tls://a")
    assert failed.value.exit_code == ExitCode.UNREACHABLE
    assert autojump_clock.current_time() == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (Refusal.INVALID_GROUP, ExitCode.ID),
        (Refusal.INVALID_REALM, ExitCode.ID),
        (Refusal.INVALID_HSM, ExitCode.ID),
        (Refusal.BUSY, ExitCode.FAILED),
    ],
)
def test_refusals(outcome: Refusal, code: ExitCode) -> None:
    """What a manager does not know is an id that was not found; any other refusal is a failure."""
    assert refused(Refused(outcome), {}).exit_code == code


def _view(agents: list[FakeAgent]) -> ClusterView:
    return build_view(
        [AgentView(agent.url, None, "down") if agent.down else AgentView(agent.url, agent.status()) for agent in agents]
    )


def _halves() -> list[FakeAgent]:
    agents = three(3)
    agents[0].lead(group(1), LOW).lead(group(3))
    agents[1].lead(group(2), HIGH)
    return agents


def _part(start: str, end: str) -> OwnedRange:
    return OwnedRange(record(start), record(end, 0xFF))


@pytest.mark.parametrize(
    ("numbers", "wanted", "code", "says"),
    [
        ((1, 2), _part("40", "7f"), ExitCode.OK, ""),
        ((1, 2), LOW, ExitCode.OK, ""),
        ((1, 3), _part("00", "0f"), ExitCode.OK, ""),
        ((1, 2), _part("00", "0f"), ExitCode.FAILED, "must be an end"),
        ((1, 2), _part("20", "30"), ExitCode.FAILED, "must be an end"),
        ((3, 2), _part("20", "30"), ExitCode.FAILED, "must be an end"),
        ((1, 9), LOW, ExitCode.ID, "two groups of the realm"),
        ((9, 1), LOW, ExitCode.ID, "two groups of the realm"),
    ],
)
def test_transfers_that_would_be_refused(
    numbers: tuple[int, int], wanted: OwnedRange, code: ExitCode, says: str
) -> None:
    """A dry run refuses what a manager would: unknown groups, and ranges that do not fit."""
    source, destination = map(group, numbers)
    if code is ExitCode.OK:
        check_transfer(_view(_halves()), REALM, source, destination, wanted)
        return
    with pytest.raises(ToolFailure, match=says) as failed:
        check_transfer(_view(_halves()), REALM, source, destination, wanted)
    assert failed.value.exit_code == code


def test_transfers_between_groups_that_cannot_act() -> None:
    """Nobody leads, or another transfer is pending: refused, and an agent's silence does not make its group unknown."""
    agents = _halves()
    agents[0].groups[group(1)].transferring = TransferringInfo(
        Direction.OUT, group(3), Range(*[b"\0" * 32] * 2), 5, b"h" * 32
    )
    with pytest.raises(ToolFailure, match="another transfer pending"):
        check_transfer(_view(agents), REALM, group(1), group(2), LOW)
    agents[0].groups[group(1)].role = GroupRole.WITNESS
    with pytest.raises(ToolFailure, match="nobody leads the source"):
        check_transfer(_view(agents), REALM, group(1), group(2), LOW)
    agents[2].down = True
    with pytest.raises(ToolFailure, match="nobody leads the destination") as failed:
        check_transfer(_view(agents), REALM, group(2), group(9), HIGH)
    assert failed.value.exit_code == ExitCode.FAILED
    with pytest.raises(ToolFailure, match="nobody leads the source"):
        check_transfer(_view(agents), RealmId(b"x" * 16), group(2), group(9), HIGH)


def test_a_drained_hsm_may_keep_what_serves_nothing() -> None:
    """The group of one that a realm began with stays and is named; one that serves, or has members, is a failure."""
    agents = three(1)
    agents[0].groups[group(2)] = FakeGroup([hsm(1)])
    assert still_led(hsm(1), _view(agents).led_by(hsm(1))).endswith("is drained and leads nothing")
    agents[0].lead(group(2))
    told = still_led(hsm(1), _view(agents).led_by(hsm(1)))
    assert f"still leads {group(2).hex()}, a group that owns no range" in told
    agents[0].groups[group(2)].owned = FULL_RANGE
    with pytest.raises(ToolFailure, match=group(2).hex()):
        still_led(hsm(1), _view(agents).led_by(hsm(1)))
    agents[0].groups[group(2)].owned = None
    agents[0].lead(group(1))
    with pytest.raises(ToolFailure, match=f"leads {group(1).hex()}: nobody else"):
        still_led(hsm(1), _view(agents).led_by(hsm(1)))
