"""CBOR forms of log entries, captures and commit certificates (hsm.md 1 and 2, storage.md 2.1).

Encoders write fields in declared order. Decoders accept exactly what the encoders write: the decoded value is
encoded again and compared, which refuses unknown and duplicate keys, other orders and non-canonical integers at once.
All of them raise `errors.DecodingError` and nothing else.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from juicebox_hsm.consensus.macs import (
    NULL,
    TRUE,
    array_head,
    encode_consumed,
    encode_partition,
    encode_transferring_in,
    encode_transferring_out,
)
from juicebox_hsm.consensus.types import (
    CONSUMED_SOURCES_MAX,
    GROUP_MEMBERS_MAX,
    MAC_BYTES,
    Captured,
    Certificate,
    LogEntry,
    Partition,
    Transferring,
    TransferringIn,
    TransferringOut,
)
from juicebox_hsm.errors import DecodingError
from juicebox_hsm.ids import ID_BYTES, RECORD_ID_BYTES, GroupId, HsmId, OwnedRange, RealmId, RecordId
from juicebox_hsm.wire import cbor

_ENTRY_INDEX: Final = {size: cbor.map_head(size) + cbor.text("index") for size in (6, 7, 8)}
_PARTITION: Final = cbor.text("partition")
_TRANSFERRING: Final = cbor.text("transferring")
_IN: Final = cbor.map_head(1) + cbor.text("In")
_OUT: Final = cbor.map_head(1) + cbor.text("Out")
_PREV_MAC: Final = cbor.text("prev_mac")
_ENTRY_MAC: Final = cbor.text("entry_mac")
_HSM: Final = cbor.text("hsm")
_CONSUMED: Final = cbor.text("consumed")
_RETIRED: Final = cbor.text("retired") + TRUE
_CAPTURED_HSM: Final = cbor.map_head(6) + cbor.text("hsm")
_VOTE_HSM: Final = cbor.map_head(4) + cbor.text("hsm")
_REALM: Final = cbor.text("realm")
_GROUP: Final = cbor.text("group")
_INDEX: Final = cbor.text("index")
_MAC: Final = cbor.text("mac")
_STATEMENT: Final = cbor.text("statement")
_CERTIFICATE_INDEX: Final = cbor.map_head(2) + _INDEX
_CAPTURES: Final = cbor.text("captures")


def _strict_bytes(item: object, size: int) -> bytes:
    """Return a byte string of exactly `size` bytes; arrays of integers are not accepted here."""
    if type(item) is not bytes or len(item) != size:
        raise DecodingError(f"a byte string of {size} bytes was expected")
    return item


def _list(item: object) -> list[object]:
    if type(item) is not list:
        raise DecodingError("an array was expected")
    return item


# Log entries --------------------------------------------------------------------------------------------------


def encode_log_entry(entry: LogEntry) -> bytes:
    """Encode a log entry: 278 bytes at most without a transfer, 464 with one, 906 with all of `consumed`."""
    marker = entry.transferring
    if marker is None:
        transferring = NULL
    elif isinstance(marker, TransferringIn):
        transferring = _IN + encode_transferring_in(marker)
    else:
        transferring = _OUT + encode_transferring_out(marker)
    return b"".join(
        (
            _ENTRY_INDEX[6 + bool(entry.consumed) + entry.retired],
            cbor.uint(entry.index),
            _PARTITION,
            encode_partition(entry.partition),
            _TRANSFERRING,
            transferring,
            _PREV_MAC,
            cbor.byte_string(entry.prev_mac),
            _ENTRY_MAC,
            cbor.byte_string(entry.entry_mac),
            _HSM,
            cbor.byte_string(entry.hsm),
            *((_CONSUMED, encode_consumed(entry.consumed)) if entry.consumed else ()),
            _RETIRED if entry.retired else b"",
        )
    )


def decode_log_entry(data: bytes) -> LogEntry:
    """Decode exactly one log entry; raises `DecodingError`, also for bytes after it."""
    entry, rest = split_log_entry(data)
    if rest:
        raise DecodingError("bytes follow the log entry")
    return entry


def split_log_entry(data: bytes) -> tuple[LogEntry, bytes]:
    """Decode the log entry at the start of `data` and return it with the bytes that follow it."""
    entry = log_entry_from_item(cbor.decode(data))
    encoded = encode_log_entry(entry)
    if not data.startswith(encoded):
        raise DecodingError("the log entry is not in canonical form")
    return entry, data[len(encoded) :]


def log_entry_from_item(item: object) -> LogEntry:
    """Build a log entry from a decoded CBOR map; form beyond lengths and ranges is the caller's to check."""
    fields = cbor.as_map(item)
    try:
        return LogEntry(
            index=_index(fields["index"]),
            partition=partition_from_item(fields["partition"]),
            transferring=transferring_from_item(fields["transferring"]),
            prev_mac=_strict_bytes(fields["prev_mac"], MAC_BYTES),
            entry_mac=_strict_bytes(fields["entry_mac"], MAC_BYTES),
            hsm=HsmId(_strict_bytes(fields["hsm"], ID_BYTES)),
            consumed=_consumed(fields["consumed"]) if "consumed" in fields else (),
            retired=_retired(fields["retired"]) if "retired" in fields else False,
        )
    except KeyError as missing:
        raise DecodingError(f"log entry lacks {missing}") from None


def _retired(item: object) -> bool:
    if item is not True:
        raise DecodingError("retired is true when present")
    return True


def _index(item: object) -> int:
    index = cbor.as_uint(item, cbor.U64_MAX)
    if index == 0:
        raise DecodingError("a log index is 1 or more")
    return index


def range_from_item(item: object) -> OwnedRange:
    """Build a range from `{start, end}`; whether start <= end is the receiver's to ask."""
    fields = cbor.as_map(item)
    try:
        return OwnedRange(
            RecordId(_strict_bytes(fields["start"], RECORD_ID_BYTES)),
            RecordId(_strict_bytes(fields["end"], RECORD_ID_BYTES)),
        )
    except KeyError as missing:
        raise DecodingError(f"range lacks {missing}") from None


def partition_from_item(item: object) -> Partition | None:
    """Build a partition from `{range, root_hash}` or null."""
    if item is None:
        return None
    fields = cbor.as_map(item)
    try:
        return Partition(range_from_item(fields["range"]), _strict_bytes(fields["root_hash"], MAC_BYTES))
    except KeyError as missing:
        raise DecodingError(f"partition lacks {missing}") from None


def transferring_from_item(item: object) -> Transferring | None:
    """Build a transfer marker from `{"In": ...}`, `{"Out": ...}` or null."""
    if item is None:
        return None
    name, value = cbor.as_variant(item)
    try:
        fields = cbor.as_map(value)
        if name == "In":
            source = GroupId(_strict_bytes(fields["source"], ID_BYTES))
            return TransferringIn(source, range_from_item(fields["range"]), _index(fields["at"]))
        if name == "Out":
            destination = GroupId(_strict_bytes(fields["destination"], ID_BYTES))
            partition = partition_from_item(fields["partition"])
            if partition is not None:
                return TransferringOut(destination, partition, _index(fields["at"]))
    except KeyError as missing:
        raise DecodingError(f"transfer marker lacks {missing}") from None
    raise DecodingError("unknown transfer marker")


def _consumed(item: object) -> tuple[tuple[GroupId, int], ...]:
    pairs = _list(item)
    if not 1 <= len(pairs) <= CONSUMED_SOURCES_MAX:
        raise DecodingError(f"consumed names 1 to {CONSUMED_SOURCES_MAX} sources when present")
    consumed = []
    for entry in pairs:
        pair = _list(entry)
        if len(pair) != 2:
            raise DecodingError("an element of consumed is a pair")
        consumed.append((GroupId(_strict_bytes(pair[0], ID_BYTES)), _index(pair[1])))
    if any(left[0] >= right[0] for left, right in pairwise(consumed)):
        raise DecodingError("consumed is sorted by group, each once")
    return tuple(consumed)


# Captures and certificates ------------------------------------------------------------------------------------


def encode_captured(captured: Captured) -> bytes:
    """Encode `{hsm, realm, group, index, mac, statement}`."""
    return b"".join(
        (
            _CAPTURED_HSM,
            cbor.byte_string(captured.hsm),
            _REALM,
            cbor.byte_string(captured.realm),
            _GROUP,
            cbor.byte_string(captured.group),
            _INDEX,
            cbor.uint(captured.index),
            _MAC,
            cbor.byte_string(captured.mac),
            _STATEMENT,
            cbor.byte_string(captured.statement),
        )
    )


def decode_captured(data: bytes) -> Captured:
    """Decode one capture; raises `DecodingError`."""
    captured = captured_from_item(cbor.decode(data))
    if encode_captured(captured) != data:
        raise DecodingError("the capture is not in canonical form")
    return captured


def captured_from_item(item: object) -> Captured:
    """Build a capture from a decoded CBOR map."""
    fields = cbor.as_map(item)
    try:
        realm = RealmId(_strict_bytes(fields["realm"], ID_BYTES))
        group = GroupId(_strict_bytes(fields["group"], ID_BYTES))
    except KeyError as missing:
        raise DecodingError(f"capture lacks {missing}") from None
    return _vote(fields, realm, group)


def _vote(item: object, realm: RealmId, group: GroupId) -> Captured:
    fields = cbor.as_map(item)
    try:
        return Captured(
            HsmId(_strict_bytes(fields["hsm"], ID_BYTES)),
            realm,
            group,
            _index(fields["index"]),
            _strict_bytes(fields["mac"], MAC_BYTES),
            _strict_bytes(fields["statement"], MAC_BYTES),
        )
    except KeyError as missing:
        raise DecodingError(f"capture lacks {missing}") from None


def encode_certificate(certificate: Certificate) -> bytes:
    """Encode `{index, captures: [{hsm, index, mac, statement}]}`; realm and group are named by the row."""
    votes = (
        b"".join(
            (
                _VOTE_HSM,
                cbor.byte_string(captured.hsm),
                _INDEX,
                cbor.uint(captured.index),
                _MAC,
                cbor.byte_string(captured.mac),
                _STATEMENT,
                cbor.byte_string(captured.statement),
            )
        )
        for captured in certificate.captures
    )
    return b"".join(
        (
            _CERTIFICATE_INDEX,
            cbor.uint(certificate.index),
            _CAPTURES,
            array_head(len(certificate.captures)),
            *votes,
        )
    )


def decode_certificate(data: bytes, realm: RealmId, group: GroupId) -> Certificate:
    """Decode a certificate stored for `group` of `realm`; raises `DecodingError`. Says nothing of authenticity."""
    fields = cbor.as_map(cbor.decode(data))
    try:
        index = _index(fields["index"])
        votes = _list(fields["captures"])
    except KeyError as missing:
        raise DecodingError(f"certificate lacks {missing}") from None
    if len(votes) > GROUP_MEMBERS_MAX:
        raise DecodingError(f"a certificate holds at most {GROUP_MEMBERS_MAX} captures")
    certificate = Certificate(index, tuple(_vote(vote, realm, group) for vote in votes))
    if encode_certificate(certificate) != data:
        raise DecodingError("the certificate is not in canonical form")
    return certificate
