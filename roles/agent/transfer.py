"""Ownership transfer: the agent's side of the five steps and of the manager's two questions (agent.md 14).

Every call is idempotent and answers only after the relevant entry is committed *and* the outbox rows of all earlier
entries of this leadership are written, so that a user's events keep their order across groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from juicebox_hsm.consensus.types import LogEntry, Partition
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.group import GroupState
from juicebox_hsm.host.leadership.events import CommitWait, TransferMade, WaitTimedOut
from juicebox_hsm.host.leadership.machine import Leadership
from juicebox_hsm.host.transfer import (
    StaleAttempts,
    has_arrived,
    is_leaving_at,
    joining_edges,
    judge_owns,
    judge_tail,
    owned_range,
    refusal_of,
    split_point,
    waits_to_sign,
)
from juicebox_hsm.hsm.messages import (
    CancelPreparedTransfer,
    CompleteTransfer,
    Outcome,
    PrepareTransfer,
    PrepareTransferOk,
    Response,
    TransferEntryOk,
    TransferIn,
    TransferInOk,
    TransferOut,
    TransferOutOk,
    TransferStatement,
    TransferStatementOk,
)
from juicebox_hsm.ids import GroupId, OwnedRange, RealmId
from juicebox_hsm.merkle.kernel import EMPTY_DELTA
from juicebox_hsm.merkle.walk import Lost
from juicebox_hsm.ports.errors import MissingNode
from juicebox_hsm.wire.rpc import (
    ArrivedCall,
    Done,
    OwnsCall,
    PartitionInfo,
    Prepared,
    Range,
    Refusal,
    Refused,
    TransferComplete,
    TransferInCall,
    TransferOutCall,
    TransferPrepare,
    TransferredOut,
)
from roles.agent.oneshot import Slot

if TYPE_CHECKING:
    from roles.agent.context import Agent

COMMIT_POLL_S: Final = 0.01


async def committed(
    agent: Agent, group: GroupState, index: int, clock: int, entry: LogEntry | None = None, delta: bytes = EMPTY_DELTA
) -> Refused | None:
    """Queue `entry`, if any, and wait up to 60 s until `index` is committed and recorded; None on success.

    MUST be called without a checkpoint after the HSM's reply. CommitTimeout leaves the outcome open: the entry may
    still commit, so the caller must not cancel.
    """
    driver = agent.driver_of(group)
    if driver is None:
        return Refused(Refusal.NOT_LEADER)
    slot: Slot[Done | Refused] = Slot()
    wait = CommitWait(index, clock, lambda refusal: slot.fill(Done() if refusal is None else Refused(refusal)))
    driver.step(TransferMade(wait, entry, delta))
    with trio.move_on_after(agent.timings.commit_wait_s):
        await slot.wait()
    driver.step(WaitTimedOut(wait))
    done = await slot.wait()
    return done if isinstance(done, Refused) else None


async def _last_entry(agent: Agent, group: GroupState, leader: Leadership) -> LogEntry | None:
    """Return the last acknowledged entry. Raises `RealmError` when the log must be read and cannot."""
    return leader.last_appended or await agent.store.log.read_last(group.realm, group.group)


# --- destination ----------------------------------------------------------------------------------------


async def handle_prepare(agent: Agent, body: TransferPrepare) -> Prepared | Refused:
    """Reserve a range at the destination."""
    found = agent.groups.leading(body.realm, body.destination)
    if isinstance(found, Refusal):
        return Refused(found)
    group, _ = found
    wanted = owned_range(body.range)
    if wanted is None:
        return Refused(Refusal.UNACCEPTABLE_RANGE)
    reply = await agent.hsm.send(PrepareTransfer(group.realm, GroupId(body.source), group.group, wanted))
    if not isinstance(reply, PrepareTransferOk):
        return Refused(refusal_of(reply))
    refused = await committed(agent, group, reply.wait_til_committed, reply.clock, reply.entry)
    return refused or Prepared(reply.nonce, reply.statement)


async def handle_cancel_prepare(agent: Agent, body: TransferPrepare) -> Done | Refused:
    """Withdraw a preparation."""
    wanted = owned_range(body.range)
    if wanted is None:
        return Refused(Refusal.NOT_PREPARED)
    request = CancelPreparedTransfer(RealmId(body.realm), GroupId(body.source), GroupId(body.destination), wanted)
    return await _plain_entry(agent, body.realm, body.destination, request)


async def handle_transfer_in(agent: Agent, body: TransferInCall) -> Done | Refused:
    """Take a range in."""
    found = agent.groups.leading(body.realm, body.destination)
    if isinstance(found, Refusal):
        return Refused(found)
    group, leader = found
    incoming_range = owned_range(body.transferring.range)
    if incoming_range is None:
        return Refused(Refusal.NOT_PREPARED)
    incoming = Partition(incoming_range, body.transferring.root_hash)
    attempts = StaleAttempts(trio.current_time())
    while True:
        reply: Response | Refused
        try:
            reply = await _try_in(agent, group, leader, body, incoming)
        except MissingNode:
            reply = Outcome.STALE_PROOF
        except RealmError:
            reply = Refused(Refusal.NO_STORE)
        if isinstance(reply, Refused):
            return reply
        if isinstance(reply, TransferInOk):
            return await committed(agent, group, reply.entry.index, reply.clock, reply.entry, reply.delta) or Done()
        if reply is not Outcome.STALE_PROOF:
            return Refused(refusal_of(reply))
        pause_s = attempts.failed(trio.current_time(), leads=group.leader is leader)
        if isinstance(pause_s, Refusal):
            return Refused(pause_s)
        await trio.sleep(pause_s)


async def _try_in(
    agent: Agent, group: GroupState, leader: Leadership, body: TransferInCall, incoming: Partition
) -> Response | Refused:
    """Build the edge proofs against the last acknowledged entry, if ranges meet, and ask the HSM."""
    last = await _last_entry(agent, group, leader)
    if last is None:
        return Refused(Refusal.INVALID_GROUP)
    proofs: tuple[bytes, bytes] | None = None
    edges = joining_edges(last.partition, incoming)
    if last.partition is not None and edges is not None:
        proofs = (
            await agent.store.nodes.read_edge_proof(group.realm, last.partition, edges[0]),
            await agent.store.nodes.read_edge_proof(group.realm, incoming, edges[1]),
        )
    return await agent.hsm.send(
        TransferIn(
            group.realm,
            GroupId(body.source),
            group.group,
            incoming,
            body.at,
            proofs,
            body.nonce,
            body.statement,
        )
    )


# --- source ---------------------------------------------------------------------------------------------


async def handle_transfer_out(agent: Agent, body: TransferOutCall) -> TransferredOut | Refused:
    """Give a range away; answers with the signed transfer."""
    found = agent.groups.leading(body.realm, body.source)
    if isinstance(found, Refusal):
        return Refused(found)
    group, leader = found
    wanted = owned_range(body.range)
    if wanted is None:
        return Refused(Refusal.UNACCEPTABLE_RANGE)
    attempts = StaleAttempts(trio.current_time())
    while True:
        try:
            reply = await _try_out(agent, group, leader, body, wanted)
        except RealmError:
            return Refused(Refusal.NO_STORE)
        if isinstance(reply, Refused):
            return reply
        if isinstance(reply, TransferOutOk):
            break
        if reply is not Outcome.STALE_PROOF:
            return Refused(refusal_of(reply))
        pause_s = attempts.failed(trio.current_time(), leads=group.leader is leader)
        if isinstance(pause_s, Refusal):
            return Refused(pause_s)
        await trio.sleep(pause_s)
    refused = await committed(agent, group, reply.wait_til_committed, reply.clock, reply.entry, reply.delta)
    return refused or await _statement(agent, group, leader, body, reply.partition)


async def _try_out(
    agent: Agent, group: GroupState, leader: Leadership, body: TransferOutCall, wanted: OwnedRange
) -> Response | Refused:
    """Read the proof at the split point, unless none is needed, and ask the HSM."""
    last = await _last_entry(agent, group, leader)
    if last is None:
        return Refused(Refusal.INVALID_GROUP)
    proof: bytes | None = None
    split = split_point(last, wanted)
    if isinstance(split, Refusal):
        return Refused(split)
    if split is not None and last.partition is not None:
        (found,) = await agent.store.nodes.read_proofs(group.realm, last.partition, [split])
        if isinstance(found, Lost):
            return Outcome.STALE_PROOF
        proof = found
    return await agent.hsm.send(
        TransferOut(group.realm, group.group, GroupId(body.destination), wanted, body.nonce, body.statement, proof)
    )


async def _statement(
    agent: Agent, group: GroupState, leader: Leadership, body: TransferOutCall, partition: Partition
) -> TransferredOut | Refused:
    """Get the transfer signed; the HSM is Busy until its own commit of this leadership covers the marker."""
    deadline = trio.current_time() + agent.timings.commit_wait_s
    request = TransferStatement(group.realm, group.group, GroupId(body.destination), body.nonce)
    while True:
        reply = await agent.hsm.send(request)
        if isinstance(reply, TransferStatementOk):
            moved = PartitionInfo(Range(partition.range.start, partition.range.end), partition.root_hash)
            return TransferredOut(moved, reply.at, reply.statement)
        if reply is not Outcome.BUSY:
            return Refused(refusal_of(reply))
        given_up = waits_to_sign(leads=group.leader is leader, in_time=trio.current_time() < deadline)
        if given_up is not None:
            return Refused(given_up)
        await trio.sleep(COMMIT_POLL_S)


async def handle_complete(agent: Agent, body: TransferComplete) -> Done | Refused:
    """Forget a transfer that has arrived, and only the one that left at `at`."""
    found = agent.groups.leading(body.realm, body.source)
    if isinstance(found, Refusal):
        return Refused(found)
    group, leader = found
    wanted = owned_range(body.range)
    if wanted is None:
        return Refused(Refusal.NOT_TRANSFERRING)
    try:
        last = await _last_entry(agent, group, leader)
    except RealmError:
        return Refused(Refusal.NO_STORE)
    if not is_leaving_at(leader.last_appended or last, body.at):
        return Refused(Refusal.NOT_TRANSFERRING)
    request = CompleteTransfer(RealmId(body.realm), GroupId(body.source), GroupId(body.destination), wanted)
    return await _plain_entry(agent, body.realm, body.source, request)


async def _plain_entry(
    agent: Agent, realm: bytes, asked: bytes, request: CancelPreparedTransfer | CompleteTransfer
) -> Done | Refused:
    """Run a request whose success is one entry without a tree change, and wait for its commit."""
    found = agent.groups.leading(realm, asked)
    if isinstance(found, Refusal):
        return Refused(found)
    group, _ = found
    reply = await agent.hsm.send(request)
    if not isinstance(reply, TransferEntryOk):
        return Refused(refusal_of(reply))
    return await committed(agent, group, reply.entry.index, reply.clock, reply.entry) or Done()


# --- the manager's questions ----------------------------------------------------------------------------


async def _fresh_tail(agent: Agent, group: GroupState, leader: Leadership) -> LogEntry | Refused:
    """Read the log's tail now; it must be this leader's and committed."""
    clock = group.role.at
    deadline = trio.current_time() + agent.timings.commit_wait_s
    while True:
        try:
            tail = await agent.store.log.read_last(group.realm, group.group)
        except RealmError:
            return Refused(Refusal.NO_STORE)
        in_time = trio.current_time() < deadline
        fresh = judge_tail(tail, leader, leads=group.leader is leader, in_time=in_time)
        if isinstance(fresh, Refusal):
            return Refused(fresh)
        if fresh is not None:
            return await committed(agent, group, fresh.index, clock) or fresh
        await trio.sleep(COMMIT_POLL_S)


async def handle_owns(agent: Agent, body: OwnsCall) -> Done | Refused:
    """Tell whether the group owns a range for certain (agent.md 14)."""
    found = agent.groups.leading(body.realm, body.group)
    if isinstance(found, Refusal):
        return Refused(found)
    asked = owned_range(body.range)
    tail = await _fresh_tail(agent, *found)
    if isinstance(tail, Refused):
        return Refused(Refusal.TIMEOUT) if tail.outcome is Refusal.COMMIT_TIMEOUT else tail
    refusal = judge_owns(tail, asked)
    if refusal is None:
        return Done()
    have = None if tail.partition is None or refusal is not Refusal.NOT_OWNED else tail.partition.range
    return Refused(refusal, detail="" if have is None else f"{have.start.hex()}-{have.end.hex()}")


async def handle_arrived(agent: Agent, body: ArrivedCall) -> Done | Refused:
    """Tell whether a committed entry of the destination consumed `source` at or above `at` (manager.md 6.3)."""
    found = agent.groups.leading(body.realm, body.destination)
    if isinstance(found, Refusal):
        return Refused(found)
    tail = await _fresh_tail(agent, *found)
    if isinstance(tail, Refused):
        return Refused(Refusal.TIMEOUT) if tail.outcome is Refusal.COMMIT_TIMEOUT else tail
    return Done() if has_arrived(tail, GroupId(body.source), body.at) else Refused(Refusal.NOT_ARRIVED)
