"""What must come before what: rows before answers, commits before steps, certificates before compaction.

Each test holds the earlier thing back, looks that the later one waits, and lets go.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
import trio.testing

from juicebox_hsm.consensus.types import Certificate, LogEntry
from juicebox_hsm.host.events import EventKind, NewEvent
from juicebox_hsm.host.log import AppendOutcome, Compacted
from juicebox_hsm.hsm.messages import AppRequest, PersistState, Request, Response
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.wire.rpc import AppOk, Done, GroupCall, Prepared, Range, Refused, SteppedDown, TransferredOut
from roles.agent.leader import hand_over
from tests.simulation.cluster import KEEP_EVENTS, TENANT, SimAgent, record_id_of, simulation, until
from tests.simulation.test_agent_transfers import UPPER, Pair

QUARTER = Range(b"\x40" + bytes(31), b"\x7f" + b"\xff" * 31)
"""What moves: the upper end of the source's half, next to the destination's."""


class Held:
    """What an agent is held back from: its HSM's persisting, and the writing of rows for requests."""

    def __init__(self, agent: SimAgent) -> None:
        self._agent = agent
        self._send: Callable[[Request], Awaitable[Response]] = agent.hsm.send
        self.persist, self.rows, self.reached_rows = trio.Event(), trio.Event(), trio.Event()
        agent.agent.hsm = self
        agent.outbox.before_record = self._before_record

    async def send(self, request: Request) -> Response:
        if isinstance(request, PersistState):
            await self.persist.wait()
        return await self._send(request)

    async def _before_record(self, events: Sequence[NewEvent]) -> None:
        if events:
            self.reached_rows.set()
            await self.rows.wait()

    def let_go(self) -> None:
        """Hold back nothing any more."""
        self.persist.set()
        self.rows.set()


def user_of(first: int, last: int) -> str:
    """Return a user whose record id begins with a byte in first..last."""
    names = (f"user{number}" for number in range(10_000))
    return next(name for name in names if first <= record_id_of(name)[0] <= last)


async def quiet() -> None:
    """Let everything happen that can happen now."""
    for _ in range(3):
        await trio.testing.wait_all_tasks_blocked(0.01)


class Asked:
    """A call under way. `replies` is empty until it is answered."""

    def __init__(self, nursery: trio.Nursery, call: Callable[[], Awaitable[Any]]) -> None:
        self.replies: list[Any] = []
        self._call = call
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        self.replies.append(await self._call())


@asynccontextmanager
async def holding(agent: SimAgent) -> AsyncIterator[tuple[Held, trio.Nursery]]:
    """Hold an agent back within the block, and let go also when the block fails."""
    held = Held(agent)
    async with trio.open_nursery() as nursery:
        try:
            yield held, nursery
        finally:
            held.let_go()


async def halves(path_pair: Pair) -> Pair:
    """Give the destination the upper half, so that both groups have users."""
    await path_pair.sim.transfer(path_pair.source, path_pair.destination, UPPER)
    return path_pair


async def nothing(_pair: Pair) -> None:
    """Begin with nothing."""


async def gone_out(pair: Pair) -> tuple[TransferredOut, Prepared]:
    prepared = await pair.prepare(QUARTER)
    return await pair.out(QUARTER, prepared), prepared


async def arrived(pair: Pair) -> TransferredOut:
    out, prepared = await gone_out(pair)
    assert not isinstance(await pair.take_in(out, prepared), Refused)
    return out


STEPS: dict[str, tuple[bool, Callable[[Pair], Awaitable[Any]], Callable[[Pair, Any], Awaitable[Any]]]] = {
    # name: (is the destination's, what comes before, the step)
    "prepare": (True, nothing, lambda pair, _: pair.prepare(QUARTER)),
    "cancel": (
        True,
        lambda pair: pair.prepare(QUARTER),
        lambda pair, _: pair.agent.call("transfer/cancel_prepare", pair.order(QUARTER)),
    ),
    "out": (False, lambda pair: pair.prepare(QUARTER), lambda pair, prepared: pair.out(QUARTER, prepared)),
    "in": (True, gone_out, lambda pair, before: pair.take_in(*before)),
    "complete": (False, arrived, lambda pair, out: pair.complete(QUARTER, out.at)),
}


@pytest.mark.parametrize("name", STEPS)
async def test_a_transfers_step_waits_for_the_rows_before_it(tmp_path: Path, name: str) -> None:
    """A step answers when its entry is committed and all earlier entries have their rows, not at the commit alone."""
    at_destination, before, step = STEPS[name]
    async with simulation(tmp_path, KEEP_EVENTS) as sim:
        pair = await halves(await Pair.create(sim))
        known = await before(pair)
        group = pair.destination if at_destination else pair.source
        user = user_of(0x80, 0xFF) if at_destination else user_of(0x00, 0x3F)
        leader = pair.agent.group(group).leader
        async with holding(pair.agent) as (held, nursery):
            end = leader.next_index
            app = Asked(nursery, lambda: pair.agent.call("app", sim.register1(group, user)))
            await until(lambda: leader.next_index == end + 1)
            asked = Asked(nursery, lambda: step(pair, known))
            await until(lambda: leader.next_index == end + 2)
            held.persist.set()
            await held.reached_rows.wait()
            assert leader.committed == end + 1, "one commit covers both"
            await quiet()
            early = (app.replies, asked.replies)
            assert early == ([], [])
        assert isinstance(app.replies[0], AppOk)
        assert not isinstance(asked.replies[0], Refused)


class CountsTails:
    """A log store that counts reads of the tail."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.reads = 0

    async def read_last(self, realm: RealmId, group: GroupId) -> LogEntry | None:
        last: LogEntry | None = await self._inner.read_last(realm, group)
        self.reads += 1
        return last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.mark.parametrize("question", ["owns", "arrived"])
async def test_a_tail_that_is_not_committed_proves_nothing(tmp_path: Path, question: str) -> None:
    """The manager's questions are answered from a committed tail: what is only appended may be another's log soon."""
    async with simulation(tmp_path, KEEP_EVENTS) as sim:
        pair = await halves(await Pair.create(sim))
        out = await arrived(pair)
        log = CountsTails(pair.agent.log._inner)
        pair.agent.log._inner = log
        leader = pair.agent.group(pair.destination).leader
        async with holding(pair.agent) as (held, nursery):
            end = leader.next_index
            Asked(nursery, lambda: pair.agent.call("app", sim.register1(pair.destination, user_of(0x80, 0xFF))))
            await until(lambda: leader.next_index == end + 1)
            log.reads = 0
            asked = Asked(
                nursery, lambda: pair.owns(pair.destination, UPPER) if question == "owns" else pair.arrived(out.at)
            )
            await until(lambda: log.reads)
            await quiet()
            assert asked.replies == []
            held.persist.set()
            await held.reached_rows.wait()
        assert not isinstance(asked.replies[0], Refused)


async def test_an_append_under_way_is_not_cancelled(tmp_path: Path) -> None:
    """An agent that is cancelled ends after its append: a cancelled write would be one of unknown outcome."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        reached, proceed = trio.Event(), trio.Event()
        outcomes: list[AppendOutcome] = []

        async def hold(really: Callable[[], Awaitable[AppendOutcome]]) -> AppendOutcome:
            reached.set()
            await proceed.wait()
            outcomes.append(await really())
            return outcomes[-1]

        agent.log.on_append = hold
        sim.nursery.start_soon(agent.call_and_forget, "app", sim.register1(group, "alice"))
        await reached.wait()
        agent.kill()
        await quiet()
        ended_early = agent.closed.is_set()
        proceed.set()
        await agent.closed.wait()
        assert (ended_early, outcomes) == (False, [AppendOutcome.APPENDED])


async def test_rows_under_way_are_not_cancelled(tmp_path: Path) -> None:
    """An agent that is cancelled ends after the rows it was writing: the audit log has what the HSM released."""
    async with simulation(tmp_path, KEEP_EVENTS) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        async with holding(agent) as (held, nursery):
            held.persist.set()
            nursery.start_soon(agent.call_and_forget, "app", sim.register1(group, "alice"))
            await held.reached_rows.wait()
            agent.kill()
            await quiet()
            assert not agent.closed.is_set()
        await agent.closed.wait()
        events = await sim.store.outbox.read(sim.realm, TENANT, 0, 10)
        assert [event.new.kind for event in events] == [EventKind.REGISTER1]


async def test_hand_over_waits_for_rows_being_written(tmp_path: Path) -> None:
    """An agent that stops has answered and recorded what was committed, although its HSM is a witness already."""
    async with simulation(tmp_path, KEEP_EVENTS) as sim:
        group = await sim.new_realm(1)
        sim.manager.appoints = False
        agent = sim.agents[0]
        async with holding(agent) as (held, nursery):
            held.persist.set()
            app = Asked(nursery, lambda: agent.call("app", sim.register1(group, "alice")))
            await held.reached_rows.wait()
            agent.agent.stopping = True
            leaving = Asked(nursery, lambda: hand_over(agent.agent))
            await until(lambda: agent.group(group).leader is None)
            status = await agent.call("status", None)
            assert next(info.waiting_clients for info in status.groups if info.group == group) == 1
            await quiet()
            await trio.sleep(0.05)
            assert (app.replies, leaving.replies) == ([], [])
        assert isinstance(app.replies[0], AppOk)
        assert len(await sim.store.outbox.read(sim.realm, TENANT, 0, 10)) == 1


async def test_nothing_is_compacted_without_its_certificate(tmp_path: Path) -> None:
    """A certificate that cannot be written keeps every row; once it is, the rows go and the certificate covers them."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        refused = 0
        calls: list[str] = []

        async def fail(*_: object) -> None:
            nonlocal refused
            refused += 1
            raise StoreUnavailable("down")

        async def write(realm: RealmId, named: GroupId, certificate: Certificate) -> None:
            await sim.store.log.write_certificate(realm, named, certificate)
            calls.append("certificate")

        async def compact(realm: RealmId, named: GroupId, rows: Any) -> None:
            calls.append("rows")
            await sim.store.log.compact(realm, named, rows)

        agent.log.write_certificate = fail  # type: ignore[attr-defined]
        agent.log.compact = compact  # type: ignore[attr-defined]
        for number in range(3):
            assert isinstance(await agent.call("app", sim.register1(group, f"user{number}")), AppOk)
        await until(lambda: refused >= 2)
        assert calls == []
        assert not isinstance(await sim.store.log.read_from(sim.realm, group, 1, 10), Compacted)
        agent.log.write_certificate = write  # type: ignore[attr-defined]
        await until(lambda: "rows" in calls)
        assert calls[:2] == ["certificate", "rows"]


async def test_a_crash_between_certificate_and_rows_is_made_good(tmp_path: Path) -> None:
    """An agent that dies after the certificate and before the compaction leaves rows for the next leader to compact."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        reached = trio.Event()

        async def never(*_: object) -> None:
            reached.set()
            await trio.sleep_forever()

        agent.log.compact = never  # type: ignore[attr-defined]
        for number in range(3):
            assert isinstance(await agent.call("app", sim.register1(group, f"user{number}")), AppOk)
        with trio.fail_after(5):
            await reached.wait()
        assert await sim.store.log.read_certificate(sim.realm, group) is not None
        assert not isinstance(await sim.store.log.read_from(sim.realm, group, 1, 10), Compacted)
        del agent.log.compact
        await sim.restart(agent)
        await until(lambda: agent.group(group).is_leader)
        with trio.fail_after(5):
            while not isinstance(await sim.store.log.read_from(sim.realm, group, 1, 10), Compacted):
                await agent.call("app", sim.register1(group, "more"))
                await trio.sleep(0.02)


async def test_an_entry_goes_to_the_leadership_that_made_it(tmp_path: Path) -> None:
    """A request that reached the HSM when another leadership of the same agent had begun is appended by that one."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        sim.manager.appoints = False
        agent = sim.agents[0]
        reached, proceed = trio.Event(), trio.Event()

        class Slow:
            async def send(self, request: Request) -> Response:
                if isinstance(request, AppRequest):
                    reached.set()
                    await proceed.wait()
                return await agent.hsm.send(request)

        agent.agent.hsm = Slow()
        first = agent.group(group).leader
        async with trio.open_nursery() as nursery:
            asked = Asked(nursery, lambda: agent.call("app", sim.register1(group, "alice")))
            try:
                await reached.wait()
                assert isinstance(await agent.call("stepdown", GroupCall(sim.realm, group)), SteppedDown)
                assert isinstance(await sim.become_leader(agent, group), Done)
                assert agent.group(group).leader is not first
            finally:
                proceed.set()
        assert isinstance(asked.replies[0], AppOk)
