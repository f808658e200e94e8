"""Ownership transfer: the agent's side of the five steps and of the manager's two questions (agent.md 14).

Every call is idempotent and answers only after the relevant entry is committed *and* the outbox rows of all earlier
entries of this leadership are written, so that a user's events keep their order across groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from juicebox_hsm.consensus.types import Leader, LogEntry, Partition, RoleStatus, SteppingDown, TransferringOut
from juicebox_hsm.errors import RealmError, check
from juicebox_hsm.host.retry import STORE_RETRY
from juicebox_hsm.host.tree import TreeSide
from juicebox_hsm.hsm.messages import (
    CancelPreparedTransfer,
    CompleteTransfer,
    NotLeader,
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
from juicebox_hsm.ids import GroupId, OwnedRange, RealmId, RecordId, next_record_id
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
from roles.agent.append import EMPTY_DELTA
from roles.agent.state import GroupState, LeaderState, Queued

if TYPE_CHECKING:
    from roles.agent.context import Agent

COMMIT_POLL_S: Final = 0.01
STALE_PAUSE_S: Final = 0.001

_REFUSALS: Final = {
    Outcome.INVALID_REALM: Refusal.INVALID_REALM,
    Outcome.INVALID_GROUP: Refusal.INVALID_GROUP,
    Outcome.UNACCEPTABLE_RANGE: Refusal.UNACCEPTABLE_RANGE,
    Outcome.OTHER_TRANSFER_PENDING: Refusal.OTHER_TRANSFER_PENDING,
    Outcome.NOT_PREPARED: Refusal.NOT_PREPARED,
    Outcome.NOT_OWNER: Refusal.NOT_OWNER,
    Outcome.NOT_TRANSFERRING: Refusal.NOT_TRANSFERRING,
    Outcome.INVALID_NONCE: Refusal.INVALID_NONCE,
    Outcome.INVALID_STATEMENT: Refusal.INVALID_STATEMENT,
    Outcome.INVALID_PROOF: Refusal.INVALID_PROOF,
    Outcome.MISSING_PROOF: Refusal.INVALID_PROOF,
    Outcome.MISSING_PROOFS: Refusal.INVALID_PROOF,
    Outcome.BUSY: Refusal.BUSY,
}


def _refused(reply: Response) -> Refused:
    if isinstance(reply, NotLeader):
        return Refused(Refusal.NOT_LEADER)
    refusal = _REFUSALS.get(reply) if isinstance(reply, Outcome) else None
    check(refusal is not None, "transfer requests are refused as specified")
    return Refused(refusal if refusal is not None else Refusal.NO_HSM)


def _leading(agent: Agent, realm: bytes, group: bytes) -> tuple[GroupState, LeaderState] | Refused:
    """Return the group and its leadership if requests may be made of it."""
    found = agent.groups.find(realm, group)
    if isinstance(found, Refusal):
        return Refused(found)
    if found.leader is None or not found.is_leader:
        return Refused(Refusal.NOT_LEADER)
    return found, found.leader


def _owned(asked: Range) -> OwnedRange | None:
    """Return a range from the wire if it is one."""
    owned = OwnedRange(RecordId(asked.start), RecordId(asked.end))
    return owned if owned.is_valid else None


def _queue(group: GroupState, entry: LogEntry, delta: bytes) -> bool:
    """Queue an entry the HSM just made; False if no leadership can take it."""
    current = group.leader
    if current is None or current.append_blocked or not current.is_new(entry.index):
        return False
    current.enqueue(Queued(entry, delta, None))
    current.work.set()
    return True


def still_ours(role: RoleStatus, clock: int) -> bool:
    """Tell whether commits seen now speak of an entry made at role clock `clock` (hsm.md 6.3)."""
    if role.at == clock:
        return isinstance(role.role, Leader)
    return role.at == clock + 1 and isinstance(role.role, SteppingDown)


async def wait_for_commit(
    agent: Agent, group: GroupState, leader: LeaderState, index: int, clock: int
) -> Refused | None:
    """Wait up to 60 s until `index` is committed and recorded; None on success.

    CommitTimeout leaves the outcome open: the entry may still commit, so the caller must not cancel.
    """
    deadline = trio.current_time() + agent.timings.commit_wait_s
    while True:
        if leader.committed is not None and min(leader.committed, leader.recorded) >= index:
            return None
        if group.leader is not leader or not still_ours(group.role, clock):
            return Refused(Refusal.NOT_LEADER)
        if trio.current_time() >= deadline:
            return Refused(Refusal.COMMIT_TIMEOUT)
        await trio.sleep(COMMIT_POLL_S)


# --- destination ----------------------------------------------------------------------------------------


async def handle_prepare(agent: Agent, body: TransferPrepare) -> Prepared | Refused:
    """Reserve a range at the destination."""
    found = _leading(agent, body.realm, body.destination)
    if isinstance(found, Refused):
        return found
    group, leader = found
    wanted = _owned(body.range)
    if wanted is None:
        return Refused(Refusal.UNACCEPTABLE_RANGE)
    reply = await agent.hsm.send(PrepareTransfer(group.realm, GroupId(body.source), group.group, wanted))
    if not isinstance(reply, PrepareTransferOk):
        return _refused(reply)
    if reply.entry is not None and not _queue(group, reply.entry, EMPTY_DELTA):
        return Refused(Refusal.NOT_LEADER)
    refused = await wait_for_commit(agent, group, leader, reply.wait_til_committed, reply.clock)
    return refused or Prepared(reply.nonce, reply.statement)


async def handle_cancel_prepare(agent: Agent, body: TransferPrepare) -> Done | Refused:
    """Withdraw a preparation."""
    wanted = _owned(body.range)
    if wanted is None:
        return Refused(Refusal.NOT_PREPARED)
    request = CancelPreparedTransfer(RealmId(body.realm), GroupId(body.source), GroupId(body.destination), wanted)
    return await _plain_entry(agent, body.realm, body.destination, request)


async def handle_transfer_in(agent: Agent, body: TransferInCall) -> Done | Refused:
    """Take a range in."""
    found = _leading(agent, body.realm, body.destination)
    if isinstance(found, Refused):
        return found
    group, leader = found
    incoming_range = _owned(body.transferring.range)
    if incoming_range is None:
        return Refused(Refusal.NOT_PREPARED)
    incoming = Partition(incoming_range, body.transferring.root_hash)
    attempt = 0
    began = trio.current_time()
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
            if not _queue(group, reply.entry, reply.delta):
                return Refused(Refusal.NOT_LEADER)
            refused = await wait_for_commit(agent, group, leader, reply.entry.index, reply.clock)
            return refused or Done()
        if reply is not Outcome.STALE_PROOF:
            return _refused(reply)
        attempt += 1
        if STORE_RETRY.exhausted(attempt, trio.current_time() - began):
            return Refused(Refusal.NO_STORE)
        if group.leader is not leader:
            return Refused(Refusal.NOT_LEADER)
        await trio.sleep(STALE_PAUSE_S if attempt < 5 else STORE_RETRY.delay_s(attempt - 4))


async def _try_in(
    agent: Agent, group: GroupState, leader: LeaderState, body: TransferInCall, incoming: Partition
) -> Response | Refused:
    """Build the edge proofs against the last acknowledged entry, if ranges meet, and ask the HSM."""
    last = leader.last_appended or await agent.store.log.read_last(group.realm, group.group)
    if last is None:
        return Refused(Refusal.INVALID_GROUP)
    proofs: tuple[bytes, bytes] | None = None
    if last.partition is not None and last.partition.range.join(incoming.range) is not None:
        below = next_record_id(last.partition.range.end) == incoming.range.start
        own_side, their_side = (TreeSide.RIGHT, TreeSide.LEFT) if below else (TreeSide.LEFT, TreeSide.RIGHT)
        proofs = (
            await agent.store.nodes.read_edge_proof(group.realm, last.partition, own_side),
            await agent.store.nodes.read_edge_proof(group.realm, incoming, their_side),
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
    found = _leading(agent, body.realm, body.source)
    if isinstance(found, Refused):
        return found
    group, leader = found
    wanted = _owned(body.range)
    if wanted is None:
        return Refused(Refusal.UNACCEPTABLE_RANGE)
    attempt = 0
    began = trio.current_time()
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
            return _refused(reply)
        attempt += 1
        if STORE_RETRY.exhausted(attempt, trio.current_time() - began):
            return Refused(Refusal.NO_STORE)
        if group.leader is not leader:
            return Refused(Refusal.NOT_LEADER)
        await trio.sleep(STALE_PAUSE_S if attempt < 5 else STORE_RETRY.delay_s(attempt - 4))
    if reply.entry is not None and not _queue(group, reply.entry, reply.delta):
        return Refused(Refusal.NOT_LEADER)
    refused = await wait_for_commit(agent, group, leader, reply.wait_til_committed, reply.clock)
    return refused or await _statement(agent, group, leader, body, reply.partition)


async def _try_out(
    agent: Agent, group: GroupState, leader: LeaderState, body: TransferOutCall, wanted: OwnedRange
) -> Response | Refused:
    """Read the proof at the split point, unless none is needed, and ask the HSM."""
    last = leader.last_appended or await agent.store.log.read_last(group.realm, group.group)
    if last is None:
        return Refused(Refusal.INVALID_GROUP)
    proof: bytes | None = None
    if last.transferring is None:
        if last.partition is None:
            return Refused(Refusal.NOT_OWNER)
        if last.partition.range != wanted:
            split = last.partition.range.split_at(wanted)
            if split is None:
                return Refused(Refusal.UNACCEPTABLE_RANGE)
            proof = (await agent.store.nodes.read_proofs(group.realm, last.partition, [split]))[0]
            if proof is None:
                return Outcome.STALE_PROOF
    return await agent.hsm.send(
        TransferOut(group.realm, group.group, GroupId(body.destination), wanted, body.nonce, body.statement, proof)
    )


async def _statement(
    agent: Agent, group: GroupState, leader: LeaderState, body: TransferOutCall, partition: Partition
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
            return _refused(reply)
        if group.leader is not leader:
            return Refused(Refusal.NOT_LEADER)
        if trio.current_time() >= deadline:
            return Refused(Refusal.COMMIT_TIMEOUT)
        await trio.sleep(COMMIT_POLL_S)


async def handle_complete(agent: Agent, body: TransferComplete) -> Done | Refused:
    """Forget a transfer that has arrived, and only the one that left at `at`.

    An order that was under way for long must not complete a later transfer of the same range, which may still be in
    flight. The last acknowledged entry is new enough to tell: a later transfer begins after entries without this marker
    were committed.
    """
    found = _leading(agent, body.realm, body.source)
    if isinstance(found, Refused):
        return found
    group, leader = found
    wanted = _owned(body.range)
    if wanted is None:
        return Refused(Refusal.NOT_TRANSFERRING)
    try:
        last = leader.last_appended or await agent.store.log.read_last(group.realm, group.group)
    except RealmError:
        return Refused(Refusal.NO_STORE)
    marker = None if last is None else (leader.last_appended or last).transferring
    if not isinstance(marker, TransferringOut) or marker.at != body.at:
        return Refused(Refusal.NOT_TRANSFERRING)
    request = CompleteTransfer(RealmId(body.realm), GroupId(body.source), GroupId(body.destination), wanted)
    return await _plain_entry(agent, body.realm, body.source, request)


async def _plain_entry(
    agent: Agent, realm: bytes, asked: bytes, request: CancelPreparedTransfer | CompleteTransfer
) -> Done | Refused:
    """Run a request whose success is one entry without a tree change, and wait for its commit."""
    found = _leading(agent, realm, asked)
    if isinstance(found, Refused):
        return found
    group, leader = found
    reply = await agent.hsm.send(request)
    if not isinstance(reply, TransferEntryOk):
        return _refused(reply)
    if not _queue(group, reply.entry, EMPTY_DELTA):
        return Refused(Refusal.NOT_LEADER)
    return await wait_for_commit(agent, group, leader, reply.entry.index, reply.clock) or Done()


# --- the manager's questions ----------------------------------------------------------------------------


async def _fresh_tail(agent: Agent, group: GroupState, leader: LeaderState) -> LogEntry | Refused:
    """Read the log's tail now; it must be this leader's and committed (a deposed leader cannot pass)."""
    clock = group.role.at
    deadline = trio.current_time() + agent.timings.commit_wait_s
    while True:
        try:
            tail = await agent.store.log.read_last(group.realm, group.group)
        except RealmError:
            return Refused(Refusal.NO_STORE)
        if tail is None or group.leader is not leader:
            return Refused(Refusal.NOT_LEADER)
        last = leader.last_appended
        if last is not None and (last.index, last.entry_mac) == (tail.index, tail.entry_mac):
            refused = await wait_for_commit(agent, group, leader, tail.index, clock)
            return tail if refused is None else refused
        if leader.own_macs.get(tail.index) != tail.entry_mac or trio.current_time() >= deadline:
            return Refused(Refusal.NOT_LEADER)
        # our own append landed and its acknowledgement is on the way
        await trio.sleep(COMMIT_POLL_S)


async def handle_owns(agent: Agent, body: OwnsCall) -> Done | Refused:
    """Tell whether the group owns a range for certain (agent.md 14)."""
    found = _leading(agent, body.realm, body.group)
    if isinstance(found, Refused):
        return found
    asked = _owned(body.range)
    tail = await _fresh_tail(agent, *found)
    if isinstance(tail, Refused):
        return Refused(Refusal.TIMEOUT) if tail.outcome is Refusal.COMMIT_TIMEOUT else tail
    if tail.transferring is not None:
        return Refused(Refusal.TRANSFER_IN_PROGRESS)
    if asked is None or tail.partition is None or not tail.partition.range.contains_range(asked):
        have = "" if tail.partition is None else f"{tail.partition.range.start.hex()}-{tail.partition.range.end.hex()}"
        return Refused(Refusal.NOT_OWNED, detail=have)
    return Done()


async def handle_arrived(agent: Agent, body: ArrivedCall) -> Done | Refused:
    """Tell whether a committed entry of the destination consumed `source` at or above `at` (manager.md 6.3)."""
    found = _leading(agent, body.realm, body.destination)
    if isinstance(found, Refused):
        return found
    tail = await _fresh_tail(agent, *found)
    if isinstance(tail, Refused):
        return Refused(Refusal.TIMEOUT) if tail.outcome is Refusal.COMMIT_TIMEOUT else tail
    consumed = dict(tail.consumed)
    if consumed.get(GroupId(body.source), 0) >= body.at:
        return Done()
    return Refused(Refusal.NOT_ARRIVED)
