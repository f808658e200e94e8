"""Who was heard when, and who counts as lost (agent.md 7, 8)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from juicebox_hsm.host.liveness import LEADERSHIPS_MAX, Claim, Leaders, Patience, Reachable
from juicebox_hsm.ids import GroupId, HsmId, RealmId

GROUP = (RealmId(b"r" * 16), GroupId(b"g" * 16))
PATIENCE = Patience(silence_s=1.0, hint_first_s=0.25, hint_again_s=3.0)
ALICE, BOB = HsmId(b"a" * 16), HsmId(b"b" * 16)


class Stream:
    """The stream a leader speaks on."""

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class Member:
    """One agent's ear, registered at 0.0, at a time that only moves when told to."""

    def __init__(self) -> None:
        self.leaders = Leaders(PATIENCE)
        self.leaders.registered(0.0)
        self.now = 100.0

    def hears(self, last: int, starting: int) -> Stream:
        """Hear a leadership now; returns its stream."""
        stream = Stream()
        self.leaders.heard(GROUP, Claim(last, starting), self.now, lambda: stream.is_closed)
        return stream

    def hint(self, later_s: float = 0.0, *, leads: bool = False) -> int | None:
        """Return the leadership that is reported after `later_s` without a word."""
        return self.leaders.hint(GROUP, self.now + later_s, leads=leads)


@dataclass(frozen=True)
class Left:
    """A case of a leadership of our own that ended unasked as `left`, after `heard` and before `later`."""

    left: Claim
    heard: Claim | None
    later: Claim | None
    reported: int | None


@pytest.mark.parametrize(
    "case",
    [
        Left(Claim(8, 6), heard=None, later=None, reported=6),
        Left(Claim(8, 6), heard=Claim(5, 3), later=None, reported=6),  # its last words were before our time
        Left(Claim(8, 6), heard=Claim(8, 3), later=None, reported=6),  # ranks below us
        Left(Claim(8, 6), heard=Claim(8, 9), later=None, reported=None),  # began after us and speaks
        Left(Claim(5, 6), heard=Claim(6, 3), later=None, reported=None),  # older, and wrote past us
        Left(Claim(8, 6), heard=Claim(5, 3), later=Claim(7, 3), reported=6),  # speaks on, though we wrote past it
        Left(Claim(8, 6), heard=None, later=Claim(8, 3), reported=None),  # speaks on, and may still write
    ],
)
def test_a_leadership_left_unasked_is_reported_unless_another_speaks(case: Left) -> None:
    """No hint while a leader that may still write speaks; and one at once when only older words are known."""
    member = Member()
    if case.heard is not None:
        member.hears(*case.heard)
    member.leaders.left(GROUP, case.left)
    if case.later is not None:
        member.hears(*case.later)
    assert member.hint() == case.reported
    assert (member.leaders.unreported(GROUP) is not None) == (case.reported is not None)


def test_members_fall_back_to_whoever_still_speaks() -> None:
    """Leaders that may write next count in any order; one that is silent, closed or beaten does not."""
    member = Member()
    first = member.hears(8, 3)
    member.hears(8, 9).close()
    assert member.hint() == 9  # the older one has not spoken since
    member.hears(8, 3)
    assert member.hint() is None
    assert member.hint(PATIENCE.silence_s) == 9
    first.close()
    member.hears(9, 9)
    member.hears(8, 3).close()  # beaten: nothing it says counts
    assert member.hint() is None
    assert member.hint(PATIENCE.silence_s - 0.001) is None
    assert member.hint(PATIENCE.silence_s) == 9
    assert member.hint(PATIENCE.silence_s) is None  # not again before its time
    assert member.hint(PATIENCE.silence_s + PATIENCE.hint_again_s) == 9


def test_made_up_leaderships_are_bounded() -> None:
    """A peer that invents leaderships fills no memory and hides no real one."""
    member = Member()
    for starting in range(1000, 0, -1):
        member.hears(1000, starting)
    [heard] = member.leaders._groups.values()
    assert len(heard.spoke) == LEADERSHIPS_MAX
    member.hears(1001, 1002)
    assert list(heard.spoke) == [1002]


def test_nobody_heard_is_reported_a_moment_after_registering() -> None:
    """A new agent gives leaders 250 ms to be heard, and says nothing before others can reach it."""
    leaders = Leaders(PATIENCE)
    assert leaders.hint(GROUP, 5.0, leads=False) is None
    leaders.registered(5.0)
    leaders.registered(6.0)  # again after ten minutes: it was known all the time
    assert leaders.hint(GROUP, 5.2, leads=False) is None
    assert leaders.hint(GROUP, 5.25, leads=False) == 0


def test_who_leads_reports_nobody() -> None:
    """Our own leadership is a leader heard, and ends what we owed the managers."""
    member = Member()
    member.leaders.left(GROUP, Claim(8, 6))
    assert member.hint(leads=True) is None
    assert member.leaders.unreported(GROUP) is None
    member.leaders.left(GROUP, Claim(8, 6))
    member.leaders.began(GROUP)
    assert member.leaders.unreported(GROUP) is None


def test_one_missing_answer_is_forgiven() -> None:
    """An agent that gave one answer too few stays in the map and is asked again soon; after two it is out of it."""
    reachable = Reachable()
    assert not reachable.asked({ALICE: "a", BOB: "b"}, ["a", "b"])
    assert reachable.asked({BOB: "b"}, ["a", "b"])
    assert reachable.url_of(ALICE) == "a"
    assert not reachable.asked({BOB: "b"}, ["a", "b"])
    assert (reachable.url_of(ALICE), reachable.url_of(BOB)) == (None, "b")
    assert not reachable.asked({ALICE: "a2", BOB: "b"}, ["a2", "b"])
    assert reachable.url_of(ALICE) == "a2"
    assert reachable.asked({BOB: "b"}, ["a2", "b"]), "forgiven anew once it answered"


def test_who_is_not_registered_any_more_goes() -> None:
    """Trust is for those that others still know at that address."""
    reachable = Reachable()
    reachable.asked({ALICE: "a"}, ["a"])
    reachable.asked({}, [])
    assert reachable.url_of(ALICE) is None
