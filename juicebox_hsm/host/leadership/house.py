"""Housekeeping: outcomes nobody confirmed, the settled index, and compaction (agent.md 10, 11).

It begins when all other members are witnesses or had their time: former leaders may still need entries to release
replies and to record their events. Then what they left is resolved, the older rows are listed, and the log is
compacted as the index advances. Before compacting up to X the capture statements that proved a commit at C > X are
stored, so that one lagging witness and a leader can go on while the third member is dead for good: `CompactRows` is
only ever emitted by the step that saw the certificate written.
"""

from __future__ import annotations

from itertools import islice

from juicebox_hsm.consensus.election import elect
from juicebox_hsm.errors import check
from juicebox_hsm.host.compaction import compactible_rows, compaction_index
from juicebox_hsm.host.leadership.effects import (
    CompactRows,
    ListRows,
    ReadUnsettled,
    Rest,
    Wake,
    WriteCertificate,
    WriteSettled,
    WriteUnknown,
)
from juicebox_hsm.host.leadership.events import (
    CertificateWritten,
    HouseFailed,
    HouseRested,
    Lane,
    Leaving,
    PredecessorsQuiet,
    RowsCompacted,
    RowsListed,
    SettledWritten,
    UnknownWritten,
    UnsettledRead,
)
from juicebox_hsm.host.leadership.state import Effects, Housing, State
from juicebox_hsm.host.outbox import unknown_events, unrecordable


def is_due(state: State) -> Effects:
    """Ask for a round: more may be settled or compacted."""
    state.house.due = True
    return [Wake(Lane.HOUSE)] if state.house.at is Housing.FREE else []


def quiet(state: State, _event: PredecessorsQuiet, now: float) -> Effects:
    """Begin: no earlier leadership needs the log or will record any more."""
    state.house.at = Housing.FREE
    state.house.due = True
    return proceed(state, now)


def proceed(state: State, _now: float) -> Effects:
    """Begin a round if one is due and everything below this leadership is committed."""
    house = state.house
    if house.at is not Housing.FREE or state.ended or not house.due:
        return []
    if state.committed is None or state.committed < state.starting - 1:
        return []
    house.due = False
    return _round(state)


def _round(state: State) -> Effects:
    """Do the first thing of a round that is left to do."""
    house = state.house
    if not house.resolved:
        house.at = Housing.RESOLVING
        return [ReadUnsettled(state.starting - 1)]
    if not house.listed:
        house.at = Housing.LISTING
        return [ListRows(state.starting)]
    if state.recorded > house.settled:
        return _settle(state)
    return _certify(state)


# --- unknown outcomes and the settled index --------------------------------------------------------------


def unsettled_read(state: State, event: UnsettledRead, _now: float) -> Effects:
    """Record as unknown what has no row; without any, the settled index alone may have to be raised."""
    house = state.house
    events = unknown_events(state.group, event.left, event.recorded, event.now_ms)
    house.writing = max(state.starting - 1, state.recorded)
    if events or event.settled < house.writing:
        return [WriteUnknown(events, house.writing, unrecordable(event.left))]
    return _resolved(state)


def unknown_written(state: State, _event: UnknownWritten, _now: float) -> Effects:
    """Everything below this leadership has its row."""
    return _resolved(state)


def _resolved(state: State) -> Effects:
    house = state.house
    house.settled = max(house.settled, house.writing)
    house.resolved = True
    return _round(state)


def _settle(state: State) -> Effects:
    state.house.at = Housing.SETTLING
    state.house.writing = state.recorded
    return [WriteSettled(state.recorded)]


def settled_written(state: State, _event: SettledWritten, _now: float) -> Effects:
    """Go on with compaction, which waits for the settled index."""
    house = state.house
    house.settled = max(house.settled, house.writing)
    return [] if state.ended else _certify(state)


def leaving(state: State, _event: Leaving, _now: float) -> Effects:
    """Write the settled index a last time. Without it the next leader only searches longer."""
    return _settle(state) if state.house.resolved and state.recorded > state.house.settled else []


# --- compaction ------------------------------------------------------------------------------------------


def rows_listed(state: State, event: RowsListed, _now: float) -> Effects:
    """Put the rows that earlier leaderships left before ours."""
    rows = state.house.uncompacted
    check(all(row.first_index < state.starting for row in event.rows), "listed rows start below the leadership")
    check(not rows or rows[0].first_index == state.starting, "our own first row starts the leadership")
    rows.extendleft(reversed(event.rows))
    state.house.listed = True
    return _round(state)


def _certify(state: State) -> Effects:
    """Store the proof of what is about to be compacted, if anything is and there is one."""
    house, certificate = state.house, state.certificate
    captured = None if state.own_captured is None else state.own_captured.index
    index = compaction_index(state.committed, captured, house.settled)
    count = compactible_rows([row.first_index for row in house.uncompacted], index)
    if count == 0 or certificate is None or certificate.index <= index:
        return _rest(state)
    proven = elect(state.configuration, {captured.hsm: captured.index for captured in certificate.captures})
    if proven is None or proven < certificate.index:
        return _rest(state)
    house.at = Housing.CERTIFYING
    house.compacting, house.compact_index = count, index
    return [WriteCertificate(certificate)]


def certificate_written(state: State, _event: CertificateWritten, _now: float) -> Effects:
    """Compact what the stored certificate covers."""
    house = state.house
    check(house.at is Housing.CERTIFYING, "a certificate is written before rows are compacted")
    house.at = Housing.COMPACTING
    return [CompactRows(list(islice(house.uncompacted, house.compacting)), house.compact_index)]


def rows_compacted(state: State, _event: RowsCompacted, _now: float) -> Effects:
    """Forget the rows."""
    for _ in range(state.house.compacting):
        state.house.uncompacted.popleft()
    state.house.compacting = 0
    return _rest(state)


# --- pauses ----------------------------------------------------------------------------------------------


def _rest(state: State) -> Effects:
    state.house.at = Housing.RESTING
    state.house.failures = 0
    return [Rest(state.limits.compact_pause_s)]


def failed(state: State, _event: HouseFailed, _now: float) -> Effects:
    """Begin the round again after a pause; everything in it may be done twice."""
    house = state.house
    house.at = Housing.RESTING
    house.due = True
    house.failures += 1
    return [Rest(state.limits.retry.delay_s(house.failures), house.failures)]


def rested(state: State, _event: HouseRested, now: float) -> Effects:
    """Begin the next round if it is due."""
    state.house.at = Housing.FREE
    return proceed(state, now)
