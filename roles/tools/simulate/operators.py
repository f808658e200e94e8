"""The operators of a simulated realm: the commands of `cluster`, run against the simulated services.

What an operator does here goes through the same functions as the command line, with a session whose store and network
are the world's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.layout import owners_of
from juicebox_hsm.host.cluster.planning import plan, spread
from juicebox_hsm.host.cluster.view import ClusterView
from juicebox_hsm.ids import GroupId, HsmId, OwnedRange, RealmId, RecordId
from juicebox_hsm.wire.methods import LEADER_STEPDOWN, REBALANCE
from juicebox_hsm.wire.rpc import Empty, StepdownOrder
from roles.survey.overview import read_overview
from roles.tools.cluster.change import transfer_range
from roles.tools.cluster.create import join_realm, new_group, new_realm
from roles.tools.session import COMMAND_TIMEOUT_S, Session, ToolFailure, call_manager
from roles.tools.simulate.network import Pool
from roles.tools.simulate.scheduling import Life
from roles.tools.simulate.surroundings import Surroundings

WAIT_S: Final = 20.0
POLL_S: Final = 0.3


@dataclass(frozen=True, slots=True)
class SimulatedSession(Session):
    """A session whose clock is the world's."""

    world: Any = None

    def now_ms(self) -> int:  # type: ignore[override]  # static there, for want of a clock
        """Return Unix time in ms."""
        now_ms: int = self.world.now_ms()
        return now_ms


class Operator:
    """Somebody at a shell. Commands that fail are told and forgotten: operators try again."""

    def __init__(self, world: Surroundings, managers: Sequence[str]) -> None:
        self._world = world
        self._managers = managers
        self._chance = world.split("operator")
        self._life = Life("operator")
        view = world.store_view("operator")
        self.session = SimulatedSession(view.store, Pool(world.network, self._life), world=world)

    async def found(self, urls: Sequence[str], sizes: Sequence[int]) -> RealmId:
        """Make a realm over all agents, with groups of the given sizes that share the key space."""
        world, session = self._world, self.session
        realm, first = await new_realm(session, urls[0])
        world.realm = realm
        if len(urls) > 1:
            view = await read_overview(session.store, session.rpc)
            await join_realm(session, realm, urls[1:], view)
        serving: list[GroupId] = []
        for number, size in enumerate(sizes):
            members = [urls[(number + offset) % len(urls)] for offset in range(size)]
            serving.append(await new_group(session, realm, members))
        view = await self.led(realm)
        for step in spread(owners_of(view.groups_of(realm)), serving):
            await transfer_range(session, self._manager(), realm, step.source, step.destination, step.range)
        world.notes.tell(f"realm {realm.hex()} founded: first group {first.hex()}, then {sizes}")
        return realm

    async def led(self, realm: RealmId) -> ClusterView:
        """Wait until every group is led. Raises `trio.TooSlowError`."""
        session = self.session
        with trio.fail_after(WAIT_S):
            while True:
                view = await read_overview(session.store, session.rpc)
                groups = view.groups_of(realm)
                if groups and all(group.leader is not None for group in groups):
                    return view
                await trio.sleep(POLL_S)

    async def attempt(self, what: str, command: Any, *arguments: Any) -> bool:
        """Run a command; tell how it ended."""
        notes = self._world.notes
        try:
            with trio.fail_after(150.0):
                await command(*arguments)
        except (ToolFailure, RealmError, trio.TooSlowError) as error:
            text = error.message if isinstance(error, ToolFailure) else str(error)
            notes.tell(f"operator {what}: {type(error).__name__} {text}")
            notes.count(f"operator.{what}.failed")
            return False
        notes.tell(f"operator {what}: done")
        notes.count(f"operator.{what}.done")
        return True

    async def move_something(self) -> None:
        """Transfer a random end of what some group owns to a group that may take it."""
        session, realm, chance = self.session, self._world.realm, self._chance
        view = await read_overview(session.store, session.rpc)
        groups = sorted(view.groups_of(realm), key=lambda group: group.id)
        owners = [group for group in groups if group.owned_range is not None]
        if not owners or len(groups) < 2:
            return
        source = chance.choice(owners)
        destination = chance.choice([group for group in groups if group is not source])
        owned = source.owned_range
        if owned is None:
            return
        wanted = self._part_of(owned)
        planned = chance.random() < 0.2
        steps = plan(destination.id, owners_of(groups), wanted) if planned else []
        if not steps:
            await transfer_range(session, self._manager(), realm, source.id, destination.id, wanted)
        for step in steps:
            await transfer_range(session, self._manager(), realm, step.source, step.destination, step.range)

    def _part_of(self, owned: OwnedRange) -> OwnedRange:
        """Return the whole of a range, its lower or its upper part."""
        low, high = int.from_bytes(owned.start, "big"), int.from_bytes(owned.end, "big")
        middle = low + (high - low) * self._chance.randint(1, 9) // 10
        match self._chance.randint(0, 3):
            case 0:
                return owned
            case 1 | 2:
                return OwnedRange(owned.start, RecordId(middle.to_bytes(32, "big")))
            case _:
                return OwnedRange(RecordId(min(middle + 1, high).to_bytes(32, "big")), owned.end)

    async def join(self, url: str) -> None:
        """Let a spare HSM join the realm."""
        session = self.session
        view = await read_overview(session.store, session.rpc)
        await join_realm(session, self._world.realm, [url], view)

    async def add_group(self, urls: list[str]) -> GroupId:
        """Make another group."""
        return await new_group(self.session, self._world.realm, urls)

    async def step_down(self, *, hsm: HsmId | None = None, group: GroupId | None = None) -> None:
        """Order a hand-over."""
        realm = None if group is None else self._world.realm
        body = StepdownOrder(hsm=hsm, realm=realm, group=group)
        await call_manager(self.session, self._manager(), LEADER_STEPDOWN, body, timeout_s=COMMAND_TIMEOUT_S)

    async def rebalance(self) -> None:
        """Ask for a rebalancing pass."""
        await call_manager(self.session, self._manager(), REBALANCE, Empty(), timeout_s=COMMAND_TIMEOUT_S)

    def _manager(self) -> str:
        return self._chance.choice(self._managers)
