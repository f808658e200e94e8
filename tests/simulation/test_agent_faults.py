"""What one agent does when store, HSM or client fail it (agent.md 13, decisions 27 and 30)."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

import roles.agent.app as app_module
from juicebox_hsm.adapters.hsm_directory.nvram import NvramFailed
from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.adapters.process.supervision import exit_code_of
from juicebox_hsm.consensus.types import Certificate, LogEntry
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.events import EventKind
from juicebox_hsm.host.leadership.state import Limits
from juicebox_hsm.host.log import AppendOutcome, Compacted
from juicebox_hsm.host.outbox import BACKLOG_BOUND_ROWS, BACKLOG_WARN_ROWS, Unpublished
from juicebox_hsm.host.readiness import EventsWait, Readiness, Trouble
from juicebox_hsm.hsm.messages import AppRequest, Outcome, Request, Response
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.ports.errors import HsmGone, StoreAmbiguous, StoreInvalid, StoreUnavailable
from juicebox_hsm.wire.rpc import App, AppOk, DamageKind, Refusal, Refused, StoreDamage
from roles.agent.leader import hand_over
from roles.agent.registration import livez, readyz
from roles.words import own_sentence
from tests.simulation.cluster import KEEP_EVENTS, TENANT, SimAgent, Simulation, simulation, until
from tests.simulation.test_agent_catch_up import alone, compacted_past

Really = Callable[[], Awaitable[AppendOutcome]]


async def kinds(sim: Simulation) -> list[EventKind]:
    """Return the kinds in the tenant's outbox."""
    return [event.new.kind for event in await sim.store.outbox.read(sim.realm, TENANT, 0, 100)]


async def serves_again(sim: Simulation, group: GroupId) -> None:
    """Wait until a request succeeds."""
    await until(lambda: sim.leader_of(group) is not None)
    leader = sim.leader_of(group)
    assert leader is not None
    assert isinstance(await leader.call("app", sim.register1(group, "again")), AppOk)


async def test_ambiguous_append_that_landed(tmp_path: Path) -> None:
    """An append of unknown outcome that did land costs the leadership; its request becomes `unknown`."""
    async with simulation(tmp_path, KEEP_EVENTS) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]

        async def land_and_fail(really: Really) -> AppendOutcome:
            agent.log.on_append = None
            await really()
            raise StoreAmbiguous("the answer was lost")

        agent.log.on_append = land_and_fail
        reply = await agent.call("app", sim.register1(group, "alice"))
        assert reply == Refused(Refusal.NOT_LEADER, consumed=True)
        await serves_again(sim, group)
        assert sorted(await kinds(sim), key=str) == [EventKind.REGISTER1, EventKind.UNKNOWN]


async def test_ambiguous_append_that_did_not_land(tmp_path: Path) -> None:
    """An append of unknown outcome that did not land costs the leadership and leaves no trace."""
    async with simulation(tmp_path, KEEP_EVENTS) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]

        async def fail(_really: Really) -> AppendOutcome:
            agent.log.on_append = None
            raise StoreAmbiguous("the answer was lost")

        agent.log.on_append = fail
        reply = await agent.call("app", sim.register1(group, "alice"))
        assert reply == Refused(Refusal.NOT_LEADER, consumed=True)
        await serves_again(sim, group)
        await trio.sleep(0.1)
        assert await kinds(sim) == [EventKind.REGISTER1]


async def test_passing_store_trouble_is_retried(tmp_path: Path) -> None:
    """An append refused for a passing reason is tried again and the client notices nothing."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        failures = [StoreUnavailable("busy")] * 3

        async def sometimes(really: Really) -> AppendOutcome:
            if failures:
                raise failures.pop()
            return await really()

        agent.log.on_append = sometimes
        assert isinstance(await agent.call("app", sim.register1(group, "alice")), AppOk)
        assert not failures


async def test_outbox_that_cannot_be_written_releases_nothing(tmp_path: Path) -> None:
    """Without its outbox row a committed answer is withheld, leadership is given up, and the outcome is `unknown`."""
    async with simulation(tmp_path, KEEP_EVENTS) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]

        async def refuse(events: object) -> None:
            if not events:
                return  # the settled index, which compaction may raise at any time
            agent.outbox.before_record = None
            raise StoreInvalid("no")

        agent.outbox.before_record = refuse
        reply = await agent.call("app", sim.register1(group, "alice"))
        assert reply == Refused(Refusal.NOT_LEADER, consumed=True)
        await serves_again(sim, group)
        assert sorted(await kinds(sim), key=str) == [EventKind.REGISTER1, EventKind.UNKNOWN]


async def test_client_that_leaves_before_the_append_stalls_nobody(tmp_path: Path) -> None:
    """A client gone between the HSM's reply and the append leaves no hole: the entry is appended and recorded."""
    async with simulation(tmp_path, KEEP_EVENTS) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        reached, proceed = trio.Event(), trio.Event()

        async def hold(really: Really) -> AppendOutcome:
            reached.set()
            await proceed.wait()
            return await really()

        agent.log.on_append = hold
        async with trio.open_nursery() as nursery:
            nursery.start_soon(app_module.handle_app, agent.agent, sim.register1(group, "alice"))
            await reached.wait()
            nursery.cancel_scope.cancel()
        proceed.set()
        assert isinstance(await agent.call("app", sim.register1(group, "bob")), AppOk)
        assert await kinds(sim) == [EventKind.REGISTER1, EventKind.REGISTER1]


async def test_busy_beyond_the_uncommitted_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With too many uncommitted entries a request is refused as Busy before the HSM sees it."""
    monkeypatch.setattr("roles.agent.context.Limits", partial(Limits, uncommitted_max=5))
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        proceed = trio.Event()

        async def hold(really: Really) -> AppendOutcome:
            await proceed.wait()
            return await really()

        agent.log.on_append = hold
        replies: list[object] = []

        async def ask(app: App) -> None:
            replies.append(await agent.call("app", app))

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(ask, sim.register1(group, f"user{number}"))
            await until(lambda: replies)
            assert all(reply == Refused(Refusal.BUSY) for reply in replies)
            proceed.set()
        assert sum(isinstance(reply, AppOk) for reply in replies) == 6


class LosesOneReply:
    """An HSM transport that loses one reply to an AppRequest after the HSM made the entry."""

    def __init__(self, inner: Callable[[Request], Awaitable[Response]]) -> None:
        self._inner = inner
        self.left = 1

    async def send(self, request: Request) -> Response:
        reply = await self._inner(request)
        if isinstance(request, AppRequest) and self.left:
            self.left -= 1
            return Outcome.STALE_PROOF
        return reply


async def test_lost_hsm_reply_does_not_stall_the_group_for_ever(tmp_path: Path) -> None:
    """An index that never arrives ends the leadership after the hole limit; service goes on under the next."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        agent.agent.hsm = LosesOneReply(agent.hsm.send)
        reply = await agent.call("app", sim.register1(group, "alice"))
        assert isinstance(reply, Refused)
        assert reply.outcome is Refusal.NOT_LEADER
        await serves_again(sim, group)


async def test_poisoned_hsm_ends_the_process(tmp_path: Path) -> None:
    """A failed NVRAM write ends the agent with `HsmGone` (exit 75)."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]

        def fail(_content: bytes) -> None:
            raise NvramFailed("disk gone")

        agent.platform.nvram_write = fail  # type: ignore[assignment,method-assign]  # parameter name
        await agent.call_and_forget("app", sim.register1(group, "alice"))
        await agent.closed.wait()
        assert agent.crash is not None
        assert contains(agent.crash, (HsmGone,))
        assert exit_code_of(agent.crash) is ExitCode.HSM
        agent.crash = None


def contains(error: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    """Tell whether one of the leaves is of such a type."""
    if isinstance(error, BaseExceptionGroup):
        return any(contains(inner, kinds) for inner in error.exceptions)
    return isinstance(error, kinds)


class Corrupting:
    """A log store whose reads spoil every entry's mac."""

    def __init__(self, inner: object) -> None:
        self._inner = inner

    async def read_from(
        self, realm: RealmId, group: GroupId, index: int, entries_max: int
    ) -> list[LogEntry] | Compacted:
        read = await self._inner.read_from(realm, group, index, entries_max)  # type: ignore[attr-defined]
        return [dataclasses.replace(entry, entry_mac=bytes(32)) for entry in read]

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


async def test_a_row_that_the_hsm_refuses_is_told(tmp_path: Path) -> None:
    """It is never skipped, and ends no process: agents with it serve other groups, and go on once it is mended."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        await sim.settle_peers()
        behind = next(agent for agent in sim.agents if agent is not sim.leader_of(group))
        store = behind.agent.store
        behind.agent.store = dataclasses.replace(store, log=Corrupting(store.log))  # type: ignore[arg-type]
        sim.cut |= alone(sim, behind)
        position = behind.group(group).position
        leader = sim.leader_of(group)
        assert leader is not None
        await leader.call("app", sim.register1(group, "alice"))
        await until(lambda: behind.agent.damages.lately(trio.current_time()) != ())
        assert behind.agent.damages.lately(trio.current_time()) == (
            StoreDamage(DamageKind.LOG, f"of entry {position}", group),
        )
        assert any("the HSM says InvalidMac" in own_sentence(trouble) for trouble in behind.agent.troubles)
        assert behind.group(group).position == position
        behind.agent.store = store
        await until(lambda: behind.group(group).position > position and not len(behind.agent.troubles))


async def test_full_outbox_refuses_before_the_hsm_is_asked(tmp_path: Path) -> None:
    """At the outbox bound requests get NoStore with their message unused."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        agent.agent.unpublished = Unpublished(BACKLOG_BOUND_ROWS)
        reply = await agent.call("app", sim.register1(group, "alice"))
        assert reply == Refused(Refusal.NO_STORE)
        assert agent.log.appends == [1]


async def test_hostile_requests_are_answered(tmp_path: Path) -> None:
    """Foreign realms and groups, garbage and wrong sizes get their refusals and disturb nothing."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        good = sim.register1(group, "alice")

        def changed(**fields: object) -> App:
            return msgspec.structs.replace(good, **fields)

        expected = [
            (changed(realm=bytes(16)), Refusal.INVALID_REALM),
            (changed(group=bytes(16)), Refusal.INVALID_GROUP),
            (changed(group=b""), Refusal.INVALID_GROUP),
            (changed(encrypted=b"\xff"), Refusal.DECODING_ERROR),
            (changed(record_id=bytes(31)), Refusal.DECODING_ERROR),
            (changed(session_id=2**32), Refusal.DECODING_ERROR),
            (changed(session_id=-1), Refusal.DECODING_ERROR),
            (changed(handshake_only=True), Refusal.SESSION_ERROR),
        ]
        for body, outcome in expected:
            reply = await agent.call("app", body)
            assert isinstance(reply, Refused)
            assert reply.outcome is outcome
        assert isinstance(await agent.call("app", good), AppOk)


async def test_shutdown_without_managers_answers_everybody(tmp_path: Path) -> None:
    """A graceful shutdown waits for what was begun: committed, recorded and answered."""
    async with simulation(tmp_path, KEEP_EVENTS) as sim:
        group = await sim.new_realm(1)
        await sim.store.discovery.deregister(sim.manager_kind, sim.manager_url)
        agent = sim.agents[0]
        await until(lambda: not agent.agent.peers.manager_urls)
        replies: list[object] = []

        proceed = trio.Event()

        async def hold(really: Really) -> AppendOutcome:
            await proceed.wait()
            return await really()

        async def ask(app: App) -> None:
            replies.append(await agent.call("app", app))

        agent.log.on_append = hold
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(ask, sim.register1(group, f"user{number}"))
            await until(lambda: agent.group(group).leader.snapshot(trio.current_time()).waiting == 5)
            agent.agent.stopping = True
            nursery.start_soon(hand_over, agent.agent)
            await until(lambda: not agent.group(group).is_leader)
            assert agent.group(group).leader is not None
            proceed.set()
        assert all(isinstance(reply, AppOk) for reply in replies)
        assert len(replies) == 5
        assert len(await kinds(sim)) == 5
        assert agent.group(group).leader is None
        assert await sim.store.outbox.settled(sim.realm, group) == 6


async def test_watchdog_regains_a_forgotten_leadership(tmp_path: Path) -> None:
    """When the HSM leads and the agent does not know, the watchdog makes it step down and a manager appoints anew."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        assert isinstance(await agent.call("app", sim.register1(group, "alice")), AppOk)
        forgotten = agent.group(group).leader
        agent.group(group).leader = None
        agent.agent.drivers[forgotten].end()
        await until(lambda: agent.group(group).leader is not None)
        await serves_again(sim, group)


async def test_probes_tell_what_is_wrong(tmp_path: Path) -> None:
    """Readiness names store trouble and keeps outbox warnings apart; liveness asks the HSM."""
    async with simulation(tmp_path) as sim:
        await sim.new_realm(1)
        agent = sim.agents[0].agent
        assert (await livez(agent))[0]
        assert (await readyz(agent)).is_ready
        agent.unpublished = Unpublished(BACKLOG_WARN_ROWS)
        assert await readyz(agent) == Readiness(warnings=(EventsWait(agent.unpublished),))
        agent.note_trouble(Code.DISCOVERY, StoreUnavailable("down"))
        assert (await readyz(agent)).reasons == (Trouble(Code.DISCOVERY, "down"),)


async def test_accounting_and_counters(tmp_path: Path) -> None:
    """Register, delete and delete again: one user counted for the day, and exact request counters."""
    async with simulation(tmp_path) as sim:
        await sim.new_realm(1)
        client = sim.client("alice")
        await client.register(b"1234", b"secret", b"info", 3)
        await client.delete()
        await client.delete()

        async def counters() -> dict[EventKind, int]:
            days = await sim.store.outbox.counters(sim.realm, TENANT)
            return {kind: count for day in days.values() for kind, count in day.items()}

        with trio.fail_after(5):
            while (await counters()).get(EventKind.DELETE) != 2:  # noqa: ASYNC110 - tests look from outside
                await trio.sleep(0.01)
        assert await counters() == {EventKind.REGISTER1: 1, EventKind.REGISTER2: 1, EventKind.DELETE: 2}
        day_ms = 86_400_000
        today = sim.agents[0].agent.now_ms() // day_ms * day_ms
        assert await sim.store.accounting.count_users(sim.realm, today, today + day_ms) == {TENANT: 1}


async def test_agent_that_cannot_read_the_log_is_not_ready(tmp_path: Path) -> None:
    """Log reads that fail are retried for ever, reported, and forgotten when they succeed again."""
    async with simulation(tmp_path) as sim:
        await sim.new_realm(1)
        agent: SimAgent = sim.agents[0]

        async def fail(*_: object) -> list[LogEntry]:
            raise StoreUnavailable("down")

        agent.log.read_from = fail  # type: ignore[attr-defined]
        await until(lambda: agent.agent.troubles)
        del agent.log.read_from
        await until(lambda: not agent.agent.troubles)


async def test_rows_of_earlier_leaderships_are_compacted_after_trouble(tmp_path: Path) -> None:
    """A store that fails while the older rows are listed delays their compaction and does not cancel it."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        for number in range(3):
            assert isinstance(await agent.call("app", sim.register1(group, f"user{number}")), AppOk)
        await sim.restart(agent)
        failures = [StoreUnavailable("busy")] * 2

        async def sometimes(realm: RealmId, wanted: GroupId, below: int) -> object:
            if failures:
                raise failures.pop()
            return await sim.store.log.list_rows(realm, wanted, below)

        agent.log.list_rows = sometimes  # type: ignore[attr-defined]
        await serves_again(sim, group)
        with trio.fail_after(5):
            while not isinstance(await sim.store.log.read_from(sim.realm, group, 3, 10), Compacted):
                await agent.call("app", sim.register1(group, "more"))
                await trio.sleep(0.02)
        assert not failures


async def test_trouble_with_compaction_ends_with_the_leadership(tmp_path: Path) -> None:
    """An agent that no longer leads a group is not unready over its compaction, which is another's by then."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        await sim.settle_peers()
        old = sim.leader_of(group)
        assert old is not None
        troubles = old.agent.troubles

        def is_in_trouble() -> bool:
            return any((held.code, held.group) == (Code.COMPACTION, group) for held in troubles)

        async def fail(*_: object) -> None:
            raise StoreUnavailable("busy")

        old.log.write_certificate = fail  # type: ignore[attr-defined]
        client = sim.client("alice")
        await client.register(b"1234", b"secret", b"info", 3)
        with trio.fail_after(10):
            while not is_in_trouble():
                await client.recover(b"1234", b"info")
                await trio.sleep(0.1)
        assert await sim.hand_over_group(old, group) is not None
        await until(lambda: not is_in_trouble())


async def _behind_compaction(sim: Simulation) -> SimAgent:
    """Return a member that was killed and whose place in the log is compacted since."""
    group = await sim.new_realm(3)
    await sim.settle_peers()
    leader = sim.leader_of(group)
    assert leader is not None
    behind = next(agent for agent in sim.agents if agent is not leader)
    behind.kill()
    await behind.closed.wait()
    await compacted_past(sim, group, leader, behind.group(group).position)
    return behind


async def _told_after_waking(sim: Simulation, behind: SimAgent, log: Corrupting) -> set[DamageKind]:
    """Run a member again, cut off, on what `log` reads; return which kinds of damage it tells of."""
    behind.store = dataclasses.replace(behind.store, log=log)  # type: ignore[arg-type]
    behind.platform.restarted()
    sim.cut |= alone(sim, behind)
    sim.nursery.start_soon(behind.run)
    await until(lambda: behind.agent.damages.lately(trio.current_time()) != ())
    return {damage.kind for damage in behind.agent.damages.lately(trio.current_time())}


async def test_damaged_rows_met_while_jumping_are_told(tmp_path: Path) -> None:
    """Rows that the HSM refuses in a jump over compacted ones are told, as any stored row it refuses is."""
    async with simulation(tmp_path) as sim:
        behind = await _behind_compaction(sim)

        class SpoilsTails(Corrupting):
            async def read_from(
                self, realm: RealmId, group: GroupId, index: int, entries_max: int
            ) -> list[LogEntry] | Compacted:
                found = await self._inner.read_from(realm, group, index, entries_max)  # type: ignore[attr-defined]
                return found if isinstance(found, Compacted) else await super().read_from(realm, group, index, 10)

        assert await _told_after_waking(sim, behind, SpoilsTails(behind.log)) == {DamageKind.LOG}


async def test_a_damaged_certificate_is_told(tmp_path: Path) -> None:
    """Statements that do not convince the HSM though their entries are there are damaged, not just late."""
    async with simulation(tmp_path) as sim:
        behind = await _behind_compaction(sim)

        class SpoilsCertificates(Corrupting):
            async def read_from(
                self, realm: RealmId, group: GroupId, index: int, entries_max: int
            ) -> list[LogEntry] | Compacted:
                found: list[LogEntry] | Compacted = await self._inner.read_from(  # type: ignore[attr-defined]
                    realm, group, index, entries_max
                )
                return found

            async def read_certificate(self, realm: RealmId, group: GroupId) -> Certificate | None:
                found = await self._inner.read_certificate(realm, group)  # type: ignore[attr-defined]
                captures = tuple(dataclasses.replace(captured, statement=bytes(32)) for captured in found.captures)
                return dataclasses.replace(found, captures=captures)  # type: ignore[no-any-return]

        assert await _told_after_waking(sim, behind, SpoilsCertificates(behind.log)) == {DamageKind.CERTIFICATE}
