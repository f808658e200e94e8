"""The driver of one leadership: it carries out what the machine decides, and decides nothing itself.

The contract is in `juicebox_hsm.host.leadership.machine`. Quick effects are done in `step`, on the spot; a long one is
returned to the lane that told the event, which carries it out and tells what came of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, cast, get_args

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.admission import Limiters
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.damage import node_place
from juicebox_hsm.host.group import GroupState
from juicebox_hsm.host.leadership.effects import (
    Adopt,
    Answer,
    Long,
    Note,
    Noted,
    Quick,
    ReadLog,
    Refuse,
    Release,
    RetryLater,
    SetDeadline,
    StepDown,
    StepDownCode,
    TellDamaged,
    WaitOver,
    Wake,
)
from juicebox_hsm.host.leadership.events import (
    ClientRequest,
    Ended,
    Event,
    HandoverAsked,
    Lane,
    RetryDue,
    Steps,
    StoreFailed,
    Turn,
)
from juicebox_hsm.host.leadership.machine import Leadership
from juicebox_hsm.hsm.messages import ResultKind, StepDownOk
from juicebox_hsm.ids import HsmId
from juicebox_hsm.wire.client import encode_noise_response
from juicebox_hsm.wire.rpc import AppOk, DamageKind, Refused, StoreDamage
from roles.agent import stalls
from roles.agent.oneshot import Signal
from roles.agent.outside import Outside, Roles

_FOLLOWED_BY: Final = {ResultKind.REGISTER1: 1, ResultKind.RECOVER1: 2, ResultKind.RECOVER2: 1}
"""How many requests of the same operation follow, which are let in when they come."""
_QUICK: Final = frozenset(get_args(Quick))
_WHY: Final = {
    StepDownCode.ASKED: "asked to",
    StepDownCode.SHUTTING_DOWN: "shutting down",
    StepDownCode.LOST_DUEL: "another leader wrote index {index}",
    StepDownCode.HOLE: "index {index} never arrived",
    StepDownCode.APPEND_AMBIGUOUS: "append of unknown outcome: {why}",
    StepDownCode.APPEND_REFUSED: "append failed: {why}",
    StepDownCode.OUTBOX_FAILED: "outbox not written: {why}",
}


class Driver:
    """Signals, deadlines and tasks of one leadership."""

    def __init__(
        self,
        outside: Outside,
        group: GroupState,
        leader: Leadership,
        roles: Roles,
        limiters: Limiters,
        log_wanted: Signal,
    ) -> None:
        self._outside = outside
        self._roles = roles
        self._limiters = limiters
        self._log_wanted = log_wanted
        """Wakes whoever reads the group's log."""
        self.group = group
        self.leader = leader
        self._traced: dict[int, Steps] = {}
        """Of requests that are traced and not committed yet: by the index of their entry."""
        self.members = [member for member in group.configuration if member != outside.hsm_id]
        self._signals: dict[Lane | HsmId, Signal] = {lane: Signal() for lane in (*Lane, *self.members)}
        self._deadline_s: float | None = None

    def step(self, event: Event) -> Long | None:
        """Tell the machine an event and do what it wants at once; returns the long effect for the caller's lane."""
        effects = self.leader.step(event, trio.current_time())
        if not effects:
            return None
        last = effects[-1]
        long = None if type(last) in _QUICK else cast("Long", last)
        for effect in effects if long is None else effects[:-1]:
            match effect:
                case Wake(lane):
                    self._signals[lane].set()
                case Release(answers):
                    self._answer(answers)
                case Refuse(request, refusal, consumed):
                    request.reply(Refused(refusal, consumed=consumed))
                case Adopt(role):
                    self._roles.adopt(self.group, role)
                case RetryLater(request, delay_s):
                    self._outside.nursery.start_soon(self._later, RetryDue(request), delay_s)
                case SetDeadline(at_s):
                    self._deadline_s = at_s
                case WaitOver(wait, refusal_or_none):
                    wait.reply(refusal_or_none)
                case ReadLog():
                    self._log_wanted.set()
                case Note(what):
                    self._note(what)
                case TellDamaged(node):
                    damage = StoreDamage(DamageKind.NODE, node_place(node), self.group.group)
                    self._outside.note_damage(damage)
        return long

    async def run_lane(
        self, lane: Lane, carry_out: Callable[[Driver, Long], Awaitable[Long | None]], first: Event | None = None
    ) -> None:
        """Take turns and carry out what they bring until the leadership ends; what was begun is finished."""
        effect = self.step(first or Turn(lane))
        while effect is not None or not self.leader.has_ended:
            if effect is None:
                await self._sleep(lane)
            else:
                effect = await carry_out(self, effect)
            if effect is None:
                effect = self.step(Turn(lane))

    def made(self, request: ClientRequest, index: int) -> None:
        """Note that the HSM made the entry `index` of a request, if the request is traced."""
        if request.steps is not None:
            self._traced[index] = request.steps
            request.steps.enter("append")

    def enter(self, step: str, indexes: Iterable[int]) -> None:
        """Tell traced requests that the step after their append begins for the entries with these indexes."""
        if self._traced:
            for steps in filter(None, map(self._traced.get, indexes)):
                steps.enter(step)

    def released(self, indexes: Iterable[int]) -> None:
        """Forget entries whose answers go out."""
        if self._traced:
            for index in indexes:
                self._traced.pop(index, None)

    async def wait(self, member: HsmId, seconds: float) -> bool:
        """Wait until a member's pusher is woken, or for `seconds`; tell which."""
        return await self._signals[member].wait_at_most(seconds)

    def store_failed(self, error: RealmError) -> None:
        """Tell the machine that the store refused a write, which is tried again."""
        self.step(StoreFailed())
        self.tell_store(error)

    def tell_store(self, error: RealmError) -> None:
        """Say why nothing is committed, once that is so because of the store."""
        if self.leader.quorum(trio.current_time()).lacks_store:
            self._outside.note_trouble(Code.STORE, error, self.group.group)

    def store_works(self) -> None:
        """Forget that the store refused us."""
        self._outside.clear_trouble(Code.STORE, self.group.group)

    def end(self) -> None:
        """Tell the machine its end, and every lane."""
        self.store_works()
        self.step(Ended())
        for signal in self._signals.values():
            signal.set()

    async def leave(self, *, by_others: bool) -> StepDownOk | None:
        """Leave leadership in order. `by_others`: whoever asks also looks for a successor, or none is needed."""
        order = self.step(HandoverAsked(by_others))
        return await self.step_down(order) if isinstance(order, StepDown) else None

    async def step_down(self, order: StepDown) -> StepDownOk | None:
        """Carry out a `StepDown`; the HSM's role is adopted when this returns."""
        if order.code is StepDownCode.HOLE:
            self._outside.metrics.count("agent.append.given_up")
        why = _WHY[order.code].format(index=order.index, why=order.why)
        return await self._roles.step_down(self.group, force=order.forced, why=why)

    async def _sleep(self, lane: Lane) -> None:
        deadline_s, self._deadline_s = (self._deadline_s, None) if lane is Lane.PRODUCE else (None, self._deadline_s)
        if deadline_s is None:
            await self._signals[lane].wait()
        else:
            await self._signals[lane].wait_at_most(max(0.0, deadline_s - trio.current_time()))

    async def _later(self, event: Event, delay_s: float) -> None:
        await trio.sleep(delay_s)
        self.step(event)

    def _note(self, what: Noted) -> None:
        match what:
            case Noted.RETRIES_EXHAUSTED:
                self._outside.metrics.count("agent.start_app_request.exhausted")
            case Noted.REPLY_UNASKED:
                self._outside.log.error("released a reply nobody asked for", group=self.group.group.hex())
            case Noted.QUORUM_LOST:
                self._outside.metrics.count("agent.commit.no_quorum")
                about = stalls.about(self.group, self.leader, trio.current_time())
                self._outside.log.warning("group cannot commit, clients are refused", **about)
            case Noted.QUORUM_BACK:
                about = stalls.about(self.group, self.leader, trio.current_time())
                self._outside.log.info("group commits again", **about)

    def _answer(self, answers: Sequence[Answer]) -> None:
        metrics = self._outside.metrics
        self.released(answer.index for answer in answers)
        counts: Counter[tuple[str, ResultKind]] = Counter()
        now_ms = self._outside.now_ms()
        metrics.timing("agent.commit.latency", (now_ms - answers[0].request.when_ms) * 1_000_000)
        for answer in answers:
            request, kind = answer.request, answer.result.kind
            following = _FOLLOWED_BY.get(kind)
            if following is not None:
                self._limiters.of(request.tenant).reserve(request.record_id, trio.current_time(), following)
            counts[request.tenant, kind] += 1
            request.reply(AppOk(encode_noise_response(answer.noise)))
        realm = self.group.realm.hex()
        for (tenant, kind), count in counts.items():
            metrics.count("realm.request.count", count, realm=realm, tenant=tenant, type=kind.value.lower())
