"""Random lives of a leadership: whatever comes when, every request is answered once, and in the order that counts.

A small host plays the lanes, the HSM, the store and two members; what is done next is drawn from a seed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from juicebox_hsm.consensus.types import Captured, Leader, LogEntry, RoleStatus, SteppingDown, Witness
from juicebox_hsm.host.leadership import effects as does
from juicebox_hsm.host.leadership import events as on
from juicebox_hsm.host.leadership.machine import Leadership
from juicebox_hsm.host.leadership.state import Limits
from juicebox_hsm.hsm.messages import AppRequestOk, CommitOk, NotLeader, Outcome, ResultKind, ResultType
from juicebox_hsm.ids import RecordId
from juicebox_hsm.merkle.kernel import EMPTY_DELTA
from juicebox_hsm.wire.client import TransportRequest, TransportResponse
from tests.host.script import GROUP, LONG, LOST, REALM, entry, hsm, mac

STARTING = 8
MEMBERS = (hsm("a"), hsm("b"), hsm("c"))


_HOUSED: dict[type, Callable[[], on.Event]] = {
    does.WriteUnknown: on.UnknownWritten,
    does.WriteSettled: on.SettledWritten,
    does.WriteCertificate: on.CertificateWritten,
    does.CompactRows: on.RowsCompacted,
}


class Host:
    """The outside of one leadership, and the checks."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.machine = Leadership(REALM, GROUP, MEMBERS, STARTING, RoleStatus(Leader(STARTING), 5), Limits())
        self.step: Callable[[on.Event, float], list[does.Effect]] = self.machine.step
        self.now = 0.0
        self.long: dict[object, does.Long] = {}
        self.asleep: set[object] = set()
        self.later: list[on.Event] = []
        self.answers: Counter[on.ClientRequest] = Counter()
        self.asked: list[on.ClientRequest] = []
        self.gone: set[on.ClientRequest] = set()
        self.made = STARTING  # the next index the HSM makes
        self.log: list[LogEntry] = []
        self.by_mac: dict[bytes, on.ClientRequest] = {}
        self.committed = STARTING - 1
        self.recorded: set[int] = set()
        self.is_leader, self.ended = True, False
        self.tell(on.Inherited(entry(str(STARTING - 1))))
        self.asleep |= {on.Lane.PRODUCE, on.Lane.COMMIT, *MEMBERS[1:]}
        for member in MEMBERS[1:]:
            self.turn(member)
        self.tell(on.PredecessorsQuiet(), on.Lane.HOUSE)
        self.asleep.add(on.Lane.HOUSE)

    def turn(self, lane: Any) -> None:
        self.asleep.discard(lane)
        event: on.Event = (
            on.Turn(lane) if isinstance(lane, on.Lane) else on.MemberTurn(lane, self.random.random() < 0.3)
        )
        self.tell(event, lane)
        if lane not in self.long:
            self.asleep.add(lane)

    def tell(self, event: on.Event, lane: object = None) -> None:
        effects = self.step(event, self.now)
        assert all(not isinstance(effect, LONG) for effect in effects[:-1])
        for effect in effects:
            self.carry_out(effect, event, lane)

    def carry_out(self, effect: does.Effect, event: on.Event, lane: object) -> None:
        match effect:
            case does.Release(answers):
                for answer in answers:
                    assert answer.index in self.recorded, "the row is written before the answer leaves"
                    self.answers[answer.request] += 1
            case does.Refuse(request, _, consumed):
                assert consumed or request not in self.by_mac.values(), "what the HSM has is used up"
                self.answers[request] += 1
            case does.RetryLater(request):
                self.later.append(on.RetryDue(request))
            case does.Adopt(role):
                self.adopt(role)
            case does.Wake(woken):
                self.asleep.discard(woken)
            case _ if isinstance(effect, LONG):
                assert lane is not None, f"{effect} has a lane"
                assert lane not in self.long, f"{lane} does one thing at a time"
                self.long[lane] = effect

    def adopt(self, role: RoleStatus) -> None:
        """Apply the role clock rule as `GroupState` does."""
        if isinstance(role.role, Witness):
            if not self.ended:
                self.ended = True
                self.tell(on.Ended())
        else:
            self.tell(on.RoleAdopted(role))

    # --- what may happen next ------------------------------------------------------------------------

    def arrive(self) -> None:
        request = on.ClientRequest(RecordId(bytes(32)), 1, TransportRequest(b""), "acme", "u", 0, lambda _answer: None)
        self.asked.append(request)
        self.tell(on.RequestArrived(request, self.random.random() < 0.05))

    def leave(self) -> None:
        if self.asked:
            request = self.random.choice(self.asked)
            self.gone.add(request)
            self.tell(on.RequestGone(request))

    def step_down(self, *, forced: bool) -> None:
        self.is_leader = False
        role = RoleStatus(Witness(), 7) if forced else RoleStatus(SteppingDown(STARTING), 6)
        if not self.ended and not (forced is False and not self.machine.is_accepting):
            self.adopt(role)

    def finish(self, lane: Any) -> None:
        """Carry a lane's long effect out, with luck or without."""
        effect = self.long.pop(lane)
        event = self.outcome(lane, effect, self.random.random())
        if event is not None:
            self.tell(event, lane)
        if lane not in self.long:
            self.turn(lane)

    def turn_of_members(self) -> None:
        """Let the heartbeat of a pusher come due."""
        member = self.random.choice(MEMBERS[1:])
        if member not in self.long:
            self.turn(member)

    def outcome(self, lane: Any, effect: does.Long, luck: float) -> on.Event | None:
        if isinstance(effect, does.StepDown):
            self.step_down(forced=effect.forced)
            return on.SteppedDown()
        match lane:
            case on.Lane.PRODUCE:
                return self.produced(effect, luck)
            case on.Lane.COMMIT if isinstance(effect, does.AskCommit):
                return self.commit(effect.captures)
            case on.Lane.COMMIT:
                assert isinstance(effect, does.WriteOutbox)
                self.recorded |= {row.index for row in effect.events} if luck < 0.95 else set()
                return on.OutboxWritten() if luck < 0.95 else on.OutboxFailed()
            case on.Lane.HOUSE:
                return self.housed(effect, luck)
            case _ if isinstance(effect, does.Pause):
                return None
        return on.PushFailed(lane, luck < 0.1) if luck < 0.2 else self.captured(lane, behind=luck < 0.3)

    def produced(self, effect: does.Long, luck: float) -> on.Event:
        match effect:
            case does.ReadTail():
                return on.TailRead(entry(str(self.machine.next_index - 1))) if luck < 0.9 else on.TailFailed()
            case does.ReadProofs(requests=requests):
                proofs = [b"p" if self.random.random() < 0.9 else LOST for _ in requests]
                return on.ProofsRead(proofs) if luck < 0.95 else on.ProofsFailed()
            case does.AskHsm(request):
                return on.HsmAnswered(request, self.hsm(request, luck), 1)
            case does.Append(entries):
                return self.append(list(entries), luck)
        assert isinstance(effect, does.ShowOwn)
        return on.OwnShown()

    def housed(self, effect: does.Long, luck: float) -> on.Event:
        match effect:
            case does.WriteCertificate(certificate):
                assert certificate.index <= self.committed
            case does.CompactRows(rows, index):
                assert all(row.first_index <= index < self.committed for row in rows)
            case does.ReadUnsettled():
                return on.UnsettledRead(STARTING - 1, [], [], 0)
            case does.ListRows():
                return on.RowsListed([])
            case does.Rest():
                return on.HouseRested()
        return on.HouseFailed() if luck < 0.2 else _HOUSED[type(effect)]()

    def hsm(self, request: on.ClientRequest, luck: float) -> Any:
        if not self.is_leader:
            return NotLeader(RoleStatus(Witness(), 7) if self.ended else RoleStatus(SteppingDown(STARTING), 6))
        if luck < 0.1:
            return Outcome.STALE_PROOF
        if luck < 0.15:
            return Outcome.SESSION_ERROR
        made = entry(str(self.made))
        self.made += 1
        if not self.ended and self.machine._state.takes(made.index):
            self.by_mac[made.entry_mac] = request
        return AppRequestOk(made, EMPTY_DELTA)

    def append(self, entries: list[LogEntry], luck: float) -> on.AppendFinished:
        next_index = STARTING + len(self.log)
        assert [each.index for each in entries] == list(range(next_index, next_index + len(entries)))
        if luck < 0.02:
            return on.AppendFinished(on.AppendResult.CONFLICT)
        if luck < 0.04:
            return on.AppendFinished(on.AppendResult.AMBIGUOUS)
        self.log += entries
        return on.AppendFinished(on.AppendResult.APPENDED)

    def captured(self, member: Any, *, behind: bool) -> on.PushAnswered:
        index = STARTING - 1 + (self.random.randint(0, len(self.log)) if behind else len(self.log))
        return on.PushAnswered(member, Captured(member, REALM, GROUP, index, mac(str(index)), bytes(32)), behind)

    def persist(self) -> None:
        index = STARTING - 1 + len(self.log)
        self.tell(on.CaptureHeard(Captured(hsm("a"), REALM, GROUP, index, mac(str(index)), bytes(32))))

    def commit(self, captures: tuple[Captured, ...]) -> on.CommitAnswered:
        if self.ended:
            return on.CommitAnswered(NotLeader(RoleStatus(Witness(), 7)))
        index = sorted((each.index for each in captures), reverse=True)[1]
        macs = [mac(str(at)) for at in range(self.committed + 1, index + 1)]
        self.committed = max(self.committed, index)
        result = ResultType(ResultKind.RECOVER1)
        released = tuple((each, TransportResponse(b""), result) for each in macs if each in self.by_mac)
        done = not self.is_leader and self.committed + 1 >= self.made
        role = RoleStatus(Leader(STARTING), 5) if self.is_leader else RoleStatus(SteppingDown(STARTING), 6)
        return on.CommitAnswered(CommitOk(index, released, (), RoleStatus(Witness(), 7) if done else role))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.now += self.random.random() * 0.1
            awake = [lane for lane in (*on.Lane, *MEMBERS[1:]) if lane not in self.long and lane not in self.asleep]
            choices: list[Any] = [lambda lane=lane: self.turn(lane) for lane in awake]
            choices += [lambda lane=lane: self.finish(lane) for lane in list(self.long)]
            choices = [*choices * 2, self.arrive, self.persist, self.turn_of_members]
            if self.later:
                choices.append(lambda: self.tell(self.later.pop(self.random.randrange(len(self.later)))))
            rare = self.random.random()
            if rare < 0.01:
                self.leave()
            elif rare < 0.011:
                self.step_down(forced=self.random.random() < 0.3)
            else:
                self.random.choice(choices)()

    def end(self) -> None:
        """End the leadership and finish what was begun."""
        self.is_leader = False
        self.adopt(RoleStatus(Witness(), 7))
        while self.later or any(lane in self.long for lane in (on.Lane.PRODUCE, on.Lane.COMMIT)):
            if self.later:
                self.tell(self.later.pop())
            for lane in (on.Lane.PRODUCE, on.Lane.COMMIT):
                if lane in self.long:
                    self.finish(lane)


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_every_request_is_answered_once(first: int) -> None:
    """However lanes, members, store and HSM are scheduled, nobody is forgotten, answered twice, or before the row."""
    for seed in range(first, first + 20):
        host = Host(seed)
        host.run(400)
        host.end()
        unanswered = [request for request in host.asked if not host.answers[request] and request not in host.gone]
        assert (seed, unanswered) == (seed, [])
        assert (seed, max(host.answers.values(), default=0)) == (seed, 1)


def test_the_schedules_reach_what_they_are_about() -> None:
    """Answers, retries, ends, compaction and failed writes all occur, so that the test above can fail."""
    seen: Counter[str] = Counter()
    for seed in range(60):
        host = Host(seed)
        told = host.step

        def counting(event: on.Event, now: float, told: Any = told) -> list[does.Effect]:
            effects: list[does.Effect] = told(event, now)
            seen.update(type(each).__name__ for each in (event, *effects))
            return effects

        host.step = counting
        host.run(400)
        host.end()
    wanted = {does.Release, does.RetryLater, does.StepDown, does.CompactRows, does.ReadLog, does.Pause}
    told_of = {on.OutboxFailed, on.HouseFailed, on.Ended}
    assert {kind.__name__ for kind in (*wanted, *told_of) if not seen[kind.__name__]} == set()
