"""How long a lease may be relied on."""

from __future__ import annotations

from juicebox_hsm.host.cluster.leases import (
    LEASE_MS,
    LOST_BEFORE_EXPIRY_S,
    RENEW_AGAIN_S,
    RENEW_EVERY_S,
    usable_until_s,
)


def test_usable_until_before_the_store_gives_it_away() -> None:
    """The holder stops half a second before an expiry that counts from when the request was sent."""
    assert usable_until_s(100.0) == 100.0 + LEASE_MS / 1000 - LOST_BEFORE_EXPIRY_S == 102.5


def test_a_renewal_that_fails_once_leaves_time_for_others() -> None:
    """Between the first renewal and the end there is room for several attempts."""
    assert usable_until_s(0.0) - RENEW_EVERY_S > 10 * RENEW_AGAIN_S
