"""Small rules: what may be compacted, what is published, when to retry, who is suspect."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any, cast

import pytest
import trio

from juicebox_hsm.adapters.observation.dogstatsd import send_metrics
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.consensus.types import Leader, RoleStatus, Witness
from juicebox_hsm.host.group import Groups, GroupState
from juicebox_hsm.hsm.messages import GroupStatus, RealmStatus, StatusOk
from juicebox_hsm.ids import GroupId, HsmId, RealmId
from juicebox_hsm.ports.errors import HsmGone
from roles.agent.context import Agent
from roles.agent.outside import Timings
from roles.agent.watchdog import watchdog

REALM, GROUP, HSM = RealmId(b"r" * 16), GroupId(b"g" * 16), HsmId(b"h" * 16)


class NullSink:
    """Swallows metrics and log lines."""

    def __getattr__(self, _name: str) -> Any:
        return lambda *_args, **_fields: None


@dataclass
class FewThings:
    """What the rules under test use of an agent."""

    metrics: Any
    log: Any


def status_of(role: Leader | Witness, captured: int) -> StatusOk:
    known = GroupStatus(GROUP, (HSM,), (captured, bytes(32)) if captured else None, None, RoleStatus(role, 9))
    return StatusOk(HSM, RealmStatus(REALM, bytes(32), (known,)), bytes(32))


class AlwaysLeading:
    """An HSM that leads whatever it is asked."""

    async def send(self, _request: object) -> object:
        await trio.lowlevel.checkpoint()
        return status_of(Leader(2), 5)


class WatchedAgent(FewThings):
    """An agent as the watchdog sees it; it cannot make the HSM step down."""

    def __init__(self, hsm: object) -> None:
        super().__init__(NullSink(), NullSink())
        self.hsm = hsm
        self.groups = Groups()
        self.timings = Timings()
        self.steps = 0

    async def step_down(self, _group: object, *, force: bool, why: str) -> None:
        self.steps += 1


async def test_the_watchdogs_last_words_are_heard(autojump_clock: trio.testing.MockClock) -> None:
    """The count and the event of a triggered watchdog reach DogStatsD although they are made as the process ends."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as statsd:
        statsd.bind(("127.0.0.1", 0))
        statsd.settimeout(5)
        environment = {"DD_AGENT_HOST": "127.0.0.1", "DD_DOGSTATSD_PORT": str(statsd.getsockname()[1])}
        agent = WatchedAgent(AlwaysLeading())
        agent.metrics = Metrics()
        with pytest.RaisesGroup(HsmGone):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send_metrics, agent.metrics, {"service": "agent"}, environment)
                nursery.start_soon(watchdog, cast("Agent", agent))
        said = statsd.recv(2000).decode()
    assert "agent.watchdog.crash:1|c|#service:agent" in said
    text = f"HSM and agent disagree about group {GROUP.hex()} for 5 checks"
    assert f"_e{{24,{len(text)}}}:Agent watchdog triggered|{text}|#service:agent" in said


async def test_watchdog_ends_the_process_at_the_fifth_check(autojump_clock: trio.testing.MockClock) -> None:
    """Two step-downs are tried first; if the HSM goes on leading, the fifth check in a row is the end."""
    agent = WatchedAgent(AlwaysLeading())
    agent.groups.add(GroupState(REALM, GROUP, (HSM,), RoleStatus(Witness(), 0)))
    began = trio.current_time()
    with pytest.raises(HsmGone):
        await watchdog(cast("Agent", agent))
    assert trio.current_time() - began == pytest.approx(5.0)
    assert agent.steps == 2
