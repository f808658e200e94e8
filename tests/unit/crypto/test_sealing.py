"""Sealing of leaves and the keyed MAC (hsm.md 13, client-protocol.md 13)."""

from __future__ import annotations

import hashlib

import pytest

from juicebox_hsm.crypto.blake2 import mac
from juicebox_hsm.crypto.sealing import OVERHEAD_BYTES, SealError, open_sealed, seal
from juicebox_hsm.errors import InvariantViolation

KEY, NONCE = b"k" * 32, b"n" * 24


@pytest.mark.parametrize("size", [0, 1, 750])
def test_round_trip_and_layout(size: int) -> None:
    """A leaf is ciphertext, tag, then the nonce, 40 bytes longer than the record."""
    leaf = seal(KEY, NONCE, b"r" * size)
    assert len(leaf) == size + OVERHEAD_BYTES == size + 40
    assert leaf.endswith(NONCE)
    assert open_sealed(KEY, leaf) == b"r" * size


def test_known_answer() -> None:
    """The cipher is the XChaCha20 of draft-irtf-cfrg-xchacha-03 A.3.1, whose ciphertext starts so."""
    leaf = seal(bytes(range(0x80, 0xA0)), bytes(range(0x40, 0x58)), b"Ladies and Gentlemen")
    ciphertext = bytes.fromhex("bd6d179d3e83d43b9576579493c0e939572a1700")
    assert leaf[:20] == ciphertext


@pytest.mark.parametrize("place", [0, 100, -25, -24, -1])
def test_every_byte_counts(place: int) -> None:
    """A changed ciphertext, tag or nonce does not open, nor does another key."""
    leaf = bytearray(seal(KEY, NONCE, b"r" * 200))
    assert open_sealed(KEY, bytes(leaf)) == b"r" * 200
    with pytest.raises(SealError):
        open_sealed(b"o" * 32, bytes(leaf))
    leaf[place] ^= 1
    with pytest.raises(SealError):
        open_sealed(KEY, bytes(leaf))


@pytest.mark.parametrize("size", [0, 1, 24, 25, 39])
def test_short_leaves(size: int) -> None:
    """Leaves too short to hold tag and nonce are refused."""
    with pytest.raises(SealError):
        open_sealed(KEY, bytes(size))


def test_sizes_are_invariants() -> None:
    """Keys and nonces of other sizes are our own mistakes."""
    with pytest.raises(InvariantViolation):
        seal(b"k" * 31, NONCE, b"")
    with pytest.raises(InvariantViolation):
        seal(KEY, b"n" * 12, b"")
    with pytest.raises(InvariantViolation):
        open_sealed(b"", bytes(100))


def test_mac_separates_labels_parts_and_sizes() -> None:
    """Moving bytes between label and parts, or another digest size, gives another MAC."""
    one = mac(32, KEY, "label", b"ab", b"c")
    assert one == hashlib.blake2s(b"\0\0\0\5label\0\0\0\2ab\0\0\0\1c", key=KEY, digest_size=32).digest()
    assert mac(32, KEY, b"label", b"ab", b"c") == one
    others = [mac(32, KEY, "label", b"a", b"bc"), mac(32, KEY, "label", b"abc"), mac(32, KEY, "labelab", b"c")]
    assert len({one, *others}) == 4
    assert mac(16, KEY, "label", b"ab", b"c") != one[:16]
