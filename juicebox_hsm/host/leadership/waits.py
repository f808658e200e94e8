"""Transfers' waits: until an entry is committed *and* the rows of all entries before it are recorded (agent.md 11, 14).

A commit speaks of an entry made at role clock c only while the clock is c, or c + 1 and stepping down (hsm.md 6.3).
"""

from __future__ import annotations

from juicebox_hsm.consensus.types import Leader, RoleStatus, SteppingDown
from juicebox_hsm.host.leadership.effects import WaitOver
from juicebox_hsm.host.leadership.events import CommitWait, WaitTimedOut
from juicebox_hsm.host.leadership.state import Effects, State
from juicebox_hsm.wire.rpc import Refusal


def still_ours(role: RoleStatus, clock: int) -> bool:
    """Tell whether commits seen now speak of an entry made at role clock `clock`."""
    if role.at == clock:
        return isinstance(role.role, Leader)
    return role.at == clock + 1 and isinstance(role.role, SteppingDown)


def begin(state: State, wait: CommitWait) -> Effects:
    """Let a caller wait; answers at once when there is nothing to wait for."""
    state.waits.append(wait)
    return look(state)


def look(state: State) -> Effects:
    """Answer who need not wait any longer: after a commit, a record, a change of role."""
    if not state.waits:
        return []
    effects: Effects = []
    waiting: list[CommitWait] = []
    done = 0 if state.committed is None else min(state.committed, state.recorded)
    for wait in state.waits:
        if done >= wait.index:
            effects.append(WaitOver(wait, None))
        elif _may_come(state, wait):
            waiting.append(wait)
        else:
            effects += refuse(wait)
    state.waits = waiting
    return effects


def _may_come(state: State, wait: CommitWait) -> bool:
    """Tell whether the wait can still succeed. What is committed needs only its rows, whose writing outlives us."""
    if state.committed is not None and wait.index <= state.committed and state.releasing:
        return True
    return not state.ended and still_ours(state.role, wait.clock)


def refuse(wait: CommitWait) -> Effects:
    """Tell a caller that this leadership will not tell it more."""
    return [WaitOver(wait, Refusal.NOT_LEADER)]


def timed_out(state: State, event: WaitTimedOut, _now: float) -> Effects:
    """Let a caller go. The outcome stays open: the entry may still commit, so the caller must not cancel."""
    if event.wait not in state.waits:
        return []
    state.waits.remove(event.wait)
    return [WaitOver(event.wait, Refusal.COMMIT_TIMEOUT)]
