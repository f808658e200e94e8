"""Which log index a strict majority of a group has captured (hsm.md 11)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from juicebox_hsm.consensus.types import Captured
from juicebox_hsm.ids import HsmId


def elect(voters: Sequence[HsmId], votes: Mapping[HsmId, int]) -> int | None:
    """Return the highest index that more than half of `voters` reached, or None without a majority.

    `votes` holds one index per voter; votes of anybody else are ignored.
    """
    cast = sorted((votes[voter] for voter in voters if voter in votes), reverse=True)
    majority = len(voters) // 2
    return cast[majority] if len(cast) > majority else None


def highest_votes(captures: Iterable[Captured], is_valid: Callable[[Captured], bool]) -> dict[HsmId, int]:
    """Return each HSM's highest valid capture; invalid ones are skipped silently.

    Validity is asked only where it could raise a vote, so repeating captures costs nothing.
    """
    votes: dict[HsmId, int] = {}
    for captured in captures:
        if captured.index > votes.get(captured.hsm, 0) and is_valid(captured):
            votes[captured.hsm] = captured.index
    return votes
