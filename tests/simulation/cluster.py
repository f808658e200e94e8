"""A realm in one process: several agents with real HSM cores and a real SQLite file, an in-memory network, our client.

The front end is a transport of the client that routes like a balancer would. Faults: agents killed and restarted with
their NVRAM, peers cut off, stores that conflict, answer ambiguously or refuse (`FaultyLog`, `FaultyOutbox`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from juicebox_hsm.adapters.hsm_directory.hsm_host import InProcessHsm
from juicebox_hsm.adapters.observation.logging import get_logger
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.client import Client
from juicebox_hsm.client.configuration import Configuration, Realm
from juicebox_hsm.client.exchange import Exchange
from juicebox_hsm.client.transport import Headers
from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.crypto.noise import Initiator
from juicebox_hsm.crypto.pin import PinHashingMode
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.events import NewEvent
from juicebox_hsm.host.log import AppendOutcome, Intent
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.hsm.keys import RealmKeys
from juicebox_hsm.ids import GroupId, HsmId, RealmId, RecordId
from juicebox_hsm.ports.store import Store
from juicebox_hsm.wire.client import (
    HTTP_STATUS,
    ClientOutcome,
    ClientResponse,
    HandshakeRequest,
    RequestKind,
    decode_client_request,
    decode_noise_response,
    encode_client_response,
    encode_noise_request,
)
from juicebox_hsm.wire.methods import LEADER_LOST, LEADER_STEPDOWN, AnyMethod
from juicebox_hsm.wire.requests import Register1, encode_secrets_request
from juicebox_hsm.wire.rpc import (
    App,
    AppOk,
    BecomeLeaderCall,
    Done,
    Empty,
    GroupCall,
    GroupCreated,
    GroupJoin,
    GroupNew,
    PartitionInfo,
    Prepared,
    Range,
    RealmCreated,
    RealmJoin,
    Refusal,
    Refused,
    SteppedDown,
    TransferComplete,
    TransferInCall,
    TransferOutCall,
    TransferPrepare,
    TransferredOut,
)
from roles.agent.context import Agent
from roles.agent.leader import lead
from roles.agent.outside import AgentConfig, Timings
from roles.agent.registration import register
from roles.agent.service import AgentService
from tests.fakes.random import SeededRandom
from tests.virtual_time import now_ms

QUICK = Timings(
    heartbeat_s=0.05,
    silence_s=0.5,
    replicate_timeout_s=0.5,
    leader_hint_first_s=0.1,
    leader_hint_again_s=0.5,
    watch_idle_first_s=0.01,
    watch_idle_max_s=0.05,
    become_leader_s=2.0,
    peer_refresh_s=1.0,
    discovery_poll_s=0.05,
    witness_grace_s=2.0,
    witness_poll_s=0.02,
    compact_pause_s=0.05,
    hole_s=0.3,
    commit_wait_s=5.0,
    watchdog_s=0.05,
    gossip_s=0.05,
    gossip_idle_s=0.2,
    tenants_refresh_s=5.0,
    dispatch_s=0.05,
    dispatch_idle_s=0.1,
    backlog_s=0.1,
    shutdown_s=5.0,
)
KEEP_EVENTS = dataclasses.replace(QUICK, dispatch_idle_s=1000.0)
"""No dispatcher after the first round, so that published rows are not removed under a test that reads them."""
TENANT = "test-acme"

_CODES = {
    Refusal.MISSING_SESSION: ClientOutcome.MISSING_SESSION,
    Refusal.SESSION_ERROR: ClientOutcome.SESSION_ERROR,
    Refusal.DECODING_ERROR: ClientOutcome.DECODING_ERROR,
    Refusal.RATE_LIMIT_EXCEEDED: ClientOutcome.RATE_LIMIT_EXCEEDED,
}


class MemoryPlatform:
    """An HSM's platform in memory; NVRAM survives `restarted`."""

    def __init__(self, keys: RealmKeys, random: Callable[[int], bytes]) -> None:
        self._keys = keys
        self._random = random
        self._nvram = b""
        self._lives = 0

    def restarted(self) -> MemoryPlatform:
        """Begin another life with the same NVRAM."""
        self._lives += 1
        return self

    @property
    def keys(self) -> RealmKeys:
        return self._keys

    @property
    def clock_start(self) -> int:
        return 1 + (self._lives << 32)

    def random(self, size: int) -> bytes:
        return self._random(size)

    def nvram_read(self) -> bytes:
        return self._nvram

    def nvram_write(self, content: bytes) -> None:
        self._nvram = content


class Unreachable(RealmError):
    """The in-memory network has no such peer now."""

    retryable = True


@dataclass(frozen=True)
class Caller:
    """Who calls, as a handler sees it."""

    connection_id: int
    closed: trio.Event


class FaultyLog:
    """A log store with faults: `on_append` may act before or after, or replace the outcome."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.on_append: Callable[[Callable[[], Awaitable[AppendOutcome]]], Awaitable[AppendOutcome]] | None = None
        self.appends: list[int] = []

    async def append(
        self,
        realm: RealmId,
        group: GroupId,
        entries: Sequence[LogEntry],
        intents: Sequence[Intent | None],
        delta: bytes,
    ) -> AppendOutcome:
        async def really() -> AppendOutcome:
            outcome: AppendOutcome = await self._inner.append(realm, group, entries, intents, delta)
            return outcome

        self.appends.append(len(entries))
        return await (really() if self.on_append is None else self.on_append(really))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class FaultyOutbox:
    """An outbox with faults: `before_record` may raise."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.before_record: Callable[[Sequence[NewEvent]], Awaitable[None]] | None = None

    async def record(
        self, realm: RealmId, events: Sequence[NewEvent], settled: Mapping[GroupId, int]
    ) -> dict[str, int]:
        if self.before_record is not None:
            await self.before_record(events)
        tails: dict[str, int] = await self._inner.record(realm, events, settled)
        return tails

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class FakeManager:
    """Counts hints and, when `appoints`, makes the member with the longest capture lead."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self.hints: list[tuple[bytes, int]] = []
        self.appoints = True

    async def call(self, method: AnyMethod, body: Any) -> Any:
        if method is LEADER_LOST:
            self.hints.append((body.group, body.starting))
            if self.appoints and not self._sim.is_led(GroupId(body.group), body.starting):
                await self._sim.appoint(GroupId(body.group))
            return Done()
        if method is LEADER_STEPDOWN:
            await self._sim.hand_over(HsmId(body.hsm))
            return Done()
        return Refused(Refusal.RPC_ERROR)


@dataclass
class SimAgent:
    """One agent with its HSM's durable state; `agent` and `service` exist while it runs."""

    sim: Simulation
    name: str
    platform: MemoryPlatform
    store: Store
    log: FaultyLog
    outbox: FaultyOutbox
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    closed: trio.Event = field(default_factory=trio.Event)
    agent: Agent = field(init=False)
    service: AgentService = field(init=False)
    handlers: Mapping[str, Any] = field(default_factory=dict)
    crash: BaseException | None = None
    hsm: InProcessHsm = field(init=False)
    metrics: Metrics = field(init=False)
    bodies: trio.Nursery = field(init=False)

    @property
    def url(self) -> str:
        return f"tcp://{self.name}:1"

    @property
    def hsm_id(self) -> HsmId:
        assert self.agent.hsm_id is not None
        return self.agent.hsm_id

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Live until `scope` is cancelled or something crashes the agent."""
        self.scope = trio.CancelScope()
        self.closed = trio.Event()
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    self.hsm = InProcessHsm(Hsm(self.platform))
                    self.metrics = Metrics()
                    self.bodies = nursery
                    config = AgentConfig(
                        self.name, self.url, "test", default_rate=10**6, timings=self.sim.timings, now_ms=now_ms
                    )
                    self.agent = Agent(
                        config,
                        self.hsm,
                        self.store,
                        NetworkOf(self.sim, self),
                        self.metrics,
                        get_logger(self.name),
                        nursery,
                        lead,
                    )
                    self.service = AgentService(self.agent)
                    await self.service.learn()
                    self.handlers = self.service.handlers()
                    self.service.start()
                    await nursery.start(register, self.agent)
                    task_status.started()
                    await trio.sleep_forever()
        except BaseExceptionGroup as crashed:
            self.crash = crashed
        finally:
            self.handlers = {}
            self.closed.set()

    def kill(self) -> None:
        """End the process; its HSM's volatile state is lost."""
        self.scope.cancel()

    async def call(self, method: str, body: Any, caller: Caller | None = None) -> Any:
        """Run a handler body as the RPC server would: in the agent's own nursery, never cancelled by the caller."""
        handler = self.handlers.get(method)
        if handler is None:
            raise Unreachable(f"{self.name} is down")
        done = trio.Event()
        result: list[Any] = []

        async def run_body() -> None:
            try:
                result.append(await handler(body, caller or Caller(0, self.closed)))
            finally:
                done.set()

        try:
            self.bodies.start_soon(run_body)
        except RuntimeError as closed:  # the nursery ended, and `run` has not yet come round to saying so
            raise Unreachable(f"{self.name} went down") from closed
        await done.wait()
        if not result:
            raise Unreachable(f"{self.name} went down")
        return result[0]

    async def call_and_forget(self, method: str, body: Any) -> None:
        """Call and take no notice of what comes back, or does not."""
        with contextlib.suppress(Unreachable):
            await self.call(method, body)

    def group(self, group: GroupId) -> Any:
        found = self.agent.groups.get(self.sim.realm, group)
        assert found is not None
        return found


class NetworkOf:
    """The network as one agent sees it."""

    def __init__(self, sim: Simulation, source: SimAgent) -> None:
        self._sim = sim
        self._source = source

    async def call(self, url: str, method: AnyMethod, body: Any, *, timeout_s: float, **_options: object) -> Any:
        with trio.move_on_after(timeout_s):
            await trio.lowlevel.checkpoint()
            if url == self._sim.manager_url:
                return await self._sim.manager.call(method, body)
            target = self._sim.by_url.get(url)
            if target is None or frozenset((self._source.name, target.name)) in self._sim.cut:
                raise Unreachable(f"no route to {url}")
            return await target.call(method.name, body, Caller(id(self._source), self._source.closed))
        raise Unreachable(f"{url} did not answer in {timeout_s} s")


class Simulation:
    """The whole: agents by name, the realm, and the front end."""

    manager_url = "tcp://manager:1"
    manager_kind = ServiceKind.MANAGER

    def __init__(self, nursery: trio.Nursery, store: Store, timings: Timings) -> None:
        self.nursery = nursery
        self.store = store
        self.timings = timings
        self.random = SeededRandom(b"simulation")
        self.keys = RealmKeys.generate(self.random)
        self.agents: list[SimAgent] = []
        self.by_url: dict[str, SimAgent] = {}
        self.cut: set[frozenset[str]] = set()
        self.realm = RealmId(b"")
        self.manager = FakeManager(self)
        self.patience_s = 2.0
        self.refusals: list[Refused] = []
        self.statements: dict[GroupId, bytes] = {}
        self._leaderships: dict[GroupId, tuple[int, float]] = {}

    async def start_agent(self) -> SimAgent:
        log, outbox = FaultyLog(self.store.log), FaultyOutbox(self.store.outbox)
        sim_agent = SimAgent(
            self,
            f"agent{len(self.agents) + 1}",
            MemoryPlatform(self.keys, SeededRandom(b"hsm%d" % len(self.agents))),
            dataclasses.replace(self.store, log=log, outbox=outbox),
            log,
            outbox,
        )
        self.agents.append(sim_agent)
        self.by_url[sim_agent.url] = sim_agent
        await self.nursery.start(sim_agent.run)
        return sim_agent

    async def restart(self, sim_agent: SimAgent) -> None:
        sim_agent.kill()
        await sim_agent.closed.wait()
        sim_agent.platform.restarted()
        sim_agent.crash = None
        await self.nursery.start(sim_agent.run)

    # --- operator ----------------------------------------------------------------------------------

    async def new_realm(self, members: int) -> GroupId:
        """Create a realm; with more than one member move everything to a group of all of them."""
        for _ in range(members):
            await self.start_agent()
        first = self.agents[0]
        created = await first.call("realm/new", Empty())
        assert isinstance(created, RealmCreated), created
        self.realm = RealmId(created.realm)
        group = GroupId(created.group)
        await self.committed(group, 1)
        if members == 1:
            return group
        larger = await self.new_group(self.agents)
        await self.transfer(group, larger)
        return larger

    async def new_group(self, members: Sequence[SimAgent]) -> GroupId:
        first = members[0]
        status = await first.call("status", Empty())
        for other in members[1:]:
            joined = await other.call("realm/join", RealmJoin(self.realm, first.hsm_id, status.hsm.realm.statement))
            assert not isinstance(joined, Refused), joined
        statements = []
        for member in members:
            known = await member.call("status", Empty())
            statements.append((known.hsm.id, known.hsm.realm.statement, known.hsm.realm.generation))
        statements.sort()
        generations = tuple(generation for _, _, generation in statements)
        proven = [(hsm, statement) for hsm, statement, _ in statements]
        made = await first.call("group/new", GroupNew(self.realm, proven, generations))
        assert isinstance(made, GroupCreated), made
        for other in members[1:]:
            body = GroupJoin(self.realm, made.group, [hsm for hsm, _ in proven], made.statement, generations)
            assert isinstance(await other.call("group/join", body), Done)
        group = GroupId(made.group)
        self.statements[group] = made.statement
        await self.committed(group, 1)
        return group

    async def transfer(self, source: GroupId, destination: GroupId, moved: Range | None = None) -> None:
        wanted = moved or Range(bytes(32), b"\xff" * 32)
        at_destination, at_source = self.leader_of(destination), self.leader_of(source)
        assert at_destination is not None
        assert at_source is not None
        prepare = TransferPrepare(self.realm, source, destination, wanted)
        prepared = await at_destination.call("transfer/prepare", prepare)
        assert isinstance(prepared, Prepared), prepared
        out = await at_source.call(
            "transfer/out",
            TransferOutCall(self.realm, source, destination, wanted, prepared.nonce, prepared.statement),
        )
        assert isinstance(out, TransferredOut), out
        partition: PartitionInfo = out.transferring
        body = TransferInCall(self.realm, source, destination, partition, out.at, prepared.nonce, out.statement)
        taken = await at_destination.call("transfer/in", body)
        assert isinstance(taken, Done), taken
        done = TransferComplete(self.realm, source, destination, wanted, out.at)
        completed = await at_source.call("transfer/complete", done)
        assert isinstance(completed, Done), completed

    def leader_of(self, group: GroupId) -> SimAgent | None:
        """Return the running agent that leads with the highest `starting`."""
        best: SimAgent | None = None
        best_starting = -1
        for sim_agent in self.agents:
            if not sim_agent.handlers:
                continue
            found = sim_agent.agent.groups.get(self.realm, group)
            if found is None or not found.is_leader or found.leader is None:
                continue
            if found.leader.starting > best_starting:
                best, best_starting = sim_agent, found.leader.starting
        return best

    def is_led(self, group: GroupId, starting: int) -> bool:
        """Tell whether a running agent leads `group` with the given `starting` or a later one."""
        leader = self.leader_of(group)
        return leader is not None and leader.group(group).leader.starting >= starting

    async def committed(self, group: GroupId, index: int, timeout_s: float = 5.0) -> None:
        """Wait until some leader committed `index`."""

        def reached() -> bool:
            leading = self.leader_of(group)
            return leading is not None and (leading.group(group).leader.committed or 0) >= index

        await until(reached, timeout_s)

    async def become_leader(self, sim_agent: SimAgent, group: GroupId, last: int | None = None) -> Any:
        return await sim_agent.call("become_leader", BecomeLeaderCall(self.realm, group, last))

    async def appoint(
        self, group: GroupId, exclude: SimAgent | None = None, last: int | None = None
    ) -> SimAgent | None:
        """Do what a manager does: the first member that accepts leads."""
        running = [a for a in self.agents if a.handlers and a is not exclude]
        candidates = [a for a in running if a.agent.groups.get(self.realm, group)]
        candidates.sort(key=lambda a: -a.group(group).position)
        for candidate in candidates:
            try:
                if isinstance(await self.become_leader(candidate, group, last), Done):
                    return candidate
            except Unreachable:
                continue
        return None

    async def hand_over(self, hsm: HsmId) -> None:
        for sim_agent in self.agents:
            if not sim_agent.handlers or sim_agent.agent.hsm_id != hsm:
                continue
            for group in list(sim_agent.agent.groups):
                if group.is_leader:
                    await self.hand_over_group(sim_agent, group.group)

    async def hand_over_group(self, old: SimAgent, group: GroupId) -> SimAgent | None:
        done = await old.call("stepdown", GroupCall(self.realm, group))
        if not isinstance(done, SteppedDown):
            return None
        return await self.appoint(group, exclude=old, last=done.last)

    async def settle_peers(self, timeout_s: float = 5.0) -> None:
        """Wait until every running agent knows the others."""

        def known() -> bool:
            running = [a for a in self.agents if a.handlers]
            return all(a.agent.peers.url_of(b.hsm_id) for a in running for b in running if a is not b)

        await until(known, timeout_s)

    @staticmethod
    def upper_half() -> Range:
        return Range(b"\x80" + bytes(31), b"\xff" * 32)

    # --- front end ---------------------------------------------------------------------------------

    def configuration(self) -> Configuration:
        realm = Realm(self.realm, "https://front.test", self.public_key)
        return Configuration((realm,), 1, 1, PinHashingMode.FAST_INSECURE)

    @property
    def public_key(self) -> bytes:
        return self.keys.signed_parts()[1]

    def client(self, user: str) -> Client:
        return Client(self.configuration(), lambda _realm: user, transport=self, random=SeededRandom(user.encode()))

    def register1(self, group: GroupId, user: str) -> App:
        """Return a Register1 in a handshake, as a balancer would send it for `user`."""
        initiator = Initiator(self.public_key, self.random(32))
        noise = HandshakeRequest(*initiator.write(encode_secrets_request(Register1())))
        hashed = hashlib.sha256(f"{TENANT}:{user}".encode()).hexdigest()
        session_id = int.from_bytes(self.random(4), "big")
        return App(
            self.realm, group, record_id_of(user), session_id, False, encode_noise_request(noise), TENANT, hashed
        )

    def exchange(self, user: str) -> Exchange:
        """Return the request-level client of one user."""
        return Exchange(lambda _realm: user, self, SeededRandom(b"x" + user.encode()))

    async def post(self, url: str, headers: Headers, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Handle a client's request as a balancer does: route, wait a little for a leader, retry what is safe."""
        request = decode_client_request(body)
        user = request.auth_token
        app = App(
            self.realm,
            b"",
            record_id_of(user),
            request.session_id,
            request.kind is RequestKind.HANDSHAKE_ONLY,
            encode_noise_request(request.encrypted),
            TENANT,
            hashlib.sha256(f"{TENANT}:{user}".encode()).hexdigest(),
        )
        response: ClientResponse = ClientOutcome.UNAVAILABLE
        deadline = trio.current_time() + self.patience_s
        while trio.current_time() < deadline:
            target = self._route(RecordId(app.record_id))
            if target is not None:
                sim_agent, group = target
                self._moved_lately(group)
                try:
                    reply = await sim_agent.call("app", msgspec_replace(app, group=group))
                except Unreachable:
                    break
                if isinstance(reply, AppOk):
                    response = decode_noise_response(reply.noise)
                    break
                self.refusals.append(reply)
                if reply.outcome in _CODES:
                    lost_by_move = reply.outcome is Refusal.MISSING_SESSION and self._moved_lately(group)
                    response = ClientOutcome.UNAVAILABLE if lost_by_move else _CODES[reply.outcome]
                    break
                if reply.consumed:
                    break
            await trio.sleep(0.01)
        status = HTTP_STATUS[response] if isinstance(response, ClientOutcome) else 200
        return status, encode_client_response(response)

    def _moved_lately(self, group: GroupId) -> bool:
        """Tell whether the group's leader changed in the last second."""
        leader = self.leader_of(group)
        starting = 0 if leader is None else leader.group(group).leader.starting
        now = trio.current_time()
        known = self._leaderships.get(group)
        if known is None or known[0] != starting:
            known = self._leaderships[group] = (starting, now)
        return now - known[1] < 1.0

    def _route(self, record: RecordId) -> tuple[SimAgent, GroupId] | None:
        best: tuple[int, SimAgent, GroupId] | None = None
        for sim_agent in self.agents:
            if not sim_agent.handlers:
                continue
            for group in sim_agent.agent.groups:
                leader = group.leader
                if leader is None or not group.is_leader or leader.last_appended is None:
                    continue
                partition = leader.last_appended.partition
                if partition is None or not partition.range.contains(record):
                    continue
                if best is None or leader.starting > best[0]:
                    best = (leader.starting, sim_agent, group.group)
        return None if best is None else (best[1], best[2])


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Wait until `condition()` is true; raises `TooSlowError` after `timeout_s`."""
    with trio.fail_after(timeout_s):
        while not condition():  # noqa: ASYNC110 - tests look from outside; there is no event to wait for
            await trio.sleep(0.005)


def msgspec_replace(app: App, *, group: bytes) -> App:
    """Return `app` addressed to `group`."""
    return App(app.realm, group, app.record_id, app.session_id, app.handshake_only, app.encrypted, app.tenant, app.user)


def record_id_of(user: str) -> RecordId:
    """Return a user's record id (a plain hash serves here)."""
    return RecordId(hashlib.sha256(b"record:" + user.encode()).digest())


@asynccontextmanager
async def simulation(path: Path, timings: Timings = QUICK, *, url: str = "") -> AsyncIterator[Simulation]:
    """Open the store at `url`, by default in `path`, and an empty cluster; unexpected crashes fail the test."""
    async with open_store(url or f"sqlite:{path / 'realm.db'}") as store:
        await store.realms.create_shared()
        await store.discovery.register(ServiceKind.MANAGER, Simulation.manager_url, 2**42)
        async with trio.open_nursery() as nursery:
            sim = Simulation(nursery, store, timings)
            yield sim
            crashed = [a.crash for a in sim.agents if a.crash is not None]
            for sim_agent in sim.agents:
                sim_agent.kill()
            nursery.cancel_scope.cancel()
        if crashed:
            raise crashed[0]
