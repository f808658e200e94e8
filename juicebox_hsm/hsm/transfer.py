"""Moving a range of records between two groups of a realm (hsm.md 12, in the form of H2).

The destination prepares, the source gives away and signs once that is committed, the destination takes in, the
source forgets. One marker per log travels in every later entry, so it survives leader changes. The destination
remembers for each source the highest index whose transfer it consumed (H2): a nonce only proves that a signature is
fresh, not that the transfer was not used already.
"""

from __future__ import annotations

from typing import Final

from juicebox_hsm.consensus.macs import same
from juicebox_hsm.consensus.types import (
    CONSUMED_SOURCES_MAX,
    LogEntry,
    Partition,
    Transferring,
    TransferringIn,
    TransferringOut,
)
from juicebox_hsm.hsm.app import proof_key
from juicebox_hsm.hsm.messages import (
    CancelPreparedTransfer,
    CompleteTransfer,
    NotLeader,
    Outcome,
    PrepareTransfer,
    PrepareTransferOk,
    TransferEntryOk,
    TransferIn,
    TransferInOk,
    TransferOut,
    TransferOutOk,
    TransferStatement,
    TransferStatementOk,
)
from juicebox_hsm.hsm.state import GroupState, HsmState, LeaderState
from juicebox_hsm.ids import ID_BYTES, LOG_INDEX_MAX, GroupId
from juicebox_hsm.merkle.kernel import EMPTY_DELTA, BadEncoding, InvalidProof, NotAdjacent, StaleProof, Tree

NONCE_BYTES: Final = 16

Consumed = tuple[tuple[GroupId, int], ...]


def _append(
    state: HsmState,
    group: GroupState,
    leader: LeaderState,
    partition: Partition | None,
    transferring: Transferring | None,
    consumed: Consumed,
) -> LogEntry:
    entry = state.new_entry(group.id, leader.log.last, partition, transferring, consumed)
    leader.log.append(entry)
    return entry


def _append_marker(
    state: HsmState, group: GroupState, leader: LeaderState, transferring: Transferring | None
) -> LogEntry:
    """Append an entry that differs from the last one by its marker only."""
    last = leader.log.last
    return _append(state, group, leader, last.partition, transferring, last.consumed)


def prepare_transfer(state: HsmState, request: PrepareTransfer) -> PrepareTransferOk | Outcome | NotLeader:
    """Reserve a range at the destination; every call replaces the nonce that a transfer must carry."""
    if request.source == request.destination or len(request.source) != ID_BYTES:
        return Outcome.INVALID_GROUP
    if not request.range.is_valid:
        return Outcome.UNACCEPTABLE_RANGE
    found = state.leading(request.realm, request.destination)
    if not isinstance(found, tuple):
        return found
    group, leader = found
    last = leader.log.last
    if last.retired:
        return Outcome.RETIRED
    marker = last.transferring
    entry = None
    if marker is None:
        if last.partition is not None and last.partition.range.join(request.range) is None:
            return Outcome.UNACCEPTABLE_RANGE
        sources = [source for source, _ in last.consumed]
        if request.source not in sources and len(sources) >= CONSUMED_SOURCES_MAX:
            return Outcome.UNACCEPTABLE_RANGE
        at = last.index + 1
        entry = _append_marker(state, group, leader, TransferringIn(request.source, request.range, at))
    elif _is_incoming(marker, request.source, request):
        at = marker.at
    else:
        return Outcome.OTHER_TRANSFER_PENDING
    nonce = state.platform.random(NONCE_BYTES)
    leader.incoming = nonce
    statement = state.macs.prepared_transfer(request.realm, request.source, request.destination, request.range, nonce)
    return PrepareTransferOk(nonce, entry, at, group.clock, statement)


def _is_incoming(
    marker: Transferring | None, source: GroupId, request: PrepareTransfer | CancelPreparedTransfer
) -> bool:
    return isinstance(marker, TransferringIn) and marker.source == source and marker.range == request.range


def cancel_prepared_transfer(state: HsmState, request: CancelPreparedTransfer) -> TransferEntryOk | Outcome | NotLeader:
    """Withdraw a preparation; `consumed` stays, so the same transfer can be prepared again."""
    if request.source == request.destination:
        return Outcome.INVALID_GROUP
    found = state.leading(request.realm, request.destination)
    if not isinstance(found, tuple):
        return found
    group, leader = found
    if not _is_incoming(leader.log.last.transferring, request.source, request):
        return Outcome.NOT_PREPARED
    entry = _append_marker(state, group, leader, None)
    leader.incoming = None
    return TransferEntryOk(entry, group.clock)


def transfer_out(state: HsmState, request: TransferOut) -> TransferOutOk | Outcome | NotLeader:
    """Take a range out of service at the source, towards a group that proved to be ready for it."""
    if request.source == request.destination:
        return Outcome.INVALID_GROUP
    if not request.range.is_valid:
        return Outcome.NOT_OWNER
    found = state.leading(request.realm, request.source)
    if not isinstance(found, tuple):
        return found
    group, leader = found
    prepared = state.macs.prepared_transfer(
        request.realm, request.source, request.destination, request.range, request.nonce
    )
    if not same(prepared, request.statement):
        return Outcome.INVALID_STATEMENT
    last = leader.log.last
    marker = last.transferring
    if isinstance(marker, TransferringOut):
        if (marker.destination, marker.partition.range) != (request.destination, request.range):
            return Outcome.OTHER_TRANSFER_PENDING
        return TransferOutOk(None, EMPTY_DELTA, marker.partition, marker.at, group.clock)
    if marker is not None:
        return Outcome.OTHER_TRANSFER_PENDING
    if last.partition is None or leader.tree is None:
        return Outcome.NOT_OWNER
    kept: Partition | None = None
    moved, delta = last.partition, EMPTY_DELTA
    if last.partition.range != request.range:
        parted = _split(leader.tree, last.partition, request)
        if isinstance(parted, Outcome):
            return parted
        kept, moved, delta = parted
    at = last.index + 1
    entry = _append(state, group, leader, kept, TransferringOut(request.destination, moved, at), last.consumed)
    leader.tree = state.new_tree(kept)
    return TransferOutOk(entry, delta, moved, at, group.clock)


def _split(tree: Tree, owned: Partition, request: TransferOut) -> tuple[Partition, Partition, bytes] | Outcome:
    """Return the kept and the moved partition and the delta; the tree itself stays as it is."""
    if request.proof is None:
        return Outcome.MISSING_PROOF
    middle = owned.range.split_at(request.range)
    if middle is None:
        return Outcome.NOT_OWNER
    if proof_key(request.proof) != middle:
        return Outcome.MISSING_PROOF
    try:
        left, right, delta = tree.split(request.proof)
    except StaleProof:
        return Outcome.STALE_PROOF
    except (InvalidProof, BadEncoding):
        return Outcome.INVALID_PROOF
    lower, upper = Partition(*left), Partition(*right)
    return (upper, lower, delta) if lower.range == request.range else (lower, upper, delta)


def transfer_statement(state: HsmState, request: TransferStatement) -> TransferStatementOk | Outcome | NotLeader:
    """Sign the transfer once the source has committed it; may be repeated with any nonce."""
    if request.source == request.destination:
        return Outcome.INVALID_GROUP
    found = state.leading(request.realm, request.source)
    if not isinstance(found, tuple):
        return found
    leader = found[1]
    marker = leader.log.last.transferring
    if not isinstance(marker, TransferringOut) or marker.destination != request.destination:
        return Outcome.NOT_TRANSFERRING
    if len(request.nonce) != NONCE_BYTES:
        return Outcome.NOT_TRANSFERRING  # no preparation can have drawn it
    if leader.committed is None or leader.committed < marker.at:
        return Outcome.BUSY
    statement = state.macs.transfer(
        request.realm, request.source, request.destination, marker.partition, marker.at, request.nonce
    )
    return TransferStatementOk(statement, marker.at)


def transfer_in(state: HsmState, request: TransferIn) -> TransferInOk | Outcome | NotLeader:
    """Take a range into service at the destination. A refusal keeps nonce and tree, so it can be retried."""
    if request.source == request.destination:
        return Outcome.INVALID_GROUP
    found = state.leading(request.realm, request.destination)
    if not isinstance(found, tuple):
        return found
    group, leader = found
    last = leader.log.last
    marker = last.transferring
    arriving = request.transferring
    if not isinstance(marker, TransferringIn) or (marker.source, marker.range) != (request.source, arriving.range):
        return Outcome.NOT_PREPARED
    if leader.incoming is None or not same(leader.incoming, request.nonce):
        return Outcome.INVALID_NONCE
    if not _is_statement(state, request):
        return Outcome.INVALID_STATEMENT
    if is_consumed(last.consumed, request.source, request.at):
        return Outcome.NOT_PREPARED
    partition, delta = arriving, EMPTY_DELTA
    if last.partition is not None and leader.tree is not None:
        if last.partition.range.join(arriving.range) is None:
            return Outcome.NOT_PREPARED
        merged = _merge(leader.tree, request)
        if isinstance(merged, Outcome):
            return merged
        partition, delta = merged
    entry = _append(state, group, leader, partition, None, _raise(last.consumed, request.source, request.at))
    leader.tree = state.new_tree(partition)
    leader.incoming = None
    return TransferInOk(entry, delta, group.clock)


def _is_statement(state: HsmState, request: TransferIn) -> bool:
    if not 0 <= request.at <= LOG_INDEX_MAX:
        return False
    expected = state.macs.transfer(
        request.realm, request.source, request.destination, request.transferring, request.at, request.nonce
    )
    return same(expected, request.statement)


def is_consumed(consumed: Consumed, source: GroupId, at: int) -> bool:
    """Tell whether a transfer from `source` at this or a later index was taken in already (H2)."""
    return at <= dict(consumed).get(source, 0)


def _raise(consumed: Consumed, source: GroupId, at: int) -> Consumed:
    return tuple(sorted({**dict(consumed), source: at}.items()))


def _merge(tree: Tree, request: TransferIn) -> tuple[Partition, bytes] | Outcome:
    """Return the joined partition and the delta; the tree itself stays as it is."""
    if request.proofs is None:
        return Outcome.MISSING_PROOFS
    own, other = request.proofs
    arriving = request.transferring
    if other[34:130] != arriving.range.start + arriving.range.end + arriving.root_hash:
        return Outcome.INVALID_PROOF
    try:
        owned, root, delta = tree.merge(own, other, arriving.root_hash, arriving.range)
    except StaleProof:
        return Outcome.STALE_PROOF
    except (InvalidProof, BadEncoding, NotAdjacent):
        return Outcome.INVALID_PROOF
    return Partition(owned, root), delta


def complete_transfer(state: HsmState, request: CompleteTransfer) -> TransferEntryOk | Outcome | NotLeader:
    """Forget the marker at the source. It does not and cannot check that the range arrived."""
    if request.source == request.destination:
        return Outcome.INVALID_GROUP
    found = state.leading(request.realm, request.source)
    if not isinstance(found, tuple):
        return found
    group, leader = found
    marker = leader.log.last.transferring
    if not isinstance(marker, TransferringOut) or (marker.destination, marker.partition.range) != (
        request.destination,
        request.range,
    ):
        return Outcome.NOT_TRANSFERRING
    return TransferEntryOk(_append_marker(state, group, leader, None), group.clock)
