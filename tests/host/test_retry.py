"""How often and how long something is tried again."""

from __future__ import annotations

from juicebox_hsm.host.retry import FOREVER_S, HSM_RETRY, STORE_RETRY, RetryProfile


def test_store_profile() -> None:
    """10 ms doubling to 2 s, 50 attempts, 30 s."""
    assert [STORE_RETRY.delay_s(attempt) for attempt in (1, 2, 3, 8, 9, 1000)] == [0.01, 0.02, 0.04, 1.28, 2.0, 2.0]
    assert not STORE_RETRY.exhausted(49, 29.9)
    assert STORE_RETRY.exhausted(50, 0.0)
    assert STORE_RETRY.exhausted(1, 30.0)


def test_attempts_without_a_bound_end_by_time() -> None:
    """A lost HSM is asked again however often that is, for a minute."""
    assert not HSM_RETRY.exhausted(10**6, 59.9)
    assert HSM_RETRY.exhausted(1, 60.0)


def test_pauses_may_grow_slowly_or_not_at_all() -> None:
    """The factor is the profile's; however many attempts there were, the pause is a number and at most the cap."""
    slow = RetryProfile(first_s=0.01, cap_s=0.5, attempts_max=None, total_s=FOREVER_S, factor=1.1)
    assert slow.delay_s(2) == 0.01 * 1.1
    assert slow.delay_s(41) < 0.5 == slow.delay_s(43) == slow.delay_s(10**9)
    assert not slow.exhausted(10**9, 10**9)


def test_spread_stays_around_the_pause() -> None:
    """The draw moves a pause by at most the profile's fraction, to either side."""
    varied = RetryProfile(first_s=1.0, cap_s=4.0, spread=0.2)
    assert (varied.delay_s(2, 0.0), varied.delay_s(2), varied.delay_s(2, 1.0)) == (1.6, 2.0, 2.4)
