"""What of a log may be compacted (agent.md 10)."""

from __future__ import annotations

from collections.abc import Sequence


def compactible_rows(starts: Sequence[int], index: int) -> int:
    """Return how many leading rows have all their entries at or below `index`.

    Only row starts are known, so row k counts iff row k+1 exists and starts at or below index + 1.
    """
    count = 0
    while count + 1 < len(starts) and starts[count + 1] <= index + 1:
        count += 1
    return count


def compaction_index(committed: int | None, captured: int | None, settled: int) -> int:
    """Return the highest index that may be compacted: below the last commit, captured by us, and settled.

    The second bound keeps our own HSM from needing a jump, which a leader is refused; the third keeps intents whose
    outcome is not recorded yet.
    """
    if committed is None or captured is None:
        return 0
    return min(committed - 1, captured, settled)
