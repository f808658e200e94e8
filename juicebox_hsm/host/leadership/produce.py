"""Producing: which requests are let in, which ride together, and how their entries reach the log (agent.md 5, 6).

Everything is done per batch: one read of proofs, one run of the HSM over the requests, one append with the squashed
delta and the intents. While an append is in flight the next requests gather; that, not concurrency, is where
throughput comes from. Only after the store acknowledged a batch do its entries go to HSMs, ours and the members'.
"""

from __future__ import annotations

from math import inf
from typing import Final

from juicebox_hsm.consensus.codec import encode_log_entry
from juicebox_hsm.errors import check
from juicebox_hsm.host.leadership import quorum, waits
from juicebox_hsm.host.leadership.effects import (
    Adopt,
    Append,
    AskHsm,
    Note,
    Noted,
    ReadLog,
    ReadProofs,
    ReadTail,
    Refuse,
    RetryLater,
    SetDeadline,
    ShowOwn,
    StepDown,
    StepDownCode,
    TellDamaged,
    Wake,
)
from juicebox_hsm.host.leadership.events import (
    AppendFinished,
    AppendResult,
    ClientRequest,
    HsmAnswered,
    Lane,
    OwnShown,
    ProofsFailed,
    ProofsRead,
    RequestArrived,
    RequestGone,
    RetryDue,
    SteppedDown,
    StoreFailed,
    TailFailed,
    TailRead,
    TransferMade,
)
from juicebox_hsm.host.leadership.state import (
    APPEND_BATCH_MAX,
    RECENT_ENTRIES_MAX,
    Effects,
    Producing,
    Queued,
    Retry,
    State,
    Waiting,
)
from juicebox_hsm.host.log import Intent, LogRow
from juicebox_hsm.hsm.messages import AppRequestOk, NotLeader, Outcome
from juicebox_hsm.merkle.kernel import EMPTY_DELTA, squash
from juicebox_hsm.merkle.walk import Lost
from juicebox_hsm.wire.rpc import Refusal

REFUSALS: Final = {
    Outcome.INVALID_PROOF: (Refusal.INVALID_PROOF, False),
    Outcome.INVALID_RECORD_DATA: (Refusal.INVALID_PROOF, False),
    Outcome.NOT_OWNER: (Refusal.NOT_LEADER, False),
    Outcome.INVALID_REALM: (Refusal.INVALID_REALM, False),
    Outcome.INVALID_GROUP: (Refusal.INVALID_GROUP, False),
    Outcome.MISSING_SESSION: (Refusal.MISSING_SESSION, True),
    Outcome.SESSION_ERROR: (Refusal.SESSION_ERROR, True),
    Outcome.DECODING_ERROR: (Refusal.DECODING_ERROR, True),
}
"""What the HSM's refusals of a client's message mean to the balancer, and whether the message may be used up."""

DAMAGED_AFTER_S: Final = 0.5
"""A node that is missing for this long is damaged (own): the client should hear of it in about a second."""

_GIVEN_UP: Final = {
    AppendResult.AMBIGUOUS: StepDownCode.APPEND_AMBIGUOUS,
    AppendResult.REFUSED: StepDownCode.APPEND_REFUSED,
}


# --- admission -------------------------------------------------------------------------------------------


def arrived(state: State, event: RequestArrived, now: float) -> Effects:
    """Let a request in, or say at once why not: it is not in the HSM's hands yet."""
    if not state.accepting:
        return [Refuse(event.request, Refusal.NOT_LEADER)]
    noticed = quorum.look(state, now)
    if state.stalled_since_s is not None and not quorum.may_try(state, now):
        return [*noticed, Refuse(event.request, quorum.refusal(state, now))]
    if state.uncommitted > state.limits.uncommitted_max:
        return [*noticed, Refuse(event.request, Refusal.BUSY)]
    if event.outbox_full:
        return [*noticed, Refuse(event.request, Refusal.NO_STORE)]
    return [*noticed, *_enter(state, event.request)]


def gone(state: State, event: RequestGone, _now: float) -> Effects:
    """Forget a request whose work has not begun. What was begun goes on without anybody to answer."""
    retry = state.retries.get(event.request)
    if retry is not None:
        retry.gone = True
    if event.request in state.incoming:
        state.incoming.remove(event.request)
        state.retries.pop(event.request, None)
    return []


def retry_due(state: State, event: RetryDue, now: float) -> Effects:
    """Let a request in again after its pause."""
    retry = state.retries.get(event.request)
    if retry is not None and retry.gone:
        del state.retries[event.request]
        return []
    if not state.accepting:
        return [_refuse(state, event.request, Refusal.NOT_LEADER)]
    if state.stalled_since_s is not None:
        return [_refuse(state, event.request, quorum.refusal(state, now))]
    return _enter(state, event.request)


def _enter(state: State, request: ClientRequest) -> Effects:
    """Let a request wait for the next batch. Whoever came first has woken the lane already."""
    state.incoming.append(request)
    return _wake(state) if len(state.incoming) == 1 else []


def _wake(state: State) -> Effects:
    return [Wake(Lane.PRODUCE)] if state.producing is Producing.FREE else []


def _refuse(state: State, request: ClientRequest, refusal: Refusal, *, consumed: bool = False) -> Refuse:
    state.retries.pop(request, None)
    return Refuse(request, refusal, consumed)


def refuse_unasked(state: State) -> Effects:
    """Refuse everybody whose message the HSM was not given; nobody will give it."""
    unasked = [*state.incoming, *state.batch, *(request for request, _ in state.asks)]
    state.incoming.clear()
    state.batch.clear()
    state.asks.clear()
    return [_refuse(state, request, Refusal.NOT_LEADER) for request in unasked]


def block(state: State) -> Effects:
    """Append nothing of this leadership any more: another leader wrote, or the log's tail is unknown."""
    state.blocked = True
    state.queue.clear()
    return refuse_unasked(state)


# --- the batch -------------------------------------------------------------------------------------------


def proceed(state: State, now: float) -> Effects:
    """Begin what is next when the lane is free: waiting requests, entries that continue the log, or a wait."""
    if state.producing is not Producing.FREE or state.ended:
        return []
    if state.incoming:
        return _begin_batch(state, now)
    return _append(state, now)


def _begin_batch(state: State, now: float) -> Effects:
    while state.incoming and len(state.batch) < APPEND_BATCH_MAX:
        state.batch.append(state.incoming.popleft())
    state.meter.add(now, len(state.batch))
    state.producing = Producing.READING
    return [ReadTail()] if state.last_appended is None else _read_proofs(state, now)


def _read_proofs(state: State, now: float) -> Effects:
    """Ask for proofs against the last acknowledged entry: nodes of queued ones may not be in the store yet."""
    last = state.last_appended
    if last is None or last.partition is None:
        return _refuse_batch(state, Refusal.NOT_LEADER, now)
    state.asked_index = last.index
    state.reading_since_s = now
    ends_s = now + state.limits.retry.total_s
    ends_s = min(state.retries[request].deadline_s if request in state.retries else ends_s for request in state.batch)
    return [ReadProofs(last.partition, tuple(state.batch), min(ends_s - now, state.limits.stall_s))]


def _refuse_batch(state: State, refusal: Refusal, now: float) -> Effects:
    refused: Effects = [_refuse(state, request, refusal) for request in state.batch]
    state.batch.clear()
    state.producing = Producing.FREE
    return refused + _append_or_proceed(state, now)


def tail_read(state: State, event: TailRead, now: float) -> Effects:
    """Go on with the batch from the log's last entry."""
    if not state.accepting:
        return _withdraw(state, now)
    if event.entry is None:
        return _refuse_batch(state, Refusal.INVALID_GROUP, now)
    if state.last_appended is None:
        state.last_appended = event.entry
    return _read_proofs(state, now)


def tail_failed(state: State, _event: TailFailed, now: float) -> Effects:
    """Refuse the batch: without the log's end nothing can be proven."""
    if not state.accepting:
        return _withdraw(state, now)
    return _refuse_batch(state, Refusal.NO_STORE, now)


def proofs_read(state: State, event: ProofsRead, now: float) -> Effects:
    """Ask the HSM, one request after the other; those with a missing node try again later."""
    if not state.accepting:
        return _withdraw(state, now)
    effects: Effects = quorum.store_works(state, now)
    for request, proof in zip(state.batch, event.proofs, strict=True):
        if isinstance(proof, Lost):
            effects += _missing(state, request, proof, now)
        else:
            if (retry := state.retries.get(request)) is not None:
                retry.missing_since_s = None
            state.asks.append((request, proof))
    state.batch.clear()
    return effects + _ask_next(state, now)


def proofs_failed(state: State, _event: ProofsFailed, now: float) -> Effects:
    """Let the whole batch try again later, or refuse it when the store has failed for too long."""
    if not state.accepting:
        return _withdraw(state, now)
    effects: Effects = quorum.store_failed(state, now, state.reading_since_s)
    if state.stalled_since_s is not None:
        return effects + _refuse_batch(state, quorum.refusal(state, now), now)
    for request in state.batch:
        effects += _again(state, request, now)
    state.batch.clear()
    return effects + _ask_next(state, now)


def _withdraw(state: State, now: float) -> Effects:
    """Drop the batch under way: its requests were refused when the leadership stopped accepting."""
    state.producing = Producing.FREE
    return _append_or_proceed(state, now)


def _missing(state: State, request: ClientRequest, node: Lost, now: float) -> Effects:
    """Try a request again whose path lacks a node, and give up when that is no passing thing.

    A root that another leader replaced may lose its nodes at any moment, but then this HSM captures the other's entries
    and the leadership ends within milliseconds. One that goes on and still finds no node reads a damaged store.
    """
    retry = state.retries.get(request)
    since = None if retry is None else retry.missing_since_s
    if since is not None and now - since >= DAMAGED_AFTER_S:
        return [TellDamaged(node), _refuse(state, request, Refusal.STORE_DAMAGED)]
    effects = _again(state, request, now)
    retry = state.retries.get(request)
    if retry is not None and retry.missing_since_s is None:
        retry.missing_since_s = now
    return effects


def _again(state: State, request: ClientRequest, now: float) -> Effects:
    """Try a request again with a fresh proof after its pause; NoStore once the profile is exhausted (agent.md 5.7)."""
    profile = state.limits.retry
    retry = state.retries.setdefault(request, Retry(0, state.reading_since_s + profile.total_s))
    retry.attempts += 1
    if profile.exhausted(retry.attempts, profile.total_s - (retry.deadline_s - now)):
        return [Note(Noted.RETRIES_EXHAUSTED), _refuse(state, request, Refusal.NO_STORE)]
    return [RetryLater(request, profile.delay_s(retry.attempts))]


def _ask_next(state: State, now: float) -> Effects:
    """Give the HSM the batch's next request; after the last one, append what it made before the next batch."""
    if state.asks:
        state.producing = Producing.ASKING
        state.asked, proof = state.asks.popleft()
        return [AskHsm(state.asked, proof, state.asked_index)]
    state.asked = None
    state.producing = Producing.FREE
    return _append_or_proceed(state, now)


def hsm_answered(state: State, event: HsmAnswered, now: float) -> Effects:
    """Queue the entry the HSM made, or answer. An entry may come for a request that an earlier leadership asked."""
    request, reply = event.request, event.reply
    ours = state.asked is request
    effects: Effects = []
    match reply:
        case AppRequestOk(entry=entry, delta=delta):
            if state.takes(entry.index):
                state.retries.pop(request, None)
                stalled = state.stalled_since_s is not None
                if stalled:  # since the request was let in
                    effects.append(Refuse(request, quorum.refusal(state, now), consumed=True))
                wrote = len(delta) > len(EMPTY_DELTA)
                state.waiters[entry.entry_mac] = Waiting(request, entry.index, wrote, told=stalled)
                state.enqueue(Queued(entry, delta, Intent(request.tenant, request.user, request.record_id, event.hint)))
            else:
                effects.append(_refuse(state, request, Refusal.NOT_LEADER, consumed=True))
        case Outcome.STALE_PROOF if state.accepting:
            effects += _again(state, request, now)
        case Outcome.STALE_PROOF:
            effects.append(_refuse(state, request, Refusal.NOT_LEADER))
        case NotLeader(role=role):
            effects.append(_refuse(state, request, Refusal.NOT_LEADER))
            if ours:
                # nobody of the batch will fare better; what is next is decided at the next turn, when the role is known
                effects += refuse_unasked(state)
                state.asked = None
                state.producing = Producing.FREE
            return effects if role is None else [*effects, Adopt(role)]
        case Outcome() if reply in REFUSALS:
            refusal, consumed = REFUSALS[reply]
            effects.append(_refuse(state, request, refusal, consumed=consumed))
        case _:
            check(condition=False, must_hold="AppRequest answers as specified")
    return effects + (_ask_next(state, now) if ours else _wake(state))


# --- the append ------------------------------------------------------------------------------------------


def _append_or_proceed(state: State, now: float) -> Effects:
    return _append(state, now) if state.next_index in state.queue else proceed(state, now)


def _append(state: State, now: float) -> Effects:
    """Append the entries that continue the log, at most 100; with a hole before them wait for it, and not for ever."""
    if state.blocked or not state.queue:
        state.missing_since_s = None
        return []
    if state.next_index not in state.queue:
        return _wait_for_hole(state, now)
    state.missing_since_s = None
    state.appending_since_s = now
    index = state.next_index
    while len(state.appending) < APPEND_BATCH_MAX and index in state.queue:
        state.appending.append(state.queue.pop(index))
        index += 1
    deltas = [queued.delta for queued in state.appending if len(queued.delta) > len(EMPTY_DELTA)]
    delta = EMPTY_DELTA if not deltas else deltas[0] if len(deltas) == 1 else squash(deltas)
    state.producing = Producing.APPENDING
    return [Append([q.entry for q in state.appending], [q.intent for q in state.appending], delta)]


def _wait_for_hole(state: State, now: float) -> Effects:
    if state.missing_since_s is None:
        state.missing_since_s = now
    until_s = state.missing_since_s + state.limits.hole_s
    if now < until_s:
        return [SetDeadline(until_s)]
    return _give_up(state, StepDownCode.HOLE, "")


def _give_up(state: State, code: StepDownCode, why: str) -> Effects:
    """Leave by force (agent.md 13): leadership cannot go on with an unknown log tail."""
    refused = block(state)
    return refused if state.ended else [*refused, StepDown(code, forced=True, index=state.next_index, why=why)]


def append_finished(state: State, event: AppendFinished, now: float) -> Effects:
    """Take note of an append: acknowledged entries go on, a conflict or an unknown tail ends the leadership."""
    batch = state.appending
    state.appending = []
    state.appending_since_s = inf
    state.producing = Producing.FREE
    if event.result is AppendResult.CONFLICT:
        return _lose(state, batch[0].entry.index)
    if event.result is not AppendResult.APPENDED:
        return _give_up(state, _GIVEN_UP[event.result], event.why)
    first, last = batch[0].entry, batch[-1].entry
    check(first.index == state.next_index, "batches are appended in order")
    state.next_index = last.index + 1
    state.last_appended = last
    quorum.appended(state, now)
    state.house.uncompacted.append(LogRow(first.index, is_tombstone=False))
    state.producing = Producing.SHOWING
    entries = [queued.entry for queued in batch]
    effects: Effects = quorum.store_works(state, now)
    if state.members:
        state.recent.extend((entry.index, encode_log_entry(entry)) for entry in entries)
        while len(state.recent) > RECENT_ENTRIES_MAX:
            state.recent.popleft()
        effects += [Wake(member) for member in state.members]
    return [*effects, ShowOwn(entries)]


def store_failed(state: State, _event: StoreFailed, now: float) -> Effects:
    """Take note of a write that is tried again."""
    return quorum.store_failed(state, now)


def own_shown(state: State, _event: OwnShown, now: float) -> Effects:
    """Begin the next batch."""
    state.producing = Producing.FREE
    return proceed(state, now)


def _lose(state: State, index: int) -> Effects:
    """Another leader wrote at `index`: nothing of ours can follow; step down and let capture sort it out."""
    first_notice = state.accepting
    refused = block(state)
    if not first_notice:
        return [*refused, ReadLog()]
    state.losing = True
    return [*refused, StepDown(StepDownCode.LOST_DUEL, forced=False, index=index)]


def stepped_down(state: State, _event: SteppedDown, _now: float) -> Effects:
    """After a lost duel the log holds what will move our HSM's role; it is read only now, when ours is settled."""
    losing, state.losing = state.losing, False
    return [ReadLog()] if losing else []


# --- entries without a client ----------------------------------------------------------------------------


def transfer_made(state: State, event: TransferMade, _now: float) -> Effects:
    """Queue what a transfer made, if anything, and let its caller wait until it is committed and recorded."""
    if event.entry is not None:
        if not state.takes(event.entry.index):
            return waits.refuse(event.wait)
        state.enqueue(Queued(event.entry, event.delta, None))
    return waits.begin(state, event.wait) + (_wake(state) if event.entry is not None else [])
