"""What goes wrong in a simulated realm, trick by trick (simulation.md 2).

A trick is an async function of the world: it makes trouble, waits as long as it drew, and takes its own trouble back.
Which tricks a run plays, how often and how badly, is drawn from the seed; `--without` leaves some out. What a trick
changes for good (a group more, a range moved) is what operators may do at any time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.settings import DRAIN_PREFIX
from juicebox_hsm.host.services import TenantLimits
from roles.tools.cluster.clients import reload_tenants
from roles.tools.simulate.keyring import TENANTS
from roles.tools.simulate.network import Weather
from roles.tools.simulate.processes import AgentProcess, Process
from roles.tools.simulate.world import World

OUTAGE_S_MAX: Final = 6.0
CLOCK_STEP_MS_MAX: Final = 8_000
"""Own: what a machine whose time service jumps may show; leases and tokens must bear it."""

Trick = Callable[["World"], Awaitable[None]]
TRICKS: Final[dict[str, Trick]] = {}


def _trick(function: Trick) -> Trick:
    TRICKS[function.__name__] = function
    return function


async def play(world: World) -> None:
    """Play tricks until the trouble is over; several may overlap."""
    profile, chance = world.profile, world.split("tricks")
    weights: Mapping[str, float] = {name: w for name, w in profile.tricks.items() if name not in world.without}
    # a run has its own temper: some tricks often, some never
    tempered = {name: weight * chance.choice((0.0, 0.5, 1.0, 1.0, 3.0)) for name, weight in weights.items()}
    if not any(tempered.values()):
        await trio.sleep(profile.trouble_s)
        return
    names = list(tempered)
    pause_s = profile.pause_s * chance.uniform(0.5, 2.0)
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(profile.trouble_s):
            while True:
                await trio.sleep(chance.expovariate(1 / pause_s))
                name = chance.choices(names, [tempered[name] for name in names])[0]
                nursery.start_soon(_play_one, world, name)
        nursery.cancel_scope.cancel()
    await world.heal()


async def _play_one(world: World, name: str) -> None:
    world.notes.tell(f"trick {name}")
    world.notes.count(f"trick.{name}")
    await TRICKS[name](world)


def _some_s(world: World) -> float:
    """Draw how long something lasts: mostly short, sometimes long."""
    return world.chance.choice((world.chance.uniform(0.05, 1.0), world.chance.uniform(0.5, OUTAGE_S_MAX)))


def _some_process(world: World) -> Process | None:
    running = [process for process in world.processes if process.is_up]
    return world.chance.choice(running) if running else None


def _some_agent(world: World) -> AgentProcess | None:
    """Choose a running agent, leaders more often than others."""
    running = [agent for agent in world.agents if agent.is_up]
    leading = [agent for agent in running if agent.leads]
    if leading and world.chance.random() < 0.5:
        return world.chance.choice(leading)
    return world.chance.choice(running) if running else None


# --- processes ---------------------------------------------------------------------------------------


@_trick
async def crash(world: World) -> None:
    """Kill a process; the supervisor starts it again after a while."""
    process = _some_agent(world) if world.chance.random() < 0.7 else _some_process(world)
    if process is not None:
        await _down(world, process, silently=False)


@_trick
async def machine(world: World) -> None:
    """Take a machine away: nobody resets its streams."""
    process = _some_agent(world)
    if process is not None:
        await _down(world, process, silently=True)


async def _down(world: World, process: Process, *, silently: bool) -> None:
    world.notes.tell(f"kill {process.name}{' silently' if silently else ''}")
    process.kill(silently=silently)
    world.restart_after(process, _some_s(world))


@_trick
async def pause(world: World) -> None:
    """Stop a process in mid-step and let it go on later: it sees time jump."""
    process = _some_agent(world) if world.chance.random() < 0.7 else _some_process(world)
    if process is None or process.life is None:
        return
    life = process.life
    world.notes.tell(f"pause {process.name}")
    process.pause()
    await trio.sleep(_some_s(world))
    if process.life is life:
        world.notes.tell(f"resume {process.name}")
        process.resume()


@_trick
async def clock(world: World) -> None:
    """Step a process' wall clock, forwards or back."""
    process = _some_process(world)
    if process is not None:
        process.clock_offset_ms = world.chance.randint(-CLOCK_STEP_MS_MAX, CLOCK_STEP_MS_MAX)
        world.notes.tell(f"clock {process.name} {process.clock_offset_ms} ms")


@_trick
async def stop(world: World) -> None:
    """Stop a process in order, as a rolling update does, and start it again."""
    process = _some_process(world)
    if process is not None and not process.stopping:
        world.notes.tell(f"stop {process.name}")
        process.stop()
        with trio.move_on_after(25.0):
            await process.ended.wait()
        world.restart_after(process, world.chance.uniform(0.05, 1.0))


@_trick
async def all_at_once(world: World) -> None:
    """Cut the power of everything."""
    world.notes.tell("power cut")
    for process in world.processes:
        process.kill()
    world.barrier()
    for process in world.processes:
        world.restart_after(process, world.chance.uniform(0.1, 3.0))


# --- HSM ---------------------------------------------------------------------------------------------


@_trick
async def nvram(world: World) -> None:
    """Let an HSM's next NVRAM write fail, before or after it is durable."""
    agent = _some_agent(world)
    if agent is not None:
        agent.platform.trouble.fails = world.chance.choice(("before", "after"))
        world.notes.tell(f"nvram {agent.name} fails {agent.platform.trouble.fails}")


@_trick
async def slow_persist(world: World) -> None:
    """Make an HSM's NVRAM slow for a while."""
    agent = _some_agent(world)
    if agent is not None:
        trouble = agent.platform.trouble
        before, trouble.persist_s = trouble.persist_s, (0.02, world.chance.uniform(0.05, 0.4))
        await trio.sleep(_some_s(world))
        trouble.persist_s = before


# --- network -----------------------------------------------------------------------------------------


@_trick
async def reset(world: World) -> None:
    """Lose some streams."""
    for _ in range(world.chance.randint(1, 4)):
        world.network.break_one()
        await trio.sleep(world.chance.uniform(0.0, 0.1))


@_trick
async def cut(world: World) -> None:
    """Cut two processes off from each other, for a while."""
    await _cut(world, both=True)


@_trick
async def cut_one_way(world: World) -> None:
    """Let nothing through from one process to another, for a while."""
    await _cut(world, both=False)


async def _cut(world: World, *, both: bool) -> None:
    first, second = world.chance.sample(world.processes, 2)
    directions = [(first.name, second.name), (second.name, first.name)][: 2 if both else 1]
    await _block(world, directions)


@_trick
async def isolate(world: World) -> None:
    """Cut an agent off from everybody."""
    agent = _some_agent(world)
    if agent is not None:
        others = [process.name for process in world.processes if process is not agent] + ["operator"]
        await _block(world, [pair for name in others for pair in ((agent.name, name), (name, agent.name))])


async def _block(world: World, directions: list[tuple[str, str]]) -> None:
    world.notes.tell(f"cut {directions[0][0]} > {directions[0][1]} and {len(directions) - 1} more")
    for source, target in directions:
        world.network.cut(source, target)
    await trio.sleep(_some_s(world))
    for direction in directions:
        world.network.blocked.discard(direction)


@_trick
async def slow_peer(world: World) -> None:
    """Make one process far away for a while."""
    process = _some_process(world)
    if process is not None:
        world.network.slow[process.name] = world.chance.uniform(0.02, 0.4)
        await trio.sleep(_some_s(world))
        world.network.slow.pop(process.name, None)


@_trick
async def bad_weather(world: World) -> None:
    """Make the whole network slow and unreliable for a while."""
    chance = world.chance
    world.network.weather = Weather(
        (0.0005, chance.uniform(0.002, 0.05)),
        chance.choice((0.0, 0.02)),
        0.5,
        chance.choice((0.0, 0.005, 0.02)),
        chance.choice((0.0, 0.02)),
    )
    await trio.sleep(_some_s(world))
    world.network.weather = Weather()


# --- store -------------------------------------------------------------------------------------------


async def _store(world: World, **changes: object) -> None:
    """Change the store's faults of one process or of all, for a while."""
    process = _some_process(world) if world.chance.random() < 0.5 else None
    touched = [process] if process is not None else list(world.processes)
    before = [(faults := world.store_faults(one.name), dataclasses.replace(faults)) for one in touched]
    for faults, _ in before:
        for name, value in changes.items():
            setattr(faults, name, value)
    world.notes.tell(f"store of {process.name if process else 'all'}: {' '.join(changes)}")
    await trio.sleep(_some_s(world))
    for faults, old in before:
        for name in changes:
            setattr(faults, name, getattr(old, name))


@_trick
async def store_slow(world: World) -> None:
    """Make the store slow."""
    await _store(world, latency_s=(0.0, world.chance.uniform(0.02, 0.5)))


@_trick
async def store_refuses(world: World) -> None:
    """Let the store refuse some or all calls."""
    await _store(world, refuse=world.chance.choice((0.05, 0.3, 1.0)))


@_trick
async def store_ambiguous(world: World) -> None:
    """Let writes have an unknown outcome."""
    await _store(world, half=world.chance.choice((0.05, 0.2, 0.6)), late_s=(0.0, world.chance.uniform(0.01, 2.0)))


@_trick
async def store_stale(world: World) -> None:
    """Show old states of what may be read stale."""
    await _store(world, stale=world.chance.uniform(0.1, 1.0), stale_s=world.chance.uniform(0.1, 4.0))


@_trick
async def store_cut(world: World) -> None:
    """Cut processes off from the store."""
    await _store(world, cut_off=True)


# --- operators ---------------------------------------------------------------------------------------


@_trick
async def transfer(world: World) -> None:
    """Move a range."""
    await world.operator.attempt("transfer", world.operator.move_something)


@_trick
async def new_group(world: World) -> None:
    """Make another group, and move something to it some other time."""
    if world.groups_made < 3:
        world.groups_made += 1
        members = [agent.url for agent in world.agents if agent.is_member]
        size = world.chance.choice([n for n in (1, 3, 5) if n <= len(members)])
        await world.operator.attempt("new_group", world.operator.add_group, world.chance.sample(members, size))


@_trick
async def stepdown(world: World) -> None:
    """Order an agent to hand over everything."""
    agent = _some_agent(world)
    if agent is not None and agent.hsm_id is not None:
        hsm = agent.hsm_id

        async def order() -> None:
            await world.operator.step_down(hsm=hsm)

        await world.operator.attempt("stepdown", order)


@_trick
async def drain(world: World) -> None:
    """Drain an HSM, and undrain it later."""
    agent = _some_agent(world)
    if agent is None or agent.hsm_id is None:
        return
    hsm = agent.hsm_id
    name = f"{DRAIN_PREFIX}{hsm.hex()}"
    settings = world.operator.session.store.settings

    async def order() -> None:
        await settings.put(name, b"simulated")
        await world.operator.step_down(hsm=hsm)

    world.drained[name] = None
    await world.operator.attempt("drain", order)
    await trio.sleep(_some_s(world))


@_trick
async def tenant_limit(world: World) -> None:
    """Give a tenant a small limit for a while."""
    tenants = world.operator.session.store.tenants
    tenant = world.chance.choice(TENANTS)
    try:
        await tenants.put(tenant, TenantLimits(world.chance.choice((0, 1, 3))))
        await reload_tenants(world.operator.session)
        world.notes.count("operator.tenant_limit.done")
    except RealmError:
        world.notes.count("operator.tenant_limit.failed")
    world.limited[tenant] = None
    await trio.sleep(_some_s(world))


@_trick
async def spare(world: World) -> None:
    """Bring a new HSM into the realm: it joins, and a new group puts it in the place of another."""
    if world.spares_left:
        await world.add_spare()


@_trick
async def managers_disagree(world: World) -> None:
    """Let a manager take every lease and prefer other members than its colleague, for a while."""
    manager = world.chance.choice(world.managers)
    manager.faults.faults = dataclasses.replace(
        manager.faults.faults, ignores_leases=True, reversed_candidates=world.chance.random() < 0.7
    )
    await trio.sleep(_some_s(world))
    manager.faults.faults = type(manager.faults.faults)()


@_trick
async def rebalance(world: World) -> None:
    """Ask for a rebalancing pass."""
    await world.operator.attempt("rebalance", world.operator.rebalance)


# --- clients -----------------------------------------------------------------------------------------


@_trick
async def duel(world: World) -> None:
    """Make some other member lead a group that is led, behind the managers' backs, while users are at work."""
    led = [agent for agent in world.agents if agent.is_up and agent.leads]
    if not led:
        return
    group = world.chance.choice(world.chance.choice(led).leads)
    rivals = [agent for agent in world.agents if agent.is_up and group in agent.groups and group not in agent.leads]
    if rivals:
        async with trio.open_nursery() as nursery:
            for user in world.chance.sample(world.users, 2):
                nursery.start_soon(user.burst)
            nursery.start_soon(world.appoint, world.chance.choice(rivals), group)
