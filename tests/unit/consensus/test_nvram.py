"""The persistent state's bytes (hsm.md 5)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.consensus.nvram import (
    Deserialization,
    InvalidChecksum,
    PersistentGroup,
    PersistentRealm,
    PersistentState,
    decode_state,
    encode_state,
)
from juicebox_hsm.ids import LOG_INDEX_MAX, GroupId, HsmId, RealmId

EMPTY = PersistentState(HsmId(b"\x11" * 16), None)
SMALL = PersistentState(
    HsmId(b"\x11" * 16),
    PersistentRealm(
        RealmId(b"\x22" * 16),
        b"\x33" * 32,
        {GroupId(b"\x44" * 16): PersistentGroup((HsmId(b"\x11" * 16),), (1, b"\x55" * 32))},
    ),
)


def test_vectors() -> None:
    """Both published states have the published bytes and digests."""
    encoded = encode_state(EMPTY)
    assert encoded[:-32].hex() == "a26269645011111111111111111111111111111111657265616c6df6"
    assert encoded[-32:].hex() == "481689d037dcf9fa77af31e468fa452730df8928cbc5fd5267fdf312fd755913"
    assert encode_state(SMALL)[-32:].hex() == "14c0f24759d876c60dcb7e6315846bc481eb5bb50e2f5b1df18fd4c39ccb6ea2"


def test_generation() -> None:
    """The generation follows the groups, only once it is not 0, so that older states keep their bytes."""
    realm = SMALL.realm
    assert realm is not None
    later = replace(SMALL, realm=replace(realm, generation=7))
    assert encode_state(later)[-32:].hex() == "194dd7288c39c13178677dfcde7c08c023bc4258ff9c9976ebc4ec60b681b97e"
    assert decode_state(encode_state(later)) == later


def test_worst_case_fits() -> None:
    """The largest legal state takes 3976 of the 4000 bytes."""
    members = tuple(HsmId(bytes([number]) * 16) for number in range(9))
    group = PersistentGroup(members, (LOG_INDEX_MAX, b"\xff" * 32))
    groups = {GroupId(bytes([number]) * 16): group for number in range(16)}
    state = PersistentState(members[0], PersistentRealm(RealmId(b"\x22" * 16), b"\x33" * 32, groups, 2**64 - 1))
    assert len(encode_state(state)) == 3976
    assert decode_state(encode_state(state)) == state


def test_first_start_is_empty() -> None:
    """No bytes at all is a first start, nothing else is."""
    assert decode_state(b"") is None
    with pytest.raises(InvalidChecksum):
        decode_state(bytes(1))


def test_groups_are_sorted() -> None:
    """The order of insertion does not show in the bytes."""
    group = PersistentGroup((EMPTY.id,), None)
    names = [GroupId(bytes([number]) * 16) for number in (3, 1, 2)]
    encoded = {
        encode_state(
            PersistentState(EMPTY.id, PersistentRealm(RealmId(bytes(16)), bytes(32), dict.fromkeys(order, group)))
        )
        for order in (names, sorted(names), names[::-1])
    }
    assert len(encoded) == 1


@given(st.integers(0, 1000), st.integers(1, 255))
def test_m8_every_altered_byte_is_noticed(position: int, change: int) -> None:
    """No flipped byte of an image gets past the checksum."""
    encoded = bytearray(encode_state(SMALL))
    encoded[position % len(encoded)] ^= change
    with pytest.raises(InvalidChecksum):
        decode_state(bytes(encoded))


@pytest.mark.parametrize("size", range(1, 200, 7))
def test_m8_truncated_images_are_refused(size: int) -> None:
    """A truncated image never starts."""
    with pytest.raises(InvalidChecksum):
        decode_state(encode_state(SMALL)[:size])


GROUP: Any = {"configuration": [b"\x11" * 16], "captured": None}
REALM: Any = {"id": b"\x22" * 16, "statement": b"\x33" * 32, "groups": {}}


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"id": b"\x11" * 16},
        {"id": b"\x11" * 15, "realm": None},
        {"realm": None, "id": b"\x11" * 16},
        {"id": b"\x11" * 16, "realm": None, "extra": 1},
        {"id": [17] * 16, "realm": None},
        {"id": b"\x11" * 16, "realm": {}},
        {"id": b"\x11" * 16, "realm": {**REALM, "statement": b""}},
        {"id": b"\x11" * 16, "realm": {**REALM, "groups": []}},
        {"id": b"\x11" * 16, "realm": {**REALM, "groups": {"x": GROUP}}},
        {"id": b"\x11" * 16, "realm": {**REALM, "groups": {bytes([n]) * 16: GROUP for n in range(17)}}},
        {"id": b"\x11" * 16, "realm": {**REALM, "groups": {b"\2" * 16: GROUP, b"\1" * 16: GROUP}}},
        {"id": b"\x11" * 16, "realm": {**REALM, "groups": {b"\2" * 16: {**GROUP, "configuration": []}}}},
        {"id": b"\x11" * 16, "realm": {**REALM, "groups": {b"\2" * 16: {**GROUP, "configuration": [b""]}}}},
        {"id": b"\x11" * 16, "realm": {**REALM, "groups": {b"\2" * 16: {**GROUP, "captured": [1]}}}},
        {"id": b"\x11" * 16, "realm": {**REALM, "groups": {b"\2" * 16: {**GROUP, "captured": [-1, bytes(32)]}}}},
        {"id": b"\x11" * 16, "realm": {**REALM, "groups": {b"\2" * 16: {**GROUP, "captured": [1, bytes(31)]}}}},
        {"id": b"\x11" * 16, "realm": {**REALM, "groups": {b"\2" * 16: {"captured": None}}}},
    ],
)
def test_intact_bytes_that_are_no_state_are_refused(document: object) -> None:
    """A valid checksum over anything but a canonical state is Deserialization, not a start."""
    body = cbor2.dumps(document)
    with pytest.raises(Deserialization):
        decode_state(body + hashlib.blake2s(body).digest())
