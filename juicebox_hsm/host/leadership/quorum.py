"""Whether a leadership can commit: whether the store takes what it writes, and a majority of members answers it.

A leader that has lost its majority, or its store, cannot know whether it will come back in a moment or never. What it
has appended may still commit, so it leads on; but clients are told at once instead of waiting for their time-outs: new
requests are refused before the HSM is asked, and those that wait are told that the outcome is unknown. Their entries
are committed, recorded for the tenant and released to nobody when the majority is back.

A leadership is *stalled* when too few members answer its pushes, or when enough do and nothing it appended was
committed for `Limits.stall_s` all the same; when the store has refused it for `STORE_PATIENCE_S`, or takes longer than
`Limits.stall_s` for one write. Who wants to know whether a store that refuses reads works again is let in now and then.
A member that was not heard for `Limits.silence_s` counts as lost once two pushes to it have failed in a row: after a
pause of our own process the first fails whatever the member does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Final

from juicebox_hsm.host.leadership.effects import Effect, Note, Noted, Refuse
from juicebox_hsm.host.leadership.state import Committing, Effects, Member, State
from juicebox_hsm.wire.rpc import Refusal

FAILURES_MIN: Final = 2
"""Pushes in a row that must fail before a silent member counts as lost."""
STORE_PATIENCE_S: Final = 1.0
"""How long a store may refuse everything before clients are refused (own): what passes has passed by then."""
STORE_TRIED_S: Final = 2.5
"""After so long without a try the next request finds out whether the store works again: a little more than the longest
pause between the tries of one write (`host.retry`)."""


@dataclass(frozen=True, slots=True)
class Quorum:
    """What a leadership knows of its majority. Ages in seconds.

    `alive` of `members` answer, our own HSM among them. `commit_age_s` is how long appended entries have waited without
    any progress, 0 while none waits. `stalled_s` is how long the leadership could not commit, None while it can;
    `lacks_store`: because of the store.
    """

    members: int
    alive: int
    commit_age_s: float
    stalled_s: float | None
    lacks_store: bool = False


def heard(state: State, member: Member, now: float) -> Effects:
    """Note that a member answered a push."""
    member.heard_s, member.failures = now, 0
    return look(state, now)


def missed(state: State, member: Member, now: float) -> Effects:
    """Note that a push to a member brought nothing."""
    member.failures += 1
    return look(state, now)


def progressed(state: State, now: float) -> Effects:
    """Note that a commit went through; what is left begins to wait anew."""
    waits = state.committed is None or state.committed < state.next_index - 1
    state.waiting_since_s = now if waits else None
    return look(state, now)


def appended(state: State, now: float) -> None:
    """Note that entries are in the log; they wait from now on unless older ones do."""
    if state.waiting_since_s is None:
        state.waiting_since_s = now


def store_failed(state: State, now: float, since_s: float | None = None) -> Effects:
    """Note that the store refused a read or a write of ours, which is tried again and was begun at `since_s`."""
    if state.store_failing_since_s is None:
        state.store_failing_since_s = now if since_s is None else since_s
    state.store_failed_s = now
    return look(state, now)


def store_works(state: State, now: float) -> Effects:
    """Note that the store did what we asked."""
    state.store_failing_since_s = None
    return look(state, now)


def look(state: State, now: float) -> Effects:
    """Find out whether the leadership can commit, and tell everybody concerned when that has changed."""
    if _is_stalled(state, now) is (state.stalled_since_s is not None):
        return []
    if state.stalled_since_s is not None:
        state.stalled_since_s = None
        return [Note(Noted.QUORUM_BACK)]
    state.stalled_since_s = now
    return [Note(Noted.QUORUM_LOST), *_refuse_everybody(state, now)]


def view(state: State, now: float) -> Quorum:
    """Return what status, metrics and logs show.

    Balancers send nothing to a leadership that says it is stalled: one that waits for a request to find out whether
    the store works again must not say so.
    """
    return Quorum(
        members=len(state.configuration),
        alive=_alive(state, now),
        commit_age_s=0.0 if state.waiting_since_s is None else now - state.waiting_since_s,
        stalled_s=None if state.stalled_since_s is None or _is_try_due(state, now) else now - state.stalled_since_s,
        lacks_store=_lacks_store(state, now),
    )


def _alive(state: State, now: float) -> int:
    silence_s = state.limits.silence_s
    lost = sum(m.failures >= FAILURES_MIN and now - m.heard_s >= silence_s for m in state.members.values())
    return len(state.configuration) - lost


def _is_stalled(state: State, now: float) -> bool:
    return _lacks_store(state, now) or _waits_for_members(state, now)


def _waits_for_members(state: State, now: float) -> bool:
    if 2 * _alive(state, now) <= len(state.configuration):
        return True
    # while rows are being written nothing can be committed, and that is the store's trouble
    if state.waiting_since_s is None or state.committing is Committing.RECORDING:
        return False
    return now - state.waiting_since_s >= state.limits.stall_s


def _lacks_store(state: State, now: float) -> bool:
    writing_since_s = min(state.appending_since_s, state.recording_since_s)
    if now - writing_since_s >= state.limits.stall_s:
        return True
    failing_since_s = state.store_failing_since_s
    return failing_since_s is not None and now - failing_since_s >= STORE_PATIENCE_S


def may_try(state: State, now: float) -> bool:
    """Tell whether a request may find out if a store that refused us works again: when no write of ours does."""
    if not _is_try_due(state, now):
        return False
    state.store_failed_s = now
    return True


def _is_try_due(state: State, now: float) -> bool:
    """Without a majority nobody tries: the HSM would be asked for an entry that cannot be committed."""
    is_writing = min(state.appending_since_s, state.recording_since_s) < inf
    is_due = not is_writing and now - state.store_failed_s >= STORE_TRIED_S
    return is_due and _lacks_store(state, now) and not _waits_for_members(state, now)


def refusal(state: State, now: float) -> Refusal:
    """Return what clients of a stalled leadership are refused with."""
    return Refusal.NO_STORE if _lacks_store(state, now) else Refusal.NO_QUORUM


def _refuse_everybody(state: State, now: float) -> Effects:
    """Answer who waits. An entry that exists keeps its place: it is recorded for the tenant if it is committed."""
    why = refusal(state, now)
    effects: list[Effect] = []
    for request in state.incoming:
        state.retries.pop(request, None)
        effects.append(Refuse(request, why))
    state.incoming.clear()
    for waiting in state.waiters.values():
        if not waiting.told:
            waiting.told = True
            effects.append(Refuse(waiting.request, why, consumed=True))
    effects += [Refuse(answer.request, why, consumed=True) for answer in state.releasing if not answer.told]
    state.releasing = tuple(replace(answer, told=True) for answer in state.releasing)
    return effects
