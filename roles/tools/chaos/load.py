"""The load of a chaos run: users who register, recover with right and wrong PINs and delete, and remember it exactly.

The history checker needs to know how many attempts of each request nobody saw answered. A client does not say, so a
transport of the harness stands between client and realm and counts them: the HTTP requests of one call come in the
order of its phases, and whether one carries a request is not secret.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

import trio

from juicebox_hsm.client import (
    Client,
    ClientError,
    Configuration,
    InvalidPin,
    NotRegistered,
    Replaced,
    Transient,
    Transport,
)
from juicebox_hsm.client.transport import Headers
from juicebox_hsm.errors import DecodingError
from juicebox_hsm.history import Call, Op, Outcome
from juicebox_hsm.ids import RealmId
from juicebox_hsm.wire.client import ClientOutcome, RequestKind, decode_client_request, decode_client_response

CALL_S: Final = 12.0
"""When a user gives up on a call: later than the longest pause of a process, before the client itself does."""

INFO: Final = b"chaos"
NUM_GUESSES_MAX: Final = 5
OVERLAP_SHARE: Final = 0.08
"""Share of moments in which a user makes two calls at once."""

FINAL_TRIES_MAX: Final = 20
FINAL_PAUSE_S: Final = 0.25

_NOT_EXECUTED: Final = frozenset(ClientOutcome) - {ClientOutcome.UNAVAILABLE}
"""Refusals that say the request was not executed; `Unavailable` may mean that the answer got lost inside."""


class CountingTransport:
    """Passes requests on and counts, for the call that runs, the attempts without an answer in each phase."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.lost = [0]

    def begin(self) -> None:
        """Start counting for a new call."""
        self.lost = [0]

    async def post(self, url: str, headers: Headers, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Pass one request on. Raises `TransportError`."""
        if decode_client_request(body).kind is RequestKind.HANDSHAKE_ONLY:
            return await self._inner.post(url, headers, body, timeout_s)
        lost = self.lost
        lost[-1] += 1  # until the answer is here
        status, answer = await self._inner.post(url, headers, body, timeout_s)
        try:
            response = decode_client_response(answer)
        except DecodingError:
            return status, answer
        if not isinstance(response, ClientOutcome):
            lost[-1] -= 1
            lost.append(0)
        elif response in _NOT_EXECUTED:
            lost[-1] -= 1
        return status, answer


@dataclass(slots=True)
class _Lane:
    """One of the two places from which a user calls."""

    transport: CountingTransport
    client: Client


class History:
    """What all users saw. `answered_at` are the times of answers, which show when the realm was unavailable."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.answered_at: list[float] = []
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []

    def add(self, call: Call, detail: str = "") -> None:
        """Record an ended call."""
        self.calls.append(call)
        self.counts[f"{call.op.value}: {call.outcome.value}"] += 1
        if call.outcome is not Outcome.LOST:
            self.answered_at.append(call.end)
        if detail:
            self.violations.append(f"user {call.user} saw {detail} in: {call}")

    def gaps(self, begun: float, ended: float, count: int = 3) -> list[tuple[float, float]]:
        """Return the longest times without any answer as (start after `begun`, length), longest first."""
        times = [begun, *sorted(time for time in self.answered_at if begun <= time <= ended), ended]
        found = [(earlier - begun, later - earlier) for earlier, later in itertools.pairwise(times)]
        return sorted(found, key=lambda gap: -gap[1])[:count]


class User:
    """One user, with everything random drawn from the run's seed."""

    def __init__(
        self,
        name: str,
        seed: int,
        configuration: Configuration,
        tokens: dict[RealmId, str],
        transport: Transport,
        history: History,
    ) -> None:
        self.name = name
        self._random = Random(f"{seed}:{name}")  # noqa: S311 -- a repeatable load
        self._history = history
        self._lanes = []
        for _ in range(2):
            counting = CountingTransport(transport)
            self._lanes.append(_Lane(counting, Client(configuration, tokens, transport=counting)))
        self._registrations = 0
        self._pin = "pin0"

    async def run(self, is_over: Callable[[], bool], pause_s: float) -> None:
        """Call until `is_over`, with `pause_s` between calls on average."""
        while not is_over():
            if self._random.random() < OVERLAP_SHARE:
                async with trio.open_nursery() as nursery:
                    for lane in self._lanes:
                        nursery.start_soon(self._one, lane)
            else:
                await self._one(self._lanes[0])
            await trio.sleep(self._random.uniform(0, 2 * pause_s))

    async def final_check(self) -> None:
        """After everything is healed: look at the record in every way; each call must be answered."""
        checks = [(Op.RECOVER, "wrong"), (Op.RECOVER, self._pin), (Op.RECOVER, self._pin), (Op.REGISTER, "final")]
        checks += [(Op.RECOVER, "final"), (Op.DELETE, ""), (Op.RECOVER, "final")]
        for op, pin in checks:
            for _ in range(FINAL_TRIES_MAX):
                if (await self._call(self._lanes[0], op, pin)).outcome is not Outcome.LOST:
                    break
                await trio.sleep(FINAL_PAUSE_S)
            else:
                self._history.violations.append(f"user {self.name}: {op.value} was not answered after the run")

    async def _one(self, lane: _Lane) -> None:
        op, pin = self._random.choices(
            [(Op.REGISTER, ""), (Op.RECOVER, self._pin), (Op.RECOVER, "wrong"), (Op.DELETE, "")], [3, 6, 4, 1]
        )[0]
        if op is Op.REGISTER:
            pin = self._pin if self._random.random() < 0.6 else f"pin{self._registrations + 1}"
        await self._call(lane, op, pin)

    async def _call(self, lane: _Lane, op: Op, pin: str) -> Call:
        """Make one call and record it."""
        secret, guesses = "", 0
        if op is Op.REGISTER:
            self._registrations += 1
            self._pin = pin
            secret, guesses = f"secret{self._registrations}", self._random.randint(1, NUM_GUESSES_MAX)
        lane.transport.begin()
        start = trio.current_time()
        outcome, left, detail = Outcome.LOST, None, ""
        given_up = True
        with trio.move_on_after(CALL_S):
            try:
                if op is Op.REGISTER:
                    await lane.client.register(pin.encode(), secret.encode(), INFO, guesses)
                elif op is Op.RECOVER:
                    secret = (await lane.client.recover(pin.encode(), INFO)).decode("utf-8", "replace")
                else:
                    await lane.client.delete()
                outcome = Outcome.OK
            except InvalidPin as error:
                outcome, left = Outcome.INVALID_PIN, error.guesses_remaining
            except NotRegistered:
                outcome = Outcome.NOT_REGISTERED
            except Transient:
                pass
            except Replaced:
                outcome = Outcome.REPLACED
            except ClientError as error:
                detail = f"{type(error).__name__}: {error}"
            given_up = False
        lost = lost_attempts(lane.transport.lost, outcome, given_up=given_up or bool(detail))
        call = Call(self.name, op, start, trio.current_time(), outcome, pin, secret, guesses, left, lost)
        self._history.add(call, detail)
        return call


def lost_attempts(counted: list[int], outcome: Outcome, *, given_up: bool) -> tuple[int, ...]:
    """Return `Call.lost` from the transport's counts, which end with a phase after the last answer. Pure.

    A call that was given up may have been about to return the answer that was its last: what that answer said is then
    not known, which is the same to the checker as an attempt that nobody saw answered.
    """
    answered = len(counted) - 1
    if outcome is not Outcome.LOST:
        return tuple(counted[:answered]) or (0,)
    if given_up and answered and not counted[-1]:
        return (*counted[: answered - 1], counted[answered - 1] + 1)
    return tuple(counted)
