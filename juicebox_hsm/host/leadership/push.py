"""Push: acknowledged entries go to every member, and members answer with captures (agent.md 7).

One push in flight per member, the next covers everything since. With nothing to send, an empty one is the heartbeat;
its answers carry the progress of members that catch up by reading the log. None of this matters for safety: the HSM
checks MACs and chaining itself, and only persisted captures are signed.
"""

from __future__ import annotations

from typing import Final

from juicebox_hsm.host.leadership import commit, quorum
from juicebox_hsm.host.leadership.effects import Pause, Pausing, Push
from juicebox_hsm.host.leadership.events import MemberTurn, PushAnswered, PushFailed
from juicebox_hsm.host.leadership.state import Effects, Member, State

PUSH_ENTRIES_MAX: Final = 200
"""Entries of one push (agent.md 2): with the largest entries it fits a frame."""


def member_turn(state: State, event: MemberTurn, now: float) -> Effects:
    """Send what the member lacks; with nothing to send, only when the heartbeat is due."""
    if state.ended:
        return []
    member = state.members.setdefault(event.member, Member(state.next_index, now))
    if member.next_index >= state.next_index and not event.heartbeat:
        return []
    member.asked = member.next_index
    entries = recent_from(state, member.next_index)
    if entries is None:
        # further behind than what is kept: it reads the log, and we go on with what comes
        member.next_index, entries = state.next_index, []
    member.sent = member.next_index + len(entries) - 1
    return [Push(event.member, entries, member.sent)]


def recent_from(state: State, index: int) -> list[bytes] | None:
    """Return encoded entries from `index` on ([] at the end); None when `index` is no longer kept."""
    if index >= state.next_index:
        return []
    if not state.recent or index < state.recent[0][0]:
        return None
    offset = index - state.recent[0][0]
    return [state.recent[at][1] for at in range(offset, min(offset + PUSH_ENTRIES_MAX, len(state.recent)))]


def answered(state: State, event: PushAnswered, now: float) -> Effects:
    """Count the member's vote and find out what it is to be sent next."""
    member = state.members[event.member]
    captured = event.captured
    member.next_index = member.sent + 1
    effects = quorum.heard(state, member, now)
    if captured is None or (captured.hsm, captured.realm, captured.group) != (event.member, state.realm, state.group):
        return effects
    effects += commit.vote(state, captured)
    if event.behind:
        member.next_index = max(captured.index + 1, state.starting)
        if member.next_index == member.asked:
            # it reads the log and has not come closer: asking again at once would only delay it
            return [*effects, Pause(event.member, Pausing.BEHIND)]
    return effects


def failed(state: State, event: PushFailed, now: float) -> Effects:
    """Leave a member alone for a moment."""
    effects = quorum.missed(state, state.members[event.member], now)
    return [*effects, Pause(event.member, Pausing.REFUSED if event.reached else Pausing.UNREACHABLE)]
