"""The users of a simulated realm: honest and forgetful, on two devices, with tokens that end (simulation.md 2).

Every user's calls are remembered exactly, as in `chaos` (`CountingTransport` counts the attempts that nobody saw
answered). A user registers, recovers with right and wrong PINs, deletes, does two of these at once, and sometimes gives
a call up in the middle.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from juicebox_hsm.client import (
    Client,
    ClientError,
    Configuration,
    InvalidAuth,
    InvalidPin,
    NotRegistered,
    RateLimitExceeded,
    Replaced,
    Transient,
)
from juicebox_hsm.client.transport import Headers
from juicebox_hsm.history import Call, Op, Outcome
from juicebox_hsm.ids import RealmId
from roles.tools.chaos.load import CountingTransport, lost_attempts
from roles.tools.simulate.surroundings import Surroundings

CALL_S: Final = 20.0
GIVE_UP_RATE: Final = 0.06
GIVE_UP_S: Final = 1.0
OVERLAP_RATE: Final = 0.1
EXPIRED_RATE: Final = 0.02
GUESSES_MAX: Final = 5
QUIET_PAUSES: Final = 8.0
"""How much longer users wait between calls when all is well: the interesting half of a run is the other one."""
CALLS_ENOUGH: Final = 76
"""Calls of a run after which that is so: each user makes three more at the end."""
WAVE_S: Final = 1.0
WAVE_RATE: Final = 0.8
WAVE_WIDTH_S: Final = 0.03
"""Most calls come in waves, so that requests meet in a batch and in the HSM, and one second differs from another."""
INFO: Final = b"simulated"
TOKEN_S: Final = 40
"""Tokens live shorter than a run, so that clients come back with new ones and balancers forget old ones."""


class Edge:
    """A client's way to the realm: any balancer, another one each time."""

    def __init__(self, world: Surroundings, name: str, balancers: Sequence[str]) -> None:
        self._world = world
        self._balancers = balancers
        self._name = name
        self._chance = world.split(f"edge {name}")

    async def post(self, url: str, headers: Headers, body: bytes, timeout_s: float) -> tuple[int, bytes]:  # noqa: ARG002
        """Send a request to some balancer. Raises `TransportError`."""
        balancer = self._chance.choice(self._balancers)
        return await self._world.network.post(self._name, balancer, headers, body, timeout_s)


@dataclass(slots=True)
class _Device:
    """One of a user's two devices."""

    transport: CountingTransport
    client: Client
    lock: trio.Lock = field(default_factory=trio.Lock)
    """One call at a time: what is lost is counted for the call that runs."""


@dataclass(frozen=True, slots=True)
class _Ending:
    """How a call ended. `impossible`: an honest client of an honest realm never sees it."""

    outcome: Outcome = Outcome.LOST
    given_up: bool = True
    secret: str = ""
    left: int | None = None
    detail: str = ""
    impossible: bool = False


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a call asks for."""

    op: Op
    pin: str
    secret: str
    guesses: int


async def _ask(client: Client, op: Op, pin: str, secret: str, guesses: int) -> str:
    """Make a call; return the secret that was recovered."""
    match op:
        case Op.REGISTER:
            await client.register(pin.encode(), secret.encode(), INFO, guesses)
        case Op.RECOVER:
            return (await client.recover(pin.encode(), INFO)).decode("utf-8", "replace")
        case Op.DELETE:
            await client.delete()
    return ""


async def _end_of(call: Awaitable[str]) -> _Ending:
    """Return how a call ended that nobody gave up."""
    try:
        return _Ending(Outcome.OK, given_up=False, secret=await call)
    except InvalidPin as error:
        return _Ending(Outcome.INVALID_PIN, given_up=False, left=error.guesses_remaining)
    except NotRegistered:
        return _Ending(Outcome.NOT_REGISTERED, given_up=False)
    except Replaced:
        return _Ending(Outcome.REPLACED, given_up=False)
    except (Transient, InvalidAuth, RateLimitExceeded) as error:
        return _Ending(given_up=False, detail=type(error).__name__)
    except ClientError as error:
        return _Ending(given_up=False, detail=f"{type(error).__name__}: {error}", impossible=True)


class User:
    """One user, with everything random drawn from the run's seed."""

    def __init__(
        self, world: Surroundings, name: str, tenant: str, configuration: Configuration, balancers: Sequence[str]
    ) -> None:
        self.name = name
        self.tenant = tenant
        self._world = world
        self._chance = world.split(f"user {name}")
        self._pin = f"{name}pin0"
        self._registrations = 0
        self._token = ""
        self._token_until_s = -1.0
        self._devices = []
        for device in ("a", "b"):
            counting = CountingTransport(Edge(world, f"{name}{device}", balancers))
            random = world.split(f"device {name}{device}").randbytes
            client = Client(configuration, self._give_token, transport=counting, random=random)
            self._devices.append(_Device(counting, client))

    def _give_token(self, realm: RealmId) -> str:
        """Return the token, a new one when it is about to end; now and then one that has ended."""
        now_s = self._world.now_ms() / 1000
        if self._chance.random() < EXPIRED_RATE and self._world.is_troubled:
            self._world.notes.count("client.expired_token")
            return self._sign(realm, now_s - 2 * TOKEN_S)
        if now_s > self._token_until_s:
            self._token = self._sign(realm, now_s)
            self._token_until_s = now_s + TOKEN_S / 2
        return self._token

    def _sign(self, realm: RealmId, now_s: float) -> str:
        return self._world.keyring.sign(self.tenant, self.name, realm, now_s, TOKEN_S)

    async def run(self) -> None:
        """Call for as long as the world is troubled, and more slowly afterwards until it is told to stop."""
        world = self._world
        while True:
            is_idle = not world.is_troubled and world.calls_made >= CALLS_ENOUGH
            pause_s = world.profile.user_pause_s * (QUIET_PAUSES if is_idle else 1.0)
            with trio.move_on_at(self._next_moment(self._chance.uniform(0.2, 1.8) * pause_s)):
                await world.closing.wait()
                return
            if self._chance.random() < OVERLAP_RATE:
                world.notes.count("client.two_devices")
                async with trio.open_nursery() as nursery:
                    for device in self._devices:
                        nursery.start_soon(self._one, device)
            else:
                await self._one(self._chance.choice(self._devices))

    def _next_moment(self, pause_s: float) -> float:
        """Return when to make the next call: mostly together with others."""
        at_s = trio.current_time() + pause_s
        if self._chance.random() < WAVE_RATE:
            at_s = math.ceil(at_s / WAVE_S) * WAVE_S + self._chance.uniform(0.0, WAVE_WIDTH_S)
        return at_s

    async def burst(self) -> None:
        """Do two things at once, now."""
        async with trio.open_nursery() as nursery:
            for device in self._devices:
                nursery.start_soon(self._one, device)

    async def final_check(self) -> list[str]:
        """Look at the record when all is well: every call must be answered. Returns what was not."""
        device = self._devices[0]
        problems = []
        for op, pin in ((Op.RECOVER, self._pin), (Op.REGISTER, f"{self.name}final"), (Op.RECOVER, f"{self.name}final")):
            call, detail = await self._call(device, op, pin, CALL_S)
            if call.outcome is Outcome.LOST:
                problems.append(f"{call}{': ' if detail else ''}{detail}")
        return problems

    async def _one(self, device: _Device) -> None:
        choices = [(Op.REGISTER, ""), (Op.RECOVER, self._pin), (Op.RECOVER, "wrong"), (Op.DELETE, "")]
        op, pin = self._chance.choices(choices, [3, 6, 3, 1])[0]
        if op is Op.REGISTER:
            pin = self._pin if self._chance.random() < 0.6 else f"{self.name}pin{self._registrations + 1}"
        limit_s = CALL_S
        if self._chance.random() < GIVE_UP_RATE:
            limit_s = self._chance.uniform(0.0, GIVE_UP_S)
        async with device.lock:
            await self._call(device, op, pin, limit_s)

    async def _call(self, device: _Device, op: Op, pin: str, limit_s: float) -> tuple[Call, str]:
        """Make one call and tell the judge."""
        secret, guesses = "", 0
        if op is Op.REGISTER:
            self._registrations += 1
            self._pin = pin
            secret, guesses = f"{self.name}secret{self._registrations}", self._chance.randint(1, GUESSES_MAX)
            self._world.judge.secret("a PIN", pin)
            self._world.judge.secret("a user's secret", secret)
        device.transport.begin()
        start = trio.current_time()
        ending = _Ending()
        try:
            with trio.move_on_after(limit_s):
                ending = await _end_of(_ask(device.client, op, pin, secret, guesses))
        finally:  # also when whoever made us call is cancelled: the realm may still do what it was asked
            call = self._record(device, start, ending, _Asked(op, pin, secret, guesses))
        return call, ending.detail

    def _record(self, device: _Device, start: float, ending: _Ending, asked: _Asked) -> Call:
        """Tell the judge of a call that has ended."""
        if ending.impossible:
            self._world.client_failed(self.name, ending.detail)
        lost = lost_attempts(device.transport.lost, ending.outcome, given_up=ending.given_up)
        secret = ending.secret or asked.secret
        end = trio.current_time()
        outcome, op, pin, guesses = ending.outcome, asked.op, asked.pin, asked.guesses
        call = Call(self.name, op, start, end, outcome, pin, secret, guesses, ending.left, lost)
        shown = ending.detail or ("given up" if ending.given_up else outcome.value)
        self._world.notes.count(f"client.{op.value}.{shown}")
        self._world.notes.tell(f"user {call}: {shown}")
        self._world.called(call)
        return call
