"""How long a lease may be relied on."""

from __future__ import annotations

from juicebox_hsm.host.cluster.leases import (
    LEASE_MS,
    LOST_BEFORE_EXPIRY_S,
    RENEW_AGAIN_S,
    RENEW_EVERY_S,
    StandingLeases,
    usable_until_s,
)
from juicebox_hsm.host.services import Lease


def test_usable_until_before_the_store_gives_it_away() -> None:
    """The holder stops half a second before an expiry that counts from when the request was sent."""
    assert usable_until_s(100.0) == 100.0 + LEASE_MS / 1000 - LOST_BEFORE_EXPIRY_S == 102.5


def test_a_renewal_that_fails_once_leaves_time_for_others() -> None:
    """Between the first renewal and the end there is room for several attempts."""
    assert usable_until_s(0.0) - RENEW_EVERY_S > 10 * RENEW_AGAIN_S


HOUR_MS = 3_600_000


def test_a_lease_that_is_renewed_is_never_taken() -> None:
    """However far ahead our clock is, and however far behind the holder's, renewals are what counts."""
    standing = StandingLeases()
    for second in range(60):
        standing.look([Lease("x", "other", "id", 3000 + second)], float(second))
        assert standing.obtain_ms("x", HOUR_MS, float(second)) is None


def test_a_lease_that_is_not_renewed_is_taken_after_its_length() -> None:
    """Its holder's clock may have been an hour ahead: nobody waits that hour, and a late renewal still counts."""
    standing, dead = StandingLeases(), Lease("x", "other", "id", HOUR_MS)
    standing.look([dead], 0.0)
    assert standing.obtain_ms("x", 5, 2.9) is None
    standing.look([dead], 3.0)
    assert standing.obtain_ms("x", 5, 3.0) == HOUR_MS + 1, "a store refuses if the holder extends meanwhile"
    assert standing.obtain_ms("x", 2 * HOUR_MS, 3.0) == 2 * HOUR_MS
    assert standing.obtain_ms("y", 5, 3.0) == 5
    standing.look([], 3.1)
    assert standing.obtain_ms("x", 5, 3.1) == 5
    standing.look([dead], 3.2)
    assert standing.obtain_ms("x", 5, 3.3) is None, "what was seen before it was given back is over"
