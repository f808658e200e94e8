"""The committer: elects, commits, records what was released, then answers (agent.md 8, 11).

Driven by events: it runs when the persister or a member's answer brings a newer capture. Order, and why: waiters are
taken out before the role is adopted (adopting Witness drops who still waits); the outbox rows of a batch are written
before any of its answers leave, so that a tenant's audit log never lacks something a client has seen.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import trio

from juicebox_hsm.consensus.election import elect
from juicebox_hsm.errors import RealmError
from juicebox_hsm.hsm.messages import Commit, CommitOk, NotLeader, ResultKind, ResultType
from juicebox_hsm.ids import HsmId
from juicebox_hsm.wire.client import NoiseResponse, encode_noise_response
from juicebox_hsm.wire.rpc import AppOk, Refusal
from roles.agent.outbox import client_event, record_events
from roles.agent.state import GroupState, LeaderState, PendingRequest

if TYPE_CHECKING:
    from roles.agent.context import Agent

Released = tuple[int, bytes, PendingRequest, NoiseResponse, ResultType]
"""(index, entry mac, request, reply, what it was about)"""

_RESERVING = frozenset({ResultKind.REGISTER1, ResultKind.RECOVER1, ResultKind.RECOVER2})


async def commit_loop(agent: Agent, group: GroupState, leader: LeaderState) -> None:
    """Commit whenever new captures may allow it, until the leadership ends."""
    while group.leader is leader:
        await leader.voted.wait()
        if group.leader is leader:
            await commit_once(agent, group, leader)


async def commit_once(agent: Agent, group: GroupState, leader: LeaderState) -> None:
    """Send Commit if a strict majority captured beyond what is committed; release what comes back."""
    votes: dict[HsmId, int] = {hsm: captured.index for hsm, captured in leader.votes.items()}
    outcome = elect(group.configuration, votes)
    if outcome is None or outcome <= (leader.committed or 0):
        return
    reply = await agent.hsm.send(Commit(group.realm, group.group, tuple(leader.votes.values())))
    match reply:
        case CommitOk():
            await _released(agent, group, leader, reply)
        case NotLeader(role=role):
            if role is not None:
                agent.adopt(group, role)
        case _:
            # captures of another branch: the capture of the foreign entries will move our role
            agent.metrics.count("agent.commit.no_quorum")


async def _released(agent: Agent, group: GroupState, leader: LeaderState, reply: CommitOk) -> None:
    """Take the waiters out, adopt the role, raise committed, record the events, answer."""
    released: list[Released] = []
    indexes = {mac: index for index, mac in leader.own_macs.items()}
    for mac, noise, result in reply.responses:
        request = leader.waiters.pop(mac, None)
        if request is None:
            agent.log.error("released a reply nobody asked for", group=group.group.hex())
            continue
        released.append((indexes[mac], mac, request, noise, result))
    for mac in reply.abandoned:
        request = leader.waiters.pop(mac, None)
        if request is not None:
            request.refuse(Refusal.NOT_LEADER, consumed=True)
    agent.releasing += 1
    group.releasing += len(released)
    try:
        agent.adopt(group, reply.role)
        leader.certificate = leader.certify(reply.committed)
        leader.raise_committed(reply.committed)
        agent.metrics.gauge("agent.commit.log.index", reply.committed)
        await _record_and_answer(agent, group, leader, released)
    finally:
        agent.releasing -= 1
        group.releasing -= len(released)


async def _record_and_answer(agent: Agent, group: GroupState, leader: LeaderState, released: list[Released]) -> None:
    committed = leader.committed or 0
    if released:
        events = [client_event(group.group, index, mac, request, result) for index, mac, request, _, result in released]
        settled = {group.group: committed} if leader.resolved else {}
        try:
            # As with the append, a cancelled write is an unknown one; the retry profile bounds it to 30 s.
            with trio.CancelScope(shield=True):
                await record_events(agent, group.realm, events, settled)
        except RealmError as error:
            agent.metrics.count("agent.outbox.given_up")
            if group.leader is leader:
                leader.block_appends()
                await agent.step_down(group, force=True, why=f"outbox not written: {error}")
            for _, _, request, _, _ in released:
                request.refuse(Refusal.NOT_LEADER, consumed=True)
            # `recorded` stays: the intents of this batch become `unknown` under the next leadership
            return
        if settled:
            leader.settled = max(leader.settled, committed)
    leader.recorded = max(leader.recorded, committed)
    leader.compactible.set()
    _answer(agent, group, released)


def _answer(agent: Agent, group: GroupState, released: list[Released]) -> None:
    counts: Counter[tuple[str, ResultKind]] = Counter()
    now_ms = agent.now_ms()
    if released:
        agent.metrics.timing("agent.commit.latency", (now_ms - released[0][2].when_ms) * 1_000_000)
    for _, _, request, noise, result in released:
        if result.kind in _RESERVING:
            agent.limiters.of(request.tenant).reserve(request.record_id, now_ms)
        counts[request.tenant, result.kind] += 1
        request.fill(AppOk(encode_noise_response(noise)))
    realm = group.realm.hex()
    for (tenant, kind), count in counts.items():
        agent.metrics.count("realm.request.count", count, realm=realm, tenant=tenant, type=kind.value.lower())
