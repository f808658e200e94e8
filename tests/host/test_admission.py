"""The sliding window and its gossip (agent.md 12)."""

from __future__ import annotations

from juicebox_hsm.host.admission import (
    PEER_KEPT_MS,
    RESERVATION_MS,
    USED_KEPT_MS,
    Limiter,
    Limiters,
    LimiterState,
)
from juicebox_hsm.ids import RecordId

ALICE, BOB = RecordId(b"a" * 32), RecordId(b"b" * 32)
NOW = 1_700_000_000_000


def gossip(*agents: Limiters, now_ms: int) -> None:
    """Tell every agent what every other one knows."""
    told = [(f"agent{number}", agent.snapshot(now_ms)) for number, agent in enumerate(agents)]
    for number, agent in enumerate(agents):
        for name, states in told:
            if name != f"agent{number}":
                agent.absorb(name, states, now_ms)


def test_five_a_second() -> None:
    """Rate 5 admits five requests in a second and the sixth only when the first is more than 1000 ms old."""
    limiter = Limiter(5)
    assert all(limiter.admit(ALICE, NOW + number) for number in range(5))
    assert not limiter.admit(ALICE, NOW + 999)
    assert not limiter.admit(ALICE, NOW + 1000)
    assert limiter.admit(ALICE, NOW + 1001)
    assert limiter.admit(ALICE, NOW + 1002)
    assert limiter.admit(ALICE, NOW + 1003)


def test_refused_requests_do_not_count() -> None:
    """A client that hammers does not keep its own window full."""
    limiter = Limiter(1)
    assert limiter.admit(ALICE, NOW)
    for late in range(1, 1001):
        assert not limiter.admit(ALICE, NOW + late)
    assert limiter.admit(ALICE, NOW + 1001)


def test_rate_zero_blocks() -> None:
    """A capacity of 0 blocks the tenant."""
    assert not Limiter(0).admit(ALICE, NOW)


def test_a_reservation_admits_exactly_one() -> None:
    """A reservation lets its record pass once at a full window, and nobody else."""
    limiter = Limiter(1)
    assert limiter.admit(ALICE, NOW)
    limiter.reserve(ALICE, NOW)
    assert not limiter.admit(BOB, NOW)
    assert limiter.admit(ALICE, NOW + 1)
    assert not limiter.admit(ALICE, NOW + 2)


def test_a_reservation_ends_after_two_seconds() -> None:
    """A reservation counts up to its expiry and not beyond, and a later one replaces it."""
    limiter = Limiter(0)
    limiter.reserve(ALICE, NOW)
    assert not limiter.admit(ALICE, NOW + RESERVATION_MS + 1)
    limiter.reserve(ALICE, NOW + 10)
    limiter.reserve(ALICE, NOW + 5)
    assert limiter.admit(ALICE, NOW + RESERVATION_MS + 10)


def test_a_reservation_is_not_used_while_there_is_room() -> None:
    """What the window admits costs no reservation."""
    limiter = Limiter(2)
    limiter.reserve(ALICE, NOW)
    assert limiter.admit(ALICE, NOW)
    assert limiter.admit(ALICE, NOW)
    assert limiter.admit(ALICE, NOW)
    assert not limiter.admit(ALICE, NOW)


def test_three_agents_share_a_rate() -> None:
    """Three agents at 3 of 5 each admit at most two more each before gossip, and none after."""
    agents = [Limiters(5) for _ in range(3)]
    for agent in agents:
        assert all(agent.of("acme").admit(ALICE, NOW) for _ in range(3))
    assert [sum(agent.of("acme").admit(ALICE, NOW + 1) for _ in range(5)) for agent in agents] == [2, 2, 2]
    gossip(*agents, now_ms=NOW + 2)
    assert not any(agent.of("acme").admit(ALICE, NOW + 3) for agent in agents)
    assert all(agent.of("acme").admit(ALICE, NOW + 1002) for agent in agents)


def test_a_reservation_works_at_another_agent_once() -> None:
    """After a leader change the new leader honours what the old one reserved, and both know that it is used."""
    old, new = Limiters(0), Limiters(0)
    old.of("acme").reserve(ALICE, NOW)
    gossip(old, new, now_ms=NOW)
    assert new.of("acme").admit(ALICE, NOW + 1)
    assert not new.of("acme").admit(ALICE, NOW + 2)
    gossip(old, new, now_ms=NOW + 3)
    assert not old.of("acme").admit(ALICE, NOW + 4)


def test_used_reservations_are_told_for_two_lifetimes() -> None:
    """A used reservation stays in the gossip long enough for every peer, then goes."""
    limiter = Limiter(0)
    limiter.reserve(ALICE, NOW)
    assert limiter.admit(ALICE, NOW)
    expiry = NOW + RESERVATION_MS
    assert limiter.state(expiry + USED_KEPT_MS).used == [(expiry, ALICE)]
    assert limiter.state(expiry + USED_KEPT_MS + 1).used == []


def test_silent_peers_are_forgotten() -> None:
    """What a peer said does not count once it was silent for 2 s."""
    mine, other = Limiters(1), Limiters(1)
    assert other.of("acme").admit(ALICE, NOW)
    mine.absorb("other", other.snapshot(NOW), NOW)
    assert not mine.of("acme").admit(BOB, NOW)
    mine.forget_silent(NOW + PEER_KEPT_MS)
    assert mine.of("acme").knows_peers
    mine.forget_silent(NOW + PEER_KEPT_MS + 1)
    assert not mine.of("acme").knows_peers


def test_a_peers_new_word_replaces_the_old() -> None:
    """A tenant that a peer no longer mentions counts no longer."""
    mine, other = Limiters(1), Limiters(1)
    assert other.of("acme").admit(ALICE, NOW)
    mine.absorb("other", other.snapshot(NOW), NOW)
    mine.absorb("other", [], NOW + 1)
    assert mine.of("acme").admit(BOB, NOW + 1)


def test_garbage_from_a_peer_is_skipped() -> None:
    """An undecodable state neither raises nor disturbs the others of the same message."""
    mine, other = Limiters(1), Limiters(1)
    assert other.of("acme").admit(ALICE, NOW)
    assert mine.absorb("other", [("bad", b"\xc1"), *other.snapshot(NOW)], NOW)
    assert not mine.of("acme").admit(BOB, NOW)


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
    assert [tenant for tenant, _ in limiters.snapshot(NOW + 4000)] == ["acme"]
    assert limiters.any_active(NOW + 4000)
    assert limiters.snapshot(NOW + 4001) == []
    assert not limiters.any_active(NOW + 4001)


def test_unsorted_requests_of_a_peer_count() -> None:
    """The window counts what a peer says in whatever order it says it."""
    limiter = Limiter(3)
    limiter.hear("other", LimiterState([NOW, NOW - 2000, NOW - 10], [], []))
    assert limiter.admit(ALICE, NOW)
    assert not limiter.admit(ALICE, NOW)


def test_a_lone_agent_forgets_too() -> None:
    """Without peers that ask, used and expired reservations and idle tenants do not pile up."""
    alone = Limiters(0)
    for number in range(100):
        record = RecordId(number.to_bytes(32, "big"))
        alone.of("acme").reserve(record, NOW)
        if number % 2:
            assert alone.of("acme").admit(record, NOW + 1)
    alone.tidy(NOW + RESERVATION_MS + USED_KEPT_MS + 1)
    state = alone.of("acme").state(NOW)
    assert (state.requests, state.reservations, state.used) == ([], [], [])
    before = alone.of("acme")
    alone.tidy(NOW + 60_000)
    assert alone.of("acme") is not before


def test_a_clock_that_is_set_back_blocks_nobody() -> None:
    """Requests admitted in what is now the future do not keep the window full until that time comes again."""
    limiter = Limiter(2)
    assert limiter.admit(ALICE, NOW)
    assert limiter.admit(ALICE, NOW)
    earlier = NOW - 3_600_000
    assert limiter.admit(ALICE, earlier)
    assert limiter.admit(ALICE, earlier)
    assert not limiter.admit(ALICE, earlier)
