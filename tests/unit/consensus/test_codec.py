"""CBOR of entries, captures and certificates: sizes, round trips and strictness."""

from __future__ import annotations

from dataclasses import replace

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.consensus.codec import (
    decode_captured,
    decode_certificate,
    decode_log_entry,
    encode_captured,
    encode_certificate,
    encode_log_entry,
    split_log_entry,
)
from juicebox_hsm.consensus.types import (
    Captured,
    Certificate,
    LogEntry,
    Partition,
    TransferringIn,
    TransferringOut,
)
from juicebox_hsm.errors import DecodingError
from juicebox_hsm.ids import FULL_RANGE, LOG_INDEX_MAX, GroupId, HsmId, OwnedRange, RealmId, RecordId

PARTITION = Partition(FULL_RANGE, b"\xff" * 32)
PLAIN = LogEntry(LOG_INDEX_MAX, PARTITION, None, b"\xff" * 32, b"\xff" * 32, HsmId(b"\xff" * 16))
GROUPS = [GroupId(bytes([number]) * 16) for number in range(16)]
LARGEST = replace(
    PLAIN,
    transferring=TransferringOut(GROUPS[0], PARTITION, LOG_INDEX_MAX),
    consumed=tuple((group, LOG_INDEX_MAX) for group in GROUPS),
)


def test_sizes() -> None:
    """Entries have the published worst-case sizes, on which storage and request limits rest."""
    assert len(encode_log_entry(PLAIN)) == 278
    assert len(encode_log_entry(replace(LARGEST, consumed=()))) == 464
    assert len(encode_log_entry(LARGEST)) == 906
    assert len(encode_log_entry(replace(LARGEST, consumed=LARGEST.consumed[:1]))) == 464 + 10 + 27


id16 = st.binary(min_size=16, max_size=16)
id32 = st.binary(min_size=32, max_size=32)
index = st.integers(1, LOG_INDEX_MAX)
ranges = st.tuples(id32, id32).map(lambda ends: OwnedRange(RecordId(min(ends)), RecordId(max(ends))))
partitions = st.builds(Partition, ranges, id32)
markers = (
    st.none() | st.builds(TransferringIn, id16, ranges, index) | st.builds(TransferringOut, id16, partitions, index)
)
consumed = st.dictionaries(id16, index, max_size=16).map(lambda pairs: tuple(sorted(pairs.items())))
entries = st.builds(LogEntry, index, st.none() | partitions, markers, id32, id32, id16, consumed, st.booleans())
captures = st.builds(Captured, id16, st.just(RealmId(bytes(16))), st.just(GroupId(bytes(16))), index, id32, id32)
certificates = st.builds(Certificate, index, st.lists(captures, max_size=9).map(tuple))


@given(entries, st.binary(max_size=20))
def test_entries_round_trip(entry: LogEntry, rest: bytes) -> None:
    """Every entry decodes to itself, and is found in front of whatever follows it."""
    encoded = encode_log_entry(entry)
    assert decode_log_entry(encoded) == entry
    assert split_log_entry(encoded + rest) == (entry, rest)


@given(entries)
def test_entries_are_declared_maps(entry: LogEntry) -> None:
    """A general CBOR encoder given the declared fields in order writes the same bytes."""
    document: dict[str, object] = {
        "index": entry.index,
        "partition": _partition(entry.partition),
        "transferring": _marker(entry),
        "prev_mac": entry.prev_mac,
        "entry_mac": entry.entry_mac,
        "hsm": entry.hsm,
    }
    if entry.consumed:
        document["consumed"] = [list(pair) for pair in entry.consumed]
    if entry.retired:
        document["retired"] = True
    assert encode_log_entry(entry) == cbor2.dumps(document)


def _range(owned: OwnedRange) -> dict[str, object]:
    return {"start": owned.start, "end": owned.end}


def _partition(partition: Partition | None) -> dict[str, object] | None:
    return None if partition is None else {"range": _range(partition.range), "root_hash": partition.root_hash}


def _marker(entry: LogEntry) -> dict[str, object] | None:
    marker = entry.transferring
    if marker is None:
        return None
    if isinstance(marker, TransferringIn):
        return {"In": {"source": marker.source, "range": _range(marker.range), "at": marker.at}}
    return {"Out": {"destination": marker.destination, "partition": _partition(marker.partition), "at": marker.at}}


@given(captures, certificates)
def test_captures_and_certificates_round_trip(captured: Captured, certificate: Certificate) -> None:
    """Captures and certificates decode to themselves; the certificate takes realm and group from its row."""
    assert decode_captured(encode_captured(captured)) == captured
    assert decode_certificate(encode_certificate(certificate), captured.realm, captured.group) == certificate


def _documents() -> dict[str, object]:
    good = cbor2.loads(encode_log_entry(replace(PLAIN, index=5)))
    assert isinstance(good, dict)
    reordered = dict(reversed(good.items()))
    return {
        "unknown key": {**good, "extra": 1},
        "missing key": {key: value for key, value in good.items() if key != "hsm"},
        "other order": reordered,
        "index 0": {**good, "index": 0},
        "index text": {**good, "index": "5"},
        "index true": {**good, "index": True},
        "short hsm": {**good, "hsm": bytes(15)},
        "hsm as array": {**good, "hsm": [0] * 16},
        "mac text": {**good, "entry_mac": "x" * 32},
        "marker text": {**good, "transferring": "In"},
        "marker both": {**good, "transferring": {"In": {}, "Out": {}}},
        "marker other": {**good, "transferring": {"Other": {}}},
        "marker empty": {**good, "transferring": {"In": {}}},
        "out without partition": {
            **good,
            "transferring": {"Out": {"destination": bytes(16), "partition": None, "at": 1}},
        },
        "out to nowhere": {**good, "transferring": {"Out": {"destination": bytes(16), "partition": None}}},
        "range empty": {**good, "partition": {"range": {}, "root_hash": bytes(32)}},
        "partition empty": {**good, "partition": {}},
        "consumed empty": {**good, "consumed": []},
        "consumed unsorted": {**good, "consumed": [[GROUPS[2], 1], [GROUPS[1], 1]]},
        "consumed twice": {**good, "consumed": [[GROUPS[2], 1], [GROUPS[2], 1]]},
        "consumed triple": {**good, "consumed": [[GROUPS[2], 1, 1]]},
        "consumed map": {**good, "consumed": {}},
        "consumed flat": {**good, "consumed": [1]},
        "consumed 17": {**good, "consumed": [[bytes([n]) * 16, 1] for n in range(17)]},
        "not a map": [1, 2],
        "null": None,
    }


@pytest.mark.parametrize("name", sorted(_documents()))
def test_other_documents_are_refused(name: str) -> None:
    """A log entry with anything added, missing, reordered or of a wrong type or length is a decoding error."""
    with pytest.raises(DecodingError):
        decode_log_entry(cbor2.dumps(_documents()[name]))


@given(entries, st.integers(0, 10**6), st.integers(1, 255))
def test_altered_bytes_never_decode_to_the_same_entry(entry: LogEntry, position: int, change: int) -> None:
    """A flipped byte is refused or gives another entry: there is one encoding per entry."""
    encoded = bytearray(encode_log_entry(entry))
    encoded[position % len(encoded)] ^= change
    try:
        assert decode_log_entry(bytes(encoded)) != entry
    except DecodingError:
        pass


@pytest.mark.parametrize("decode", [decode_log_entry, decode_captured])
@given(data=st.binary(max_size=300))
def test_garbage_is_a_decoding_error(decode: object, data: bytes) -> None:
    """Bytes that are not ours never raise anything but DecodingError."""
    with pytest.raises(DecodingError):
        decode(data)  # type: ignore[operator]  # parametrised


@pytest.mark.parametrize(
    "document",
    [
        {"index": 1},
        {"captures": []},
        {"index": 1, "captures": {}},
        {"index": 0, "captures": []},
        {"index": 1, "captures": [{}]},
        {"index": 1, "captures": [{"hsm": bytes(16), "index": 1, "mac": bytes(32)}]},
        {"captures": [], "index": 1},
    ],
)
def test_other_certificates_and_captures_are_refused(document: dict[str, object]) -> None:
    """A certificate or capture with missing or wrong parts is a decoding error."""
    with pytest.raises(DecodingError):
        decode_certificate(cbor2.dumps(document), RealmId(bytes(16)), GroupId(bytes(16)))
    for incomplete in (document, {**document, "realm": bytes(16), "group": bytes(16), "hsm": bytes(16)}):
        with pytest.raises(DecodingError):
            decode_captured(cbor2.dumps(incomplete))


def test_bytes_after_the_item_and_long_integers_are_refused() -> None:
    """Trailing bytes, longer integer forms, duplicate keys and too many captures are refused."""
    encoded = encode_log_entry(replace(PLAIN, index=5))
    with pytest.raises(DecodingError):
        decode_log_entry(encoded + b"\0")
    with pytest.raises(DecodingError):
        decode_log_entry(encoded.replace(b"eindex\x05", b"eindex\x18\x05"))
    with pytest.raises(DecodingError):
        decode_log_entry(b"\xa7" + encoded[1:] + b"eindex\x05")
    vote = Captured(PLAIN.hsm, RealmId(bytes(16)), GroupId(bytes(16)), 1, bytes(32), bytes(32))
    with pytest.raises(DecodingError):
        decode_certificate(encode_certificate(Certificate(1, (vote,) * 10)), vote.realm, vote.group)
    with pytest.raises(DecodingError):
        decode_certificate(encode_certificate(Certificate(1, (vote,))) + b"\0", vote.realm, vote.group)
    with pytest.raises(DecodingError):
        decode_captured(encode_captured(vote) + b"\0")
