"""The agent's RPC methods and status (agent.md 2), and the set of its long-lived tasks (agent.md 4).

Handler isolation: the RPC server runs each body in its own nursery and never cancels it for a lost stream; a client
request additionally only *waits* in its body, the work is the producer's. So nothing that was begun is ever undone by
a caller that goes away.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final, Protocol

import trio

from juicebox_hsm.adapters.observation.logging import bind_context
from juicebox_hsm.adapters.rpc import Handler, handles
from juicebox_hsm.adapters.tls.certificate_end import to_unix_ms
from juicebox_hsm.consensus.types import Leader as LeaderRole
from juicebox_hsm.consensus.types import RoleStatus, SteppingDown, Transferring, TransferringOut, Witness
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.liveness import Claim
from juicebox_hsm.host.readiness import Trouble, of_outbox
from juicebox_hsm.hsm.messages import GroupStatus, LeaderStatus, Status, StatusOk
from juicebox_hsm.ids import OwnedRange
from juicebox_hsm.ports.errors import HsmGone
from juicebox_hsm.wire.methods import (
    AGENT_STATUS,
    APP,
    BECOME_LEADER,
    CAPTURED,
    GROUP_JOIN,
    GROUP_NEW,
    GROUP_RETIRE,
    RATE_STATE,
    REALM_JOIN,
    REALM_NEW,
    REPLICATE,
    STEPDOWN,
    TENANTS_RELOAD,
    TRANSFER_ARRIVED,
    TRANSFER_CANCEL_PREPARE,
    TRANSFER_COMPLETE,
    TRANSFER_IN,
    TRANSFER_OUT,
    TRANSFER_OWNS,
    TRANSFER_PREPARE,
    Reply,
    Request,
)
from juicebox_hsm.wire.rpc import (
    AgentGroupInfo,
    AgentStatus,
    App,
    AppOk,
    CapturedReply,
    Direction,
    Empty,
    GroupCall,
    GroupInfo,
    GroupRole,
    HsmInfo,
    LeaderInfo,
    OutboxInfo,
    Range,
    RateState,
    RealmCreated,
    RealmInfo,
    Refusal,
    Refused,
    Replicate,
    RoleInfo,
    TenantsReloaded,
    Told,
    TransferringInfo,
)
from roles.agent.app import handle_app
from roles.agent.ending import handle_group_retire, leave_ended_groups
from roles.agent.leader import handle_become_leader, handle_stepdown
from roles.agent.lifecycle import (
    RealmTablesFailed,
    handle_group_join,
    handle_group_new,
    handle_realm_join,
    handle_realm_new,
    learn_groups,
)
from roles.agent.lost import report_lost_leaders
from roles.agent.outbox import Dispatcher, watch_backlog
from roles.agent.ratelimit import gossip, keep_tenants, refresh_tenants
from roles.agent.replicate import handle_captured, handle_replicate
from roles.agent.transfer import (
    handle_arrived,
    handle_cancel_prepare,
    handle_complete,
    handle_owns,
    handle_prepare,
    handle_transfer_in,
    handle_transfer_out,
)
from roles.agent.watchdog import watchdog
from roles.words import own_sentence

if TYPE_CHECKING:
    from roles.agent.context import Agent

STATUS_HSM_S: Final = 1.0
FATAL: Final = (HsmGone, RealmTablesFailed)
"""Errors that leave a handler and end the process."""


class Connection(Protocol):
    """What is used of the RPC caller: its stream's identity and end."""

    @property
    def connection_id(self) -> int:
        """A number per stream."""
        ...

    @property
    def closed(self) -> trio.Event:
        """Set when the stream is gone."""
        ...


class AgentService:
    """The methods of one agent, and the tasks behind them."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.dispatcher = Dispatcher(agent)

    async def learn(self) -> None:
        """Read the tenants' limits and learn the HSM's groups, whose log watchers start at once (agent.md 4)."""
        try:
            await refresh_tenants(self.agent)
        except RealmError as error:
            self.agent.log.warning("tenant limits not read", error=str(error))
        await learn_groups(self.agent)

    def start(self) -> None:
        """Start the long-lived tasks; our own address must be known by now."""
        agent = self.agent
        for name, task in (
            ("persister", agent.persister.run),
            ("peers", agent.peers.run),
            ("outbox dispatcher", self.dispatcher.run),
        ):
            agent.nursery.start_soon(task, name=name)
        for background in (report_lost_leaders, leave_ended_groups, gossip, keep_tenants, watch_backlog, watchdog):
            agent.nursery.start_soon(background, agent, name=background.__name__)

    def handlers(self) -> Mapping[str, Handler]:
        """Return the method table for the RPC server."""
        agent = self.agent

        def plain(
            handle: Callable[[Agent, Request], Awaitable[Reply]],
        ) -> Callable[[Request, Connection], Awaitable[Reply]]:
            async def handler(body: Request, _caller: Connection) -> Reply:
                bind_context(**_named(body))
                return await handle(agent, body)

            return handler

        async def app(body: App, _caller: Connection) -> AppOk | Refused:
            return await handle_app(agent, body)

        async def captured(body: GroupCall, _caller: Connection) -> CapturedReply | Refused:
            return handle_captured(agent, body)

        async def realm_new(_body: Empty, _caller: Connection) -> RealmCreated | Refused:
            return await handle_realm_new(agent)

        return dict(
            (
                handles(AGENT_STATUS, self._status),
                handles(REALM_NEW, realm_new),
                handles(REALM_JOIN, plain(handle_realm_join)),
                handles(GROUP_NEW, plain(handle_group_new)),
                handles(GROUP_JOIN, plain(handle_group_join)),
                handles(GROUP_RETIRE, plain(handle_group_retire)),
                handles(BECOME_LEADER, plain(handle_become_leader)),
                handles(STEPDOWN, plain(handle_stepdown)),
                handles(REPLICATE, self._replicate),
                handles(CAPTURED, captured),
                handles(APP, app),
                handles(TRANSFER_PREPARE, plain(handle_prepare)),
                handles(TRANSFER_CANCEL_PREPARE, plain(handle_cancel_prepare)),
                handles(TRANSFER_OUT, plain(handle_transfer_out)),
                handles(TRANSFER_IN, plain(handle_transfer_in)),
                handles(TRANSFER_COMPLETE, plain(handle_complete)),
                handles(TRANSFER_OWNS, plain(handle_owns)),
                handles(TRANSFER_ARRIVED, plain(handle_arrived)),
                handles(RATE_STATE, self._rate_state),
                handles(TENANTS_RELOAD, self._tenants_reload),
            )
        )

    async def _replicate(self, body: Replicate, caller: Connection) -> CapturedReply | Refused:
        bind_context(realm=body.realm.hex(), group=body.group.hex())
        group = self.agent.groups.get(body.realm, body.group)
        if group is not None:
            claim = Claim(body.last, body.starting)
            self.agent.leaders.heard((group.realm, group.group), claim, trio.current_time(), caller.closed.is_set)
        return await handle_replicate(self.agent, body)

    async def _rate_state(self, _body: Empty, _caller: Connection) -> RateState:
        return RateState(self.agent.limiters.snapshot(trio.current_time()))

    async def _tenants_reload(self, _body: Empty, _caller: Connection) -> TenantsReloaded | Refused:
        try:
            return TenantsReloaded(await refresh_tenants(self.agent))
        except RealmError as error:
            return Refused(Refusal.NO_STORE, detail=str(error))

    async def _status(self, _body: Empty, _caller: Connection) -> AgentStatus:
        return await agent_status(self.agent)


def _named(body: object) -> dict[str, str]:
    """Return what a request is about, for the log. Not asked for `app`, which logs in the leadership's tasks."""
    named = {name: getattr(body, name, None) for name in ("realm", "group", "source", "destination")}
    return {name: value.hex() for name, value in named.items() if isinstance(value, bytes)}


async def hsm_status(agent: Agent) -> StatusOk | None:
    """Ask the HSM for its status, live; None when it does not answer within 1 s."""
    with trio.move_on_after(STATUS_HSM_S):
        try:
            reply = await agent.hsm.send(Status())
        except HsmGone:
            return None
        if isinstance(reply, StatusOk):
            return reply
    return None


async def agent_status(agent: Agent) -> AgentStatus:
    """Return the agent's status; never fails, `hsm` is absent when the HSM does not answer."""
    status = await hsm_status(agent)
    return AgentStatus(
        uptime_s=trio.current_time() - agent.started_at,
        hsm=None if status is None else _hsm_info(status),
        name=agent.config.name,
        build=agent.config.build,
        groups=_group_infos(agent),
        outbox=OutboxInfo(
            agent.unpublished.rows,
            agent.unpublished.oldest_s,
            "; ".join(own_sentence(warning) for warning in of_outbox(agent.unpublished, agent.set_aside)),
        ),
        certificate_end_ms=to_unix_ms(agent.config.certificate_end()),
        instance=agent.config.instance,
        now_ms=agent.now_ms(),
        logs_behind=agent.logs_behind,
        troubles=tuple(
            Told(trouble.code.word, own_sentence(trouble)) for trouble in agent.troubles if isinstance(trouble, Trouble)
        ),
        damages=agent.damages.lately(trio.current_time()),
        latency_ms=agent.latency.mean_ms(trio.current_time()),
    )


def _group_infos(agent: Agent) -> list[AgentGroupInfo]:
    now = trio.current_time()
    infos = []
    for group in agent.groups:
        leader = group.leader
        if leader is None:
            role = role_info(group.role)
            ended = group.end is not None
            infos.append(
                AgentGroupInfo(group.realm, group.group, role, False, waiting_clients=group.releasing, ended=ended)
            )
            continue
        shown, quorum = leader.snapshot(now), leader.quorum(now)
        last = shown.last_appended
        infos.append(
            AgentGroupInfo(
                group.realm,
                group.group,
                role_info(group.role),
                leading=True,
                waiting_clients=shown.waiting,
                last_appended=None if last is None else (last.index, last.entry_mac),
                append_queue_len=shown.queued,
                requests_per_s=shown.requests_per_s,
                members_alive=quorum.alive,
                commit_age_s=quorum.commit_age_s,
                stalled_s=quorum.stalled_s,
                ended=group.end is not None,
                lacks_store=quorum.lacks_store,
            )
        )
    return infos


def role_info(status: RoleStatus) -> RoleInfo:
    """Return a role in its wire form."""
    match status.role:
        case LeaderRole(starting):
            return RoleInfo(GroupRole.LEADER, status.at, starting)
        case SteppingDown(leader_starting):
            return RoleInfo(GroupRole.STEPPING_DOWN, status.at, leader_starting)
        case Witness():
            return RoleInfo(GroupRole.WITNESS, status.at)


def _range(owned: OwnedRange) -> Range:
    return Range(owned.start, owned.end)


def _transferring_info(marker: Transferring) -> TransferringInfo:
    if isinstance(marker, TransferringOut):
        partition = marker.partition
        return TransferringInfo(
            Direction.OUT, marker.destination, _range(partition.range), marker.at, partition.root_hash
        )
    return TransferringInfo(Direction.IN, marker.source, _range(marker.range), marker.at)


def _leader_info(leader: LeaderStatus) -> LeaderInfo:
    return LeaderInfo(
        committed=leader.committed,
        last=leader.last.index,
        owned_range=None if leader.owned_range is None else _range(leader.owned_range),
        transferring=None if leader.transferring is None else _transferring_info(leader.transferring),
        retired=leader.last.retired,
    )


def _group_info(group: GroupStatus) -> GroupInfo:
    return GroupInfo(
        id=group.id,
        configuration=list(group.configuration),
        captured=group.captured,
        leader=None if group.leader is None else _leader_info(group.leader),
        role=role_info(group.role),
    )


def _hsm_info(status: StatusOk) -> HsmInfo:
    realm = status.realm
    return HsmInfo(
        id=status.id,
        realm=None
        if realm is None
        else RealmInfo(realm.id, realm.statement, [_group_info(group) for group in realm.groups], realm.generation),
        public_key=status.public_key,
    )
