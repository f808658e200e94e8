"""The comparison of the audit drill notices each kind of lie and accuses no honest log."""

from __future__ import annotations

import pytest

from tests.client.audit_match import Logged, Made, deliveries_problems, match_problems

CALLS = [
    Made("register", "success", 2, 0),
    Made("recover", "wrong", 2, 0, left=4),
    Made("recover", "lost", 2, 2),
    Made("recover", "success", 3, 0),
    Made("delete", "success", 1, 1),
    Made("recover", "none", 1, 0),
]
LOG = [
    Logged(1, "g:2", "registered"),
    Logged(3, "g:5", "guess_used", 5, 1),
    Logged(5, "g:8", "guess_used", 5, 2),
    Logged(9, "g:12", "guess_used", 5, 3),
    Logged(10, "g:13", "share_recovered"),
    Logged(12, "g:20", "deleted"),
]


def test_an_honest_log_fits() -> None:
    """Exact events, events of lost attempts and unknown ones in their place are explained."""
    assert match_problems("u", CALLS, LOG) == []
    assert deliveries_problems({"u": [*LOG, *LOG]}) == []
    late = [*LOG[:5], Logged(11, "g:14", "guess_used", 5, 1), LOG[5]]
    assert match_problems("u", CALLS, late) == []
    assert match_problems("u", CALLS, [*LOG, Logged(13, "g:9", "unknown")]) == []
    assert match_problems("u", CALLS, [*LOG, Logged(13, "g:8", "unknown")]) == [], "the true event came, too"


@pytest.mark.parametrize("missing", range(len(LOG)))
def test_a_missing_event_is_noticed(missing: int) -> None:
    """Without any one of the events of answered requests the log does not fit."""
    calls = [Made(call.op, call.outcome, call.answered, 0, call.left) for call in CALLS]
    assert match_problems("u", calls, [each for each in LOG if each is not LOG[missing]])


def test_invented_events_are_noticed() -> None:
    """More events than requests were made do not fit, nor do more unknown ones than attempts were lost."""
    assert match_problems("u", CALLS, [*LOG, Logged(14, "g:30", "registered")])
    assert match_problems("u", CALLS, [Logged(20, "g:1", "guess_used", 5, 1), *LOG])
    many = [Logged(20 + number, f"g:{30 + number}", "unknown") for number in range(4)]
    assert match_problems("u", CALLS, [*LOG, *many])
    assert match_problems("u", CALLS, [*LOG, Logged(14, "g:2", "deleted")])


def test_a_wrong_count_is_noticed() -> None:
    """A guess whose count differs from what the client was told does not fit."""
    calls = [Made(call.op, call.outcome, call.answered, 0, call.left) for call in CALLS]
    assert match_problems("u", calls, [LOG[0], Logged(3, "g:5", "guess_used", 5, 2), *LOG[2:]])


def test_order_and_content_of_deliveries() -> None:
    """A first delivery out of order, and two contents of one seq, are noticed."""
    assert deliveries_problems({"u": [LOG[1], LOG[0]]})
    assert deliveries_problems({"u": [LOG[0], Logged(1, "g:2", "deleted")]})
    assert deliveries_problems({"u": [LOG[0]], "v": [Logged(1, "g:3", "deleted")]})
    assert deliveries_problems({"u": [LOG[0], Logged(2, "g:1", "deleted")]})
