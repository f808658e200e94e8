"""Forwarding a client's request to the agent that leads its record's group: carries out what `host.forwarding` says."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from juicebox_hsm.adapters.rpc import RpcError
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.forwarding import Answer, Answered, Ask, AwaitTable, LeaderSearch, LookAgain, NoReply
from juicebox_hsm.ids import GroupId, RealmId, RecordId
from juicebox_hsm.ports.observation import Meter
from juicebox_hsm.ports.rpc import RpcCaller
from juicebox_hsm.wire.methods import APP
from juicebox_hsm.wire.rpc import App, AppOk, PeerRole, Refused
from roles.lb.poller import Poller


@dataclass(slots=True)
class Forwarding:
    """One client request on its way. `encrypted` is CBOR; `user` the hashed user id; `group` who was asked last.

    `trace` is the W3C trace context agents get, None when this request is not traced.
    """

    realm: RealmId
    record: RecordId
    session_id: int
    handshake_only: bool
    is_transport: bool
    encrypted: bytes = field(repr=False)
    tenant: str
    user: str = field(repr=False)
    group: GroupId | None = None
    trace: str | None = None


class Forwarder:
    """Sends requests to agents by the poller's table."""

    def __init__(self, rpc: RpcCaller, poller: Poller, metrics: Meter) -> None:
        self._rpc = rpc
        self._poller = poller
        self._metrics = metrics

    async def refresh(self) -> None:
        """Look at discovery and all agents now; concurrent callers share one look."""
        await self._poller.refresh()

    async def forward(self, job: Forwarding) -> Answer:
        """Return the agent's answer, or UNAVAILABLE when nobody could give one in time."""
        now_s = trio.current_time()
        search = LeaderSearch(job.realm, job.record, is_transport=job.is_transport, now_s=now_s)
        while True:
            match search.next_step(self._poller.table, trio.current_time()):
                case Ask(route, timeout_s):
                    job.group = route.group
                    reply = await self._ask(route.url, route.group, job, timeout_s)
                    search.heard(route, reply, trio.current_time())
                case LookAgain():
                    self._metrics.count("load_balancer.retries")
                    await self._poller.refresh()
                case AwaitTable(until_s):
                    with trio.move_on_at(until_s):
                        await self._poller.look_for_change()
                case Answered(answer):
                    return answer

    async def _ask(self, url: str, group: GroupId, job: Forwarding, timeout_s: float) -> AppOk | Refused | NoReply:
        """Send the request to one agent."""
        request = App(
            realm=job.realm,
            group=group,
            record_id=job.record,
            session_id=job.session_id,
            handshake_only=job.handshake_only,
            encrypted=job.encrypted,
            tenant=job.tenant,
            user=job.user,
        )
        try:
            reply = await self._rpc.call(url, APP, request, timeout_s=timeout_s, server=PeerRole.AGENT, trace=job.trace)
        except RpcError as error:
            return NoReply(error.maybe_delivered)
        except RealmError:
            # Ours: a request that does not fit a frame; nothing was sent. It cannot be, for bodies are limited.
            return NoReply(maybe_delivered=False)
        return reply
