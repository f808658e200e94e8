"""What a log's store and its writers tell each other (storage.md 2.1)."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from juicebox_hsm.ids import RecordId


@dataclass(frozen=True, slots=True)
class Intent:
    """Who a client's log entry is for, stored with the entry (agent.md 11).

    `user` is the hashed user id (64 hex digits); `hint` is the tenant's next outbox sequence as the writer knew it.
    """

    tenant: str
    user: str
    record_id: RecordId
    hint: int


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
