"""`cluster transfer` on a terminal: what it tells while a manager works."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from juicebox_hsm.adapters.rpc import RpcUnreachable
from juicebox_hsm.host.cluster.view import wire_range
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.wire import rpc
from juicebox_hsm.wire.methods import AnyMethod
from roles.manager.appointment import Appointer
from roles.manager.service import ManagerService
from roles.tools.cluster.change import transfer_range, transfer_shown
from roles.tools.cluster.progress import watch
from roles.tools.session import Session
from tests.host.cluster.agents import FULL, REALM, FakeAgent, group, three
from tests.unit.manager.fakes import FakeStore, make_context

MANAGER = "tls://m2"
DEAD = "tls://m1"
WANTED = rpc.TransferPrepare(REALM, group(1), group(2), wire_range(FULL))


class _Managers:
    """Delivers an operator's calls to one real manager; the other one of discovery does not answer."""

    def __init__(self, service: ManagerService) -> None:
        self.handlers = service.handlers()
        self.calls: list[tuple[str, str]] = []

    async def call(self, url: str, method: AnyMethod, body: Any, *, timeout_s: float, **_options: object) -> Any:
        self.calls.append((url, method.name))
        await trio.lowlevel.checkpoint()
        if url != MANAGER:
            raise RpcUnreachable(f"{url}: down", maybe_delivered=False)
        return await self.handlers[method.name](body, None)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _agents() -> list[FakeAgent]:
    agents = three(groups=2)
    agents[0].lead(group(1), FULL)
    agents[1].lead(group(2))
    return agents


@asynccontextmanager
async def _session(agents: list[FakeAgent]) -> AsyncIterator[tuple[Session, _Managers]]:
    context = make_context(agents)
    for url in (DEAD, MANAGER):
        await context.store.discovery.register(ServiceKind.MANAGER, url, 0)
    async with trio.open_nursery() as nursery:
        managers = _Managers(ManagerService(context, Appointer(context), nursery))
        yield Session(context.store, managers), managers


async def test_the_step_is_told(autojump_clock: trio.testing.MockClock) -> None:
    """The line names range, groups, step, attempt and time; a manager that is down does not disturb."""
    agents = _agents()
    agents[0].hang.add("transfer/out")
    lines: list[str] = []
    async with _session(agents) as (session, managers), trio.open_nursery() as nursery:
        nursery.start_soon(watch, session, None, WANTED, lines.append)
        await trio.sleep(1)
        assert set(lines) == {f"[0x00...-0xff...] from {group(1).hex()[:8]} to {group(2).hex()[:8]}: asking a manager"}
        nursery.start_soon(managers.handlers["transfer"], WANTED, None)
        await trio.sleep(1.1)
        assert lines[-1].endswith(": out, attempt 1, 0.0 s"), "the fakes' clock stands still"
        asked = len(managers.calls)
        await trio.sleep(1)
        assert managers.calls[asked:] == [(MANAGER, "status")] * 4, "every 250 ms, only the one that runs it"
        nursery.cancel_scope.cancel()


async def test_only_a_terminal_is_told(autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the line appears and is removed; elsewhere, or when no command asked, nothing is written."""
    for stream, order, told in (
        (_Terminal(), transfer_shown, True),
        (io.StringIO(), transfer_shown, False),
        (_Terminal(), transfer_range, False),  # the demo, which makes several realms at once
    ):
        monkeypatch.setattr("sys.stderr", stream)
        agents = _agents()
        agents[0].refuse["transfer/out"] = rpc.Refused(rpc.Refusal.NO_STORE)
        async with _session(agents) as (session, managers), trio.open_nursery() as nursery:
            nursery.start_soon(order, session, None, REALM, group(1), group(2), FULL)
            await trio.sleep(3)
            agents[0].refuse.clear()
        assert agents[1].groups[group(2)].owned == FULL
        assert ("attempt" in stream.getvalue()) is told
        asked = [method for _, method in managers.calls].count("status")
        assert (asked > 5) is told, "a few to see that managers answer, four a second to follow the transfer"
        assert bool(stream.getvalue()) is told


async def test_what_cannot_be_read_is_passed_over(autojump_clock: trio.testing.MockClock) -> None:
    """A manager of an older build, and one that runs another transfer, leave the line as it was."""

    class Strange:
        async def call(self, url: str, method: AnyMethod, body: Any, *, timeout_s: float, **_options: object) -> Any:
            await trio.lowlevel.checkpoint()
            return strange

    other = rpc.RunningTransfer(
        REALM, group(2), group(1), WANTED.range, rpc.TransferStep.OUT, attempt=1, begun_ms=0, age_s=1.0
    )
    for reply in (rpc.ManagerStatus("[]"), rpc.ManagerStatus("{}", transfers=(other,))):
        strange = reply
        lines: list[str] = []
        with trio.move_on_after(1):
            await watch(Session(FakeStore(), Strange()), MANAGER, WANTED, lines.append)
        assert len(lines) == 1
