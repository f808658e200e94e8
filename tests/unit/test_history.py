"""The history checker against forged histories: every kind of lie is noticed, every honest mishap is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from juicebox_hsm.errors import LocalError
from juicebox_hsm.history import ATTEMPTS_MAX, Call, Op, Outcome, Violation, check_history, check_user

_UNANSWERED = {Op.REGISTER: (0, 1), Op.RECOVER: (0, 1), Op.DELETE: (1,)}


class History:
    """Writes calls one after the other, each a second long with half a second between them."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._now = 0.0

    def _add(self, op: Op, outcome: Outcome, lost: tuple[int, ...] | None, **fields: Any) -> History:
        start = fields.pop("start", self._now)
        end = fields.pop("end", start + 1)
        self.calls.append(Call("ann", op, start, end, outcome, lost=lost, **fields))
        self._now = max(self._now, (start if math.isinf(end) else end) + 0.5)
        return self

    def register(
        self, secret: str, guesses: int, pin: str = "right", lost: tuple[int, ...] | None = (0, 0), **times: float
    ) -> History:
        """Add a successful register."""
        return self._add(Op.REGISTER, Outcome.OK, lost, pin=pin, secret=secret, num_guesses=guesses, **times)

    def recovered(self, secret: str, lost: tuple[int, ...] | None = (0, 0, 0), **times: float) -> History:
        """Add a recover with the right PIN that returned `secret`."""
        return self._add(Op.RECOVER, Outcome.OK, lost, pin="right", secret=secret, **times)

    def refused(self, left: int, pin: str = "wrong", lost: tuple[int, ...] | None = (0, 0), **times: float) -> History:
        """Add a recover that ended with InvalidPin in phase 2; `lost=(0,)` for phase 1."""
        return self._add(Op.RECOVER, Outcome.INVALID_PIN, lost, pin=pin, guesses_remaining=left, **times)

    def absent(self, lost: tuple[int, ...] | None = (0,), **times: float) -> History:
        """Add a recover that ended with NotRegistered."""
        return self._add(Op.RECOVER, Outcome.NOT_REGISTERED, lost, pin="right", **times)

    def replaced(self, lost: tuple[int, ...] | None = (0, 0), **times: float) -> History:
        """Add a recover that met another version than it began with."""
        return self._add(Op.RECOVER, Outcome.REPLACED, lost, pin="right", **times)

    def deleted(self, lost: tuple[int, ...] | None = (0,), **times: float) -> History:
        """Add a successful delete."""
        return self._add(Op.DELETE, Outcome.OK, lost, **times)

    def lost(self, op: Op, lost: tuple[int, ...] | None = None, **fields: Any) -> History:
        """Add a call without an answer; by default its last phase lost one attempt."""
        fields.setdefault("pin", "right")
        return self._add(op, Outcome.LOST, lost, **fields)

    def check(self, *barriers: float) -> Violation | None:
        """Return the checker's verdict."""
        return check_user(self.calls, barriers)


def accepted(history: History, *barriers: float) -> None:
    """Fail unless the history has an explanation."""
    violation = history.check(*barriers)
    assert violation is None, str(violation)


def rejected(history: History, *barriers: float) -> Violation:
    """Fail unless the last call of the history has no explanation; return the verdict."""
    violation = history.check(*barriers)
    assert violation is not None, "explained: " + " | ".join(map(str, history.calls))
    assert violation.call is history.calls[-1], f"another call than the last was blamed: {violation}"
    return violation


def exhausted() -> History:
    """Return a record whose two guesses were used by wrong PINs."""
    return History().register("s1", 2).refused(1).refused(0)


# --- what an exact realm does ----------------------------------------------------------------------------------


def test_a_life_without_mishaps_is_explained() -> None:
    """Counting down, reset by success, the last guess that succeeds, exhaustion, delete and a new life."""
    accepted(
        History()
        .absent()
        .register("s1", 2)
        .refused(1)
        .recovered("s1")
        .refused(1)
        .recovered("s1")
        .refused(1)
        .refused(0)
        .refused(0, pin="right", lost=(0,))
        .refused(0, pin="right", lost=(0,))
        .deleted()
        .absent()
        .deleted()
        .register("s2", 1, pin="other")
        .refused(0, pin="right")
        .register("s3", 1)
        .recovered("s3")
    )


def test_no_guesses_allowed_is_locked_from_the_start() -> None:
    """A registration with 0 guesses refuses the first recover before any evaluation."""
    accepted(History().register("s1", 0).refused(0, pin="right", lost=(0,)))
    rejected(History().register("s1", 0).recovered("s1"))


def test_users_are_judged_apart() -> None:
    """One user's lie is reported once, with that user's history only."""
    good = [Call("bob", Op.RECOVER, 0, 1, Outcome.NOT_REGISTERED, pin="x", lost=(0,))]
    bad = History().register("s1", 2).refused(0).calls
    [violation] = check_history([*good, *bad])
    assert violation.user == "ann"
    assert len(violation.history) == 2
    assert check_history(good) == []


# --- lies --------------------------------------------------------------------------------------------------------


def test_an_extra_guess_is_noticed() -> None:
    """A wrong PIN that leaves as many guesses as the one before was not counted."""
    rejected(History().register("s1", 3).refused(2).refused(2))
    rejected(History().register("s1", 3).refused(2).refused(1).refused(1))


def test_a_guess_counted_twice_is_noticed() -> None:
    """One evaluation that was answered at once costs one guess."""
    rejected(History().register("s1", 3).refused(1))


def test_success_after_the_limit_is_noticed() -> None:
    """A record without guesses answers nobody, whatever the PIN."""
    rejected(exhausted().recovered("s1"))
    rejected(exhausted().refused(0))  # phase 2 was answered, so an evaluation was granted
    accepted(exhausted().refused(0, lost=(0,)))


def test_a_resurrected_secret_is_noticed() -> None:
    """Neither exhaustion nor delete is undone by anything but a register."""
    rejected(exhausted().refused(0, pin="right", lost=(0,)).refused(1))
    rejected(exhausted().refused(0, pin="right", lost=(0,)).recovered("s1"))
    rejected(History().register("s1", 2).deleted().recovered("s1"))
    rejected(History().register("s1", 2).deleted().refused(1))


def test_a_stale_secret_is_noticed() -> None:
    """After a second register the first secret never comes back, and its count is gone."""
    rejected(History().register("s1", 2).register("s2", 2).recovered("s1"))
    rejected(History().register("s1", 2).refused(1).register("s2", 2).refused(0))
    rejected(History().register("s1", 2).recovered("s7"))


def test_guesses_remaining_beyond_the_policy_are_noticed() -> None:
    """The answer never names more guesses than were registered."""
    rejected(History().register("s1", 2).refused(2))
    rejected(History().register("s1", 2).refused(7))


def test_a_forgotten_registration_is_noticed() -> None:
    """An acknowledged register is there until something removes it; an acknowledged delete removed it."""
    rejected(History().register("s1", 2).absent())
    rejected(History().absent().deleted().register("s1", 2).refused(1).absent())


def test_a_wrong_pin_that_recovers_is_noticed() -> None:
    """Only the registered PIN brings the secret back, and the registered PIN is never refused while guesses last."""
    history = History().register("s1", 2, pin="another")
    rejected(history.recovered("s1"))
    rejected(History().register("s1", 3).refused(2, pin="right"))


def test_a_count_that_was_not_reset_is_noticed() -> None:
    """A successful recover gives all guesses back."""
    rejected(History().register("s1", 3).refused(2).recovered("s1").refused(1))


def test_a_version_that_changes_by_itself_is_noticed() -> None:
    """A recovery is interrupted by another version only if somebody registers."""
    rejected(History().register("s1", 2).replaced())


def test_real_time_is_respected() -> None:
    """A call cannot see what began after it ended, nor miss what ended before it began."""
    rejected(History().register("s1", 2, start=10, end=11).absent(start=11.5, end=12))
    history = History().absent(start=2, end=3).register("s1", 2, start=0, end=1)
    violation = history.check()
    assert violation is not None
    assert violation.call.outcome is Outcome.NOT_REGISTERED
    violation = History().recovered("s1", start=0, end=1).register("s1", 2, start=2, end=3).check()
    assert violation is not None
    assert violation.call.op is Op.RECOVER


# --- calls at the same time ------------------------------------------------------------------------------------


def test_overlapping_calls_may_take_effect_in_either_order() -> None:
    """Two wrong guesses at once: either is first, but never both."""
    both = History().register("s1", 3).refused(2, start=10, end=20).refused(1, start=11, end=19)
    accepted(both)
    accepted(History().register("s1", 3).refused(1, start=10, end=20).refused(2, start=11, end=19))
    same = History().register("s1", 3).refused(2, start=10, end=20).refused(2, start=11, end=19)
    assert same.check() is not None


def test_overlapping_success_between_two_phases() -> None:
    """A success that overlaps a wrong guess may reset the count before or after it, with different results."""
    accepted(History().register("s1", 2).refused(1).recovered("s1", start=10, end=20).refused(1, start=10, end=20))
    accepted(History().register("s1", 3).refused(2).recovered("s1", start=10, end=20).refused(1, start=10, end=20))
    # evaluated between Recover2 and Recover3 of the success
    accepted(History().register("s1", 3).refused(2).recovered("s1", start=10, end=20).refused(0, start=10, end=20))
    history = History().register("s1", 4).refused(3).recovered("s1", start=10, end=20).refused(0, start=10, end=20)
    assert history.check() is not None


def test_the_last_guess_spent_by_another_lane() -> None:
    """With one guess left, two recoveries at once: one may be refused in phase 2 without an evaluation."""
    history = History().register("s1", 1).refused(0, start=10, end=20).refused(0, start=10, end=20)
    accepted(history)
    # two evaluations at once, both answered with a count: one too many
    history = History().register("s1", 1).recovered("s1", start=10, end=11).refused(0, start=12, end=20)
    accepted(history.recovered("s1", start=30, end=31) if history.check() else history)
    history = History().register("s1", 2).refused(0, start=10, end=20).refused(0, start=10, end=20)
    assert history.check() is not None


def test_a_register_during_a_recovery() -> None:
    """A recovery that overlaps a register may end with the old secret, the new one, or find the version replaced."""
    for ending in ("s1", "s2"):
        history = History().register("s1", 2).register("s2", 2, start=10, end=20)
        accepted(history.recovered(ending, start=11, end=19))
    accepted(History().register("s1", 2).register("s2", 2, start=10, end=20).replaced(start=11, end=19))
    accepted(History().register("s1", 2).register("s2", 2, start=10, end=20).replaced((0, 0, 0), start=11, end=19))


# --- lost answers ------------------------------------------------------------------------------------------------


def test_a_lost_register_may_or_may_not_have_happened() -> None:
    """Both are explained, but not both in turn without anything in between."""
    lost = {"lost": (0, 1), "secret": "s1", "num_guesses": 2}
    accepted(History().lost(Op.REGISTER, **lost).recovered("s1"))
    accepted(History().lost(Op.REGISTER, **lost).absent())
    accepted(History().lost(Op.REGISTER, **lost).absent().recovered("s1"))  # it took effect late
    rejected(History().lost(Op.REGISTER, **lost).recovered("s1").absent())


def test_a_register_lost_in_its_first_phase_changes_nothing() -> None:
    """Register1 alone stores nothing."""
    lost = {"lost": (5,), "secret": "s2", "num_guesses": 2}
    accepted(History().register("s1", 2).lost(Op.REGISTER, **lost).recovered("s1"))
    rejected(History().register("s1", 2).lost(Op.REGISTER, **lost).recovered("s2"))
    rejected(History().lost(Op.REGISTER, **lost).recovered("s2"))


def test_a_lost_recover_spends_at_most_its_attempts() -> None:
    """Each unanswered evaluation may have cost a guess; none was refunded."""
    for left in (4, 3, 2):
        accepted(History().register("s1", 5).lost(Op.RECOVER, (0, 2), pin="wrong").refused(left))
    rejected(History().register("s1", 5).lost(Op.RECOVER, (0, 2), pin="wrong").refused(1))
    rejected(History().register("s1", 5).lost(Op.RECOVER, (2,), pin="wrong").refused(3))


def test_a_recover_lost_in_its_third_phase_has_spent_a_guess_and_may_have_reset() -> None:
    """Recover2 was answered, so it counts; Recover3 was not, so the count may be 0 or not."""
    begin = {"op": Op.RECOVER, "lost": (0, 0, 1)}
    accepted(History().register("s1", 3).refused(2).lost(**begin).refused(2))
    accepted(History().register("s1", 3).refused(2).lost(**begin).refused(0))
    rejected(History().register("s1", 3).refused(2).lost(**begin).refused(1))
    rejected(History().register("s1", 3).refused(2).lost(**(begin | {"pin": "wrong"})))


def test_a_late_reset_happens_once() -> None:
    """One unanswered Recover3 explains one reset, not two."""
    late = History().register("s1", 3).lost(Op.RECOVER, (0, 0, 1)).refused(1)
    accepted(late.refused(2))
    rejected(late.refused(2))


def test_a_lost_delete_explains_one_disappearance() -> None:
    """The delete may come late, but only once."""
    history = History().register("s1", 2).lost(Op.DELETE, (1,)).recovered("s1").absent()
    accepted(history)
    rejected(history.register("s2", 2).absent())
    accepted(History().register("s1", 2).lost(Op.DELETE, (2,)).recovered("s1").absent().register("s2", 2).absent())


def test_retries_of_an_answered_call_count_too() -> None:
    """An answered recover that lost attempts on the way may have spent them, before or after its answer."""
    accepted(History().register("s1", 5).refused(2, lost=(0, 2)))
    accepted(History().register("s1", 5).refused(4, lost=(0, 2)).refused(1))
    rejected(History().register("s1", 5).refused(1, lost=(0, 2)))
    rejected(History().register("s1", 5).refused(4, lost=(0, 2)).refused(0))


def test_a_repeated_register_resets_its_own_count() -> None:
    """A register whose first attempt comes late starts its registration anew, once."""
    history = History().register("s1", 3, lost=(0, 1)).refused(2).refused(2)
    accepted(history)
    rejected(history.refused(2))


def test_unknown_lost_attempts_are_as_many_as_a_client_makes() -> None:
    """Without a count a lost recover spent up to five guesses, and reset only after at least one evaluation."""
    guesses = ATTEMPTS_MAX + 2
    for left in range(1, guesses):
        accepted(History().register("s1", guesses).lost(Op.RECOVER, pin="wrong").refused(left))
    rejected(History().register("s1", guesses).lost(Op.RECOVER, pin="wrong").refused(0))
    accepted(History().register("s1", 3).refused(2).lost(Op.RECOVER).refused(2))
    rejected(History().register("s1", 3).refused(2).lost(Op.RECOVER, pin="wrong").refused(2))
    accepted(History().register("s1", 9, lost=None).refused(4, lost=None))
    rejected(History().register("s1", 9, lost=None).refused(3, lost=None))


def test_a_call_that_never_ended_may_still_have_happened() -> None:
    """A call without an end takes effect at any time after its start, or never."""
    history = History().register("s1", 2).lost(Op.DELETE, (1,), start=5, end=math.inf)
    accepted(history.recovered("s1", start=6, end=7).recovered("s1").absent())


def test_barriers_end_what_was_lost_before() -> None:
    """When every process was dead in between, an attempt of before is not executed after."""
    history = History().register("s1", 2).lost(Op.DELETE, (1,)).recovered("s1", start=10, end=11).absent()
    accepted(history)
    accepted(history, 1.2)  # the barrier was before the delete
    accepted(history, 11.2)  # between the recover and the barrier
    rejected(history, 5.0)
    during = History().register("s1", 2).lost(Op.DELETE, (1,), start=4, end=6).recovered("s1", start=7, end=8).absent()
    accepted(during, 5.0)  # it may have been sent after the barrier
    # what happened before a barrier stays
    accepted(History().register("s1", 2).lost(Op.DELETE, (1,)).absent(start=10, end=11), 5.0)


# --- the interface ------------------------------------------------------------------------------------------------


def test_a_violation_explains_itself() -> None:
    """The report names the possible states and marks the call in the user's history."""
    violation = rejected(History().register("s1", 3).lost(Op.RECOVER, (0, 1), pin="wrong").refused(0))
    assert violation.states_before == ("s1 with 0 of 3 guesses used", "s1 with 1 of 3 guesses used")
    assert violation.states_after == ("s1 with 0 of 3 guesses used", "s1 with 1 of 3 guesses used")
    text = str(violation)
    assert "  > 3.000 .. 4.000  recover pin=wrong -> invalid pin, 0 left" in text
    assert "register s1 pin=right guesses=3 -> ok" in text
    assert "-> lost (lost attempts 0/1)" in text
    text = str(rejected(exhausted().refused(0, pin="right", lost=(0,)).deleted(lost=None).recovered("s1")))
    assert "not registered" in text
    assert "delete -> ok (lost attempts unknown)" in text
    assert "secret s1" in text
    assert "never" in str(Call("ann", Op.DELETE, 0, math.inf, Outcome.LOST))


@pytest.mark.parametrize(
    "fields",
    [{"start": 2.0, "end": 1.0}, {"lost": ()}, {"lost": (0, 0)}, {"lost": (-1,)}, {"start": math.nan}],
)
def test_what_is_not_a_call_is_refused(fields: dict[str, Any]) -> None:
    """Times run forward and there is one count for each phase."""
    with pytest.raises(LocalError):
        Call(**{"user": "ann", "op": Op.DELETE, "start": 0.0, "end": 1.0, "outcome": Outcome.OK, **fields})


def test_too_many_calls_at_once_are_refused_rather_than_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search says that it cannot decide instead of running for ever."""
    monkeypatch.setattr("juicebox_hsm.history.CONFIGURATIONS_MAX", 50)
    history = History().register("s1", 9)
    for _ in range(6):
        history.refused(3, start=10, end=20)
    with pytest.raises(LocalError, match="overlap too much"):
        history.check()


def test_long_histories_with_many_losses_stay_cheap() -> None:
    """A user with dozens of calls, each with lost attempts, needs few configurations at any time."""
    history = History().register("s0", 3)
    for number in range(1, 15):
        history.lost(Op.RECOVER, (5,), pin="wrong").refused(2, lost=(1, 0)).recovered(f"s{number - 1}", lost=(0, 1, 1))
        history.register(f"s{number}", 3, lost=(0, 1))
    accepted(history)
    assert len(history.calls) == 57
