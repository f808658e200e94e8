"""The tenants' accounts and their gossip (agent.md 12)."""

from __future__ import annotations

import heapq
import itertools
import random
from bisect import bisect_right
from collections.abc import Callable

import pytest

from juicebox_hsm.host.admission import (
    ACTIVE_S,
    DEBT_S,
    PEER_KEPT_S,
    RESERVATION_S,
    USED_KEPT_S,
    Limiter,
    Limiters,
)
from juicebox_hsm.ids import RecordId

ALICE, BOB = RecordId(b"a" * 32), RecordId(b"b" * 32)
NOW = 1_000.0


def admitted(limiter: Limiter, now_s: float, asked: int = 50) -> int:
    """Return how many of many requests are let in at once."""
    return sum(limiter.admit(ALICE, now_s) for _ in range(asked))


def gossip(*agents: Limiters, now_s: float) -> None:
    """Tell every agent what every other one knows."""
    told = [(f"agent{number}", agent.snapshot(now_s)) for number, agent in enumerate(agents)]
    for number, agent in enumerate(agents):
        for name, states in told:
            if name != f"agent{number}":
                agent.absorb(name, states, now_s)


# --- the figures of many agents on virtual time ----------------------------------------------------------


class Realm:
    """Agents that share a tenant, users who recover again and again, and gossip that is late."""

    def __init__(self, rate: int, agents: int, lag_s: float, seed: int) -> None:
        self.random = random.Random(seed)
        self.agents = [Limiters(rate, number << 32) for number in range(agents)]
        self.lag_s = lag_s
        self.times: list[float] = []
        self.cut = 0
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[float], None]]] = []
        for number in range(agents):
            # clocks that have nothing to do with each other
            self._at(self.random.uniform(0, lag_s), self._gossip(number))

    def _at(self, time_s: float, do: Callable[[float], None]) -> None:
        heapq.heappush(self._due, (time_s, next(self._order), do))

    def _clock(self, agent: int, now_s: float) -> float:
        return now_s + 1e4 * agent

    def _gossip(self, number: int) -> Callable[[float], None]:
        def ask(now_s: float) -> None:
            for other, agent in enumerate(self.agents):
                if other != number:
                    said = agent.snapshot(self._clock(other, now_s))

                    def hear(then_s: float, other: int = other, said: list[tuple[str, bytes]] = said) -> None:
                        self.agents[number].absorb(f"{other}", said, self._clock(number, then_s))

                    self._at(now_s + self.lag_s / 5, hear)
            self._at(now_s + self.lag_s * self.random.uniform(0.6, 1.0), ask)

        return ask

    def user(self, agent: int, begin_s: float) -> None:
        """Add a user of one leader: a refused one tries again soon, as people and programs do."""
        record = RecordId(next(self._order).to_bytes(32, "big"))

        def request(now_s: float, reserve: int) -> bool:
            limiter = self.agents[agent].of("acme")
            if not limiter.admit(record, self._clock(agent, now_s)):
                return False
            self.times.append(now_s)
            limiter.reserve(record, self._clock(agent, now_s + 0.01), reserve)
            return True

        def first(now_s: float) -> None:
            if request(now_s, 2):
                self._at(now_s + self.random.uniform(0.1, 1.0), second)  # the PIN is stretched
            else:
                self._at(now_s + self.random.uniform(0.1, 0.3), first)

        def second(now_s: float) -> None:
            self.cut += not request(now_s, 1)
            self._at(now_s + 0.03, third)

        def third(now_s: float) -> None:
            self.cut += not request(now_s, 0)
            self._at(now_s + self.random.uniform(0.1, 0.3), first)

        self._at(begin_s, first)

    def run(self, until_s: float) -> None:
        """Play until `until_s`."""
        while self._due[0][0] < until_s:
            time_s, _, do = heapq.heappop(self._due)
            do(time_s)

    def worst(self, window_s: float = 10.0) -> int:
        """Return the most requests that were let in within any window."""
        times = sorted(self.times)
        return max(bisect_right(times, time_s + window_s) - at for at, time_s in enumerate(times))


@pytest.mark.parametrize("lag_s", [0.1, 0.5])
@pytest.mark.parametrize("agents", [1, 3, 8])
@pytest.mark.parametrize("rate", [10, 30])
def test_any_ten_seconds_are_within_a_tenth(rate: int, agents: int, lag_s: float) -> None:
    """However many leaders, however late gossip, whatever their clocks: neither more nor much less than the rate."""
    for seed in range(2):
        realm = Realm(rate, agents, lag_s, seed)
        for number in range(2 * rate):
            realm.user(number % agents, 5.0 + realm.random.random() / 10)
        realm.run(35.0)
        assert realm.worst() <= 1.10 * 10 * rate, seed
        assert len(realm.times) >= 0.90 * 30 * rate, seed
        assert realm.cut == 0, "an operation under way is finished"


@pytest.mark.parametrize("agents", [3, 8])
def test_one_busy_leader_has_the_whole_rate(agents: int) -> None:
    """A tenant whose users belong to one leader is not limited to that leader's equal part; others let their few in."""
    realm = Realm(10, agents, 0.5, 1)
    for number in range(20):
        realm.user(0, 5.0 + number / 100)
    realm.user(1, 15.0)
    realm.run(45.0)
    assert len(realm.times) >= 0.90 * 400
    assert realm.worst() <= 110


@pytest.mark.parametrize("agents", [1, 3, 8])
def test_the_smallest_limit_is_kept_but_for_an_operation_a_leader(agents: int) -> None:
    """At one operation per second each leader may begin one before it hears of the others'; on average it is kept."""
    for seed in range(2):
        realm = Realm(3, agents, 0.5, seed)
        for number in range(16):
            realm.user(number % agents, 5.0 + realm.random.random() / 10)
        realm.run(65.0)
        assert realm.worst() <= 1.10 * 30 + 3 * agents, seed
        assert 0.80 * 3 * 60 <= len(realm.times) <= 1.10 * 3 * 60 + 3 * agents
        assert realm.cut == 0


# --- one agent -------------------------------------------------------------------------------------------


def test_half_a_second_at_once_and_then_the_rate() -> None:
    """What was saved up is let in at once, one above nothing; after that the rate, and refusals cost nothing."""
    limiter = Limiter(10)
    assert admitted(limiter, NOW) == 5
    assert admitted(limiter, NOW + 0.05) == 0
    assert admitted(limiter, NOW + 1.0) == 5, "not more is saved up"
    times = [NOW + 1 + step / 100 for step in range(1, 1001)]
    assert 99 <= sum(limiter.admit(ALICE, time_s) for time_s in times) <= 101


def test_rate_zero_blocks() -> None:
    """A capacity of 0 blocks the tenant, and ends with the block."""
    limiter = Limiter(0)
    assert admitted(limiter, NOW) == 0
    limiter.rate = 30
    assert admitted(limiter, NOW + 1) == 15


def test_a_debt_of_another_rate_is_forgiven() -> None:
    """Whatever was let in at a high rate, a lower one has its own pace soon."""
    limiter = Limiter(3000)
    assert admitted(limiter, NOW, 1500) == 1500
    for number in range(1000):
        limiter.reserve(RecordId(number.to_bytes(32, "big")), NOW, 2)
    limiter.rate = 3
    assert admitted(limiter, NOW + DEBT_S + 2.0) > 0


def test_reservations_admit_what_they_say_and_are_paid_at_once() -> None:
    """A reserved request passes whatever the accounts say, once each; it is paid for when it is reserved."""
    limiter = Limiter(10)
    assert limiter.admit(ALICE, NOW)
    limiter.reserve(ALICE, NOW, 2)
    assert sum(limiter.admit(BOB, NOW) for _ in range(9)) == 2, "three of five are gone"
    assert limiter.admit(ALICE, NOW)
    limiter.reserve(ALICE, NOW, 1)
    assert limiter.admit(ALICE, NOW)
    assert not limiter.admit(ALICE, NOW)


def test_a_reservation_ends_after_two_seconds_and_is_refunded() -> None:
    """A reservation counts up to its end; a later one of the record moves the end; what was not used comes back."""
    limiter = Limiter(0)
    limiter.reserve(ALICE, NOW, 1)
    limiter.reserve(ALICE, NOW + 1, 1)
    assert limiter.state(NOW + 1).paid == 1
    assert limiter.admit(ALICE, NOW + 1 + RESERVATION_S)
    limiter.reserve(BOB, NOW + 1, 2)
    assert limiter.state(NOW + 1).paid == 3
    assert limiter.state(NOW + 1 + RESERVATION_S + 0.1).paid == 1
    assert not limiter.admit(BOB, NOW + 1 + RESERVATION_S + 0.1)


# --- several -------------------------------------------------------------------------------------------


def test_what_others_let_in_is_paid_for_once() -> None:
    """A peer's admissions count when they are heard of, whatever the clocks say, and not again with its next word."""
    mine, other = Limiters(10), Limiters(10, 1 << 32)
    mine.absorb("other", [], NOW)
    assert admitted(other.of("acme"), 5.0) == 5
    other.of("acme").reserve(BOB, 5.0, 2)
    for late in range(3):
        mine.absorb("other", other.snapshot(5.0), NOW + late / 1000)
    assert admitted(mine.of("acme"), NOW + 0.1) == 0
    assert admitted(mine.of("acme"), NOW + 0.8) > 0


def test_a_peer_that_began_long_ago_owes_nothing() -> None:
    """An agent that has just started does not pay for what others let in before."""
    mine, other = Limiters(10), Limiters(10, 1 << 32)
    for second in range(10):
        other.of("acme").admit(BOB, float(second))
    mine.absorb("other", other.snapshot(9.0), NOW)
    assert admitted(mine.of("acme"), NOW) > 0


def test_what_was_let_in_after_a_silence_counts() -> None:
    """A tenant that was quiet for long, and no longer gossiped, is told of from its new beginning."""
    mine, other = Limiters(10), Limiters(10, 1 << 32)
    assert other.of("acme").admit(BOB, 0.0)
    mine.absorb("other", other.snapshot(0.0), NOW)
    mine.absorb("other", other.snapshot(100.0), NOW + 100)
    assert admitted(other.of("acme"), 200.0) == 5
    mine.absorb("other", other.snapshot(200.0), NOW + 200)
    assert admitted(mine.of("acme"), NOW + 200) == 0


def test_a_reservation_works_at_another_agent_once() -> None:
    """After a leader change the new leader honours what the old one reserved and paid, and both know it is used."""
    old, new = Limiters(10), Limiters(10, 1 << 32)
    old.of("acme").reserve(ALICE, NOW)
    gossip(old, new, now_s=NOW)
    new.of("acme").rate = old.of("acme").rate = 0
    assert new.of("acme").admit(ALICE, NOW + 0.1)
    assert not new.of("acme").admit(ALICE, NOW + 0.2)
    assert new.of("acme").state(NOW + 0.2).paid == 0
    gossip(old, new, now_s=NOW + 0.3)
    assert not old.of("acme").admit(ALICE, NOW + 0.4)
    assert old.of("acme").state(NOW + RESERVATION_S + 1).paid == 1, "used elsewhere, so not refunded"


def test_used_reservations_are_told_for_two_lifetimes() -> None:
    """A used reservation stays in the gossip long enough for every peer, then goes."""
    limiter = Limiter(0)
    limiter.reserve(ALICE, NOW)
    assert limiter.admit(ALICE, NOW)
    assert len(limiter.state(NOW + USED_KEPT_S).used) == 1
    assert limiter.state(NOW + USED_KEPT_S + 0.1).used == []


def test_silent_peers_are_forgotten() -> None:
    """A peer's demand and reservations do not count once it was silent for 2 s."""
    mine, other = Limiters(10), Limiters(10, 1 << 32)
    assert other.of("acme").admit(ALICE, NOW)
    mine.absorb("other", other.snapshot(NOW), NOW)
    mine.forget_silent(NOW + PEER_KEPT_S)
    assert mine.of("acme").knows_peers
    mine.forget_silent(NOW + PEER_KEPT_S + 0.1)
    assert not mine.of("acme").knows_peers


def test_garbage_from_a_peer_is_skipped() -> None:
    """An undecodable state, as of an agent of another version, neither raises nor disturbs others of its message."""
    mine, other = Limiters(10), Limiters(10, 1 << 32)
    assert admitted(other.of("acme"), NOW) == 5
    assert mine.absorb("other", [("bad", b"\xc1"), ("older", b"\x93\x90\x90\x90"), *other.snapshot(NOW)], NOW)
    assert admitted(mine.of("acme"), NOW) == 0


def test_configuration_comes_and_goes() -> None:
    """A tenant has three requests per operation, and the default again once its configuration vanishes."""
    limiters = Limiters(10)
    assert limiters.of("acme").rate == 10
    limiters.configure({"acme": 4, "other": 0})
    assert limiters.of("acme").rate == 12
    assert limiters.of("other").rate == 0
    limiters.configure({})
    assert limiters.of("acme").rate == 10
    assert limiters.of("other").rate == 10


def test_quiet_tenants_are_not_told() -> None:
    """Tenants without activity for 4 s leave the gossip and, holding nothing, the memory."""
    limiters = Limiters(10)
    assert limiters.of("acme").admit(ALICE, NOW)
    assert [tenant for tenant, _ in limiters.snapshot(NOW + ACTIVE_S)] == ["acme"]
    assert limiters.any_active(NOW + ACTIVE_S)
    assert limiters.snapshot(NOW + ACTIVE_S + 0.1) == []
    assert not limiters.any_active(NOW + ACTIVE_S + 0.1)
    assert not limiters._by_tenant


def test_a_lone_agent_forgets_too() -> None:
    """Without peers that ask, used and expired reservations and idle tenants do not pile up."""
    limiters = Limiters(10)
    for number in range(100):
        limiters.of(f"tenant{number}").reserve(ALICE, NOW)
        limiters.of(f"tenant{number}").admit(ALICE, NOW)
    limiters.tidy(NOW + USED_KEPT_S + 0.1)
    limiters.tidy(NOW + USED_KEPT_S + 0.2)
    assert not limiters._by_tenant
