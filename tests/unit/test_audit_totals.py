"""The sums of the audit drill notice each kind of miscount and accuse no honest store."""

from __future__ import annotations

from dataclasses import replace

import pytest

from juicebox_hsm.host.events import EventKind
from tests.client.audit_match import Logged, Made
from tests.client.audit_totals import Totals, totals_problems

CALLS = {
    "u": [
        Made("register", "success", 2, 0),
        Made("recover", "success", 3, 1),
        Made("recover", "lost", 1, 2),
    ],
    "v": [Made("register", "success", 2, 0), Made("delete", "success", 1, 0), Made("recover", "none", 1, 0)],
}
LOGS = {
    "u": [
        Logged(2, "g:3", "registered"),
        Logged(4, "g:6", "guess_used", 5, 1),
        Logged(5, "g:7", "share_recovered"),
        Logged(11, "g:12", "unknown"),
    ],
    "v": [Logged(7, "g:8", "registered"), Logged(8, "g:10", "deleted"), Logged(8, "g:10", "deleted")],
}
COUNTERS = {
    EventKind.REGISTER1: 2,
    EventKind.REGISTER2: 2,
    EventKind.RECOVER1: 4,  # one of them by an attempt that nobody saw answered
    EventKind.RECOVER2: 1,
    EventKind.RECOVER3: 1,
    EventKind.DELETE: 1,
    EventKind.UNKNOWN: 1,
}
KEPT = {
    EventKind.REGISTER2: 2,
    EventKind.RECOVER2: 1,
    EventKind.RECOVER3: 1,
    EventKind.DELETE: 1,
    EventKind.UNKNOWN: 1,
}
HONEST = Totals(COUNTERS, 12, KEPT, 1)


def test_honest_totals_fit() -> None:
    """Sums that agree, with lost attempts counted or not, are no problem."""
    assert totals_problems(CALLS, LOGS, HONEST) == []
    fewer = {**COUNTERS, EventKind.RECOVER1: 3}
    assert totals_problems(CALLS, LOGS, replace(HONEST, counters=fewer, rows=11)) == []


@pytest.mark.parametrize("kind", EventKind)
@pytest.mark.parametrize("off", [-2, 3])
def test_a_miscounted_kind_is_noticed(kind: EventKind, off: int) -> None:
    """A counter that tells too little or too much of any kind of request does not fit, even if the sum does."""
    counters = {**COUNTERS, kind: COUNTERS[kind] + off}
    assert totals_problems(CALLS, LOGS, replace(HONEST, counters=counters, rows=12 + off))


def test_other_sums_that_are_wrong_are_noticed() -> None:
    """Counters that are not the number of rows, a row nobody read, and a wrong number of users do not fit."""
    assert totals_problems(CALLS, LOGS, replace(HONEST, rows=13))
    assert totals_problems(CALLS, LOGS, replace(HONEST, kept={**KEPT, EventKind.RECOVER2: 2}))
    assert totals_problems(CALLS, LOGS, replace(HONEST, users=2))
    assert totals_problems(CALLS, LOGS, replace(HONEST, users=0))


def test_lost_attempts_explain_only_as_many_requests() -> None:
    """An unknown outcome and the uncounted answers share the lost attempts: together they may not be more."""
    calls = {**CALLS, "u": [*CALLS["u"][:2], Made("recover", "lost", 1, 0)]}
    assert totals_problems(calls, LOGS, HONEST)
