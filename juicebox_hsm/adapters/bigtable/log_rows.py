"""Encode and decode log rows: one cell per entry, newest first, intents behind their entries (storage.md 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import Row, SetCell
from juicebox_hsm.consensus.codec import encode_log_entry, split_log_entry
from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.errors import DecodingError
from juicebox_hsm.host.log import Intent
from juicebox_hsm.ids import RECORD_ID_BYTES, RecordId
from juicebox_hsm.ports.errors import StoreInvalid
from juicebox_hsm.wire import cbor

ENTRIES: Final = "f"
TOMBSTONE: Final = "t"
TOMBSTONE_CELL: Final = SetCell(TOMBSTONE, b"t", b"")


def entry_cells(entries: Sequence[LogEntry], intents: Sequence[Intent | None]) -> list[SetCell]:
    """Return the cells of a batch's row."""
    cells = []
    for entry, intent in zip(entries, intents, strict=True):
        value = encode_log_entry(entry)
        if intent is not None:
            value += encode_intent(intent)
        cells.append(SetCell(ENTRIES, keys.downward(entry.index), value))
    return cells


def encode_intent(intent: Intent) -> bytes:
    """Encode an intent as it follows its entry."""
    return b"".join(
        (
            cbor.map_head(4),
            cbor.text("tenant"),
            cbor.text(intent.tenant),
            cbor.text("user"),
            cbor.text(intent.user),
            cbor.text("record_id"),
            cbor.byte_string(intent.record_id),
            cbor.text("hint"),
            cbor.uint(intent.hint),
        )
    )


def is_tombstone(row: Row) -> bool:
    """Tell whether the row was compacted. Families never mix in a row of the log."""
    return row.cells[0].family == TOMBSTONE


def decode_cell(qualifier: bytes, value: bytes) -> tuple[LogEntry, bytes]:
    """Return a cell's entry and the encoded intent behind it, b"" for none. Raises `StoreInvalid`."""
    try:
        entry, rest = split_log_entry(value)
    except DecodingError as error:
        raise StoreInvalid(f"a stored log entry is damaged: {error}") from None
    if keys.upward(qualifier) != entry.index:
        raise StoreInvalid(f"the log entry of index {entry.index} is stored under {keys.upward(qualifier)}")
    return entry, rest


def decode_entries(row: Row) -> list[LogEntry]:
    """Return a row's entries, oldest first."""
    return [decode_cell(cell.qualifier, cell.value)[0] for cell in reversed(row.cells)]


def decode_with_intents(row: Row) -> list[tuple[LogEntry, Intent]]:
    """Return a row's entries that have an intent, oldest first."""
    found = []
    for cell in reversed(row.cells):
        entry, rest = decode_cell(cell.qualifier, cell.value)
        if rest:
            found.append((entry, _decode_intent(rest)))
    return found


def _decode_intent(data: bytes) -> Intent:
    try:
        fields = cbor.as_map(cbor.decode(data))
        return Intent(
            cbor.as_text(fields["tenant"]),
            cbor.as_text(fields["user"]),
            RecordId(cbor.as_fixed(fields["record_id"], RECORD_ID_BYTES)),
            cbor.as_uint(fields["hint"], cbor.U64_MAX),
        )
    except (DecodingError, KeyError):
        raise StoreInvalid("a stored intent is damaged") from None
