"""A realm of one record that is exact by construction, clients that lose answers, and a slow second checker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from juicebox_hsm.history import Call, Op, Outcome

ATTEMPTS_MAX = 5
PHASES = {Op.REGISTER: ["register1", "register2"], Op.RECOVER: ["recover1", "recover2", "recover3"]}


@dataclass
class Record:
    """The record of client-protocol.md 9, written as its table."""

    state: str = "NotRegistered"
    secret: str = ""
    pin: str = ""
    limit: int = 0
    used: int = 0

    def execute(self, request: str, call: Call, version: str) -> tuple[str, int, str]:
        """Execute one request; return (answer, guesses left, secret that names the version)."""
        if request == "register1":
            return "ok", 0, ""
        if request == "register2":
            self.state, self.secret, self.pin = "Registered", call.secret, call.pin
            self.limit, self.used = call.num_guesses, 0
            return "ok", 0, ""
        if request == "delete":
            self.state = "NotRegistered"
            return "ok", 0, ""
        if self.state == "NotRegistered":
            return "not registered", 0, ""
        if self.state == "NoGuesses":
            return "no guesses", 0, ""
        if request != "recover1" and self.secret != version:
            return "version", 0, ""
        if request == "recover3":
            self.used = 0
            return "ok", 0, self.secret
        if self.used >= self.limit:
            self.state = "NoGuesses"
            return "no guesses", 0, ""
        if request == "recover2":
            self.used += 1
        return "ok", self.limit - self.used, self.secret


@dataclass
class _Lane:
    """One task of a client: the call it runs, and how far."""

    call: Call | None = None
    phase: int = 0
    version: str = ""
    lost: list[int] = field(default_factory=list)


class Simulation:
    """Clients of one user against one record, one step at a time; `calls` is the history they saw."""

    def __init__(self, random: Random, *, lanes: int, loss: float, count: int, barriers: bool = True) -> None:
        self.random = random
        self.loss = loss
        self.count = count
        self.record = Record()
        self.lanes = [_Lane() for _ in range(lanes)]
        self.calls: list[Call] = []
        self.barriers: list[float] = []
        self._with_barriers = barriers
        self._late: list[tuple[str, Call, str]] = []
        self._now = 0.0
        self._begun = 0

    def run(self) -> None:
        """Run until `count` calls have ended."""
        while len(self.calls) < self.count:
            self._now += 1.0
            self._execute_late()
            if self._with_barriers and self.random.random() < 0.01:
                self._late.clear()
                self.barriers.append(self._now)
                self._now += 1.0
            lane = self.random.choice(self.lanes)
            if lane.call is None:
                if self._begun < self.count:
                    self._begin(lane)
            else:
                self._attempt(lane, lane.call)

    def _execute_late(self) -> None:
        if self._late and self.random.random() < 0.3:
            request, call, version = self._late.pop(self.random.randrange(len(self._late)))
            self.record.execute(request, call, version)

    def _begin(self, lane: _Lane) -> None:
        self._begun += 1
        op = self.random.choices([Op.REGISTER, Op.RECOVER, Op.DELETE], [3, 7, 1])[0]
        call = Call("ann", op, self._now, self._now, Outcome.LOST, pin=self.random.choice(["right", "right", "wrong"]))
        if op is Op.REGISTER:
            guesses = self.random.choice([0, 1, 2, 3, 3, 5])
            call = replace(call, pin="right", secret=f"s{self._begun}", num_guesses=guesses)
        lane.call, lane.phase, lane.version, lane.lost = call, 0, "", [0]

    def _attempt(self, lane: _Lane, call: Call) -> None:
        """Make one attempt of the lane's request: answered, or lost in one of three ways."""
        request = PHASES.get(call.op, ["delete"])[lane.phase]
        if self.random.random() >= self.loss:
            self._answer(lane, call, *self.record.execute(request, call, lane.version))
            return
        match self.random.randrange(3):
            case 0:
                self.record.execute(request, call, lane.version)
            case 1:
                self._late.append((request, call, lane.version))
        lane.lost[-1] += 1
        if lane.lost[-1] == ATTEMPTS_MAX or self.random.random() < 0.4:  # a client may also be stopped
            self._end(lane, call)

    def _answer(self, lane: _Lane, call: Call, answer: str, left: int, secret: str) -> None:
        if answer == "no guesses":
            self._end(lane, replace(call, outcome=Outcome.INVALID_PIN, guesses_remaining=0))
        elif answer == "not registered":
            self._end(lane, replace(call, outcome=Outcome.NOT_REGISTERED))
        elif answer == "version":
            self._end(lane, replace(call, outcome=Outcome.REPLACED))
        elif call.op is Op.RECOVER and lane.phase == 1 and call.pin != self.record.pin:
            self._end(lane, replace(call, outcome=Outcome.INVALID_PIN, guesses_remaining=left))
        elif lane.phase + 1 < len(PHASES.get(call.op, ["delete"])):
            lane.version = secret
            lane.phase += 1
            lane.lost.append(0)
        else:
            done = replace(call, outcome=Outcome.OK)
            self._end(lane, replace(done, secret=secret) if call.op is Op.RECOVER else done)

    def _end(self, lane: _Lane, call: Call) -> None:
        self._now += 1.0
        self.calls.append(replace(call, end=self._now, lost=tuple(lane.lost)))
        lane.call = None


@dataclass(frozen=True)
class _Item:
    """One request in the slow checker: which call and phase, and whether its answer was seen."""

    call: int
    phase: int
    answered: bool


def explainable(calls: Sequence[Call]) -> bool:
    """Decide by trying every order of all requests: the oracle for small histories without barriers."""
    items = []
    for index, call in enumerate(calls):
        assert call.lost is not None
        for phase, lost in enumerate(call.lost):
            if call.outcome is not Outcome.LOST or phase + 1 < len(call.lost):
                items.append(_Item(index, phase, answered=True))
            items += [_Item(index, phase, answered=False)] * lost
    return any(_runs(calls, order) for order in _orders(calls, items))


def _orders(calls: Sequence[Call], items: list[_Item]) -> Iterator[list[_Item]]:
    """Return every order that respects time; an unanswered request may also be left out."""
    due = [item for item in items if item.answered]
    if not due:
        yield []  # whatever stays unanswered after the last answer, nobody can see
        return
    for item in set(items):
        before = [other for other in due if other is not item and _precedes(calls, other, item)]
        if any(other != item for other in before):
            continue
        rest = list(items)
        rest.remove(item)
        for order in _orders(calls, rest):
            yield [item, *order]


def _precedes(calls: Sequence[Call], first: _Item, second: _Item) -> bool:
    """Tell whether an answered request must come before another one."""
    if first.call == second.call:
        return first.phase < second.phase
    return calls[first.call].end < calls[second.call].start


def _runs(calls: Sequence[Call], order: list[_Item]) -> bool:
    """Tell whether executing requests in this order gives every caller its answer."""
    record = Record()
    versions: dict[int, str] = {}
    for item in order:
        call = calls[item.call]
        request = PHASES.get(call.op, ["delete"])[item.phase]
        answer, left, secret = record.execute(request, call, versions.get(item.call, ""))
        if item.answered and not _fits(call, item, record, answer, left, secret):
            return False
        if item.answered and request == "recover1":
            versions[item.call] = secret
    return True


def _fits(call: Call, item: _Item, record: Record, answer: str, left: int, secret: str) -> bool:
    assert call.lost is not None
    is_last = item.phase + 1 == len(call.lost)
    outcome: tuple[Outcome, int | None] | None = {
        "no guesses": (Outcome.INVALID_PIN, 0),
        "not registered": (Outcome.NOT_REGISTERED, None),
        "version": (Outcome.REPLACED, None),
    }.get(answer)
    if outcome is None and call.op is Op.RECOVER and item.phase == 1 and call.pin != record.pin:
        outcome = (Outcome.INVALID_PIN, left)
    if outcome is None and item.phase + 1 == len(PHASES.get(call.op, ["delete"])):
        outcome = (Outcome.OK, None)
        if call.op is Op.RECOVER and secret != call.secret:
            return False
    if outcome is None:
        return not is_last
    return is_last and outcome == (call.outcome, call.guesses_remaining)
