"""With what proof, and when, a member leaves a group whose log has ended."""

from __future__ import annotations

from dataclasses import replace

import pytest

from juicebox_hsm.consensus.types import Captured, LogEntry
from juicebox_hsm.host.ending import HOUSE_S, has_cleared_up, proof_of_end
from juicebox_hsm.host.leadership.machine import Snapshot
from juicebox_hsm.ids import GroupId, HsmId, RealmId

MEMBERS = tuple(HsmId(bytes([number]) * 16) for number in (1, 2, 3))
END = LogEntry(7, None, None, b"\x06" * 32, b"\x07" * 32, MEMBERS[0], retired=True)
CLEAR = Snapshot(1, END, 7, 7, 6, True, 0, 0, 0, 0, 0.0, 1, 7)


def vote(member: HsmId, index: int = 7, mac: bytes = END.entry_mac) -> Captured:
    """Return a member's capture; only HSMs look at the statement."""
    return Captured(member, RealmId(bytes(16)), GroupId(bytes(16)), index, mac, bytes(32))


def test_a_proof_has_a_majority_for_the_very_entry() -> None:
    """Each member counts once, strangers, other entries and other indexes do not; the proof holds what counted."""
    full = proof_of_end(END, MEMBERS, [vote(MEMBERS[2]), vote(MEMBERS[0]), vote(MEMBERS[2])])
    assert full is not None
    assert full.index == 7
    assert [found.hsm for found in full.captures] == [MEMBERS[0], MEMBERS[2]]
    for lacking in (
        [],
        [vote(MEMBERS[0]), vote(MEMBERS[0])],
        [vote(MEMBERS[0]), vote(HsmId(b"\x09" * 16))],
        [vote(MEMBERS[0]), vote(MEMBERS[1], index=6)],
        [vote(MEMBERS[0]), vote(MEMBERS[1], mac=b"\x08" * 32)],
    ):
        assert proof_of_end(END, MEMBERS, lacking) is None


@pytest.mark.parametrize(
    "left",
    [{"waiting": 1}, {"releasing": 1}, {"queued": 1}, {"resolved": False}, {"settled": 5}, {"uncompacted_rows": 2}],
    ids=lambda left: next(iter(left)),
)
def test_a_leader_clears_up_first(left: dict[str, int | bool]) -> None:
    """A leader stays while somebody waits, an intent has no row, or more than one row of the log is left."""
    assert has_cleared_up(CLEAR, END, HOUSE_S)
    assert not has_cleared_up(replace(CLEAR, **left), END, HOUSE_S)  # type: ignore[arg-type]  # fields of the snapshot by name


def test_a_leader_of_an_ended_group_has_its_time() -> None:
    """One that cannot clear up leaves all the same, and not a moment before: the next one begins anew."""
    assert not has_cleared_up(replace(CLEAR, uncompacted_rows=2), END, HOUSE_S)
    assert has_cleared_up(replace(CLEAR, uncompacted_rows=2), END, HOUSE_S + 0.1)
