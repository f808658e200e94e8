"""The map from HSM ids to agents' addresses (agent.md 8)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from juicebox_hsm.adapters.observation.logging import get_logger
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.rpc import RpcFailed
from juicebox_hsm.host.services import ServiceAddress, ServiceKind
from juicebox_hsm.ids import HsmId
from juicebox_hsm.wire.methods import AnyMethod
from juicebox_hsm.wire.rpc import AgentStatus, BecomeLeaderCall, HsmInfo, Refusal, Refused, RpcCode
from roles.agent.leader import handle_become_leader
from roles.agent.peers import Peers
from roles.clock import OwnClock

HERE, THERE = "tls://here", "tls://there"
MEMBER, OWN = HsmId(b"\x07" * 16), HsmId(b"\x01" * 16)


def _time_ms() -> int:
    return int(trio.current_time() * 1000)


class World:
    """Discovery and one other agent, which answers unless told not to."""

    def __init__(self) -> None:
        self.answers = True
        self.asked = 0
        self.hsm, self.instance = MEMBER, b"there"
        self.lines: list[str] = []
        self.addresses = [ServiceAddress(ServiceKind.AGENT, url, 1) for url in (HERE, THERE)]
        self.ahead_ms = 0
        self.clock = OwnClock(lambda: _time_ms() + self.ahead_ms, Metrics(), get_logger("test"))
        self.peers = Peers(
            cast(
                "Any",
                SimpleNamespace(
                    store=SimpleNamespace(discovery=self),
                    rpc=self,
                    now_ms=lambda: 1,
                    hsm_id=OWN,
                    log=SimpleNamespace(error=self.note, info=self.note),
                    config=SimpleNamespace(url=HERE, instance=b"here"),
                    clock=self.clock,
                    timings=SimpleNamespace(peer_refresh_s=10.0, peer_status_s=2.0, discovery_poll_s=1.0),
                    clear_trouble=lambda _: None,
                ),
            )
        )

    def note(self, event: str, **_about: object) -> None:
        self.lines.append(event)

    async def list(self) -> list[ServiceAddress]:
        await trio.lowlevel.checkpoint()
        return self.addresses

    async def call(
        self, url: str, method: AnyMethod, body: object, *, timeout_s: float, **_options: object
    ) -> AgentStatus:
        assert url == THERE
        self.asked += 1
        if not self.answers:
            await trio.sleep(timeout_s)
            raise RpcFailed(RpcCode.DEADLINE_EXCEEDED)
        await trio.lowlevel.checkpoint()
        return AgentStatus(1.0, HsmInfo(self.hsm, None, b""), THERE, "", [], instance=self.instance, now_ms=_time_ms())


async def test_one_missing_answer_is_forgiven(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """An agent that gave one answer too few stays in the map and is asked again at once; after two it is out of it."""
    world = World()
    nursery.start_soon(world.peers.run)
    await trio.sleep(1)
    assert world.peers.url_of(MEMBER) == THERE
    world.answers = False
    world.peers.suspect()
    await trio.sleep(2.1)
    assert (world.peers.url_of(MEMBER), world.asked) == (THERE, 3), "it is trusted once, and asked again"
    world.answers = True
    world.peers.suspect()
    await trio.sleep(3)
    assert world.peers.url_of(MEMBER) == THERE
    world.answers = False
    world.peers.suspect()
    await trio.sleep(5)
    assert world.peers.url_of(MEMBER) is None
    world.answers = True
    world.peers.suspect()
    await trio.sleep(3)
    assert world.peers.url_of(MEMBER) == THERE


async def test_who_is_not_registered_any_more_goes(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """An agent that left discovery leaves the map with the next look, whatever it answered before."""
    world = World()
    nursery.start_soon(world.peers.run)
    await trio.sleep(1)
    world.addresses = world.addresses[:1]
    await trio.sleep(2)
    assert world.peers.url_of(MEMBER) is None


async def test_a_jump_of_our_own_clock_is_noticed_at_once(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """It takes no new answers to see it: the next look at discovery is soon enough to be within ten seconds."""
    world = World()
    nursery.start_soon(world.peers.run)
    await trio.sleep(0.5)
    asked, before_s = world.asked, world.clock.off_s
    world.ahead_ms = 25 * 60 * 1000
    await trio.sleep(2)
    assert (world.asked, before_s) == (asked, 0.0)
    assert round(world.clock.off_s) == 25 * 60 / 2, "the middle of two"


async def test_a_copy_of_our_own_hsm_is_noticed(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """Our HSM at another address is told while it answers from another process, with a line at each end."""
    world = World()
    nursery.start_soon(world.peers.run)
    await trio.sleep(1)
    seen = [world.peers.copies]
    world.hsm = OWN
    await trio.sleep(11)
    seen.append(world.peers.copies)
    world.instance = b"here"  # the same process, which was advertised there before
    await trio.sleep(2)
    assert [*seen, world.peers.copies] == [(), (THERE,), ()]
    assert world.lines == ["our HSM also runs elsewhere: one is a copy", "our HSM runs here only, again"]


async def test_an_agent_with_a_copy_does_not_lead() -> None:
    """Whoever asks, a copied HSM is not made a leader: a manager that sees one of the addresses cannot know."""
    agent: Any = SimpleNamespace(
        hsm_id=OWN, groups=SimpleNamespace(find=lambda *_: object()), peers=SimpleNamespace(copies=(THERE,))
    )
    reply = await handle_become_leader(agent, BecomeLeaderCall(bytes(16), bytes(16)))
    assert isinstance(reply, Refused)
    assert (reply.outcome, reply.detail) == (Refusal.HSM_TWICE, f"this HSM also runs at {THERE}")
