"""The client request's door (agent.md 5): checks that need no leadership, then the machine's `RequestArrived`.

The RPC's task only waits on the request's slot, so a client that goes away never cancels what was begun: once the HSM
made an entry, the entry reaches the queue, is appended, committed and recorded, with or without somebody to answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from juicebox_hsm.adapters.observation.tracing import current
from juicebox_hsm.errors import DecodingError, check
from juicebox_hsm.host.events import is_well_formed
from juicebox_hsm.host.group import GroupState
from juicebox_hsm.host.leadership.events import ClientRequest, RequestArrived, RequestGone
from juicebox_hsm.host.leadership.produce import REFUSALS
from juicebox_hsm.hsm.messages import Handshake, HandshakeOk, NotLeader, Outcome
from juicebox_hsm.ids import RecordId
from juicebox_hsm.ports.errors import HsmGone
from juicebox_hsm.wire.client import HandshakeRequest, decode_noise_request, encode_noise_response
from juicebox_hsm.wire.rpc import App, AppOk, Refusal, Refused
from roles.agent.oneshot import Slot

if TYPE_CHECKING:
    from roles.agent.context import Agent


async def handle_app(agent: Agent, body: App) -> AppOk | Refused:
    """Answer one client request; see the module docstring for what cancellation does."""
    found = agent.groups.find(body.realm, body.group)
    if isinstance(found, Refusal):
        return Refused(found)
    try:
        encrypted = decode_noise_request(body.encrypted)
    except DecodingError:
        return Refused(Refusal.DECODING_ERROR)
    if not is_well_formed(body):
        return Refused(Refusal.DECODING_ERROR)
    record = RecordId(body.record_id)
    driver = agent.driver_of(found)
    if driver is None or not found.is_leader:
        return Refused(Refusal.NOT_LEADER)
    if body.handshake_only:
        if not isinstance(encrypted, HandshakeRequest):
            return Refused(Refusal.SESSION_ERROR)
        return await _handshake(agent, found, record, body.session_id, encrypted)
    if not agent.limiters.is_configured:  # the store has been away since the start; an append needs it, too
        return Refused(Refusal.NO_STORE, detail="the tenants' limits have not been read yet")
    now_ms = agent.now_ms()
    if not agent.limiters.of(body.tenant).admit(record, trio.current_time()):
        agent.metrics.count("agent.app.rate_limited", tenant=body.tenant)
        return Refused(Refusal.RATE_LIMIT_EXCEEDED)
    slot: Slot[AppOk | Refused] = Slot()
    traced = current()
    steps = None if agent.traces is None or traced is None else agent.traces.steps(traced)
    request = ClientRequest(record, body.session_id, encrypted, body.tenant, body.user, now_ms, slot.fill, steps)
    if steps is not None:
        steps.enter("queue")
    arrived_s = trio.current_time()
    driver.step(RequestArrived(request, agent.unpublished.is_full))
    try:
        reply = await slot.wait()
    except trio.Cancelled:
        driver.step(RequestGone(request))
        raise
    finally:
        if steps is not None:
            steps.end()
    _tell(agent, reply, arrived_s)
    return reply


def _tell(agent: Agent, reply: AppOk | Refused, arrived_s: float) -> None:
    """Take down how long an answer took, and count refusals that say how the group is."""
    if not isinstance(reply, Refused):
        now_s = trio.current_time()
        agent.latency.add(now_s, now_s - arrived_s)
        return
    match reply.outcome:
        case Refusal.BUSY:
            agent.metrics.count("agent.app.busy")
        case Refusal.NO_QUORUM:
            agent.metrics.count("agent.app.no_quorum")
        case _:
            pass


async def _handshake(
    agent: Agent, group: GroupState, record: RecordId, session_id: int, encrypted: HandshakeRequest
) -> AppOk | Refused:
    """Open a session: no log entry, no rate limit."""
    try:
        reply = await agent.hsm.send(
            Handshake(
                group.realm,
                group.group,
                record,
                session_id,
                encrypted.client_ephemeral_public,
                encrypted.payload_ciphertext,
            )
        )
    except HsmGone:
        # the producer or the persister meets the same error and ends the process
        agent.persister.request()
        return Refused(Refusal.NO_HSM)
    match reply:
        case HandshakeOk(noise=noise):
            return AppOk(encode_noise_response(noise))
        case NotLeader() | Outcome.NOT_OWNER:
            return Refused(Refusal.NOT_LEADER)
        case Outcome():
            if reply in REFUSALS:
                refusal, consumed = REFUSALS[reply]
                return Refused(refusal, consumed=consumed)
    check(condition=False, must_hold="Handshake answers as specified")
    return Refused(Refusal.NO_HSM)
