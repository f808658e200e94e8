"""Encode and decode outbox rows: events, cursors, counters, settled indexes (storage.md 2.7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import cbor2

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import Cell, Row
from juicebox_hsm.adapters.bigtable.sums import SUM_BYTES, has_wrong_sum, with_sum
from juicebox_hsm.consensus.types import MAC_BYTES
from juicebox_hsm.errors import DecodingError
from juicebox_hsm.host.events import EventKind, NewEvent, OutboxEvent
from juicebox_hsm.ids import ID_BYTES, RECORD_ID_BYTES, GroupId, RecordId
from juicebox_hsm.ports.errors import StoreDamaged, StoreInvalid
from juicebox_hsm.wire import cbor
from juicebox_hsm.wire.rpc import DamageKind

EVENTS: Final = "f"
COUNTERS: Final = "n"
REMOVED: Final = "t"
"""Family of the mark on a row from which events were removed: the row key stays taken for a week, so that a writer
with an outdated tail collides with it instead of using sequence numbers again."""
PUBLISHED: Final = b"p"
REMOVED_BELOW: Final = b"r"
ACKNOWLEDGED: Final = b"v"
"""Columns of a cursor row; `p` sorts first, which whoever reads one cell of it relies on."""
WRITE_ID: Final = b"w"
SETTLED: Final = b"s"


def encode_event(seq: int, event: NewEvent) -> bytes:
    """Encode an event; the tenant is in the row's key."""
    encoded: bytes = cbor2.dumps(
        {
            "seq": seq,
            "group": event.group,
            "index": event.index,
            "mac": event.mac,
            "record_id": event.record_id,
            "user": event.user,
            "kind": event.kind.value,
            "event": None if event.event is None else dict(event.event),
            "accounting": event.accounting,
            "when_ms": event.when_ms,
            "sum": bytes(SUM_BYTES),
        }
    )
    return with_sum(encoded[:-SUM_BYTES])


def _body(item: object) -> Mapping[str, str | int] | None:
    if item is None:
        return None
    fields = cbor.as_map(item)
    if any(type(name) is not str or type(value) not in (str, int) for name, value in fields.items()):
        raise DecodingError("an event body holds texts and integers")
    return fields


def decode_event(tenant: str, cell: Cell) -> OutboxEvent:
    """Decode one event cell; those of earlier versions have no checksum. Raises `StoreDamaged`."""
    stored_under = keys.upward(cell.qualifier)
    place = f"{stored_under} of tenant {tenant}"
    try:
        fields = cbor.as_map(cbor.decode(cell.value))
        if has_wrong_sum(cell.value, cell.value):
            raise DecodingError("its checksum is wrong")
        accounting = fields["accounting"]
        seq = cbor.as_uint(fields["seq"], cbor.U64_MAX)
        event = NewEvent(
            tenant=tenant,
            group=GroupId(cbor.as_fixed(fields["group"], ID_BYTES)),
            index=cbor.as_uint(fields["index"], cbor.U64_MAX),
            mac=cbor.as_fixed(fields["mac"], MAC_BYTES),
            record_id=RecordId(cbor.as_fixed(fields["record_id"], RECORD_ID_BYTES)),
            user=cbor.as_text(fields["user"]),
            kind=EventKind(fields["kind"]),
            event=_body(fields["event"]),
            accounting=None if accounting is None else cbor.as_text(accounting),
            when_ms=cbor.as_uint(fields["when_ms"], cbor.U64_MAX),
        )
    except (DecodingError, KeyError, ValueError) as error:
        raise StoreDamaged(DamageKind.EVENT, place, why=str(error)) from None
    if seq != stored_under:
        raise StoreDamaged(DamageKind.EVENT, place, why=f"it is event {seq}")
    return OutboxEvent(seq, event)


def number(value: bytes) -> int:
    """Decode an 8-byte number."""
    if len(value) != 8:
        raise StoreInvalid(f"a stored number has {len(value)} bytes instead of 8")
    return int.from_bytes(value, "big")


@dataclass(frozen=True, slots=True)
class Cursor:
    """A tenant's cursor row. `write_id` is b"" if the row was never written; `counters` as stored, per day."""

    published: int = 0
    removed_below: int = 0
    acknowledged_below: int = 0
    write_id: bytes = b""
    counters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def decode_cursor(row: Row | None) -> Cursor:
    """Decode a cursor row. Raises `StoreInvalid`."""
    if row is None:
        return Cursor()
    values = {cell.qualifier: cell.value for cell in row.cells if cell.family == EVENTS}
    counters = {cell.qualifier[2:].decode(): decode_counts(cell.value) for cell in row.cells if cell.family == COUNTERS}
    return Cursor(
        number(values.get(PUBLISHED, bytes(8))),
        number(values.get(REMOVED_BELOW, bytes(8))),
        number(values.get(ACKNOWLEDGED, bytes(8))),
        values.get(WRITE_ID, b""),
        counters,
    )


def counter_qualifier(day: str) -> bytes:
    """Return the column of a day's counters."""
    return b"n:" + day.encode()


def encode_counts(counts: Mapping[str, int]) -> bytes:
    """Encode a day's counters."""
    encoded: bytes = cbor2.dumps(dict(counts))
    return encoded


def decode_counts(value: bytes) -> dict[str, int]:
    """Decode a day's counters. Raises `StoreInvalid`."""
    try:
        fields: dict[Any, Any] = cbor.as_map(cbor.decode(value))
        return {cbor.as_text(kind): cbor.as_uint(count, cbor.U64_MAX) for kind, count in fields.items()}
    except DecodingError:
        raise StoreInvalid("stored request counters are damaged") from None
