"""One run from beginning to end (simulation.md 1).

Services start, an operator founds a realm, users begin. Then the profile's tricks are played for half a minute,
everything is healed, half a minute passes in quiet, and the judge looks at what is left. Wherever the judge finds a
rule broken, the run ends.
"""

from __future__ import annotations

import traceback
from typing import Final

import trio

from juicebox_hsm.client import Configuration, Realm
from juicebox_hsm.crypto.pin import PinHashingMode
from juicebox_hsm.host.services import ServiceKind
from roles.tools.simulate import tricks
from roles.tools.simulate.clients import User
from roles.tools.simulate.keyring import TENANTS
from roles.tools.simulate.quiet import look_around
from roles.tools.simulate.scheduling import LifeOfParents, light_waits, prepare_runner, seeded_scheduler, thaw_all
from roles.tools.simulate.world import World

START_S: Final = 20.0
"""How long a realm may take to be founded, with everything well."""
POLL_S: Final = 0.1
WATCH_S: Final = 1.0
OUTBOX_S: Final = 5.0
"""After the last call, before outboxes must be empty and auditors know: dispatchers look every 2 s at idle times."""


def simulate(world: World) -> None:
    """Play a run; what it found is left in the world."""
    with seeded_scheduler(world.seed), light_waits(world.clock):
        trio.run(_main, world, clock=world.clock, instruments=[LifeOfParents()])


async def _main(world: World) -> None:
    """Play the run from beginning to end."""
    prepare_runner()
    async with trio.open_nursery() as nursery:
        world.nursery = nursery
        try:
            async with trio.open_nursery() as playing:
                playing.start_soon(_end_when_broken, world, playing.cancel_scope)
                playing.start_soon(_watch, world)
                await _play(world)
                playing.cancel_scope.cancel()
        except BaseException as error:  # noqa: BLE001 - the world's own parts failed: that is a finding, too
            world.broken("simulator", "".join(traceback.format_exception(error)))
        world.is_over = True
        world.ended_at_s = world.clock.now
        world.notes.close()
        for process in world.processes:
            if process.view is not None:
                process.view.crash()
        thaw_all()
        nursery.cancel_scope.cancel()


async def _watch(world: World) -> None:
    """Let the judge look at logs and ranges every second."""
    while True:
        await trio.sleep(WATCH_S)
        world.judge.check_now()


async def _end_when_broken(world: World, scope: trio.CancelScope) -> None:
    await world.when_broken.wait()
    scope.cancel()


async def _play(world: World) -> None:
    await world.operator.session.store.realms.create_shared()
    for process in world.processes:
        process.start()
    if not await _found(world):
        return
    async with trio.open_nursery() as nursery:
        for user in world.users:
            nursery.start_soon(user.run)
        world.is_troubled = True
        await tricks.play(world)
        world.is_troubled = False
        await trio.sleep(world.profile.quiet_s)
        world.closing.set()
    await _look(world)


async def _found(world: World) -> bool:
    try:
        with trio.fail_after(START_S):
            await _wait_for_agents(world)
            await world.operator.found([agent.url for agent in world.agents], world.shape.sizes)
    except Exception as error:  # noqa: BLE001 - an operator's command says anything
        world.broken("start", "".join(traceback.format_exception(error)))
        return False
    realm = Realm(world.realm, "https://edge", world.keyring.realm.communication_public)
    configuration = Configuration((realm,), 1, 1, PinHashingMode.FAST_INSECURE)
    urls = [balancer.url for balancer in world.balancers]
    for number in range(world.profile.users):
        world.users.append(User(world, f"user{number}", TENANTS[number % len(TENANTS)], configuration, urls))
    for agent in world.agents:
        agent.is_member = True
    return True


async def _wait_for_agents(world: World) -> None:
    """Wait until all services are in discovery."""
    discovery = world.operator.session.store.discovery
    wanted = len(world.agents)
    while (  # noqa: ASYNC110 - an operator polls
        len(await discovery.list(ServiceKind.AGENT)) < wanted
        or len(await discovery.list(ServiceKind.MANAGER)) < len(world.managers)
        or not all(balancer.is_serving for balancer in world.balancers)
    ):
        await trio.sleep(POLL_S)


async def _look(world: World) -> None:
    """Ask every user to find its record, now that all is well."""
    problems: list[str] = []

    async def check(user: User) -> None:
        problems.extend(await user.final_check())

    async with trio.open_nursery() as nursery:
        for user in world.users:
            nursery.start_soon(check, user)
    await trio.sleep(OUTBOX_S)
    for tenant, ledger in world.auditor.ledgers.items():
        missing = ledger.missing(world.store.data.realm(world.realm).tenant(tenant))
        if missing:
            world.broken("audit", f"events {missing} of {tenant} were published and never came")
    world.judge.finish(await look_around(world, problems))
