"""Ownership transfer: the rules of the agent's side of the five steps and of the manager's questions (agent.md 14).

Every call is idempotent. When an entry of a transfer counts as done is the leadership's rule (`leadership.waits`).
"""

from __future__ import annotations

from typing import Final

from juicebox_hsm.consensus.types import LogEntry, Partition, TransferringOut
from juicebox_hsm.errors import check
from juicebox_hsm.host.leadership.machine import Leadership
from juicebox_hsm.host.retry import STORE_RETRY
from juicebox_hsm.hsm.messages import NotLeader, Outcome, Response
from juicebox_hsm.ids import GroupId, OwnedRange, RecordId, next_record_id
from juicebox_hsm.merkle.walk import Side
from juicebox_hsm.wire.rpc import Range, Refusal

STALE_PAUSE_S: Final = 0.001
QUICK_ATTEMPTS_MAX: Final = 5
"""So many attempts follow each other at once: a proof is stale because an entry was just written, and most often
the next one is not."""

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
    Outcome.RETIRED: Refusal.RETIRED,
    Outcome.STILL_OWNER: Refusal.STILL_OWNER,
}


def owned_range(asked: Range) -> OwnedRange | None:
    """Return a range from the wire if it is one."""
    owned = OwnedRange(RecordId(asked.start), RecordId(asked.end))
    return owned if owned.is_valid else None


def refusal_of(reply: Response) -> Refusal:
    """Return what callers are told of the HSM's refusal."""
    if isinstance(reply, NotLeader):
        return Refusal.NOT_LEADER
    refusal = _REFUSALS.get(reply) if isinstance(reply, Outcome) else None
    check(refusal is not None, "transfer requests are refused as specified")
    return refusal or Refusal.NO_HSM


class StaleAttempts:
    """The attempts of one request that met stale proofs or missing nodes, bounded like those of the store.

    Moments are in s on a monotonic clock.
    """

    def __init__(self, began_s: float) -> None:
        self._made = 0
        self._began_s = began_s

    def failed(self, now_s: float, *, leads: bool) -> float | Refusal:
        """Return the pause (s) before the next attempt, or why there is none. `leads`: in the same leadership."""
        self._made += 1
        if STORE_RETRY.exhausted(self._made, now_s - self._began_s):
            return Refusal.NO_STORE
        if not leads:
            return Refusal.NOT_LEADER
        if self._made < QUICK_ATTEMPTS_MAX:
            return STALE_PAUSE_S
        return STORE_RETRY.delay_s(self._made - QUICK_ATTEMPTS_MAX + 1)


def waits_to_sign(*, leads: bool, in_time: bool) -> Refusal | None:
    """Tell whether to ask again for a transfer's statement that the HSM is too busy to sign; None to ask."""
    if not leads:
        return Refusal.NOT_LEADER
    return None if in_time else Refusal.COMMIT_TIMEOUT


def judge_tail(tail: LogEntry | None, leader: Leadership, *, leads: bool, in_time: bool) -> LogEntry | Refusal | None:
    """Return the log's tail if `leader`, in office (`leads`), knows it as its last entry; None to read it again.

    A deposed leader cannot pass. An entry that `leader` made may be in the log before its acknowledgement has come.
    """
    if tail is None or not leads:
        return Refusal.NOT_LEADER
    last = leader.last_appended
    if last is not None and (last.index, last.entry_mac) == (tail.index, tail.entry_mac):
        return tail
    return None if in_time and leader.made(tail) else Refusal.NOT_LEADER


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
