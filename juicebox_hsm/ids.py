"""Identifiers and ranges of record ids (hsm.md section 1).

Ids are `NewType`s over `bytes`: they cost nothing at run time and the type checker keeps them apart.
Record ids order as big-endian integers, which is how Python orders equal-length `bytes`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NewType

from juicebox_hsm.errors import DecodingError

RealmId = NewType("RealmId", bytes)
GroupId = NewType("GroupId", bytes)
HsmId = NewType("HsmId", bytes)
RecordId = NewType("RecordId", bytes)
LogIndex = NewType("LogIndex", int)

ID_BYTES: Final = 16
RECORD_ID_BYTES: Final = 32
LOG_INDEX_MAX: Final = 2**64 - 1

RECORD_ID_MIN: Final = RecordId(bytes(32))
RECORD_ID_MAX: Final = RecordId(b"\xff" * 32)


def next_record_id(record: RecordId) -> RecordId | None:
    """Return the id after `record`, or None after the maximum id."""
    if record == RECORD_ID_MAX:
        return None
    return RecordId((int.from_bytes(record, "big") + 1).to_bytes(32, "big"))


def prev_record_id(record: RecordId) -> RecordId | None:
    """Return the id before `record`, or None before the minimum id."""
    if record == RECORD_ID_MIN:
        return None
    return RecordId((int.from_bytes(record, "big") - 1).to_bytes(32, "big"))


def parse_id(text: str) -> bytes:
    """Decode 32 hex digits to a 16-byte id; raises `DecodingError` for anything else."""
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) != ID_BYTES or len(text) != 2 * ID_BYTES:
        raise DecodingError(f"not an id of 32 hex digits: {text[:40]!r}")
    return raw


@dataclass(frozen=True, slots=True)
class OwnedRange:
    """An inclusive range of record ids. `is_valid` must be asked before a host-supplied range is used."""

    start: RecordId
    end: RecordId

    @property
    def is_valid(self) -> bool:
        """Tell whether both ends are 32 bytes and start <= end."""
        return len(self.start) == RECORD_ID_BYTES and len(self.end) == RECORD_ID_BYTES and self.start <= self.end

    def contains(self, record: bytes) -> bool:
        """Tell whether `record` (32 bytes) lies in the range."""
        return self.start <= record <= self.end

    def contains_range(self, other: OwnedRange) -> bool:
        """Tell whether all of `other` lies in the range."""
        return self.start <= other.start and other.end <= self.end

    def overlaps(self, other: OwnedRange) -> bool:
        """Tell whether any record lies in both ranges."""
        return self.start <= other.end and other.start <= self.end

    def join(self, other: OwnedRange) -> OwnedRange | None:
        """Return the union of two adjacent ranges, or None if they do not touch end to start."""
        if next_record_id(self.end) == other.start:
            return OwnedRange(self.start, other.end)
        if next_record_id(other.end) == self.start:
            return OwnedRange(other.start, self.end)
        return None

    def split_at(self, part: OwnedRange) -> RecordId | None:
        """Return the first id of the right half when `part` is one end of this range, else None.

        Equal, middle and foreign ranges all give None.
        """
        if self.start == part.start and part.end < self.end:
            return next_record_id(part.end)
        if self.end == part.end and part.start > self.start:
            return part.start
        return None


FULL_RANGE: Final = OwnedRange(RECORD_ID_MIN, RECORD_ID_MAX)


def uncovered(ranges: Iterable[OwnedRange]) -> list[OwnedRange]:
    """Return the parts of the whole id space that none of the ranges has, in order; they may overlap."""
    gaps: list[OwnedRange] = []
    start: RecordId | None = RECORD_ID_MIN
    for each in sorted(ranges, key=lambda each: each.start):
        if start is None:
            break
        before = prev_record_id(each.start)
        if before is not None and start <= before:
            gaps.append(OwnedRange(start, before))
        after = next_record_id(each.end)
        start = None if after is None else max(start, after)
    if start is not None:
        gaps.append(OwnedRange(start, RECORD_ID_MAX))
    return gaps
