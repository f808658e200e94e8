"""The agent as handlers and lanes see it: its groups, and how a role that the HSM reports starts or ends a leadership.

One object is passed to them instead of nine arguments. They are functions over it; long-lived tasks run in `nursery`,
whose failure is the failure of the process (agent.md 13).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from juicebox_hsm.adapters.observation.logging import bind_context
from juicebox_hsm.adapters.observation.tracing import Traces
from juicebox_hsm.consensus.types import RoleStatus, Witness
from juicebox_hsm.errors import check
from juicebox_hsm.host.admission import Limiters
from juicebox_hsm.host.group import Groups, GroupState
from juicebox_hsm.host.latency import LatencyMeter
from juicebox_hsm.host.leadership.events import Event, RoleAdopted
from juicebox_hsm.host.leadership.machine import Leadership
from juicebox_hsm.host.leadership.state import Limits
from juicebox_hsm.host.liveness import Leaders, Patience
from juicebox_hsm.host.outbox import Unpublished
from juicebox_hsm.host.readiness import Trouble
from juicebox_hsm.host.witness import Following, Pace
from juicebox_hsm.hsm.messages import NotLeader, Outcome, StepDown, StepDownOk
from juicebox_hsm.ids import GroupId, HsmId, RealmId
from juicebox_hsm.ports.hsm_transport import HsmTransport
from juicebox_hsm.ports.observation import EventMeter, Log
from juicebox_hsm.ports.rpc import RpcCaller
from juicebox_hsm.ports.store import Store
from juicebox_hsm.wire.rpc import LogBehind
from roles.agent.driver import Driver
from roles.agent.outside import AgentConfig, Outside
from roles.agent.peers import Peers
from roles.agent.watch import Follower, Persister

LeadershipRunner = Callable[["Agent", GroupState, Leadership], Awaitable[None]]


class Agent(Outside):
    """An agent's groups with their roles, and what is counted and held over all of them. Create it inside Trio.

    `run_leadership` is `leader.lead`.
    """

    logs_behind: tuple[LogBehind, ...] = ()
    """Logs that are not those of which our HSM captured entries: an older or another store."""

    def __init__(
        self,
        config: AgentConfig,
        hsm: HsmTransport,
        store: Store,
        rpc: RpcCaller,
        metrics: EventMeter,
        log: Log,
        nursery: trio.Nursery,
        run_leadership: LeadershipRunner,
        traces: Traces | None = None,
    ) -> None:
        super().__init__(config, hsm, store, rpc, metrics, log, nursery, traces)
        self._run_leadership = run_leadership
        self.groups = Groups()
        self.followers: dict[tuple[RealmId, GroupId], Follower] = {}
        self.persister = Persister(self, self.groups, self.tell)
        self.peers = Peers(self)
        self.leaders = Leaders(
            Patience(self.timings.silence_s, self.timings.leader_hint_first_s, self.timings.leader_hint_again_s)
        )
        self._pace = Pace(
            self.timings.watch_idle_first_s, self.timings.watch_idle_max_s, self.timings.catch_up_unready_s
        )
        self.limiters = Limiters(config.default_rate, int.from_bytes(config.instance[:4], "big") << 32)
        self.registered = False
        self.registering = trio.CancelScope()
        """Ends the renewal of our entry in discovery."""
        self.stopping = False
        self.drivers: dict[Leadership, Driver] = {}
        """The drivers of leaderships whose lanes have not ended."""
        self.leaderships = 0
        """Leadership tasks that have not ended yet."""
        self.outbox_tails: dict[str, int] = {}
        """Tenant -> highest outbox sequence seen, for the hints of intents."""
        self.unpublished = Unpublished()
        self.latency = LatencyMeter()
        self.set_aside = 0
        """Tenant events of earlier leaderships that nothing could record."""
        self.bus_trouble: tuple[Trouble, ...] = ()
        """Why events are not published, while the bus is to blame."""

    def add_group(self, realm: RealmId, group: GroupId, members: tuple[HsmId, ...], position: int) -> GroupState:
        """Insert a group as Witness at clock 0 and start its log watcher at index `position`."""
        following = Following(position, self._pace)
        state = GroupState(realm, group, members, RoleStatus(Witness(), 0), following, limits=self._limits())
        self.groups.add(state)
        follower = Follower(self, state, self.persister, self.peers, self)
        self.followers[realm, group] = follower
        self.nursery.start_soon(follower.run, name=f"watch {group.hex()}")
        return state

    def drop_group(self, group: GroupState) -> None:
        """Remove a group that the HSM has forgotten; its watcher ends by itself."""
        group.has_left = True
        self.groups.remove(group)
        self.followers.pop((group.realm, group.group), None)
        self.leaders.began((group.realm, group.group))

    def follower(self, group: GroupState) -> Follower:
        """Return the watcher of a group."""
        return self.followers[group.realm, group.group]

    def adopt(self, group: GroupState, status: RoleStatus) -> None:
        """Apply a role the HSM reported; starts the tasks of a new leadership, ends those of an old one."""
        change = group.adopt(status)
        about: dict[str, object] = {"realm": group.realm.hex(), "group": group.group.hex()}
        if change.stale:
            self.log.warning("stale role dropped", **about, at=status.at, have=group.role.at)
        if change.started is not None:
            wake = self.follower(group).wake
            self.drivers[change.started] = Driver(self, group, change.started, self, self.limiters, wake)
        if change.ended is not None:
            self.drivers[change.ended].end()
            self.log.info("leadership ended", **about, starting=change.ended.starting)
            if not change.ended.was_asked_to_leave and not self.stopping:
                self.leaders.left((group.realm, group.group), change.ended.claim)
        if change.started is not None:
            self.log.info("leadership began", **about, starting=change.started.starting)
            self.leaders.began((group.realm, group.group))
            self.leaderships += 1
            self.nursery.start_soon(self._lead, group, change.started, name=f"lead {group.group.hex()}")
            self.persister.request()
        elif not change.stale:
            self.tell(group, RoleAdopted(group.role))

    def driver_of(self, group: GroupState) -> Driver | None:
        """Return the driver of the group's leadership, None for a witness."""
        return None if group.leader is None else self.drivers[group.leader]

    def tell(self, group: GroupState, event: Event) -> None:
        """Tell the group's leadership, if there is one, an event that no lane of its own brings."""
        driver = self.driver_of(group)
        if driver is not None:
            driver.step(event)

    def _limits(self) -> Limits:
        return Limits(
            hole_s=self.timings.hole_s,
            compact_pause_s=self.timings.compact_pause_s,
            silence_s=self.timings.silence_s,
        )

    async def _lead(self, group: GroupState, leader: Leadership) -> None:
        bind_context(realm=group.realm.hex(), group=group.group.hex())  # once for all tasks of the leadership
        try:
            await self._run_leadership(self, group, leader)
        finally:
            self.leaderships -= 1
            del self.drivers[leader]

    async def step_down(self, group: GroupState, *, force: bool, why: str) -> StepDownOk | None:
        """Ask the HSM to leave leadership of `group`; None when it does not lead."""
        say = self.log.warning if force else self.log.info
        say("stepping down", realm=group.realm.hex(), group=group.group.hex(), forced=force, why=why)
        self.metrics.count("agent.stepdown", forced=str(force).lower())
        reply = await self.hsm.send(StepDown(group.realm, group.group, force))
        match reply:
            case StepDownOk(role=role):
                self.adopt(group, role)
                return reply
            case NotLeader(role=status):
                if status is not None:
                    self.adopt(group, status)
                return None
        check(reply in (Outcome.INVALID_REALM, Outcome.INVALID_GROUP), "StepDown answers as specified")
        return None
