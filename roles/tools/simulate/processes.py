"""The processes of a simulated realm: the services as shipped, wired to the world instead of to sockets and files.

Each start of a process is a `Life`. What the wiring of `roles/*/main.py` does with sockets, signals and systemd is
left out; the order of start and of shutdown is the same. A process ends by `kill` (it never runs again), by an
orderly `stop`, or because an error left its nursery, as the supervisor would see it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import trio

from juicebox_hsm.adapters.faults.store import with_faults
from juicebox_hsm.adapters.faults.switch import Faults, FaultSwitch
from juicebox_hsm.adapters.hsm_directory.nvram import NvramFailed
from juicebox_hsm.adapters.rpc import RpcServer
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.hsm.keys import RealmKeys
from juicebox_hsm.hsm.messages import (
    BecomeLeader,
    JoinGroup,
    JoinRealm,
    NewGroup,
    NewRealm,
    PersistState,
    Request,
    Response,
)
from juicebox_hsm.hsm.state import Poisoned
from juicebox_hsm.ids import GroupId, HsmId
from juicebox_hsm.ports.errors import HsmGone
from juicebox_hsm.tenant_keys import record_id_key_fingerprint
from juicebox_hsm.wire.methods import AGENT_METHODS, MANAGER_METHODS
from roles.agent.context import Agent
from roles.agent.leader import hand_over, lead
from roles.agent.outside import AgentConfig
from roles.agent.registration import register, withdraw
from roles.agent.service import FATAL, AgentService
from roles.lb.forward import Forwarder
from roles.lb.guard import RealmGuard
from roles.lb.poller import Poller
from roles.lb.service import ClientService
from roles.manager.appointment import Appointer
from roles.manager.context import ManagerContext
from roles.manager.loops import run_loops
from roles.manager.service import ManagerService
from roles.shell import Entry
from roles.tools.simulate.network import Endpoint, Pool
from roles.tools.simulate.scheduling import Life
from roles.tools.simulate.surroundings import Surroundings

MAY_PERSIST: Final = (PersistState, BecomeLeader, NewRealm, JoinRealm, NewGroup, JoinGroup)
"""Requests that a thread runs in the shipped wiring, because they may wait for a disk."""
STOP_S: Final = 20.0
FIRST_TABLE_S: Final = 5.0
REGISTER_RETRY_S: Final = 10.0
POLL_S: Final = 1.5
"""Pause between a balancer's looks at an agent; 0.1 s as shipped. A refused request makes it look at once, as ever."""
PASS_S: Final = 5.0
"""A manager's `--interval`: what is lost is told to it, so passes are for what nobody tells."""
LOOK_S: Final = 0.5
"""How often a young manager looks who is there; 0.1 s as shipped."""
LATE_RATE: Final = 0.25
"""Share of an HSM's requests that wait a moment before, or whose answers come noticeably after the fact."""


@dataclass(slots=True)
class HsmTrouble:
    """What is wrong with one HSM's NVRAM: times in seconds; `fails` is the fate of the next write."""

    persist_s: tuple[float, float] = (0.0005, 0.003)
    fails: str = ""
    """"before" or "after" it is durable, "" for no failure."""


class MemoryPlatform:
    """An HSM's platform in memory; NVRAM survives, lives are numbered so that role clocks never go back (H5)."""

    def __init__(self, keys: RealmKeys, chance: random.Random, wrote: Callable[[bytes], None]) -> None:
        self._keys = keys
        self._chance = chance
        self._wrote = wrote
        self._nvram = b""
        self.lives = 0
        self.trouble = HsmTrouble()

    @property
    def keys(self) -> RealmKeys:
        """Return the realm keys."""
        return self._keys

    @property
    def clock_start(self) -> int:
        """Return a first clock value above all of earlier lives."""
        return 1 + (self.lives << 32)

    def random(self, size: int) -> bytes:
        """Return bytes of this HSM's generator."""
        return self._chance.randbytes(size)

    def nvram_read(self) -> bytes:
        """Return what is durable."""
        return self._nvram

    def nvram_write(self, content: bytes) -> None:
        """Make the content durable, or fail."""
        fate, self.trouble.fails = self.trouble.fails, ""
        if fate == "before":
            raise NvramFailed("the write failed")
        self._nvram = content
        self._wrote(content)
        if fate == "after":
            raise NvramFailed("the write was reported as failed")


class SimulatedHsm:
    """`HsmTransport` of one life: one request at a time, answered after as long as a disk may take."""

    def __init__(self, world: Surroundings, name: str, platform: MemoryPlatform, chance: random.Random) -> None:
        self._world = world
        self._name = name
        self._platform = platform
        self._chance = chance
        self._lock = trio.Lock()
        self.core = Hsm(platform)

    async def send(self, request: Request) -> Response:
        """Run one request; a caller that is cancelled does not undo what was begun. Raises `HsmGone`."""
        if not isinstance(request, MAY_PERSIST):
            if not self._lock.locked() and self._chance.random() < LATE_RATE:
                await trio.lowlevel.checkpoint()
            async with self._lock:
                return self._handle(request)
        async with self._lock:
            with trio.CancelScope(shield=True):
                await trio.sleep(self._chance.uniform(*self._platform.trouble.persist_s))
                reply = self._handle(request)
                if self._chance.random() < LATE_RATE:
                    await trio.sleep(self._chance.uniform(0.0, 0.002))
            return reply

    def _handle(self, request: Request) -> Response:
        try:
            return self._world.hsm_handle(self._name, self.core, request)
        except (Poisoned, NvramFailed) as error:
            raise HsmGone(str(error)) from error


class NoMetrics:
    """Takes every measurement and keeps none."""

    def count(self, name: str, n: int = 1, **tags: object) -> None:
        """Forget it."""

    def gauge(self, name: str, value: float, **tags: object) -> None:
        """Forget it."""

    def timing(self, name: str, ns: float, **tags: object) -> None:
        """Forget it."""

    def event(self, title: str, text: str) -> None:
        """Forget it."""


class WorldLog:
    """A structured logger whose lines the judge reads."""

    def __init__(self, world: Surroundings, name: str) -> None:
        self._world = world
        self._name = name

    def debug(self, event: str, **fields: object) -> None:
        """Drop it: nobody runs a realm at this level."""

    def info(self, event: str, **fields: object) -> None:
        """Log at info."""
        self._world.logged(self._name, "info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Log at warning."""
        self._world.logged(self._name, "warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Log at error."""
        self._world.logged(self._name, "error", event, fields)

    exception = error


class SimulatedFaults(FaultSwitch):
    """A manager's fault switch that the world turns."""

    def __init__(self) -> None:
        super().__init__()
        self.faults = Faults()

    @property
    def is_configured(self) -> bool:
        """Return that faults can be asked for."""
        return True

    @property
    def now(self) -> Faults:
        """Return the faults in force."""
        return self.faults


@dataclass(eq=False)
class Process:
    """One service. `life` is None while it is down; `ended` is set when a life ended by itself or was killed."""

    world: Surroundings
    name: str
    url: str = field(init=False)
    life: Life | None = None
    ended: trio.Event = field(default_factory=trio.Event)
    clock_offset_ms: int = 0
    view: Any = None
    lives: int = 0
    stopping: bool = False
    stop_asked: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        """Name its address."""
        self.url = f"tcp://{self.name}:1"
        self.chance = self.world.split(self.name)
        self.log = WorldLog(self.world, self.name)
        self.faults = SimulatedFaults()

    @property
    def is_up(self) -> bool:
        """Tell whether it runs, paused or not."""
        return self.life is not None

    def now_ms(self) -> int:
        """Return Unix milliseconds by this process' clock."""
        return self.world.now_ms() + self.clock_offset_ms

    def start(self) -> None:
        """Begin a life."""
        self.lives += 1
        self.life = Life(self.name)
        self.stopping = False
        self.ended = trio.Event()
        self.stop_asked = trio.Event()
        self.view = self.world.store_view(self.name)
        self.life.context.copy().run(self.world.nursery.start_soon, self._live, self.life)

    def kill(self, *, silently: bool = False) -> None:
        """End this life at once, whatever it was doing. `silently`: its peers must find out for themselves."""
        life = self.life
        if life is None:
            return
        life.freeze()
        self._end(life, silently=silently)

    def pause(self) -> None:
        """Stop it from running; peers stop hearing pongs."""
        if self.life is not None:
            self.life.freeze()
            self.view.freeze()
            self.world.network.suspect()

    def resume(self) -> None:
        """Let it go on where it was; its clocks have jumped."""
        if self.life is not None:
            self.life.thaw()

    def stop(self) -> None:
        """Ask it to leave in order."""
        self.stopping = True
        self.stop_asked.set()

    async def _live(self, life: Life) -> None:
        try:
            async with trio.open_nursery() as nursery:
                await self.run(nursery, life)
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as error:
            if not self.world.is_over and self.life is life:
                self._end(life)
                self.world.died(self, error)
            return
        if self.life is life:
            self._end(life)

    def _end(self, life: Life, *, silently: bool = False) -> None:
        self.life = None
        self.world.network.close(life, silently=silently)
        self.view.crash()
        self.on_end()
        self.ended.set()

    async def run(self, nursery: trio.Nursery, life: Life) -> None:
        """Live until told to stop."""
        raise NotImplementedError

    def on_end(self) -> None:
        """Note that a life ended."""


class AgentProcess(Process):
    """An agent with its HSM; NVRAM outlives it."""

    def __post_init__(self) -> None:
        """Make the HSM's platform."""
        super().__post_init__()
        chance = self.world.split(f"hsm {self.name}")
        self.is_member = False
        self.platform = MemoryPlatform(self.world.keyring.realm, chance, partial(self.world.hsm_wrote, self.name))
        self.agent: Agent | None = None
        self.hsm: SimulatedHsm | None = None

    async def run(self, nursery: trio.Nursery, life: Life) -> None:
        """Do what an agent's `main` does, in its order."""
        world = self.world
        self.platform.lives += 1
        self.platform.trouble.fails = ""
        try:
            self.hsm = SimulatedHsm(world, self.name, self.platform, self.chance)
        except NvramFailed as error:
            raise HsmGone(str(error)) from error
        world.hsm_started(self.name, self.hsm.core)
        config = AgentConfig(
            self.name,
            self.url,
            "simulated",
            default_rate=world.profile.rate,
            timings=world.timings,
            now_ms=self.now_ms,
            instance=f"{self.name} {self.platform.lives}".encode(),
        )
        agent = Agent(
            config, self.hsm, self.view.store, Pool(world.network, life), NoMetrics(), self.log, nursery, lead
        )
        service = AgentService(agent)
        await service.learn()
        bodies = nursery
        server = RpcServer(
            bodies, tls=None, methods=AGENT_METHODS, handlers=world.guarded(self.name, service.handlers()), fatal=FATAL
        )
        world.network.open(Endpoint(self.url, life, server))
        self.agent, self.service = agent, service
        service.start()
        await nursery.start(register, agent)
        await self.stop_asked.wait()
        agent.stopping = True
        with trio.move_on_after(agent.timings.shutdown_s):
            with trio.move_on_after(agent.timings.shutdown_s - 3.0):
                await hand_over(agent)
            try:
                await service.dispatcher.release()
            except RealmError as error:
                self.log.warning("dispatcher lease not given back", error=str(error))
            await withdraw(agent)
            await server.shutdown(2.0)

    @property
    def hsm_id(self) -> HsmId | None:
        """Return the id of its HSM, once known."""
        return None if self.agent is None else self.agent.hsm_id

    @property
    def groups(self) -> list[GroupId]:
        """Return the groups it is a member of."""
        return [] if self.agent is None else [group.group for group in self.agent.groups]

    @property
    def leads(self) -> list[GroupId]:
        """Return the groups it leads."""
        return [] if self.agent is None else [group.group for group in self.agent.groups if group.is_leader]

    def on_end(self) -> None:
        """Tell the judge that the HSM's volatile state is lost."""
        self.agent = None
        self.world.hsm_crashed(self.name)


class ManagerProcess(Process):
    """A cluster manager."""

    async def run(self, nursery: trio.Nursery, life: Life) -> None:
        """Do what a manager's `main` does."""
        world = self.world
        context = self.context = ManagerContext(
            store=with_faults(self.view.store, self.faults),
            rpc=Pool(world.network, life),
            name=self.name,
            now_ms=self.now_ms,
            meter=NoMetrics(),
            log=self.log,
            faults=self.faults,
        )
        appointer = Appointer(context)
        nursery.start_soon(
            partial(
                run_loops,
                context,
                appointer,
                interval_s=PASS_S,
                rebalance_interval_s=world.profile.rebalance_s,
                young_s=LOOK_S,
            )
        )
        service = ManagerService(context, appointer, nursery)
        server = RpcServer(
            nursery, tls=None, methods=MANAGER_METHODS, handlers=world.guarded(self.name, service.handlers())
        )
        world.network.open(Endpoint(self.url, life, server))
        entry = Entry(context.store.discovery, ServiceKind.MANAGER, self.url, self.now_ms, self.log)
        registering = trio.CancelScope()

        async def keep() -> None:
            with registering:
                await entry.keep(REGISTER_RETRY_S)

        nursery.start_soon(keep)
        await self.stop_asked.wait()
        registering.cancel()
        with trio.move_on_after(10.0):
            await entry.withdraw()
            await server.shutdown(8.0)


class BalancerProcess(Process):
    """A load balancer from its request handler on."""

    is_serving = False

    async def run(self, nursery: trio.Nursery, life: Life) -> None:
        """Do what a balancer does behind TLS and HTTP."""
        world = self.world
        store = self.view.store
        rpc = Pool(world.network, life)
        poller = self.poller = Poller(
            rpc, store.discovery, rng=self.chance, metrics=NoMetrics(), log=self.log, poll_s=POLL_S
        )
        guard = RealmGuard(record_id_key_fingerprint(world.keyring.record_ids), store.settings, poller, self.log)
        service = ClientService(
            keys=world.keyring.token_key,
            record_key=world.keyring.record_ids,
            forwarder=Forwarder(rpc, poller, NoMetrics()),
            guard=guard,
            now_s=lambda: self.now_ms() / 1000,
            metrics=NoMetrics(),
            log=self.log,
        )
        await nursery.start(poller.run, FIRST_TABLE_S)
        with trio.move_on_after(FIRST_TABLE_S):
            await guard.look()
        nursery.start_soon(guard.run)
        world.network.open(Endpoint(self.url, life, service=service, nursery=nursery))
        self.is_serving = True
        await self.stop_asked.wait()

    def on_end(self) -> None:
        """Note that nobody is served."""
        self.is_serving = False
