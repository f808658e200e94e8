"""Who is there in a simulated run: agents, managers, balancers, users, an operator; and how all of them are healed."""

from __future__ import annotations

from typing import Final

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.ids import GroupId
from juicebox_hsm.wire.methods import BECOME_LEADER
from juicebox_hsm.wire.rpc import BecomeLeaderCall
from roles.tools.simulate.auditor import AuditorProcess
from roles.tools.simulate.clients import User
from roles.tools.simulate.operators import Operator
from roles.tools.simulate.processes import AgentProcess, BalancerProcess, ManagerProcess, Process
from roles.tools.simulate.profiles import Profile
from roles.tools.simulate.surroundings import QUICK_STORE_S, Surroundings

DUEL_S: Final = 10.0
SPARES: Final = 1


class World(Surroundings):
    """A run with everybody in it, for tricks and judge. `without` are tricks that are not played."""

    def __init__(
        self, seed: int, profile: Profile, *, without: frozenset[str] = frozenset(), keeps_trace: bool = False
    ) -> None:
        super().__init__(seed, profile, keeps_trace=keeps_trace)
        self.without = without
        self.agents = [AgentProcess(self, f"agent{number}") for number in range(1, self.shape.hsms + 1)]
        self.managers = [ManagerProcess(self, f"manager{number}") for number in (1, 2)]
        self.balancers = [BalancerProcess(self, f"lb{number}") for number in (1, 2)]
        self.auditor = AuditorProcess(self, "auditor")
        self.operator = Operator(self, [manager.url for manager in self.managers])
        self.users: list[User] = []
        self.spares_left = SPARES
        self.groups_made = 0
        self.drained: dict[str, None] = {}
        self.limited: dict[str, None] = {}

    @property
    def processes(self) -> list[Process]:
        """Return all services, spares included."""
        return [*self.agents, *self.managers, *self.balancers, self.auditor]

    async def add_spare(self) -> None:
        """Start one more agent, whose HSM joins the realm and a new group."""
        self.spares_left -= 1
        agent = AgentProcess(self, f"agent{len(self.agents) + 1}")
        self.agents.append(agent)
        agent.start()
        await trio.sleep(1.0)
        if await self.operator.attempt("join", self.operator.join, agent.url):
            agent.is_member = True
            others = [other.url for other in self.agents if other.is_member and other is not agent]
            members = [agent.url, *self.chance.sample(others, 2)]
            await self.operator.attempt("new_group", self.operator.add_group, members)

    async def appoint(self, agent: AgentProcess, group: GroupId) -> None:
        """Make an agent lead, without asking anybody."""
        body = BecomeLeaderCall(self.realm, group, None)
        try:
            await self.operator.session.rpc.call(agent.url, BECOME_LEADER, body, timeout_s=10.0)
        except RealmError as error:
            self.notes.tell(f"duel: {error}")

    async def heal(self) -> None:
        """End all trouble: everything runs, nothing is cut, clocks are right, nobody is drained."""
        self.network.heal()
        self.network.slow.clear()
        self.network.weather = type(self.network.weather)()
        for faults in self.faults.values():
            for name, value in (("refuse", 0.0), ("half", 0.0), ("stale", 0.0), ("cut_off", False)):
                setattr(faults, name, value)
            faults.latency_s = QUICK_STORE_S
        for process in self.processes:
            process.clock_offset_ms = 0
            process.faults.faults = type(process.faults.faults)()
            process.resume()
            if process.is_up and process.stopping:  # what would have started it again has ended with the trouble
                self.nursery.start_soon(self._restart_when_ended, process)
            elif not process.is_up:
                self.restart(process)
        for agent in self.agents:
            agent.platform.trouble = type(agent.platform.trouble)()
        store = self.operator.session.store
        for name in self.drained:
            await store.settings.remove(name)
        for tenant in self.limited:
            await store.tenants.remove(tenant)
        self.notes.tell("healed")

    async def _restart_when_ended(self, process: Process) -> None:
        await process.ended.wait()
        self.restart(process)
