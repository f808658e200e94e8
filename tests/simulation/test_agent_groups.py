"""Groups of three: replication, duels, hand-over, lost leaders, catch-up after compaction."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import trio

from juicebox_hsm.client import ClientError
from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.host.events import EventKind
from juicebox_hsm.host.log import Compacted
from juicebox_hsm.ids import GroupId
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.wire.rpc import AppOk, Done, Refusal
from tests.simulation.cluster import KEEP_EVENTS, QUICK, TENANT, SimAgent, Simulation, simulation, until


async def all_at_end(sim: Simulation, group: GroupId, timeout_s: float = 3.0) -> None:
    """Wait until every running member captured the end of the leader's log."""

    def there() -> bool:
        leader = sim.leader_of(group)
        if leader is None:
            return False
        end = leader.group(group).leader.next_index
        return all(a.group(group).position == end for a in sim.agents if a.handlers)

    await until(there, timeout_s)


class Traffic:
    """Users who recover for ever, each after a registration; errors are kept."""

    def __init__(self, sim: Simulation, users: int) -> None:
        self._sim = sim
        self._users = users
        self.done = 0
        self.errors: list[ClientError] = []

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        clients = [self._sim.client(f"user{number}") for number in range(self._users)]
        for client in clients:
            await client.register(b"1234", b"secret", b"info", 100)
        task_status.started()
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(self._one, client)

    async def _one(self, client: object) -> None:
        while True:
            try:
                secret = await client.recover(b"1234", b"info")  # type: ignore[attr-defined]
                assert secret == b"secret"
                self.done += 1
            except ClientError as error:
                self.errors.append(error)
            await trio.sleep(0.002)

    async def more(self, count: int, timeout_s: float = 5.0) -> None:
        """Wait until `count` more recoveries succeeded."""
        wanted = self.done + count
        await until(lambda: self.done >= wanted, timeout_s)


async def test_group_of_three_serves(tmp_path: Path) -> None:
    """A realm moved to a group of three registers and recovers, and all members capture the log's end."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        client = sim.client("alice")
        await client.register(b"1234", b"secret", b"info", 3)
        assert await client.recover(b"1234", b"info") == b"secret"
        await all_at_end(sim, group)


async def test_three_duelling_leaders_one_wins(tmp_path: Path) -> None:
    """With every member made leader at once, exactly one of three concurrent requests succeeds."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        sim.manager.appoints = False
        await all_at_end(sim, group)
        for member in sim.agents:
            assert isinstance(await sim.become_leader(member, group), Done)
        replies = []

        async def ask(member: SimAgent, user: str) -> None:
            replies.append(await member.call("app", sim.register1(group, user)))

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for number, member in enumerate(sim.agents):
                    nursery.start_soon(ask, member, f"user{number}")
        assert sum(isinstance(reply, AppOk) for reply in replies) == 1
        assert [r.outcome for r in replies if not isinstance(r, AppOk)] == [Refusal.NOT_LEADER] * 2
        await until(lambda: sum(member.group(group).leader is not None for member in sim.agents) == 1)


async def test_idle_rival_steps_down_at_the_foreign_entry(tmp_path: Path) -> None:
    """A leader that saw no request steps down once it captures an entry of another leader."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        await all_at_end(sim, group)
        old = sim.leader_of(group)
        assert old is not None
        rival = next(member for member in sim.agents if member is not old)
        assert isinstance(await sim.become_leader(rival, group), Done)
        assert isinstance(await rival.call("app", sim.register1(group, "alice")), AppOk)
        await until(lambda: old.group(group).leader is None)


async def test_hand_over_under_load_without_client_errors(tmp_path: Path) -> None:
    """Nine planned hand-overs under load change the leader each time and cost no client an error."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        await sim.settle_peers()
        traffic = Traffic(sim, 4)
        await sim.nursery.start(traffic.run)
        for _ in range(9):
            await traffic.more(4)
            old = sim.leader_of(group)
            assert old is not None
            new = await sim.hand_over_group(old, group)
            assert new is not None
            assert new is not old
        await traffic.more(4)
        assert traffic.errors == []


async def test_killed_leader_is_reported_and_replaced(tmp_path: Path) -> None:
    """When the leader's process dies its closed streams alone raise the alarm, and service goes on without it."""
    async with simulation(tmp_path, dataclasses.replace(QUICK, silence_s=1000.0)) as sim:
        group = await sim.new_realm(3)
        await sim.settle_peers()
        traffic = Traffic(sim, 4)
        await sim.nursery.start(traffic.run)
        await traffic.more(8)
        old = sim.leader_of(group)
        assert old is not None
        sim.manager.hints.clear()
        old.kill()
        await traffic.more(8)
        assert group in {hinted for hinted, _ in sim.manager.hints}
        assert sim.leader_of(group) is not old


async def test_stopped_leader_is_noticed_by_silence(tmp_path: Path) -> None:
    """A leader that keeps its streams and says nothing is reported after the silence period."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        await sim.settle_peers()
        await sim.client("alice").register(b"1234", b"secret", b"info", 3)
        old = sim.leader_of(group)
        assert old is not None
        sim.manager.hints.clear()
        for member in sim.agents:
            if member is not old:
                sim.cut.add(frozenset((old.name, member.name)))
        await until(lambda: group in {hinted for hinted, _ in sim.manager.hints})


async def test_member_behind_compaction_jumps_and_forms_a_quorum(tmp_path: Path) -> None:
    """A member that slept through compaction catches up by certificate, and with the leader alone commits again."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        await sim.settle_peers()
        leader = sim.leader_of(group)
        assert leader is not None
        sleeper, third = [member for member in sim.agents if member is not leader]
        behind = sleeper.group(group).position
        sleeper.kill()
        await sleeper.closed.wait()
        client = sim.client("alice")
        await client.register(b"1234", b"secret", b"info", 100)
        with trio.fail_after(10):
            while not isinstance(await sim.store.log.read_from(sim.realm, group, behind, 10), Compacted):
                assert await client.recover(b"1234", b"info") == b"secret"
                await trio.sleep(0.01)  # work alone takes no virtual time, and compaction pauses
        third.kill()
        await third.closed.wait()
        await sim.restart(sleeper)
        with trio.fail_after(5):
            assert await client.recover(b"1234", b"info") == b"secret"
        assert sleeper.group(group).position > behind


class PowerCut(BaseException):
    """The process ends here and now."""


async def test_unconfirmed_outcomes_become_unknown(tmp_path: Path) -> None:
    """A leader that dies between commit and outbox leaves an intent; its successor records it as unknown, once."""
    async with simulation(tmp_path, KEEP_EVENTS) as sim:
        group = await sim.new_realm(3)
        await sim.settle_peers()
        leader = sim.leader_of(group)
        assert leader is not None

        async def die(_events: object) -> None:
            raise PowerCut

        leader.outbox.before_record = die
        await leader.call_and_forget("app", sim.register1(group, "alice"))
        await leader.closed.wait()
        assert leader.crash is not None
        leader.outbox.before_record = None
        await until(lambda: any(a.agent.outbox_tails.get(TENANT) for a in sim.agents if a is not leader))
        await sim.restart(leader)
        back = await sim.appoint(group)
        assert back is not None
        assert isinstance(await back.call("app", sim.register1(group, "bob")), AppOk)
        events = await sim.store.outbox.read(sim.realm, TENANT, 0, 10)
        assert [event.new.kind for event in events] == [EventKind.UNKNOWN, EventKind.REGISTER1]
        assert events[0].new.event == {"event": "unknown"}
        assert events[0].seq == 1


async def test_outbox_is_dense_and_in_order_over_leaders(tmp_path: Path) -> None:
    """Events of one user keep their order and the tenant's sequence has no hole, over several leaderships."""
    async with simulation(tmp_path, KEEP_EVENTS) as sim:
        group = await sim.new_realm(3)
        await sim.settle_peers()
        client = sim.client("alice")
        for number in range(3):
            await client.register(b"1234", b"%d" % number, b"info", 3)
            assert await client.recover(b"1234", b"info") == b"%d" % number
            old = sim.leader_of(group)
            assert old is not None
            assert await sim.hand_over_group(old, group) is not None
        events = await sim.store.outbox.read(sim.realm, TENANT, 0, 100)
        assert [event.seq for event in events] == list(range(1, 16))
        one_round = ["register1", "register2", "recover1", "recover2", "recover3"]
        assert [event.new.kind.value for event in events] == one_round * 3


async def test_whole_cluster_restarts(tmp_path: Path) -> None:
    """After every process restarted with its NVRAM, hints bring a leader and the secret is still there."""
    async with simulation(tmp_path) as sim:
        await sim.new_realm(3)
        client = sim.client("alice")
        await client.register(b"1234", b"secret", b"info", 3)
        for member in sim.agents:
            member.kill()
            await member.closed.wait()
        for member in sim.agents:
            await sim.restart(member)
        sim.patience_s = 5.0
        assert await client.recover(b"1234", b"info") == b"secret"


async def test_split_and_merge_with_live_users(tmp_path: Path) -> None:
    """Half the records move to another group and back while users recover; none of them loses anything."""
    async with simulation(tmp_path, dataclasses.replace(QUICK, commit_wait_s=10.0)) as sim:
        group = await sim.new_realm(3)
        other = await sim.new_group(sim.agents)
        await sim.settle_peers()
        traffic = Traffic(sim, 4)
        await sim.nursery.start(traffic.run)
        await traffic.more(4)
        await sim.transfer(group, other, sim.upper_half())
        await traffic.more(8)
        await sim.transfer(other, group, sim.upper_half())
        await traffic.more(8)
        assert traffic.errors == []


async def test_member_far_behind_is_not_flooded(tmp_path: Path) -> None:
    """A member behind the leadership's start that cannot read the log is asked at a steady pace, not without pause."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        await sim.settle_peers()
        first = sim.leader_of(group)
        assert first is not None
        behind, second = (a for a in sim.agents if a is not first)

        async def fail(*_: object) -> list[LogEntry]:
            raise StoreUnavailable("down")

        behind.log.read_from = fail  # type: ignore[attr-defined]
        sim.cut |= {frozenset((other.name, behind.name)) for other in (first, second)}
        assert isinstance(await first.call("app", sim.register1(group, "alice")), AppOk)
        assert await sim.hand_over_group(first, group) is second
        assert isinstance(await second.call("app", sim.register1(group, "bob")), AppOk)
        asked = 0
        handler = behind.handlers["replicate"]

        async def counting(body: object, caller: object) -> object:
            nonlocal asked
            asked += 1
            return await handler(body, caller)

        behind.handlers = {**behind.handlers, "replicate": counting}
        sim.cut.clear()
        await until(lambda: asked)
        asked = 0
        await trio.sleep(0.5)
        assert 2 <= asked <= 25
        del behind.log.read_from
        await all_at_end(sim, group)


async def test_rows_on_their_way_are_not_unknown(tmp_path: Path) -> None:
    """A new leader waits for a predecessor whose HSM is a witness again and whose last rows are still being written."""
    async with simulation(tmp_path, KEEP_EVENTS) as sim:
        group = await sim.new_realm(3)
        await sim.settle_peers()
        old = sim.leader_of(group)
        assert old is not None
        held, proceed = trio.Event(), trio.Event()

        async def hold(events: object) -> None:
            if events:
                held.set()
                await proceed.wait()

        old.outbox.before_record = hold
        replies: list[object] = []

        async def ask() -> None:
            replies.append(await old.call("app", sim.register1(group, "alice")))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await held.wait()
            new = await sim.hand_over_group(old, group)
            assert new is not None
            assert old.group(group).leader is None
            leader = new.group(group).leader
            await until(lambda: leader.committed == leader.starting - 1)
            await trio.sleep(0.3)
            early = leader.snapshot(0.0).resolved
            proceed.set()
        assert not early
        assert isinstance(replies[0], AppOk)
        await until(lambda: leader.snapshot(0.0).resolved)
        events = await sim.store.outbox.read(sim.realm, TENANT, 0, 10)
        assert [event.new.kind for event in events] == [EventKind.REGISTER1]
