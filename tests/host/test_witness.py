"""What a witness's host gives its HSM, and when it jumps (agent.md 7)."""

from __future__ import annotations

import pytest

from juicebox_hsm.consensus.types import Captured, Certificate, LogEntry, RoleStatus, Witness
from juicebox_hsm.errors import InvariantViolation
from juicebox_hsm.host.log import Compacted
from juicebox_hsm.host.retry import STORE_RETRY
from juicebox_hsm.host.witness import Evidence, Feed, Following, Idle, Jump, Jumped, Pace, Persist, ReadLog
from juicebox_hsm.hsm.messages import CaptureJumpOk, NotWitness, Outcome, Response, RoleOk
from juicebox_hsm.ids import GroupId, HsmId, RealmId

ROLE = RoleStatus(Witness(), 1)
PACE = Pace(idle_first_s=0.1, idle_max_s=0.35, unready_s=30.0)
REALM, GROUP = RealmId(b"r" * 16), GroupId(b"g" * 16)


def entries(first: int, last: int) -> tuple[LogEntry, ...]:
    """Return entries first..last of one branch."""
    return tuple(
        LogEntry(index, None, None, bytes([index - 1]) * 32, bytes([index]) * 32, HsmId(bytes(16)))
        for index in range(first, last + 1)
    )


def captured(index: int, hsm: int = 0) -> Captured:
    """Return a member's capture."""
    return Captured(HsmId(bytes([hsm]) * 16), REALM, GROUP, index, bytes(32), bytes(32))


def is_catching_up(following: Following) -> bool:
    """Return what it says now; asked through a function, because the type checker takes properties for constants."""
    return following.is_catching_up


def test_a_push_is_fed_as_far_as_it_is_new() -> None:
    """What the HSM has is left out, what it misses is never skipped."""
    following = Following(5, PACE)
    assert following.pushed(entries(5, 7)) == Feed(entries(5, 7))
    assert following.pushed(entries(3, 7)) == Feed(entries(5, 7))
    assert following.pushed(entries(3, 4)) == Persist()
    assert following.pushed(entries(6, 7)) == ReadLog()
    assert following.pushed((*entries(5, 6), *entries(8, 9))) == ReadLog()


def test_the_position_moves_with_what_the_hsm_captured() -> None:
    """Only the HSM's yes moves it; after a no its own head says where it stands."""
    following = Following(5, PACE)
    assert following.fed(entries(5, 7), RoleOk(ROLE)) is None
    assert following.position == 8
    for refused in (Outcome.INVALID_MAC, Outcome.INVALID_CHAIN, Outcome.MISSING_PREV):
        assert following.fed(entries(8, 9), refused) is refused
    assert following.position == 8
    following.head(captured(8))
    assert following.position == 9
    following.head(None)
    assert following.position == 1


def test_unspecified_answers_are_broken_invariants() -> None:
    """An HSM that answers what it never answers stops the process."""
    with pytest.raises(InvariantViolation):
        Following().fed(entries(1, 1), Outcome.NO_QUORUM)
    with pytest.raises(InvariantViolation):
        Following().jumped(Outcome.HAVE_REALM)


def test_what_was_read_is_fed_unless_a_push_was_faster() -> None:
    """Rows that a push overtook are cut; rows that do not reach the position are read again."""
    following = Following(5, PACE)
    assert following.read(entries(5, 9), 0.0) == Feed(entries(5, 9))
    following.fed(entries(5, 7), RoleOk(ROLE))
    assert following.read(entries(5, 9), 0.0) == Feed(entries(8, 9))
    assert following.read(entries(5, 7), 0.0) == ReadLog()
    assert following.read(entries(9, 9), 0.0) == ReadLog()


def test_an_idle_log_is_read_less_and_less_often() -> None:
    """The wait doubles up to its bound, and begins anew with a wake-up or with entries."""
    following = Following(5, PACE)
    waits = []
    for _ in range(4):
        step = following.read([], 0.0)
        assert isinstance(step, Idle)
        waits.append(step.seconds)
        following.waited(woken=False)
    assert waits == [0.1, 0.2, 0.35, 0.35]
    following.waited(woken=True)
    assert following.read([], 0.0) == Idle(0.1)
    following.waited(woken=False)
    following.read(entries(5, 5), 0.0)
    assert following.read([], 0.0) == Idle(0.1)


def test_a_failing_store_is_asked_less_and_less_often() -> None:
    """The store's backoff, begun anew once it answered."""
    following = Following()
    assert [following.read_failed() for _ in range(10)][:3] == [0.01, 0.02, 0.04]
    assert following.read_failed() == STORE_RETRY.cap_s
    following.read([], 0.0)
    assert following.read_failed() == 0.01


def test_compacted_entries_are_jumped_over() -> None:
    """It becomes trouble when no certificate helps for long, and is over with a jump or when the log goes on."""
    following = Following(5, PACE)
    assert following.read(Compacted(5), 100.0) == Jump(5, is_first=True, is_trouble=False)
    assert is_catching_up(following)
    assert following.read(Compacted(5), 130.0) == Jump(5, is_first=False, is_trouble=False)
    assert following.read(Compacted(5), 130.1) == Jump(5, is_first=False, is_trouble=True)
    assert following.caught_up(131.0) == 31.0
    assert not is_catching_up(following)
    assert following.read(Compacted(5), 200.0) == Jump(5, is_first=True, is_trouble=False)
    following.read([], 201.0)
    assert not is_catching_up(following)


def test_a_push_past_the_gap_needs_no_jump() -> None:
    """What was compacted before the position moved past it is nobody's concern any more."""
    following = Following(5, PACE)
    following.fed(entries(5, 7), RoleOk(ROLE))
    assert following.read(Compacted(5), 1.0) == ReadLog()
    assert not is_catching_up(following)


def test_jumps_are_tried_again_at_growing_distances() -> None:
    """Soon at first, then after a quarter of the time that has passed, never later than the store's bound."""
    following = Following(5, PACE)
    following.read(Compacted(5), 100.0)
    assert [following.jump_pause_s(at) for at in (100.0, 101.0, 1000.0)] == [0.05, 0.3, STORE_RETRY.cap_s]


@pytest.mark.parametrize(
    ("reply", "meaning"),
    [
        (CaptureJumpOk(), Jumped.MOVED),
        (NotWitness(ROLE), Jumped.LEADS),
        (Outcome.INVALID_MAC, Jumped.CORRUPTED),
        (Outcome.INVALID_CHAIN, Jumped.CORRUPTED),
        (Outcome.NO_QUORUM, Jumped.LATER),
        (Outcome.STALE_INDEX, Jumped.LATER),
        (Outcome.MISSING_ENTRIES, Jumped.LATER),
    ],
)
def test_each_answer_to_a_jump_has_its_meaning(reply: Response, meaning: Jumped) -> None:
    """Rows that the HSM refuses are a corrupted log; everything else may be tried again."""
    assert Following().jumped(reply) is meaning


def test_evidence_reaches_from_the_certificate_to_the_highest_capture() -> None:
    """Live captures add votes and length; rows beyond the last capture are of no use and left out."""
    certificate = Certificate(5, (captured(5, 1), captured(6, 2)))
    evidence = Evidence(certificate, [captured(8, 3)])
    assert evidence.captures == (captured(5, 1), captured(6, 2), captured(8, 3))
    asked = [evidence.wanted]
    evidence.add(entries(5, 6))
    asked.append(evidence.wanted)
    evidence.add(entries(7, 9))
    assert [*asked, evidence.wanted] == [5, 7, None]
    assert evidence.entries == entries(5, 8)


def test_evidence_whose_rows_are_gone_is_worth_nothing() -> None:
    """There is a newer certificate then; a log that ends early gives what it has."""
    certificate = Certificate(5, (captured(7, 1),))
    gone = Evidence(certificate, [])
    gone.add(entries(5, 6))
    gone.add(Compacted(7))
    assert (gone.wanted, gone.entries) == (None, ())
    short = Evidence(certificate, [])
    short.add(entries(5, 6))
    short.add([])
    assert (short.wanted, short.entries) == (None, entries(5, 6))
    assert Evidence(Certificate(5, ()), []).wanted is None
