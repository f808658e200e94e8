"""MACs over every statement that HSMs of a realm exchange (hsm.md 4).

`MAC(domain, message) = keyed BLAKE2s-256(MAC key, u8(len(domain)) || domain || CBOR(message))`. The messages are
CBOR maps in one fixed key order; they are written by concatenation because the log entry's MAC lies on the path of
every client request. Verification never raises: a value that no HSM could have signed is simply not authentic.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

from juicebox_hsm.consensus.types import (
    Captured,
    LogEntry,
    Partition,
    TransferringIn,
    TransferringOut,
)
from juicebox_hsm.ids import LOG_INDEX_MAX, GroupId, HsmId, OwnedRange, RealmId
from juicebox_hsm.wire import cbor

NULL: Final = b"\xf6"
TRUE: Final = b"\xf5"

_RANGE_START: Final = cbor.map_head(2) + cbor.text("start")
_END: Final = cbor.text("end")
_PARTITION_RANGE: Final = cbor.map_head(2) + cbor.text("range")
_ROOT_HASH: Final = cbor.text("root_hash")
_IN_SOURCE: Final = cbor.map_head(3) + cbor.text("source")
_OUT_DESTINATION: Final = cbor.map_head(3) + cbor.text("destination")
_RANGE: Final = cbor.text("range")
_PARTITION: Final = cbor.text("partition")
_AT: Final = cbor.text("at")
_REALM: Final = cbor.text("realm")
_GROUP: Final = cbor.text("group")
_INDEX: Final = cbor.text("index")
_HSM: Final = cbor.text("hsm")
_KEYS: Final = cbor.text("keys")
_CONFIGURATION: Final = cbor.text("configuration")
_GENERATIONS: Final = cbor.text("generations")
_ENTRY_MAC: Final = cbor.text("entry_mac")
_TRANSFERRING_OUT: Final = cbor.text("transferring_out")
_TRANSFERRING_IN: Final = cbor.text("transferring_in")
_CONSUMED: Final = cbor.text("consumed")
_RETIRED: Final = cbor.text("retired")
_PREV_MAC: Final = cbor.text("prev_mac")
_SOURCE: Final = cbor.text("source")
_DESTINATION: Final = cbor.text("destination")
_NONCE: Final = cbor.text("nonce")


def same(left: bytes, right: bytes) -> bool:
    """Compare two macs, statements or nonces in constant time (for equal lengths)."""
    return hmac.compare_digest(left, right)


def mac(key: bytes, domain: bytes, message: bytes) -> bytes:
    """Return the 32-byte MAC of an encoded message (CBOR) in an ASCII domain of at most 255 bytes."""
    return hashlib.blake2s(bytes((len(domain),)) + domain + message, key=key).digest()


# Encodings shared with the log entry's stored form -------------------------------------------------------------


def array_head(items: int) -> bytes:
    """Encode the head of an array."""
    return cbor.head(4, items)


def encode_range(value: OwnedRange) -> bytes:
    """Encode `{start, end}`."""
    return b"".join((_RANGE_START, cbor.byte_string(value.start), _END, cbor.byte_string(value.end)))


def encode_partition(value: Partition | None) -> bytes:
    """Encode `{range, root_hash}`, or null."""
    if value is None:
        return NULL
    return b"".join((_PARTITION_RANGE, encode_range(value.range), _ROOT_HASH, cbor.byte_string(value.root_hash)))


def encode_transferring_in(value: TransferringIn) -> bytes:
    """Encode `{source, range, at}`."""
    return b"".join(
        (_IN_SOURCE, cbor.byte_string(value.source), _RANGE, encode_range(value.range), _AT, cbor.uint(value.at))
    )


def encode_transferring_out(value: TransferringOut) -> bytes:
    """Encode `{destination, partition, at}`."""
    return b"".join(
        (
            _OUT_DESTINATION,
            cbor.byte_string(value.destination),
            _PARTITION,
            encode_partition(value.partition),
            _AT,
            cbor.uint(value.at),
        )
    )


def encode_consumed(value: Sequence[tuple[GroupId, int]]) -> bytes:
    """Encode the list of `[group, index]`."""
    pairs = (b"\x82" + cbor.byte_string(group) + cbor.uint(index) for group, index in value)
    return array_head(len(value)) + b"".join(pairs)


# Messages -----------------------------------------------------------------------------------------------------


def group_configuration_message(
    realm: RealmId, group: GroupId, configuration: Sequence[HsmId], generations: Sequence[int] = ()
) -> bytes:
    """Encode the message of the group configuration statement; `generations` are left out when empty."""
    members = b"".join(map(cbor.byte_string, configuration))
    bound = (_GENERATIONS, array_head(len(generations)), *map(cbor.uint, generations)) if generations else ()
    return b"".join(
        (
            cbor.map_head(4 if generations else 3),
            _REALM,
            cbor.byte_string(realm),
            _GROUP,
            cbor.byte_string(group),
            _CONFIGURATION,
            array_head(len(configuration)),
            members,
            *bound,
        )
    )


def hsm_realm_message(realm: RealmId, hsm: HsmId, keys: Sequence[bytes]) -> bytes:
    """Encode the message of the HSM-realm statement over the four realm keys; the result is secret."""
    return b"".join(
        (
            cbor.map_head(3),
            _REALM,
            cbor.byte_string(realm),
            _HSM,
            cbor.byte_string(hsm),
            _KEYS,
            array_head(len(keys)),
            *map(cbor.byte_string, keys),
        )
    )


_CAPTURED_HSM: Final = cbor.map_head(5) + _HSM


def captured_message(hsm: HsmId, realm: RealmId, group: GroupId, index: int, entry_mac: bytes) -> bytes:
    """Encode the message of a capture statement. `index` is 0 to 2^64-1."""
    return b"".join(
        (
            _CAPTURED_HSM,
            cbor.byte_string(hsm),
            _REALM,
            cbor.byte_string(realm),
            _GROUP,
            cbor.byte_string(group),
            _INDEX,
            cbor.uint(index),
            _ENTRY_MAC,
            cbor.byte_string(entry_mac),
        )
    )


_ENTRY_HSM: Final = {size: cbor.map_head(size) + _HSM for size in (7, 8, 9, 10)}


def log_entry_message(realm: RealmId, group: GroupId, entry: LogEntry) -> bytes:
    """Encode the message of a log entry's MAC; `entry.entry_mac` is not an input."""
    marker = entry.transferring
    out = NULL
    tail: tuple[bytes, ...] = ()
    if isinstance(marker, TransferringOut):
        out = encode_transferring_out(marker)
    elif marker is not None:
        tail = (_TRANSFERRING_IN, encode_transferring_in(marker))
    if entry.consumed:
        tail += (_CONSUMED, encode_consumed(entry.consumed))
    if entry.retired:
        tail += (_RETIRED, TRUE)
    return b"".join(
        (
            _ENTRY_HSM[7 + len(tail) // 2],
            cbor.byte_string(entry.hsm),
            _REALM,
            cbor.byte_string(realm),
            _GROUP,
            cbor.byte_string(group),
            _INDEX,
            cbor.uint(entry.index),
            _PARTITION,
            encode_partition(entry.partition),
            _TRANSFERRING_OUT,
            out,
            *tail,
            _PREV_MAC,
            cbor.byte_string(entry.prev_mac),
        )
    )


def prepared_transfer_message(
    realm: RealmId, source: GroupId, destination: GroupId, owned: OwnedRange, nonce: bytes
) -> bytes:
    """Encode the message of a destination's preparation statement."""
    return b"".join(
        (
            cbor.map_head(5),
            _REALM,
            cbor.byte_string(realm),
            _SOURCE,
            cbor.byte_string(source),
            _DESTINATION,
            cbor.byte_string(destination),
            _RANGE,
            encode_range(owned),
            _NONCE,
            cbor.byte_string(nonce),
        )
    )


def transfer_message(
    realm: RealmId, source: GroupId, destination: GroupId, partition: Partition, at: int, nonce: bytes
) -> bytes:
    """Encode the message of a source's transfer statement in the form that binds source and index (H2)."""
    return b"".join(
        (
            cbor.map_head(6),
            _REALM,
            cbor.byte_string(realm),
            _SOURCE,
            cbor.byte_string(source),
            _DESTINATION,
            cbor.byte_string(destination),
            _PARTITION,
            encode_partition(partition),
            _AT,
            cbor.uint(at),
            _NONCE,
            cbor.byte_string(nonce),
        )
    )


def _is_index(value: int) -> bool:
    return 0 <= value <= LOG_INDEX_MAX


def _indexes_fit(entry: LogEntry) -> bool:
    marker = entry.transferring
    return (
        _is_index(entry.index)
        and (marker is None or _is_index(marker.at))
        and (not entry.consumed or all(_is_index(index) for _, index in entry.consumed))
    )


class Macs:
    """Signs and verifies with a realm's MAC key (32 bytes). Verification compares in constant time."""

    __slots__ = ("_key",)

    def __init__(self, mac_key: bytes) -> None:
        self._key = mac_key

    def group_configuration(
        self, realm: RealmId, group: GroupId, configuration: Sequence[HsmId], generations: Sequence[int] = ()
    ) -> bytes:
        """Sign the configuration of a group, and its members' generations unless all are 0."""
        if any(generations):
            message = group_configuration_message(realm, group, configuration, generations)
            return mac(self._key, b"groupcfg2", message)
        return mac(self._key, b"groupcfg", group_configuration_message(realm, group, configuration))

    def hsm_realm(self, realm: RealmId, hsm: HsmId, keys: Sequence[bytes]) -> bytes:
        """Sign that `hsm` serves `realm` with these four keys."""
        return mac(self._key, b"hsmrealm", hsm_realm_message(realm, hsm, keys))

    def captured(self, hsm: HsmId, realm: RealmId, group: GroupId, index: int, entry_mac: bytes) -> bytes:
        """Sign that `hsm` persisted (`index`, `entry_mac`) as its captured head."""
        return mac(self._key, b"capture", captured_message(hsm, realm, group, index, entry_mac))

    def log_entry(self, realm: RealmId, group: GroupId, entry: LogEntry) -> bytes:
        """Return the entry MAC for `entry`, whatever its `entry_mac` field holds."""
        return mac(self._key, b"logentry", log_entry_message(realm, group, entry))

    def prepared_transfer(
        self, realm: RealmId, source: GroupId, destination: GroupId, owned: OwnedRange, nonce: bytes
    ) -> bytes:
        """Sign that `destination` is ready to take `owned` from `source`."""
        message = prepared_transfer_message(realm, source, destination, owned, nonce)
        return mac(self._key, b"prepared_transfer", message)

    def transfer(
        self, realm: RealmId, source: GroupId, destination: GroupId, partition: Partition, at: int, nonce: bytes
    ) -> bytes:
        """Sign that `source` gave `partition` away to `destination` in its committed entry `at`."""
        return mac(self._key, b"transfer2", transfer_message(realm, source, destination, partition, at, nonce))

    def verify_captured(self, captured: Captured) -> bool:
        """Tell whether the statement of `captured` is authentic."""
        if not _is_index(captured.index):
            return False
        expected = self.captured(captured.hsm, captured.realm, captured.group, captured.index, captured.mac)
        return hmac.compare_digest(expected, captured.statement)

    def verify_log_entry(self, realm: RealmId, group: GroupId, entry: LogEntry) -> bool:
        """Tell whether all fields of `entry` are what an HSM of the realm put into this group's log."""
        return _indexes_fit(entry) and hmac.compare_digest(self.log_entry(realm, group, entry), entry.entry_mac)
