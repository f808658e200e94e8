"""Whose wall clock is off."""

from __future__ import annotations

from juicebox_hsm.host.clocks import KEPT_S, OFF_MS, Clocks, Reading, is_off, offset_ms, past_ms, read_clock


def test_most_decide() -> None:
    """One clock among several is named however far it is off, and the others are not."""
    right = [Reading(1_000), Reading(1_003), Reading(990)]
    for wrong_ms in (1_500_000, -1_500_000):
        wrong = Reading(1_000 + wrong_ms)
        everybody = [*right, wrong]
        assert is_off(wrong, everybody)
        assert abs(offset_ms(wrong, everybody) - wrong_ms) < 20
        assert not any(is_off(each, everybody) for each in right)


def test_everybody_together_is_right() -> None:
    """A jump of all clocks is nobody's fault: there is nothing to compare with."""
    everybody = [Reading(3_600_000 + each) for each in range(5)]
    assert not any(is_off(each, everybody) for each in everybody)
    assert not is_off(Reading(5), [Reading(5)])


def test_two_that_differ_are_both_named() -> None:
    """With one other clock nobody knows which of the two is wrong."""
    pair = [Reading(0), Reading(60_000)]
    assert [offset_ms(each, pair) for each in pair] == [-30_000, 30_000]
    assert all(is_off(each, pair) for each in pair)


def test_a_slow_answer_is_not_a_wrong_clock() -> None:
    """An answer that took long says less: its clock may have been read at any moment of it."""
    assert read_clock(1_000_500, 100.0, 101.0) == Reading(900_000, 500)
    exact, slow = Reading(0), read_clock(110_000, 100.0, 116.0)
    assert slow == Reading(2_000, 8_000)
    everybody = [exact, exact, Reading(OFF_MS + 7_000, 8_000)]
    assert not is_off(everybody[2], everybody)
    assert is_off(Reading(OFF_MS + 7_000, 0), everybody)


def test_who_fell_silent_has_no_say() -> None:
    """What a service said a minute ago, before its clock was set perhaps, is not held against us."""
    clocks, own = Clocks(), Reading(0)
    clocks.heard("tls://a", Reading(9), 0.0)
    clocks.heard("tls://b", Reading(7), 50.0)
    assert clocks.everybody(own, KEPT_S) == [own, Reading(9), Reading(7)]
    assert clocks.everybody(own, KEPT_S + 1) == [own, Reading(7)]


def test_no_single_clock_says_what_is_old() -> None:
    """What is destroyed for its age is old by two clocks; fewer than two registrations leave only our own to ask."""
    right, ahead, behind = 1_000_000, 9_000_000, 5
    assert past_ms(ahead, [right, ahead, right - 60]) == right, "ours is ahead"
    assert past_ms(right, [ahead, right, right]) == right, "another's is ahead"
    assert past_ms(ahead, [ahead, right]) == right, "there are two, and ours is ahead"
    assert past_ms(right, [right, behind]) == behind, "one that is behind only puts off"
    assert past_ms(right, [right, right - 60, behind]) == right - 60
    assert past_ms(right, []) == past_ms(right, [behind]) == right
