"""When a member's HSM is told to forget a group whose log has ended, and with what proof (agent.md 16).

Every member's agent does this by itself, whenever it finds that its HSM captured the retired entry: at once, or years
later on an HSM that was away. The proof is the commit certificate of that entry. Whoever forgets first puts it into the
store, where it stays beside the log's last row, for captures of members that forgot cannot be asked for any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from juicebox_hsm.consensus.election import elect, highest_votes
from juicebox_hsm.consensus.types import Captured, Certificate, LogEntry
from juicebox_hsm.host.leadership.machine import Snapshot
from juicebox_hsm.ids import HsmId

HOUSE_S: Final = 150.0
"""How long a leader of an ended group may take to settle and compact: twice the grace for former leaders, and some."""


def proof_of_end(entry: LogEntry, configuration: Sequence[HsmId], captures: Sequence[Captured]) -> Certificate | None:
    """Return the certificate of the retired entry, None without captures of exactly it by a strict majority."""
    fitting = [vote for vote in captures if (vote.index, vote.mac) == (entry.index, entry.entry_mac)]
    votes = highest_votes(fitting, lambda vote: vote.hsm in configuration)
    if elect(configuration, votes) is None:
        return None
    by_hsm = {vote.hsm: vote for vote in fitting if vote.hsm in votes}
    return Certificate(entry.index, tuple(by_hsm[hsm] for hsm in sorted(by_hsm)))


def has_cleared_up(shown: Snapshot, entry: LogEntry, age_s: float) -> bool:
    """Tell whether a leader has done what only it can: every intent has its row, and one row of the log is left.

    After `HOUSE_S` since the end it has had its time; whoever leads next finds what is left.
    """
    if age_s > HOUSE_S:
        return True
    busy = shown.waiting or shown.releasing or shown.queued
    return not busy and shown.resolved and shown.settled >= entry.index - 1 and shown.uncompacted_rows <= 1
