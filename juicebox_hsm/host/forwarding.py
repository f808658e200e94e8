"""How one client request finds the agent that answers it (load-balancer.md 8.3, 9; decision record 0010).

`LeaderSearch` says what to do next and is told what came of it; it neither waits nor sends. The caller MUST

* call `next_step` with the newest table and the time, carry the step out, and call it again, until it is `Answered`;
* tell `heard` the outcome of every `Ask` before the next step;
* after `LookAgain` have asked discovery and all agents once; after `AwaitTable` have waited until a newer table came or
  `until_s` was reached, whichever is first.

Steps come in this order: one pass over the candidates, one `LookAgain`, a second pass, and then `AwaitTable` for routes
not yet tried until the patience ends. There is no pause between tries: backoff belongs to the client.

The replay rule (9.1): a Noise transport message can be consumed by one HSM once. An agent that may have handed it to
its HSM never gets it again; whether it may have is said by `consumed` in its refusal, or by `maybe_delivered` when
there was none. Handshakes that carry a request are idempotent and may go anywhere.

What one agent may have executed no other agent's refusal denies: `RateLimitExceeded` and the like tell the client that
nothing happened, so from then on they are `Unavailable`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from juicebox_hsm.host.routing import Route, RouteKey, RoutingTable
from juicebox_hsm.ids import RealmId, RecordId
from juicebox_hsm.wire.client import ClientOutcome
from juicebox_hsm.wire.rpc import AppOk, Refusal, Refused

TRY_S: Final = 10.0
"""Longest wait for one agent (load-balancer.md constants)."""

REQUEST_S: Final = 25.0
"""Longest time for one client request (load-balancer.md constants)."""

PATIENCE_S: Final = 1.0
"""How long to wait for a new route after the second pass (decision record 0010)."""

SETTLED_S: Final = 10.0
"""A leadership younger than this may not know sessions that clients rightly believe in (load-balancer.md 9)."""

Answer = bytes | ClientOutcome
"""The CBOR NoiseResponse of an agent, or any other outcome."""

_FINAL: Final = {
    Refusal.SESSION_ERROR: ClientOutcome.SESSION_ERROR,
    Refusal.DECODING_ERROR: ClientOutcome.DECODING_ERROR,
    Refusal.RATE_LIMIT_EXCEEDED: ClientOutcome.RATE_LIMIT_EXCEEDED,
    # The agent has too much uncommitted work: asking it again at once would make that worse.
    Refusal.BUSY: ClientOutcome.UNAVAILABLE,
    # Every leader reads the same store.
    Refusal.STORE_DAMAGED: ClientOutcome.UNAVAILABLE,
}
"""Refusals that are the answer, whoever else might be asked."""

_SURELY_UNUSED: Final = frozenset({Refusal.INVALID_REALM, Refusal.INVALID_GROUP, Refusal.INVALID_PROOF})
_SAYS_CONSUMED: Final = frozenset({Refusal.NO_HSM, Refusal.NO_STORE, Refusal.NO_QUORUM, Refusal.NOT_LEADER})


@dataclass(frozen=True, slots=True)
class Ask:
    """Send the request to the agent of `route` and wait for at most `timeout_s`."""

    route: Route
    timeout_s: float


@dataclass(frozen=True, slots=True)
class LookAgain:
    """Ask discovery and all agents now."""


@dataclass(frozen=True, slots=True)
class AwaitTable:
    """Wait for a newer table, until `until_s` on the caller's clock."""

    until_s: float


@dataclass(frozen=True, slots=True)
class Answered:
    """The search is over."""

    answer: Answer


Step = Ask | LookAgain | AwaitTable | Answered

_GIVEN_UP: Final = Answered(ClientOutcome.UNAVAILABLE)


@dataclass(frozen=True, slots=True)
class NoReply:
    """A call without a reply. `maybe_delivered`: the agent may have got the request."""

    maybe_delivered: bool


class _Stage(enum.Enum):
    BEGUN = enum.auto()
    FIRST_PASS = enum.auto()
    LOOKING = enum.auto()
    SECOND_PASS = enum.auto()
    WAITING = enum.auto()


class LeaderSearch:
    """One client request on its way. `is_transport`: it is a Noise transport message, which is used up once."""

    __slots__ = (
        "_answer",
        "_consumed",
        "_consumed_before",
        "_deadline_s",
        "_is_transport",
        "_patience_ends_s",
        "_queue",
        "_realm",
        "_record",
        "_rivals",
        "_stage",
        "_tried",
    )

    def __init__(self, realm: RealmId, record: RecordId, *, is_transport: bool, now_s: float) -> None:
        self._realm = realm
        self._record = record
        self._is_transport = is_transport
        self._deadline_s = now_s + REQUEST_S
        self._patience_ends_s = self._deadline_s
        self._stage = _Stage.BEGUN
        self._queue: list[Route] = []
        self._rivals = False
        self._tried: set[RouteKey] = set()
        self._consumed: set[str] = set()
        self._consumed_before = 0
        self._answer: Answer | None = None

    def next_step(self, table: RoutingTable, now_s: float) -> Step:
        """Say what to do next, by the newest table."""
        if self._answer is not None:
            return Answered(self._answer)
        while True:
            step = self._next_in_pass(now_s)
            if step is not None:
                return step
            match self._stage:
                case _Stage.BEGUN:
                    self._stage = _Stage.FIRST_PASS
                    self._begin_pass(table)
                case _Stage.FIRST_PASS:
                    self._stage = _Stage.LOOKING
                    return LookAgain()
                case _Stage.LOOKING:
                    self._stage = _Stage.SECOND_PASS
                    self._begin_pass(table)
                case _Stage.SECOND_PASS:
                    self._stage = _Stage.WAITING
                    hopeless = table.is_hopeless(self._realm, self._record, now_s)
                    self._patience_ends_s = min(now_s + (0.0 if hopeless else PATIENCE_S), self._deadline_s)
                case _Stage.WAITING:
                    if self._was_used_up():
                        return _GIVEN_UP
                    if not self._begin_pass(table, skip=self._tried):
                        return _GIVEN_UP if now_s >= self._patience_ends_s else AwaitTable(self._patience_ends_s)

    def heard(self, route: Route, reply: AppOk | Refused | NoReply, now_s: float) -> None:
        """Take in what came of asking `route`."""
        match reply:
            case AppOk():
                self._answer = reply.noise
            case Refused():
                self._answer = self._judge(route, reply, now_s)
            case NoReply(maybe_delivered):
                if maybe_delivered:
                    self._consumed.add(route.url)

    def _begin_pass(self, table: RoutingTable, skip: Iterable[RouteKey] = ()) -> bool:
        """Queue the candidates but `skip`; tell whether there are any."""
        candidates = table.candidates(self._realm, self._record)
        self._rivals = len(candidates) > 1
        self._queue = [route for route in candidates if route.key not in skip]
        self._consumed_before = len(self._consumed)
        return bool(self._queue)

    def _next_in_pass(self, now_s: float) -> Step | None:
        """Return the next try of this pass, or None when all were made."""
        while self._queue:
            route = self._queue.pop(0)
            self._tried.add(route.key)
            if self._is_transport and route.url in self._consumed:
                continue
            if now_s >= self._deadline_s:
                return _GIVEN_UP
            return Ask(route, min(TRY_S, self._deadline_s - now_s))
        return None

    def _was_used_up(self) -> bool:
        """Tell whether the last pass may have consumed a message that can be consumed only once."""
        return self._is_transport and len(self._consumed) > self._consumed_before

    def _judge(self, route: Route, refused: Refused, now_s: float) -> ClientOutcome | None:
        """Return the client's outcome, or None when the next candidate may be asked."""
        outcome = refused.outcome
        final = _FINAL.get(outcome)
        if final is not None:
            return ClientOutcome.UNAVAILABLE if self._consumed else final
        if outcome is Refusal.MISSING_SESSION:
            young = now_s - route.since_s < SETTLED_S
            unsure = young or self._rivals or self._consumed
            return ClientOutcome.UNAVAILABLE if unsure else ClientOutcome.MISSING_SESSION
        if refused.consumed or not (outcome in _SURELY_UNUSED or outcome in _SAYS_CONSUMED):
            self._consumed.add(route.url)
        return None
