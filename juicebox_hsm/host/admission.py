"""Who is let in: each tenant's rate (agent.md 12). Bounds of backlog and outbox are the leadership's.

The rate is an exact sliding one-second window, shared among agents by gossip. A request is admitted when fewer than
`rate` were admitted in the last second here and, as far as gossip knows, at the other agents, or when its record holds
an unused reservation: what phase one of an operation earned, so that an operation once begun can finish. Times are
Unix milliseconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from juicebox_hsm.ids import RecordId

WINDOW_MS: Final = 1000
RESERVATION_MS: Final = 2000
USED_KEPT_MS: Final = 2 * RESERVATION_MS
PEER_KEPT_MS: Final = 2000
ACTIVE_MS: Final = 4000
"""Tenants with no activity for this long are not gossiped, and their limiters may be forgotten."""
REQUESTS_PER_OPERATION: Final = 3


class LimiterState(msgspec.Struct, array_like=True, frozen=True):
    """What agents tell each other of one tenant: admitted times, reservations and used ones as (expiry, record)."""

    requests: list[int]
    reservations: list[tuple[int, bytes]]
    used: list[tuple[int, bytes]]


_STATE_DECODER: Final = msgspec.msgpack.Decoder(LimiterState)
_STATE_ENCODER: Final = msgspec.msgpack.Encoder()


@dataclass(slots=True)
class _Peer:
    """One other agent's view: sorted admitted times, reservations by record, used reservations."""

    requests: list[int]
    reservations: dict[bytes, int]
    used: set[tuple[int, bytes]]


@dataclass(slots=True)
class Limiter:
    """One tenant's window here, with what the peers said of theirs. `rate` is in requests per second."""

    rate: int
    _own: deque[int] = field(default_factory=deque)
    _reservations: dict[bytes, int] = field(default_factory=dict)
    _used: dict[tuple[int, bytes], None] = field(default_factory=dict)
    _peers: dict[str, _Peer] = field(default_factory=dict)
    _last_ms: int = 0

    def admit(self, record: RecordId, now_ms: int) -> bool:
        """Tell whether a request of `record` is admitted now, and count it if so."""
        own = self._own
        floor = now_ms - WINDOW_MS
        while own and own[0] < floor:
            own.popleft()
        if own and own[-1] > now_ms + WINDOW_MS:
            own.clear()  # the clock was set back; until it was there again the window would have stayed full
        count = len(own)
        for peer in self._peers.values():
            count += len(peer.requests) - bisect_left(peer.requests, floor)
        if count >= self.rate and not self._use_reservation(record, now_ms):
            return False
        own.append(now_ms)
        self._last_ms = now_ms
        return True

    def reserve(self, record: RecordId, now_ms: int) -> None:
        """Grant `record` one admission within the next 2 s."""
        self._reservations[record] = max(now_ms + RESERVATION_MS, self._reservations.get(record, 0))
        self._last_ms = now_ms

    def _use_reservation(self, record: RecordId, now_ms: int) -> bool:
        for source in (self._reservations, *(peer.reservations for peer in self._peers.values())):
            expiry = source.get(record)
            if expiry is None or expiry < now_ms:
                continue
            key = (expiry, bytes(record))
            if key in self._used or any(key in peer.used for peer in self._peers.values()):
                continue
            self._used[key] = None
            return True
        return False

    def is_active(self, now_ms: int) -> bool:
        """Tell whether anything happened here in the last 4 s."""
        return now_ms - self._last_ms <= ACTIVE_MS

    def state(self, now_ms: int) -> LimiterState:
        """Return what peers need to know, after forgetting what no longer counts."""
        floor = now_ms - WINDOW_MS
        while self._own and self._own[0] < floor:
            self._own.popleft()
        self._reservations = {record: expiry for record, expiry in self._reservations.items() if expiry >= now_ms}
        self._used = {key: None for key in self._used if key[0] + USED_KEPT_MS >= now_ms}
        return LimiterState(
            list(self._own), [(expiry, record) for record, expiry in self._reservations.items()], list(self._used)
        )

    def hear(self, peer: str, state: LimiterState | None) -> None:
        """Replace what is known of `peer`; None forgets it."""
        if state is None:
            self._peers.pop(peer, None)
            return
        reservations: dict[bytes, int] = {}
        for expiry, record in state.reservations:
            reservations[record] = max(expiry, reservations.get(record, 0))
        self._peers[peer] = _Peer(
            sorted(state.requests), reservations, {(expiry, record) for expiry, record in state.used}
        )

    @property
    def knows_peers(self) -> bool:
        """Tell whether any peer's state counts here."""
        return bool(self._peers)


class Limiters:
    """The limiters of all tenants, created on demand. Rates are in requests per second."""

    def __init__(self, default_rate: int) -> None:
        self._default_rate = default_rate
        self._rates: dict[str, int] = {}
        self._by_tenant: dict[str, Limiter] = {}
        self._heard_ms: dict[str, int] = {}

    def of(self, tenant: str) -> Limiter:
        """Return the tenant's limiter."""
        limiter = self._by_tenant.get(tenant)
        if limiter is None:
            limiter = self._by_tenant[tenant] = Limiter(self._rates.get(tenant, self._default_rate))
        return limiter

    def configure(self, operations_per_s: Mapping[str, int]) -> None:
        """Adopt the configured operations per second; tenants not named have the default."""
        rates = {tenant: ops * REQUESTS_PER_OPERATION for tenant, ops in operations_per_s.items()}
        if rates == self._rates:
            return
        self._rates = rates
        for tenant, limiter in self._by_tenant.items():
            limiter.rate = rates.get(tenant, self._default_rate)

    def snapshot(self, now_ms: int) -> list[tuple[str, bytes]]:
        """Return the encoded states of tenants active in the last 4 s; forget limiters that hold nothing."""
        told = []
        for tenant, limiter in list(self._by_tenant.items()):
            if limiter.is_active(now_ms):
                told.append((tenant, _STATE_ENCODER.encode(limiter.state(now_ms))))
            elif not limiter.knows_peers and not limiter.state(now_ms).used:
                del self._by_tenant[tenant]
        return told

    def absorb(self, peer: str, states: list[tuple[str, bytes]], now_ms: int) -> bool:
        """Replace what `peer` said before; states that do not decode are skipped. True if it said anything."""
        self._heard_ms[peer] = now_ms
        told: dict[str, LimiterState] = {}
        for tenant, encoded in states:
            try:
                told[tenant] = _STATE_DECODER.decode(encoded)
            except msgspec.DecodeError:
                continue
        for tenant, limiter in self._by_tenant.items():
            if tenant not in told:
                limiter.hear(peer, None)
        for tenant, state in told.items():
            self.of(tenant).hear(peer, state)
        return bool(told)

    def tidy(self, now_ms: int) -> None:
        """Forget what no longer counts, also where no peer asks for it; a reservation is one entry per user."""
        self.forget_silent(now_ms)
        self.snapshot(now_ms)

    def forget_silent(self, now_ms: int) -> None:
        """Forget peers that were not heard for 2 s."""
        for peer, heard_ms in list(self._heard_ms.items()):
            if now_ms - heard_ms > PEER_KEPT_MS:
                del self._heard_ms[peer]
                for limiter in self._by_tenant.values():
                    limiter.hear(peer, None)

    def any_active(self, now_ms: int) -> bool:
        """Tell whether any tenant was active here in the last 4 s."""
        return any(limiter.is_active(now_ms) for limiter in self._by_tenant.values())
