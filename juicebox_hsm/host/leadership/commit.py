"""Committing: what a majority captured is committed, recorded, and only then answered (agent.md 8, 11).

Order, and why: waiters are taken out before the role is adopted, because adopting Witness drops who still waits; the
outbox rows of a batch are written before any of its answers leave, so that a tenant's audit log never lacks something
a client has seen.
"""

from __future__ import annotations

from math import inf

from juicebox_hsm.consensus.election import elect
from juicebox_hsm.consensus.types import Captured, Certificate
from juicebox_hsm.host.leadership import house, produce, quorum, waits
from juicebox_hsm.host.leadership.effects import (
    Adopt,
    Answer,
    AskCommit,
    Note,
    Noted,
    Refuse,
    Release,
    StepDown,
    StepDownCode,
    Wake,
    WriteOutbox,
)
from juicebox_hsm.host.leadership.events import CaptureHeard, CommitAnswered, Lane, OutboxFailed, OutboxWritten
from juicebox_hsm.host.leadership.state import Committing, Effects, State
from juicebox_hsm.host.outbox import client_event
from juicebox_hsm.hsm.messages import CommitOk, NotLeader
from juicebox_hsm.wire.rpc import Refusal


def capture_heard(state: State, event: CaptureHeard, _now: float) -> Effects:
    """Count our own HSM's persisted capture."""
    state.own_captured = event.captured
    return vote(state, event.captured)


def vote(state: State, captured: Captured) -> Effects:
    """Adopt a member's capture if it is newer than the known one."""
    known = state.votes.get(captured.hsm)
    if known is not None and known.index >= captured.index:
        return []
    state.votes[captured.hsm] = captured
    state.voted = True
    return [Wake(Lane.COMMIT)] if state.committing is Committing.FREE else []


def proceed(state: State, _now: float) -> Effects:
    """Ask for a commit if a strict majority captured beyond what is committed."""
    if state.committing is not Committing.FREE or state.ended or not state.voted:
        return []
    state.voted = False
    outcome = elect(state.configuration, {hsm: captured.index for hsm, captured in state.votes.items()})
    if outcome is None or outcome <= (state.committed or 0):
        return []
    state.committing = Committing.ASKING
    return [AskCommit(tuple(state.votes.values()))]


def answered(state: State, event: CommitAnswered, now: float) -> Effects:
    """Take out what is released, adopt the role, and record before anything is answered."""
    state.committing = Committing.FREE
    match event.reply:
        case CommitOk():
            return _committed(state, event.reply, now)
        case NotLeader(role=role) if role is not None:
            return [Adopt(role)]
        case _:
            # captures of another branch: the capture of the foreign entries will move our role
            return []


def _committed(state: State, reply: CommitOk, now: float) -> Effects:
    effects: Effects = []
    answers: list[Answer] = []
    for mac, noise, result in reply.responses:
        waiting = state.waiters.pop(mac, None)
        if waiting is None:
            effects.append(Note(Noted.REPLY_UNASKED))
        else:
            told = waiting.told
            answers.append(Answer(waiting.request, waiting.index, mac, noise, result, waiting.wrote, told))
    for mac in reply.abandoned:
        waiting = state.waiters.pop(mac, None)
        if waiting is not None and not waiting.told:
            effects.append(Refuse(waiting.request, Refusal.NOT_LEADER, consumed=True))
    state.certificate = certify(state, reply.committed)
    raise_committed(state, reply.committed)
    effects += quorum.progressed(state, now)
    if not answers:
        return [*effects, Adopt(reply.role), *_recorded(state)]
    state.committing = Committing.RECORDING
    state.recording_since_s = now
    state.releasing = tuple(answers)
    state.recording = state.committed if state.house.resolved else None
    events = [client_event(state.group, answer) for answer in answers]
    return [*effects, Adopt(reply.role), WriteOutbox(events, state.recording)]


def certify(state: State, index: int) -> Certificate:
    """Return the captures of our branch at or above `index` as a commit certificate (agent.md 10)."""
    ours = state.own_macs
    return Certificate(index, tuple(c for c in state.votes.values() if c.index >= index and ours.get(c.index) == c.mac))


def raise_committed(state: State, index: int) -> None:
    """Note a commit; forget the macs below it."""
    if state.committed is not None and index <= state.committed:
        return
    first = state.starting - 1 if state.committed is None else state.committed
    for passed in range(first, index):
        state.own_macs.pop(passed, None)
    state.committed = index


def outbox_written(state: State, _event: OutboxWritten, now: float) -> Effects:
    """Answer. The leadership may have ended meanwhile; its committed requests are answered all the same."""
    answers, state.releasing = state.releasing, ()
    state.recording_since_s = inf
    noticed = quorum.store_works(state, now)
    if state.recording is not None:
        state.house.settled = max(state.house.settled, state.recording)
    state.committing = Committing.FREE
    awaited = [answer for answer in answers if not answer.told]
    return [*noticed, *([Release(awaited)] if awaited else []), *_recorded(state)]


def outbox_failed(state: State, event: OutboxFailed, _now: float) -> Effects:
    """Give the leadership up. `recorded` stays: the intents of this batch become `unknown` under the next one."""
    answers, state.releasing = state.releasing, ()
    state.recording_since_s = inf
    state.committing = Committing.FREE
    effects: Effects = produce.block(state)
    effects += [Refuse(answer.request, Refusal.NOT_LEADER, consumed=True) for answer in answers if not answer.told]
    effects += waits.look(state)
    if state.ended:
        return effects
    return [*effects, StepDown(StepDownCode.OUTBOX_FAILED, forced=True, why=event.why)]


def _recorded(state: State) -> Effects:
    """Note that everything committed has its rows."""
    state.recorded = max(state.recorded, state.committed or 0)
    return waits.look(state) + house.is_due(state)
