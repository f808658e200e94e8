"""The routing table's keeper: its loops and waits (load-balancer.md 8). Its rules: `tests/host/test_routing.py`."""

from __future__ import annotations

import trio

from juicebox_hsm.adapters.rpc import RpcUnreachable
from juicebox_hsm.ids import RecordId
from tests.unit.lb.harness import REALM, Balancer, FakeAgent

RECORD = RecordId(b"\x55" * 32)


def _urls(balancer: Balancer) -> list[str]:
    return [route.url for route in balancer.poller.table.candidates(REALM, RECORD)]


async def test_polls_ten_times_a_second(nursery: trio.Nursery, autojump_clock: object) -> None:
    """Each agent is asked about every 100 ms, and discovery every second."""
    agent = FakeAgent("tls://a")
    balancer = Balancer(agent)
    await balancer.start(nursery, settle=False)
    before, reads = agent.polls, balancer.discovery.reads
    await trio.sleep(10)
    assert 90 <= agent.polls - before <= 112
    assert 9 <= balancer.discovery.reads - reads <= 11


async def test_failing_agent_is_asked_less(nursery: trio.Nursery, autojump_clock: object) -> None:
    """After failures the polls of that agent back off to one in two seconds, and recover with it."""
    agent = FakeAgent("tls://a", status_error=RpcUnreachable("refused", maybe_delivered=False))
    balancer = Balancer(agent)
    await balancer.start(nursery, settle=False)
    await trio.sleep(10)
    before = agent.polls
    await trio.sleep(20)
    assert 8 <= agent.polls - before <= 13
    agent.status_error = None
    await trio.sleep(3)
    assert _urls(balancer) == ["tls://a"]


async def test_refused_agent_loses_routes_at_once(nursery: trio.Nursery, autojump_clock: object) -> None:
    """A refused or reset stream takes the routes away with the next poll; the realm stays known."""
    agent = FakeAgent("tls://a")
    balancer = Balancer(agent)
    await balancer.start(nursery, settle=False)
    agent.status_error = RpcUnreachable("refused", maybe_delivered=False)
    await trio.sleep(0.13)
    assert _urls(balancer) == []
    assert REALM in balancer.poller.table.realms


async def test_silent_agent_loses_routes_after_three_seconds(nursery: trio.Nursery, autojump_clock: object) -> None:
    """An agent that does not answer keeps its routes for 3 s, and a healthy one is not delayed by it."""
    silent, healthy = FakeAgent("tls://a", starting=9), FakeAgent("tls://b")
    balancer = Balancer(silent, healthy)
    await balancer.start(nursery, settle=False)
    silent.status_delay_s = 1000
    before = healthy.polls
    await trio.sleep(2.8)
    assert _urls(balancer) == ["tls://a", "tls://b"]
    assert healthy.polls - before >= 23
    await trio.sleep(0.5)
    assert _urls(balancer) == ["tls://b"]


async def test_discovery_trouble_keeps_the_table(nursery: trio.Nursery, autojump_clock: object) -> None:
    """While discovery cannot be read the known agents stay in use; later additions and removals are seen."""
    first, second = FakeAgent("tls://a"), FakeAgent("tls://b", starting=9)
    balancer = Balancer(first, second)
    balancer.discovery.urls = ["tls://a"]
    await balancer.start(nursery, settle=False)
    balancer.discovery.down = True
    await trio.sleep(60)
    assert _urls(balancer) == ["tls://a"]
    balancer.discovery.down = False
    balancer.discovery.urls = ["tls://b"]
    await trio.sleep(1.5)
    assert _urls(balancer) == ["tls://b"]
    polls = first.polls
    await trio.sleep(5)
    assert first.polls == polls


async def test_slow_agent_does_not_delay_a_forced_refresh(nursery: trio.Nursery, autojump_clock: object) -> None:
    """A forced refresh waits half a second at most."""
    slow, fast = FakeAgent("tls://a", status_delay_s=100), FakeAgent("tls://b")
    balancer = Balancer(slow, fast)
    await balancer.start(nursery, settle=False)
    began = trio.current_time()
    await balancer.poller.refresh()
    assert trio.current_time() - began <= 0.6


async def test_older_answer_does_not_win(nursery: trio.Nursery, autojump_clock: object) -> None:
    """An answer that was asked for earlier and arrives later does not replace the newer one."""
    agent = FakeAgent("tls://a", status_delay_s=0.3)
    balancer = Balancer(agent)
    await balancer.start(nursery, settle=False)
    await trio.sleep(0.2)  # a poll that still sees the leader is under way
    agent.leads = False
    agent.status_delay_s = 0.0
    await balancer.poller.refresh()
    assert _urls(balancer) == []
    await trio.sleep(0.35)
    assert _urls(balancer) == []


async def test_unchanged_answers_do_not_publish(nursery: trio.Nursery, autojump_clock: object) -> None:
    """Growing commit indexes alone do not rebuild the table unless claims compete."""
    agent = FakeAgent("tls://a")
    balancer = Balancer(agent)
    await balancer.start(nursery, settle=False)
    table = balancer.poller.table
    agent.committed = 999
    await trio.sleep(1)
    assert balancer.poller.table is table
