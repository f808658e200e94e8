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


REGISTER = Made("register", "success", 2, 0)
LOST = Made("recover", "lost", 1, 2)
WRONG = Made("recover", "wrong", 2, 0, left=3)
REGISTERED, FIRST, SECOND, _, SHARE, DELETED = LOG
AGAIN = Logged(11, "g:14", "guess_used", 5, 1)


def test_a_guess_that_nobody_saw_answered_is_missed() -> None:
    """A guess that is in no log shows in the count of the next one, unless something unknown stands in its place."""
    calls = [REGISTER, LOST, WRONG]
    assert match_problems("u", calls, [REGISTERED, SECOND])
    assert match_problems("u", calls, [REGISTERED, FIRST, SECOND]) == []
    assert match_problems("u", calls, [REGISTERED, Logged(9, "g:7", "unknown"), SECOND]) == []
    assert match_problems("u", calls, [REGISTERED, Logged(9, "g:1", "unknown"), SECOND]), "before the registration"
    assert match_problems("u", calls, [REGISTERED, SECOND, Logged(9, "g:9", "unknown")]), "after the next guess"
    third = Logged(5, "g:8", "guess_used", 5, 3)
    assert match_problems(
        "u", [REGISTER, LOST, Made("recover", "wrong", 2, 0, left=2)], [REGISTERED, Logged(9, "g:7", "unknown"), third]
    ), "one unknown is one guess"


def test_the_last_guess_is_missed_though_nothing_follows_it() -> None:
    """Who hears that no guess is left spent them all: four events of five guesses do not fit."""
    log = [REGISTERED, *(Logged(2 + number, f"g:{4 + number}", "guess_used", 5, number) for number in range(1, 6))]
    calls = [
        REGISTER,
        *(Made("recover", "wrong", 2, 0, left=left) for left in (4, 3, 2, 1)),
        LOST,
        Made("recover", "wrong", 1, 0, left=0),
    ]
    assert match_problems("u", calls, log) == []
    assert match_problems("u", calls, log[:-1])
    assert match_problems("u", calls, [*log[:-1], Logged(20, "g:20", "unknown")]) == []
    repeated = [*calls[:-2], Made("recover", "wrong", 2, 1, left=0)]
    assert match_problems("u", repeated, log) == [], "the attempt before spent the last guess"
    assert match_problems("u", repeated, log[:-1])


@pytest.mark.parametrize(
    ("calls", "log", "lost"),
    [
        ([Made("register", "lost", 1, 1), Made("recover", "wrong", 2, 0, left=4)], [REGISTERED, FIRST], REGISTERED),
        (
            [REGISTER, Made("recover", "lost", 2, 1), Made("recover", "wrong", 2, 0, left=4)],
            [REGISTERED, FIRST, SHARE, AGAIN],
            SHARE,
        ),
        ([REGISTER, Made("delete", "lost", 0, 1), Made("recover", "none", 1, 0)], [REGISTERED, DELETED], DELETED),
    ],
    ids=["register", "recover", "delete"],
)
def test_other_lost_events_are_missed(calls: list[Made], log: list[Logged], lost: Logged) -> None:
    """A registration, a recovery and a deletion of unanswered requests show in what the user sees next."""
    assert match_problems("u", calls, log) == []
    assert match_problems("u", calls, [each for each in log if each is not lost])
    unknown = Logged(30, lost.ref, "unknown")
    assert match_problems("u", calls, [unknown if each is lost else each for each in log]) == []


def test_order_and_content_of_deliveries() -> None:
    """A first delivery out of order, and two contents of one seq, are noticed."""
    assert deliveries_problems({"u": [LOG[1], LOG[0]]})
    assert deliveries_problems({"u": [LOG[0], Logged(1, "g:2", "deleted")]})
    assert deliveries_problems({"u": [LOG[0]], "v": [Logged(1, "g:3", "deleted")]})
    assert deliveries_problems({"u": [LOG[0], Logged(2, "g:1", "deleted")]})
