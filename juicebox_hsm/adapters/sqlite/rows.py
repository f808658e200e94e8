"""Encode what the file keeps as opaque blobs: log entries, intents, outbox events, certificates (own).

MessagePack arrays through msgspec: the HSM checks every MAC over its own encoding, so the stored form only has to be
lossless, and this one costs a tenth of the canonical CBOR. Blobs that do not decode raise `StoreInvalid`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar
from zlib import crc32

import msgspec

from juicebox_hsm.consensus.types import (
    Captured,
    Certificate,
    LogEntry,
    Partition,
    Transferring,
    TransferringIn,
    TransferringOut,
)
from juicebox_hsm.host.events import EventKind, NewEvent, OutboxEvent
from juicebox_hsm.host.log import Intent
from juicebox_hsm.ids import GroupId, HsmId, OwnedRange, RealmId, RecordId
from juicebox_hsm.ports.errors import StoreDamaged, StoreInvalid
from juicebox_hsm.wire.rpc import DamageKind

_PartitionRow = tuple[bytes, bytes, bytes]  # start, end, root hash
_TransferRow = tuple[bool, bytes, bytes, bytes, bytes, int]  # is in, peer group, start, end, root hash or b"", at
_Ending = _TransferRow | bool | None  # a marker, True for a retired entry, which has none
_EntryRow = tuple[int, _PartitionRow | None, _Ending, bytes, bytes, bytes, tuple[tuple[bytes, int], ...]]
_IntentRow = tuple[str, str, bytes, int]
_EventRow = tuple[bytes, bytes, str, str, dict[str, str | int] | None, str | None]
_StoredRow = tuple[int, int, bytes, bytes, bytes | None, int | None]  # id, last, mac, entries, intents, sum
_CaptureRow = tuple[bytes, int, bytes, bytes]

_pack = msgspec.msgpack.Encoder().encode
_entries = msgspec.msgpack.Decoder(list[_EntryRow])
_intents = msgspec.msgpack.Decoder(list[_IntentRow | None])
_event = msgspec.msgpack.Decoder(_EventRow)
_captures = msgspec.msgpack.Decoder(list[_CaptureRow])

T = TypeVar("T")


def unpack(decoder: msgspec.msgpack.Decoder[T], data: bytes, what: str) -> T:
    """Decode `data`; raises `StoreInvalid` that names `what` was damaged."""
    try:
        return decoder.decode(data)
    except msgspec.MsgspecError:
        raise StoreInvalid(f"a stored {what} cannot be decoded; the file is damaged") from None


def checksum(*parts: bytes | None) -> int:
    """Return the CRC-32 of what a row keeps: finds damage, not forgery. About 0.1 us per 100 bytes."""
    value = 0
    for part in parts:
        value = crc32(part or b"", value)
    return value


def entries_size(head: bytes) -> int | None:
    """Return how many pairs an encoded map has, from its first five bytes; None if it is no map (MessagePack)."""
    kind = head[0] if head else 0
    if 0x80 <= kind <= 0x8F:
        return kind & 0x0F
    if kind == 0xDE and len(head) >= 3:
        return int.from_bytes(head[1:3], "big")
    if kind == 0xDF and len(head) >= 5:
        return int.from_bytes(head[1:5], "big")
    return None


def _transfer_row(marker: Transferring) -> _TransferRow:
    if isinstance(marker, TransferringIn):
        return (True, marker.source, marker.range.start, marker.range.end, b"", marker.at)
    bounds = marker.partition.range
    return (False, marker.destination, bounds.start, bounds.end, marker.partition.root_hash, marker.at)


def _transfer(row: _TransferRow) -> Transferring:
    is_in, group, start, end, root_hash, at = row
    bounds = OwnedRange(RecordId(start), RecordId(end))
    if is_in:
        return TransferringIn(GroupId(group), bounds, at)
    return TransferringOut(GroupId(group), Partition(bounds, root_hash), at)


def encode_entries(entries: Sequence[LogEntry]) -> bytes:
    """Encode a batch of log entries."""
    rows = []
    for entry in entries:
        partition, marker = entry.partition, entry.transferring
        rows.append(
            (
                entry.index,
                None if partition is None else (partition.range.start, partition.range.end, partition.root_hash),
                _transfer_row(marker) if marker is not None else entry.retired or None,
                entry.prev_mac,
                entry.entry_mac,
                entry.hsm,
                entry.consumed,
            )
        )
    return _pack(rows)


def decode_entries(data: bytes) -> list[LogEntry]:
    """Decode a batch of log entries."""
    entries = []
    for index, partition, marker, prev_mac, entry_mac, hsm, consumed in unpack(_entries, data, "log row"):
        entries.append(
            LogEntry(
                index,
                None
                if partition is None
                else Partition(OwnedRange(RecordId(partition[0]), RecordId(partition[1])), partition[2]),
                None if marker is None or isinstance(marker, bool) else _transfer(marker),
                prev_mac,
                entry_mac,
                HsmId(hsm),
                tuple((GroupId(group), at) for group, at in consumed),
                retired=marker is True,
            )
        )
    return entries


def read_row(row: _StoredRow, low: int, group: GroupId) -> tuple[list[LogEntry], bytes | None]:
    """Return a log row's entries and encoded intents; `low` is the smallest row id of its group.

    Raises `StoreDamaged` unless the row is what was written: its checksum is right and its columns are its entries'.
    """
    at, last, mac, packed, intents, total = row
    first = at - low
    why = "its checksum is wrong"
    if total is None or total == checksum(packed, intents):
        try:
            entries = decode_entries(packed)
        except StoreInvalid as error:
            why = str(error)
        else:
            if entries and (entries[0].index, entries[-1].index, entries[-1].entry_mac) == (first, last, mac):
                return entries, intents
            why = "it holds other entries than it says"
    raise StoreDamaged(DamageKind.LOG, f"of entries {first} to {last}", group=group, why=why)


def encode_intents(intents: Sequence[Intent | None]) -> bytes | None:
    """Encode intents parallel to a batch's entries; None when there are none at all."""
    if not any(intents):
        return None
    return _pack([None if i is None else (i.tenant, i.user, i.record_id, i.hint) for i in intents])


def decode_intents(data: bytes) -> list[Intent | None]:
    """Decode what `encode_intents` wrote."""
    return [
        None if row is None else Intent(row[0], row[1], RecordId(row[2]), row[3])
        for row in unpack(_intents, data, "intent")
    ]


def encode_event(event: NewEvent) -> bytes:
    """Encode an event's fields that have no column."""
    return _pack((event.mac, event.record_id, event.user, event.kind.value, event.event, event.accounting))


def read_event(
    seq: int, data: bytes, total: int | None, tenant: str, group: GroupId, index: int, when_ms: int
) -> OutboxEvent:
    """Return an event from its row of the outbox. Raises `StoreDamaged` unless it is what was written."""
    why = "its checksum is wrong"
    if total is None or total == checksum(data):
        try:
            return OutboxEvent(seq, decode_event(data, tenant, group, index, when_ms))
        except (StoreInvalid, ValueError) as error:
            why = str(error)
    raise StoreDamaged(DamageKind.EVENT, f"{seq} of tenant {tenant}", group=group, why=why)


def decode_event(data: bytes, tenant: str, group: GroupId, index: int, when_ms: int) -> NewEvent:
    """Put an event together from its blob and its columns."""
    mac, record, user, kind, body, accounting = unpack(_event, data, "outbox row")
    return NewEvent(tenant, group, index, mac, RecordId(record), user, EventKind(kind), body, accounting, when_ms)


def encode_certificate(certificate: Certificate) -> bytes:
    """Encode a certificate's captures; its index is a column, realm and group are the row's."""
    return _pack([(c.hsm, c.index, c.mac, c.statement) for c in certificate.captures])


def decode_certificate(data: bytes, index: int, realm: RealmId, group: GroupId) -> Certificate:
    """Put a certificate together."""
    return Certificate(
        index,
        tuple(
            Captured(HsmId(hsm), realm, group, at, mac, statement)
            for hsm, at, mac, statement in unpack(_captures, data, "certificate")
        ),
    )
