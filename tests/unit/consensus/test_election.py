"""Election against the examples of hsm.md 11."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.consensus.election import elect, highest_votes
from juicebox_hsm.consensus.types import Captured
from juicebox_hsm.ids import GroupId, HsmId, RealmId


def ids(count: int) -> list[HsmId]:
    return [HsmId(bytes([number]) * 16) for number in range(count)]


@pytest.mark.parametrize(
    ("voters", "votes", "outcome"),
    [
        (5, (15, 15, 15, 14, 13), 15),
        (5, (13, 14, 15, 14, 13), 14),
        (5, (13, 15, 14), 13),
        (5, (13, 15), None),
        (4, (11, 12, 14), 11),
        (4, (11, 12), None),
        (3, (11, 15), 11),
        (2, (13, 15), 13),
        (2, (13,), None),
        (1, (42,), 42),
        (1, (), None),
    ],
)
def test_examples(voters: int, votes: tuple[int, ...], outcome: int | None) -> None:
    """The published examples come out."""
    members = ids(voters)
    assert elect(members, dict(zip(members, votes, strict=False))) == outcome


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 9))
def test_outcome_is_the_highest_index_a_strict_majority_reached(votes: list[int], absent: int) -> None:
    """The outcome is exactly the highest index that more than half of the voters are at or above."""
    members = ids(len(votes) + absent)[:9]
    cast = dict(zip(members, votes, strict=False))
    reached = [index for index in range(1, 10) if 2 * sum(vote >= index for vote in cast.values()) > len(members)]
    assert elect(members, cast) == (max(reached) if reached else None)


def test_strangers_do_not_vote() -> None:
    """Votes of HSMs outside the configuration do not make a quorum."""
    members = ids(5)
    assert elect(members[:3], {members[0]: 5, members[3]: 5, members[4]: 5}) is None


def test_one_vote_per_voter_and_only_valid_ones() -> None:
    """Duplicates of one HSM count once, at its highest valid capture; an invalid higher one does not shadow it."""
    member = ids(1)[0]
    captures = [
        Captured(member, RealmId(bytes(16)), GroupId(bytes(16)), index, bytes(32), bytes(32)) for index in (3, 9, 5, 4)
    ]
    assert highest_votes(captures, lambda captured: captured.index != 9) == {member: 5}
    assert highest_votes(captures, lambda _: False) == {}
