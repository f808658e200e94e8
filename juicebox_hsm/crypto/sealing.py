"""Sealing of record leaves with XChaCha20-Poly1305 (hsm.md 13): ciphertext, 16-byte tag, then the 24-byte nonce.

The nonce must be random and fresh for every leaf; 24 bytes make chance collisions negligible. The binding of a leaf to
its record id comes from the tree's leaf hash, so there is no associated data.
"""

from __future__ import annotations

from typing import Final

from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
)
from nacl.exceptions import CryptoError

from juicebox_hsm.errors import RealmError, check

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 24
TAG_BYTES: Final = 16
OVERHEAD_BYTES: Final = TAG_BYTES + NONCE_BYTES


class SealError(RealmError, ValueError):
    """A leaf was not sealed with this key, or was changed since."""


def seal(record_key: bytes, nonce: bytes, plaintext: bytes) -> bytes:
    """Return the sealed leaf, 40 bytes longer than `plaintext`. `nonce` is 24 fresh random bytes."""
    check(len(record_key) == KEY_BYTES and len(nonce) == NONCE_BYTES, "a record key and nonce have their sizes")
    return crypto_aead_xchacha20poly1305_ietf_encrypt(plaintext, None, nonce, record_key) + nonce


def open_sealed(record_key: bytes, leaf: bytes) -> bytes:
    """Return the plaintext of a sealed leaf; raises `SealError` for anything `seal` did not make with this key."""
    check(len(record_key) == KEY_BYTES, "a record key has 32 bytes")
    if len(leaf) < OVERHEAD_BYTES:
        raise SealError(f"a sealed leaf has at least {OVERHEAD_BYTES} bytes, this one has {len(leaf)}")
    try:
        return crypto_aead_xchacha20poly1305_ietf_decrypt(leaf[:-NONCE_BYTES], None, leaf[-NONCE_BYTES:], record_key)
    except CryptoError:
        raise SealError("a sealed leaf does not open") from None
