"""One leadership of one group, from Leader through SteppingDown to its end: events in, effects out (agent.md 5 to 14).

This is the contract with the driver, which owns tasks, sockets, stores and the clock, and never edits the state.

**Life.** The role clock rule (`host.group`) makes a leadership when the HSM leads and ends it with `Ended`. An ended
one is kept until its lanes have ended: an append may still return, and rows that are being written are still answered.

**Order.** The driver MUST carry out the effects of one step in the order given, before it waits for anything. *Quick*
ones are done on the spot; `Adopt` is itself a step, and its effects come before the rest. At most one effect of a step
is *long*. It is the last one, answers an event of the same lane, and occupies that lane: producing, committing, house,
or a member's pusher. When it is done the lane tells the event that belongs to it (below), and when no long effect
follows, its `Turn` (a member's pusher: `MemberTurn`). A lane whose turn brought nothing sleeps until `Wake`, its
deadline or, for a pusher, the heartbeat. Between a `Wake` and the turn more work may come: that is how requests come to
ride together.

| long effect | told when it is done | may be cancelled |
|---|---|---|
| `ReadTail`, `ReadProofs` | `TailRead`, `TailFailed`; `ProofsRead`, `ProofsFailed` | with the process only |
| `AskHsm` | `HsmAnswered`, to the leadership that leads *now*; to the asker if none does | no: an entry may exist |
| `Append` | `AppendFinished` | no: a cancelled write is one of unknown outcome |
| `ShowOwn` | `OwnShown` | with the process only |
| `StepDown` | `SteppedDown`, after the role was adopted | with the process only |
| `AskCommit` | `CommitAnswered` | no: replies are released once |
| `WriteOutbox` | `OutboxWritten`, `OutboxFailed` | no |
| `Push`, `Pause` | `PushAnswered`, `PushFailed`; `MemberTurn` | at the end of the leadership |
| house effects, `Rest` | their event, or `HouseFailed`; `HouseRested` | at the end of the leadership |

An entry that an HSM made MUST reach the machine in the turn of the event loop in which the reply came, whatever becomes
of the client: a hole in the log stalls the group until the hole limit ends the leadership.

**Late and twice.** `RequestGone`, `RetryDue`, `WaitTimedOut`, `StoreFailed`, `Wake`-less turns and captures may come
late, twice, and after the end; older captures than known ones count for nothing. Any other event is told once. Nothing
is assumed about how long a long effect takes.

**An ambiguous append is never treated as failed.** The store reads the tail before it says so, retries within its
profile, and what is still unknown then ends the leadership by force: whether the entries are in the log is found out by
the next leadership, which reads the tail.

**Without a majority, or a store that works,** clients are not left waiting (`quorum`): who waits is refused, with
`consumed` if an entry exists, which stays and is recorded but not released if it is committed after all.

**What a crash between two effects means.** The process loses all of this state; nothing in it is needed for safety.

* `AskHsm`, `Append`: the entry is lost with the HSM's memory; no guess was counted, the client's message is used up.
* `Append`, `ShowOwn` or `Push`: the entries are in the log; the next leader's HSM captures and commits them. Their
  intents have no rows, so the auditor sees `unknown`; the clients see no answer. The guess stays counted.
* `AskCommit`, `WriteOutbox`: committed and released, but the reply dies here; the same as above.
* `WriteOutbox`, `Release`: the row says what happened, and the client does not hear it.
* `WriteUnknown` and any later effect: written again by the next leader; rows are found by (index, mac), not repeated.
* `WriteCertificate`, `CompactRows`: a certificate more than needed. The other order does not occur: without the
  certificate a lagging witness could not pass the compacted rows.

So a crash between any two effects loses at most an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from juicebox_hsm.consensus.types import Captured, LogEntry, RoleStatus, SteppingDown
from juicebox_hsm.host.leadership import commit, events, house, produce, push, quorum, waits
from juicebox_hsm.host.leadership.effects import Effect, Refuse, StepDown, StepDownCode
from juicebox_hsm.host.leadership.events import Event, Lane
from juicebox_hsm.host.leadership.quorum import Quorum
from juicebox_hsm.host.leadership.state import Effects, Limits, State
from juicebox_hsm.host.liveness import Claim
from juicebox_hsm.ids import GroupId, HsmId, RealmId
from juicebox_hsm.wire.rpc import Refusal


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What status and metrics show of a leadership. Indexes are of the log, counts of requests or entries."""

    starting: int
    last_appended: LogEntry | None
    committed: int | None
    recorded: int
    settled: int
    resolved: bool
    queued: int
    waiting: int
    releasing: int
    uncommitted: int
    requests_per_s: float
    uncompacted_rows: int
    uncompacted_first: int


def _turn(state: State, event: events.Turn, now: float) -> Effects:
    match event.lane:
        case Lane.PRODUCE:
            return produce.proceed(state, now)
        case Lane.COMMIT:
            return commit.proceed(state, now)
        case Lane.HOUSE:
            return house.proceed(state, now)


def _role_adopted(state: State, event: events.RoleAdopted, _now: float) -> Effects:
    """Stepping down begins: what the HSM was not given is refused, the rest is finished."""
    state.role = event.role
    refused = produce.refuse_unasked(state) if isinstance(event.role.role, SteppingDown) else []
    return refused + waits.look(state)


def _ended(state: State, _event: events.Ended, _now: float) -> Effects:
    """Refuse everybody who waits, with `consumed` for those whose message the HSM was given."""
    state.ended = True
    effects: Effects = [
        Refuse(w.request, Refusal.NOT_LEADER, consumed=True) for w in state.waiters.values() if not w.told
    ]
    state.waiters.clear()
    effects += produce.block(state)
    return effects + waits.look(state)


def _inherited(state: State, event: events.Inherited, _now: float) -> Effects:
    state.inherit(event.entry)
    return []


def _handover_asked(state: State, event: events.HandoverAsked, _now: float) -> Effects:
    """Leave in order: what was begun is still committed, recorded and answered."""
    if state.ended:
        return []
    state.asked_to_leave |= event.by_others
    return [StepDown(StepDownCode.ASKED if event.by_others else StepDownCode.SHUTTING_DOWN, forced=False)]


# Any: each handler takes the event it is listed under.
_HANDLERS: Final[Mapping[type, Callable[[State, Any, float], Effects]]] = {
    events.Turn: _turn,
    events.RoleAdopted: _role_adopted,
    events.Ended: _ended,
    events.Inherited: _inherited,
    events.HandoverAsked: _handover_asked,
    events.SteppedDown: produce.stepped_down,
    events.RequestArrived: produce.arrived,
    events.RequestGone: produce.gone,
    events.RetryDue: produce.retry_due,
    events.TailRead: produce.tail_read,
    events.TailFailed: produce.tail_failed,
    events.ProofsRead: produce.proofs_read,
    events.ProofsFailed: produce.proofs_failed,
    events.HsmAnswered: produce.hsm_answered,
    events.StoreFailed: produce.store_failed,
    events.AppendFinished: produce.append_finished,
    events.OwnShown: produce.own_shown,
    events.TransferMade: produce.transfer_made,
    events.WaitTimedOut: waits.timed_out,
    events.CaptureHeard: commit.capture_heard,
    events.CommitAnswered: commit.answered,
    events.OutboxWritten: commit.outbox_written,
    events.OutboxFailed: commit.outbox_failed,
    events.MemberTurn: push.member_turn,
    events.PushAnswered: push.answered,
    events.PushFailed: push.failed,
    events.PredecessorsQuiet: house.quiet,
    events.UnsettledRead: house.unsettled_read,
    events.UnknownWritten: house.unknown_written,
    events.RowsListed: house.rows_listed,
    events.SettledWritten: house.settled_written,
    events.CertificateWritten: house.certificate_written,
    events.RowsCompacted: house.rows_compacted,
    events.HouseFailed: house.failed,
    events.HouseRested: house.rested,
    events.Leaving: house.leaving,
}


class Leadership:
    """One leadership; see the module docstring. `members` are the other members, to whom the log is pushed."""

    __slots__ = ("_state", "starting")

    def __init__(
        self,
        realm: RealmId,
        group: GroupId,
        configuration: tuple[HsmId, ...],
        starting: int,
        role: RoleStatus,
        limits: Limits,
        own_captured: Captured | None = None,
    ) -> None:
        self._state = State(realm, group, configuration, starting, role, limits, own_captured)
        self.starting = starting

    def step(self, event: Event, now: float) -> list[Effect]:
        """Take an event at monotonic time `now` in seconds; returns what is to be done, in order."""
        return _HANDLERS[type(event)](self._state, event, now)

    # --- views: nothing below changes anything -------------------------------------------------------

    @property
    def next_index(self) -> int:
        """The index after the last one the store acknowledged."""
        return self._state.next_index

    @property
    def last_appended(self) -> LogEntry | None:
        """The last entry known to be in the log."""
        return self._state.last_appended

    @property
    def committed(self) -> int | None:
        """The highest index the HSM said is committed during this leadership, if any."""
        return self._state.committed

    @property
    def is_accepting(self) -> bool:
        """Tell whether requests are let in."""
        return self._state.accepting

    @property
    def has_ended(self) -> bool:
        """Tell whether the role clock rule ended this leadership."""
        return self._state.ended

    @property
    def was_asked_to_leave(self) -> bool:
        """Tell whether somebody who also looks for a successor asked for the step-down."""
        return self._state.asked_to_leave

    @property
    def releasing(self) -> int:
        """Committed requests whose rows and answers are not out yet."""
        return len(self._state.releasing)

    @property
    def queued(self) -> int:
        """Entries that wait for their append."""
        return len(self._state.queue)

    @property
    def claim(self) -> Claim:
        """How this leadership ranks among others."""
        return Claim(self._state.next_index - 1, self.starting)

    def quorum(self, now: float) -> Quorum:
        """Return what is known of the members at monotonic time `now`, and whether the leadership can commit."""
        return quorum.view(self._state, now)

    def made(self, entry: LogEntry) -> bool:
        """Tell whether `entry` is of this leadership, or the one it began after, and not below the last commit."""
        return self._state.own_macs.get(entry.index) == entry.entry_mac

    def snapshot(self, now: float) -> Snapshot:
        """Return what status and metrics show."""
        state, rows = self._state, self._state.house.uncompacted
        return Snapshot(
            starting=state.starting,
            last_appended=state.last_appended,
            committed=state.committed,
            recorded=state.recorded,
            settled=state.house.settled,
            resolved=state.house.resolved,
            queued=len(state.queue),
            waiting=sum(not waiting.told for waiting in state.waiters.values())
            + len(state.incoming)
            + len(state.batch)
            + len(state.asks),
            releasing=len(state.releasing),
            uncommitted=state.uncommitted,
            requests_per_s=state.meter.per_second(now),
            uncompacted_rows=len(rows),
            uncompacted_first=rows[0].first_index if rows else 0,
        )
