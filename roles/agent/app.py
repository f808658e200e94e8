"""The client request path (agent.md 5): admission in the RPC's task, everything else in the producer's batch.

The RPC's task only waits on the request's slot, so a client that goes away never cancels what was begun: once the HSM
made an entry, the entry reaches the queue, is appended, committed and recorded, with or without somebody to answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from juicebox_hsm.adapters.clock.retrying import budget, retrying
from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.errors import DecodingError, RealmError, check
from juicebox_hsm.host.log import Intent
from juicebox_hsm.host.retry import STORE_RETRY
from juicebox_hsm.hsm.messages import (
    AppRequest,
    AppRequestOk,
    Handshake,
    HandshakeOk,
    NotLeader,
    Outcome,
)
from juicebox_hsm.ids import RECORD_ID_BYTES, GroupId, RealmId, RecordId
from juicebox_hsm.ports.errors import HsmGone
from juicebox_hsm.wire.client import HandshakeRequest, decode_noise_request, encode_noise_response
from juicebox_hsm.wire.rpc import App, AppOk, Refusal, Refused
from roles.agent.state import APPEND_BATCH_MAX, UNCOMMITTED_MAX, GroupState, LeaderState, PendingRequest, Queued

if TYPE_CHECKING:
    from roles.agent.context import Agent

SESSION_ID_MAX: Final = 2**32 - 1
DELTA_EMPTY_BYTES: Final = 10

_REFUSALS: Final = {
    Outcome.INVALID_PROOF: Refused(Refusal.INVALID_PROOF),
    Outcome.INVALID_RECORD_DATA: Refused(Refusal.INVALID_PROOF),
    Outcome.NOT_OWNER: Refused(Refusal.NOT_LEADER),
    Outcome.INVALID_REALM: Refused(Refusal.INVALID_REALM),
    Outcome.INVALID_GROUP: Refused(Refusal.INVALID_GROUP),
    Outcome.MISSING_SESSION: Refused(Refusal.MISSING_SESSION, consumed=True),
    Outcome.SESSION_ERROR: Refused(Refusal.SESSION_ERROR, consumed=True),
    Outcome.DECODING_ERROR: Refused(Refusal.DECODING_ERROR, consumed=True),
}


async def handle_app(agent: Agent, body: App) -> AppOk | Refused:
    """Answer one client request; see the module docstring for what cancellation does."""
    found = agent.groups.find(body.realm, body.group)
    if isinstance(found, Refusal):
        return Refused(found)
    try:
        encrypted = decode_noise_request(body.encrypted)
    except DecodingError:
        return Refused(Refusal.DECODING_ERROR)
    if len(body.record_id) != RECORD_ID_BYTES or not 0 <= body.session_id <= SESSION_ID_MAX:
        return Refused(Refusal.DECODING_ERROR)
    record = RecordId(body.record_id)
    leader = found.leader
    if leader is None or not found.is_leader:
        return Refused(Refusal.NOT_LEADER)
    if body.handshake_only:
        if not isinstance(encrypted, HandshakeRequest):
            return Refused(Refusal.SESSION_ERROR)
        return await _handshake(agent, found, record, body.session_id, encrypted)
    now_ms = agent.now_ms()
    if not agent.limiters.of(body.tenant).admit(record, now_ms):
        agent.metrics.count("agent.app.rate_limited")
        return Refused(Refusal.RATE_LIMIT_EXCEEDED)
    if leader.uncommitted > UNCOMMITTED_MAX:
        agent.metrics.count("agent.app.busy")
        return Refused(Refusal.BUSY)
    if agent.outbox_full:
        return Refused(Refusal.NO_STORE)
    request = PendingRequest(record, body.session_id, encrypted, body.tenant, body.user, now_ms)
    leader.incoming.append(request)
    leader.work.set()
    return await request.wait()


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
            refused = _REFUSALS.get(reply)
            if refused is not None:
                return refused
    check(condition=False, must_hold="Handshake answers as specified")
    return Refused(Refusal.NO_HSM)


async def run_requests(agent: Agent, group: GroupState, leader: LeaderState) -> None:
    """Take up to 100 waiting requests, give them to the HSM, and queue the entries it makes."""
    batch: list[PendingRequest] = []
    while leader.incoming and len(batch) < APPEND_BATCH_MAX:
        request = leader.incoming.popleft()
        if not request.gone:
            batch.append(request)
    if not batch:
        return
    if not group.is_leader:
        _refuse(batch, Refused(Refusal.NOT_LEADER))
        return
    began = trio.current_time()
    leader.meter.add(began, len(batch))
    last = await _last_entry(agent, group, leader)
    if isinstance(last, Refusal):
        _refuse(batch, Refused(last))
        return
    if last.partition is None:
        _refuse(batch, Refused(Refusal.NOT_LEADER))
        return
    records = [request.record_id for request in batch]
    try:
        with budget(_left_s(batch, began)):
            proofs = await agent.store.nodes.read_proofs(group.realm, last.partition, records)
    except RealmError as error:
        agent.log.warning("proofs not read", group=group.group.hex(), error=str(error))
        for request in batch:
            _again(agent, group, leader, request)
        return
    # Every request to the HSM is a checkpoint, so pings and heartbeats get their turn while a batch runs.
    for request, proof in zip(batch, proofs, strict=True):
        if proof is None:
            agent.metrics.count("agent.start_app_request.missing_node")
            _again(agent, group, leader, request)
        elif group.leader is not leader:
            request.refuse(Refusal.NOT_LEADER)
        else:
            await _run_one(agent, group, leader, request, proof, last.index)
    agent.metrics.timing("agent.start_app_request", int((trio.current_time() - began) * 1e9))


async def _run_one(
    agent: Agent, group: GroupState, leader: LeaderState, request: PendingRequest, proof: bytes, index: int
) -> None:
    reply = await agent.hsm.send(
        AppRequest(group.realm, group.group, request.record_id, request.session_id, request.encrypted, proof, index)
    )
    # No checkpoint from here to the queue: a hole in the log would stall the group.
    match reply:
        case AppRequestOk(entry=entry, delta=delta):
            # The leadership that made the entry: while we waited for the HSM, another may have begun.
            current = group.leader
            if current is None or current.append_blocked or not current.is_new(entry.index):
                request.refuse(Refusal.NOT_LEADER, consumed=True)
                return
            hint = agent.outbox_tails.get(request.tenant, 0) + 1
            request.wrote = len(delta) > DELTA_EMPTY_BYTES
            current.waiters[entry.entry_mac] = request
            intent = Intent(request.tenant, request.user, request.record_id, hint)
            current.enqueue(Queued(entry, delta, intent))
            if current is not leader:
                current.work.set()
        case Outcome.STALE_PROOF:
            agent.metrics.count("agent.start_app_request.stale_proof")
            _again(agent, group, leader, request)
        case NotLeader(role=role):
            request.refuse(Refusal.NOT_LEADER)
            if role is not None:
                agent.adopt(group, role)
        case Outcome() if reply in _REFUSALS:
            request.fill(_REFUSALS[reply])
        case _:
            check(condition=False, must_hold="AppRequest answers as specified")


async def _last_entry(agent: Agent, group: GroupState, leader: LeaderState) -> LogEntry | Refusal:
    """Return the last acknowledged entry: queued ones may have nodes that are not in the store yet."""
    if leader.last_appended is not None:
        return leader.last_appended

    async def read() -> LogEntry | None:
        return await agent.store.log.read_last(RealmId(group.realm), GroupId(group.group))

    try:
        last = await retrying(read)
    except RealmError as error:
        agent.log.warning("log tail not read", group=group.group.hex(), error=str(error))
        return Refusal.NO_STORE
    if last is None:
        return Refusal.INVALID_GROUP
    if leader.last_appended is None:
        leader.last_appended = last
    return leader.last_appended


def _refuse(batch: list[PendingRequest], refused: Refused) -> None:
    for request in batch:
        request.fill(refused)


def _left_s(batch: list[PendingRequest], now: float) -> float:
    """Return how long the reads of a batch may be tried again: as long as its oldest request has left."""
    for request in batch:
        if request.retry_deadline is None:
            request.retry_deadline = now + STORE_RETRY.total_s
    return min(now if request.retry_deadline is None else request.retry_deadline for request in batch) - now


def _again(agent: Agent, group: GroupState, leader: LeaderState, request: PendingRequest) -> None:
    """Try a request again with a fresh proof after its backoff; NoStore once the retry profile is exhausted."""
    now = trio.current_time()
    request.attempts += 1
    deadline = now if request.retry_deadline is None else request.retry_deadline
    if STORE_RETRY.exhausted(request.attempts, STORE_RETRY.total_s - (deadline - now)):
        agent.metrics.count("agent.start_app_request.exhausted")
        request.refuse(Refusal.NO_STORE)
        return
    agent.nursery.start_soon(_requeue, group, leader, request, STORE_RETRY.delay_s(request.attempts))


async def _requeue(group: GroupState, leader: LeaderState, request: PendingRequest, delay_s: float) -> None:
    await trio.sleep(delay_s)
    if group.leader is not leader:
        request.refuse(Refusal.NOT_LEADER)
        return
    leader.incoming.append(request)
    leader.work.set()
