"""The agent as its parts see it: ports, settings, shared state, and how a role reply starts or ends a leadership.

One object is passed to every part instead of nine arguments. Parts are functions over it; long-lived tasks run in
`nursery`, whose failure is the failure of the process (agent.md 13).
"""

from __future__ import annotations

import datetime as dt
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from juicebox_hsm.adapters.observation.logging import bind_context
from juicebox_hsm.consensus.types import RoleStatus, Witness
from juicebox_hsm.errors import RealmError, check
from juicebox_hsm.host.admission import Limiters
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.events import EVENT_KEPT_MS
from juicebox_hsm.host.group import Groups, GroupState
from juicebox_hsm.host.leadership.events import Event, RoleAdopted
from juicebox_hsm.host.leadership.machine import Leadership
from juicebox_hsm.host.leadership.state import Limits
from juicebox_hsm.host.liveness import Leaders, Patience
from juicebox_hsm.host.outbox import Unpublished
from juicebox_hsm.host.readiness import OtherStore, Trouble, Troubles
from juicebox_hsm.host.witness import Following, Pace
from juicebox_hsm.hsm.messages import NotLeader, Outcome, StepDown, StepDownOk
from juicebox_hsm.ids import GroupId, HsmId, RealmId
from juicebox_hsm.ports.hsm_transport import HsmTransport
from juicebox_hsm.ports.observation import EventMeter, Log
from juicebox_hsm.ports.rpc import RpcCaller
from juicebox_hsm.ports.store import Store
from juicebox_hsm.wire.rpc import LogBehind
from roles.agent.driver import Driver
from roles.agent.peers import Peers
from roles.agent.watch import Follower, Persister
from roles.clock import OwnClock
from roles.words import own_sentence


@dataclass(frozen=True, slots=True)
class Timings:
    """Periods and deadlines of the agent in seconds (agent.md 15); tests shorten them."""

    heartbeat_s: float = 0.25
    silence_s: float = 1.0
    replicate_timeout_s: float = 0.5
    leader_hint_first_s: float = 0.25
    leader_hint_again_s: float = 1.0
    watch_idle_first_s: float = 0.025
    watch_idle_max_s: float = 1.0
    catch_up_unready_s: float = 30.0
    become_leader_s: float = 5.0
    peer_refresh_s: float = 10.0
    peer_status_s: float = 2.0
    discovery_poll_s: float = 1.0
    register_s: float = 60.0
    register_retry_s: float = 10.0
    witness_grace_s: float = 60.0
    witness_poll_s: float = 0.5
    compact_pause_s: float = 1.0
    hole_s: float = 5.0
    commit_wait_s: float = 60.0
    watchdog_s: float = 1.0
    gossip_s: float = 0.1
    gossip_idle_s: float = 0.5
    tenants_refresh_s: float = 5.0
    dispatch_s: float = 0.5
    dispatch_idle_s: float = 2.0
    backlog_s: float = 5.0
    shutdown_s: float = 20.0


def wall_clock_ms() -> int:
    """Return Unix milliseconds."""
    return time.time_ns() // 1_000_000


INSTANCE_BYTES: Final = 16


def no_certificate() -> dt.datetime | None:
    """Return that there is no certificate whose end could be told."""
    return None


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """Settings of one agent. `url` is the address others reach it at; `default_rate` is in requests per second.

    `certificate_end` tells when the cluster certificate in service ends (UTC), None without TLS. `instance` tells this
    process from one that runs a copy of its HSM.
    """

    name: str
    url: str
    build: str
    default_rate: int = 10
    event_kept_ms: int = EVENT_KEPT_MS
    timings: Timings = field(default_factory=Timings)
    now_ms: Callable[[], int] = wall_clock_ms
    certificate_end: Callable[[], dt.datetime | None] = no_certificate
    instance: bytes = field(default_factory=partial(os.urandom, INSTANCE_BYTES))


WATCHDOG_CHECKS: Final = 5
LeadershipRunner = Callable[["Agent", GroupState, Leadership], Awaitable[None]]


class Agent:
    """Everything the parts of one agent share. Create it inside Trio; `run_leadership` is `leader.lead`."""

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
    ) -> None:
        self.config = config
        self.now_ms = config.now_ms
        """Returns Unix milliseconds."""
        self.hsm = hsm
        self.store = store
        self.rpc = rpc
        self.metrics = metrics
        self.log = log
        self.nursery = nursery
        self._run_leadership = run_leadership
        self.started_at = trio.current_time()
        self.groups = Groups()
        self.followers: dict[tuple[RealmId, GroupId], Follower] = {}
        self.persister = Persister(self)
        self.peers = Peers(self)
        self.clock = OwnClock(config.now_ms, metrics, log)
        self.leaders = Leaders(
            Patience(self.timings.silence_s, self.timings.leader_hint_first_s, self.timings.leader_hint_again_s)
        )
        self._pace = Pace(
            self.timings.watch_idle_first_s, self.timings.watch_idle_max_s, self.timings.catch_up_unready_s
        )
        self.limiters = Limiters(config.default_rate, int.from_bytes(config.instance[:4], "big") << 32)
        self.hsm_id: HsmId | None = None
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
        self.set_aside = 0
        """Tenant events of earlier leaderships that nothing could record."""
        self.bus_trouble: tuple[Trouble, ...] = ()
        """Why events are not published, while the bus is to blame."""
        self.troubles = Troubles()
        """What is being tried again, and keeps us from being ready."""

    @property
    def timings(self) -> Timings:
        """The periods and deadlines in force."""
        return self.config.timings

    def add_group(self, realm: RealmId, group: GroupId, members: tuple[HsmId, ...], position: int) -> GroupState:
        """Insert a group as Witness at clock 0 and start its log watcher at index `position`."""
        following = Following(position, self._pace)
        state = GroupState(realm, group, members, RoleStatus(Witness(), 0), following, limits=self._limits())
        self.groups.add(state)
        follower = Follower(self, state)
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
            self.drivers[change.started] = Driver(self, group, change.started)
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

    def note_trouble(self, code: Code, error: RealmError, group: GroupId | None = None) -> None:
        """Log trouble that is being retried and report not ready until `clear_trouble`."""
        self.note(Trouble(code, str(error) or type(error).__name__, group))

    def note(self, trouble: Trouble | OtherStore) -> None:
        """Do the same with trouble whose facts are known."""
        if self.troubles.note(trouble):
            self.log.warning("trouble, retrying", code=trouble.code.word, reason=own_sentence(trouble))
        self.metrics.count("agent.trouble", what=trouble.code.word)

    def clear_trouble(self, code: Code, group: GroupId | None = None) -> None:
        """Forget trouble."""
        if self.troubles.clear(code, group):
            about = {} if group is None else {"group": group.hex()}
            self.log.info("trouble over", code=code.word, **about)
