"""Encode and decode log rows: one cell per entry, newest first, intents behind their entries (storage.md 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import Cell, Row, SetCell
from juicebox_hsm.adapters.bigtable.sums import SUM_HEAD, has_wrong_sum, with_sum
from juicebox_hsm.consensus.codec import encode_log_entry, split_log_entry
from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.errors import DecodingError
from juicebox_hsm.host.log import Intent
from juicebox_hsm.ids import ID_BYTES, RECORD_ID_BYTES, RecordId
from juicebox_hsm.ports.errors import StoreDamaged
from juicebox_hsm.wire import cbor
from juicebox_hsm.wire.rpc import DamageKind

ENTRIES: Final = "f"
TOMBSTONE: Final = "t"
TOMBSTONE_CELL: Final = SetCell(TOMBSTONE, b"t", b"")


def entry_cells(entries: Sequence[LogEntry], intents: Sequence[Intent | None]) -> list[SetCell]:
    """Return the cells of a batch's row."""
    cells = []
    for entry, intent in zip(entries, intents, strict=True):
        value = encode_log_entry(entry)
        if intent is not None:
            value = with_sum(value + encode_intent(intent))
        cells.append(SetCell(ENTRIES, keys.downward(entry.index), value))
    return cells


def encode_intent(intent: Intent) -> bytes:
    """Encode an intent as it follows its entry, up to the checksum of both."""
    return b"".join(
        (
            cbor.map_head(5),
            cbor.text("tenant"),
            cbor.text(intent.tenant),
            cbor.text("user"),
            cbor.text(intent.user),
            cbor.text("record_id"),
            cbor.byte_string(intent.record_id),
            cbor.text("hint"),
            cbor.uint(intent.hint),
            SUM_HEAD,
        )
    )


def is_tombstone(row: Row) -> bool:
    """Tell whether the row was compacted. Families never mix in a row of the log."""
    return row.cells[0].family == TOMBSTONE


def decode_cell(key: bytes, cell: Cell) -> tuple[LogEntry, bytes]:
    """Return a cell's entry and the encoded intent behind it, b"" for none. Raises `StoreDamaged`."""
    value = cell.value
    try:
        entry, rest = split_log_entry(value)
    except DecodingError as error:
        raise _damaged(key, cell, str(error)) from None
    if keys.upward(cell.qualifier) != entry.index:
        raise _damaged(key, cell, f"it is entry {entry.index}")
    if has_wrong_sum(value, rest):
        raise _damaged(key, cell, "its checksum is wrong")
    return entry, rest


def _damaged(key: bytes, cell: Cell, why: str) -> StoreDamaged:
    place = f"of entry {keys.upward(cell.qualifier)}"
    return StoreDamaged(DamageKind.LOG, place, group=key[:ID_BYTES], why=why)


def decode_entries(row: Row) -> list[LogEntry]:
    """Return a row's entries, oldest first."""
    return [decode_cell(row.key, cell)[0] for cell in reversed(row.cells)]


def decode_with_intents(row: Row) -> list[tuple[LogEntry, Intent]]:
    """Return a row's entries that have an intent, oldest first."""
    found = []
    for cell in reversed(row.cells):
        entry, rest = decode_cell(row.key, cell)
        if rest:
            found.append((entry, _decode_intent(row.key, cell, rest)))
    return found


def _decode_intent(key: bytes, cell: Cell, data: bytes) -> Intent:
    try:
        fields = cbor.as_map(cbor.decode(data))
        return Intent(
            cbor.as_text(fields["tenant"]),
            cbor.as_text(fields["user"]),
            RecordId(cbor.as_fixed(fields["record_id"], RECORD_ID_BYTES)),
            cbor.as_uint(fields["hint"], cbor.U64_MAX),
        )
    except (DecodingError, KeyError):
        raise _damaged(key, cell, "its intent cannot be decoded") from None
