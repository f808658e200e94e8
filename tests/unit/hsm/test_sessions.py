"""The session cache (hsm.md 13.1)."""

from __future__ import annotations

import pytest

from juicebox_hsm.crypto.noise import Session
from juicebox_hsm.errors import InvariantViolation
from juicebox_hsm.hsm.sessions import Sessions
from juicebox_hsm.ids import RecordId

ONE, TWO = RecordId(b"\1" * 32), RecordId(b"\2" * 32)


def session() -> Session:
    return Session(bytes(32), bytes(32))


def test_i18_keyed_by_record_and_session_id() -> None:
    """A session is found under its own record and id only, and only once."""
    sessions = Sessions(4)
    kept = session()
    sessions.put(ONE, 7, kept)
    assert sessions.take(TWO, 7) is None
    assert sessions.take(ONE, 8) is None
    assert sessions.take(ONE, 7) is kept
    assert sessions.take(ONE, 7) is None


def test_least_recently_used_goes_first() -> None:
    """A full cache drops the session whose last use or insertion is oldest; replacing drops nothing else."""
    sessions = Sessions(3)
    for number in range(3):
        sessions.put(ONE, number, session())
    used = sessions.take(ONE, 0)
    assert used is not None
    sessions.put(ONE, 0, used)
    sessions.put(ONE, 2, session())
    assert len(sessions) == 3
    sessions.put(TWO, 9, session())
    assert [(ONE, number) in sessions for number in range(3)] == [True, False, True]
    assert (TWO, 9) in sessions


@pytest.mark.parametrize(("capacity", "is_right"), [(0, False), (1, True), (65535, True), (65536, False)])
def test_capacity_is_bounded(capacity: int, is_right: bool) -> None:
    """A cache holds something, and no more than 65535 sessions."""
    if is_right:
        assert len(Sessions(capacity)) == 0
        return
    with pytest.raises(InvariantViolation, match="1 to 65535"):
        Sessions(capacity)
