"""Who is let in: each tenant's rate (agent.md 12). Bounds of backlog and outbox are the leadership's.

Every agent keeps two accounts of a tenant, in requests. The *level* is the tenant's: it fills at the tenant's rate up
to half a second's worth, and pays for what all agents let in, ours at once, the others' when gossip tells. It may go
into debt, and while it is there nothing new is let in anywhere: what was too much is paid back. The *share* is this
agent's part of the rate, in proportion to how much was asked here and, as far as is known, elsewhere; since the shares
of all agents add up to the rate, little goes into debt. A request needs both.

An operation is paid for when it begins. As soon as its first request is committed the following ones are reserved and
paid for; they are let in whatever the accounts say, so an operation under way is never cut. What was reserved and not
used in time is refunded.

Times are seconds of the caller's monotonic clock. Agents tell each other amounts, counts and remaining times, never
moments, so their clocks need not agree.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from juicebox_hsm.ids import RecordId

BURST_S: Final = 0.5
"""The level holds so many seconds' worth of the rate: with all else it keeps any ten seconds within a tenth of it."""
REQUESTS_PER_OPERATION: Final = 3
"""The longest operation; the level holds at least one."""
DEMAND_S: Final = 1.0
"""What was asked counts for the shares for about so long."""
IDLE_SHARE: Final = 0.01
"""Everybody's demand counts as at least this part of the rate, or who was never asked could not let its first in."""
RESERVATION_S: Final = 2.0
PEER_KEPT_S: Final = 2.0
ACTIVE_S: Final = 4.0
"""Tenants with no activity for this long are not gossiped, and their limiters may be forgotten."""
USED_KEPT_S: Final = 2 * RESERVATION_S
DEBT_S: Final = 10.0
"""Debts beyond so many seconds' worth of the rate are forgiven: they are of a higher rate, or of agents long apart."""


class LimiterState(msgspec.Struct, array_like=True, frozen=True):
    """What agents tell each other of one tenant.

    `paid` requests since `epoch` began, which was `age_s` ago; `demand` in requests per second; reservations as
    (number, record, remaining s); numbers of used ones. Numbers and epochs are never used twice.
    """

    epoch: int
    age_s: float
    paid: int
    demand: float
    reservations: list[tuple[int, bytes, float]]
    used: list[int]


_STATE_DECODER: Final = msgspec.msgpack.Decoder(LimiterState)
_STATE_ENCODER: Final = msgspec.msgpack.Encoder()


@dataclass(slots=True)
class _Peer:
    """One other agent's word: what it had paid, its demand, its reservations by record with their ends, used ones."""

    epoch: int
    paid: int
    demand: float
    reservations: dict[bytes, list[tuple[int, float]]]
    used: frozenset[int]


@dataclass(slots=True)
class Limiter:
    """One tenant's accounts here. `rate` is in requests per second; `agents` shares it; `numbers` are drawn once."""

    rate: int
    numbers: Iterator[int] = field(default_factory=itertools.count)
    agents: int = 1
    _now_s: float = -math.inf
    _last_s: float = -math.inf
    _level: float = math.inf
    _own: float = math.inf
    _demand: float = 0.0
    _epoch: int = 0
    _began_s: float = 0.0
    _paid: int = 0
    _reserved: dict[bytes, dict[int, float]] = field(default_factory=dict)
    _used: dict[int, float] = field(default_factory=dict)
    _peers: dict[str, _Peer] = field(default_factory=dict)

    def admit(self, record: RecordId, now_s: float) -> bool:
        """Tell whether a request of `record` is admitted now, and count it if so."""
        self._advance(now_s)
        if self._use_reservation(record, now_s):
            return True
        self._touch(now_s)
        self._demand += 1 / DEMAND_S
        if self.rate == 0 or self._level <= 0 or self._own < 1:
            return False
        self._pay(1)
        return True

    def reserve(self, record: RecordId, now_s: float, requests: int = 1) -> None:
        """Grant `record` as many admissions within the next 2 s, those it still has included."""
        self._advance(now_s)
        self._touch(now_s)
        held = self._reserved.setdefault(bytes(record), {})
        while len(held) < requests:
            held[next(self.numbers)] = 0.0
            self._pay(1)
        for number in held:
            held[number] = now_s + RESERVATION_S

    def is_active(self, now_s: float) -> bool:
        """Tell whether anything happened here in the last 4 s."""
        return now_s - self._last_s <= ACTIVE_S

    def state(self, now_s: float) -> LimiterState:
        """Return what peers need to know, after forgetting what no longer counts."""
        self._advance(now_s)
        for record, held in list(self._reserved.items()):
            for number in [number for number, end_s in held.items() if end_s < now_s]:
                del held[number]
                self._pay(-1)
            if not held:
                del self._reserved[record]
        self._used = {number: end_s for number, end_s in self._used.items() if end_s >= now_s}
        reserved = [(n, r, end_s - now_s) for r, held in self._reserved.items() for n, end_s in held.items()]
        return LimiterState(self._epoch, now_s - self._began_s, self._paid, self._demand, reserved, list(self._used))

    def hear(self, peer: str, state: LimiterState | None, now_s: float) -> None:
        """Replace what is known of `peer`, and pay for what it let in since; None forgets it."""
        self._advance(now_s)
        known = self._peers.get(peer)
        if state is None:
            self._peers.pop(peer, None)
            return
        if known is not None and known.epoch == state.epoch:
            self._spend(state.paid - known.paid)
        elif state.age_s <= PEER_KEPT_S:
            self._spend(state.paid)  # else it began long before we knew it, and most of that is long past
        reservations: dict[bytes, list[tuple[int, float]]] = {}
        for number, record, left_s in state.reservations:
            reservations.setdefault(record, []).append((number, now_s + min(left_s, RESERVATION_S)))
        demand = state.demand if 0 <= state.demand < math.inf else 0.0
        self._peers[peer] = _Peer(state.epoch, state.paid, demand, reservations, frozenset(state.used))
        for held in self._reserved.values():
            for number in held.keys() & self._peers[peer].used:
                del held[number]

    @property
    def knows_peers(self) -> bool:
        """Tell whether any peer's state counts here."""
        return bool(self._peers)

    @property
    def is_holding(self) -> bool:
        """Tell whether reservations or used ones are remembered."""
        return bool(self._reserved or self._used)

    def _full(self) -> float:
        return max(float(REQUESTS_PER_OPERATION), BURST_S * self.rate)

    def _part(self) -> float:
        """Return this agent's part of the rate, above 0 and at most 1."""
        idle = max(IDLE_SHARE * self.rate, IDLE_SHARE)
        all_asked = self._demand + sum(peer.demand for peer in self._peers.values())
        return (self._demand + idle) / (all_asked + idle * max(self.agents, 1 + len(self._peers)))

    def _advance(self, now_s: float) -> None:
        """Let the accounts fill until `now_s`."""
        passed_s = 0.0 if self._now_s == -math.inf else max(0.0, now_s - self._now_s)
        self._now_s = max(self._now_s, now_s)
        part = self._part()
        lowest = -DEBT_S * self.rate
        self._level = min(self._full(), max(lowest, self._level) + self.rate * passed_s)
        self._own = min(max(1.0, self._full() * part), max(lowest * part, self._own) + self.rate * part * passed_s)
        self._demand *= math.exp(-passed_s / DEMAND_S)

    def _touch(self, now_s: float) -> None:
        """Note activity; after a pause so long that peers were not told of us they hear of a new beginning."""
        if not self.is_active(now_s):
            self._epoch, self._began_s, self._paid = next(self.numbers), now_s, 0
        self._last_s = now_s

    def _pay(self, requests: int) -> None:
        self._spend(requests)
        self._own -= requests
        self._paid += requests

    def _spend(self, requests: int) -> None:
        self._level -= requests

    def _use_reservation(self, record: RecordId, now_s: float) -> bool:
        held = self._reserved.get(bytes(record), {})
        theirs = (mine for peer in self._peers.values() for mine in peer.reservations.get(bytes(record), ()))
        for number, end_s in (*held.items(), *theirs):
            if end_s < now_s or number in self._used or any(number in peer.used for peer in self._peers.values()):
                continue
            held.pop(number, None)
            self._used[number] = now_s + USED_KEPT_S
            self._touch(now_s)
            return True
        return False


class Limiters:
    """The limiters of all tenants, created on demand. Rates are in requests per second.

    `first_number` begins the numbers of reservations; it is drawn for each process, so that they differ from others'.
    """

    def __init__(self, default_rate: int, first_number: int = 0) -> None:
        self._default_rate = default_rate
        self._numbers = itertools.count(first_number)
        self._rates: dict[str, int] = {}
        self._configured = False
        self._by_tenant: dict[str, Limiter] = {}
        self._heard_s: dict[str, float] = {}

    def of(self, tenant: str) -> Limiter:
        """Return the tenant's limiter."""
        limiter = self._by_tenant.get(tenant)
        if limiter is None:
            rate = self._rates.get(tenant, self._default_rate)
            limiter = self._by_tenant[tenant] = Limiter(rate, self._numbers, 1 + len(self._heard_s))
        return limiter

    @property
    def is_configured(self) -> bool:
        """Tell whether the tenants' limits are known; until then nobody can be judged, not even by the default."""
        return self._configured

    def configure(self, operations_per_s: Mapping[str, int]) -> None:
        """Adopt the configured operations per second; tenants not named have the default."""
        self._configured = True
        rates = {tenant: ops * REQUESTS_PER_OPERATION for tenant, ops in operations_per_s.items()}
        if rates == self._rates:
            return
        self._rates = rates
        for tenant, limiter in self._by_tenant.items():
            limiter.rate = rates.get(tenant, self._default_rate)

    def snapshot(self, now_s: float) -> list[tuple[str, bytes]]:
        """Return the encoded states of tenants active in the last 4 s; forget limiters that hold nothing."""
        told = []
        for tenant, limiter in list(self._by_tenant.items()):
            if limiter.is_active(now_s):
                told.append((tenant, _STATE_ENCODER.encode(limiter.state(now_s))))
                continue
            limiter.state(now_s)
            if not limiter.knows_peers and not limiter.is_holding:
                del self._by_tenant[tenant]
        return told

    def absorb(self, peer: str, states: list[tuple[str, bytes]], now_s: float) -> bool:
        """Replace what `peer` said before; states that do not decode are skipped. True if it said anything."""
        self._heard_s[peer] = now_s
        self._count_agents()
        told: dict[str, LimiterState] = {}
        for tenant, encoded in states:
            try:
                told[tenant] = _STATE_DECODER.decode(encoded)
            except msgspec.DecodeError:
                continue
        for tenant, limiter in self._by_tenant.items():
            if tenant not in told:
                limiter.hear(peer, None, now_s)
        for tenant, state in told.items():
            self.of(tenant).hear(peer, state, now_s)
        return bool(told)

    def tidy(self, now_s: float) -> None:
        """Forget what no longer counts, also where no peer asks for it; a reservation is one entry per user."""
        self.forget_silent(now_s)
        self.snapshot(now_s)

    def forget_silent(self, now_s: float) -> None:
        """Forget peers that were not heard for 2 s."""
        for peer, heard_s in list(self._heard_s.items()):
            if now_s - heard_s > PEER_KEPT_S:
                del self._heard_s[peer]
                for limiter in self._by_tenant.values():
                    limiter.hear(peer, None, now_s)
        self._count_agents()

    def any_active(self, now_s: float) -> bool:
        """Tell whether any tenant was active here in the last 4 s."""
        return any(limiter.is_active(now_s) for limiter in self._by_tenant.values())

    def _count_agents(self) -> None:
        for limiter in self._by_tenant.values():
            limiter.agents = 1 + len(self._heard_s)
