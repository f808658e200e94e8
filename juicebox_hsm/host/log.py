"""What a log's store and its writers tell each other (storage.md 2.1)."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from juicebox_hsm.consensus.types import ZERO_MAC, LogEntry
from juicebox_hsm.errors import check
from juicebox_hsm.ids import RecordId

BATCH_ENTRIES_MAX: Final = 100
"""Entries of one append (storage.md 2.1)."""


@dataclass(frozen=True, slots=True)
class Intent:
    """Who a client's log entry is for, stored with the entry (agent.md 11).

    `user` is the hashed user id (64 hex digits); `hint` is the tenant's next outbox sequence as the writer knew it.
    """

    tenant: str
    user: str
    record_id: RecordId
    hint: int


def lacks(last: LogEntry | None, captured: int, mac: bytes) -> bool:
    """Tell whether a log that ends with `last` cannot be the one of which an HSM captured an entry."""
    return last is None or last.index < captured or (last.index == captured and last.entry_mac != mac)


class AppendOutcome(enum.Enum):
    """What became of an append."""

    APPENDED = "Appended"
    CONFLICT = "Conflict"


@dataclass(frozen=True, slots=True)
class Compacted:
    """The entry at `index` is no longer in the log (or a range of rows is missing from there on)."""

    index: int


@dataclass(frozen=True, slots=True)
class LogRow:
    """One row (batch) of the log, by the index of its first entry."""

    first_index: int
    is_tombstone: bool


def check_batch(entries: Sequence[LogEntry], intents: Sequence[Intent | None], index_max: int) -> None:
    """Check what the caller of an append promises; `index_max` is the highest index that the store can keep."""
    check(0 < len(entries) <= BATCH_ENTRIES_MAX, "a log batch has 1..100 entries")
    check(len(intents) == len(entries), "intents are parallel to entries")
    check(entries[0].index > 1 or entries[0].prev_mac == ZERO_MAC, "the first entry of a log follows the zero mac")
    check(entries[0].index > 0 and entries[-1].index <= index_max, "log indexes are within what the store keeps")
    for before, after in pairwise(entries):
        check(
            after.index == before.index + 1 and after.prev_mac == before.entry_mac,
            "the entries of a batch follow each other",
        )
