"""Ownership transfer: the rules of the agent's side of the five steps and of the manager's questions (agent.md 14).

Every call is idempotent. When an entry of a transfer counts as done is the leadership's rule (`leadership.waits`).
"""

from __future__ import annotations

from typing import Final

from juicebox_hsm.consensus.types import LogEntry, Partition, TransferringOut
from juicebox_hsm.host.retry import STORE_RETRY
from juicebox_hsm.hsm.messages import Outcome
from juicebox_hsm.ids import GroupId, OwnedRange, RecordId, next_record_id
from juicebox_hsm.merkle.walk import Side
from juicebox_hsm.wire.rpc import Range, Refusal

STALE_PAUSE_S: Final = 0.001
QUICK_ATTEMPTS_MAX: Final = 5
"""So many attempts follow each other at once: a proof is stale because an entry was just written, and most often
the next one is not."""

REFUSALS: Final = {
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
    Outcome.RETIRED: Refusal.RETIRED,
    Outcome.STILL_OWNER: Refusal.STILL_OWNER,
}


def owned_range(asked: Range) -> OwnedRange | None:
    """Return a range from the wire if it is one."""
    owned = OwnedRange(RecordId(asked.start), RecordId(asked.end))
    return owned if owned.is_valid else None


def stale_pause_s(attempt: int) -> float:
    """Return the pause after attempt number `attempt` (from 1) that met a stale proof or a missing node."""
    if attempt < QUICK_ATTEMPTS_MAX:
        return STALE_PAUSE_S
    return STORE_RETRY.delay_s(attempt - QUICK_ATTEMPTS_MAX + 1)


def joining_edges(own: Partition | None, incoming: Partition) -> tuple[Side, Side] | None:
    """Return the edges (of our tree, of the incoming one) that prove a join; None when the ranges do not meet."""
    if own is None or own.range.join(incoming.range) is None:
        return None
    below = next_record_id(own.range.end) == incoming.range.start
    return (Side.RIGHT, Side.LEFT) if below else (Side.LEFT, Side.RIGHT)


def split_point(last: LogEntry, wanted: OwnedRange) -> RecordId | Refusal | None:
    """Return the record at which the owned range splits to give `wanted` away.

    None when no proof is needed: all of it goes, or a transfer is under way already (a repeated call).
    """
    if last.transferring is not None:
        return None
    if last.partition is None:
        return Refusal.NOT_OWNER
    if last.partition.range == wanted:
        return None
    split = last.partition.range.split_at(wanted)
    return Refusal.UNACCEPTABLE_RANGE if split is None else split


def is_leaving_at(last: LogEntry | None, at: int) -> bool:
    """Tell whether the transfer that left at index `at` is the one in flight.

    An order that was under way for long must not complete a later transfer of the same range. The last acknowledged
    entry is new enough to tell: a later transfer begins after entries without this marker were committed.
    """
    marker = None if last is None else last.transferring
    return isinstance(marker, TransferringOut) and marker.at == at


def judge_owns(tail: LogEntry, asked: OwnedRange | None) -> Refusal | None:
    """Tell whether the group owns a range for certain, by a committed tail; None if so."""
    if tail.transferring is not None:
        return Refusal.TRANSFER_IN_PROGRESS
    if asked is None or tail.partition is None or not tail.partition.range.contains_range(asked):
        return Refusal.NOT_OWNED
    return None


def has_arrived(tail: LogEntry, source: GroupId, at: int) -> bool:
    """Tell whether a committed entry of the destination consumed `source` at or above `at` (manager.md 6.3)."""
    return dict(tail.consumed).get(source, 0) >= at
