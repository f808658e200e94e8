"""Keys, tags and ciphertexts that a client derives (client-protocol.md 10 "Signed public key" and 13)."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha512
from typing import Final

from nacl.bindings import (
    crypto_aead_chacha20poly1305_ietf_decrypt,
    crypto_aead_chacha20poly1305_ietf_encrypt,
    crypto_sign,
    crypto_sign_BYTES,
    crypto_sign_open,
    crypto_sign_seed_keypair,
)
from nacl.exceptions import CryptoError

from juicebox_hsm.crypto.blake2 import mac
from juicebox_hsm.errors import RealmError, check

SECRET_BYTES_MAX: Final = 128
"""Longest secret a registration holds."""

_PADDED_SECRET_BYTES: Final = 129
_ENCRYPTED_SECRET_BYTES: Final = 145
_ZERO_NONCE: Final = bytes(12)
"""Fixed nonce of the secret's encryption; safe because its key is new for each registration."""


class DeriveError(RealmError, ValueError):
    """An encrypted secret does not open, or opens to something that is not a padded secret."""


@dataclass(frozen=True, slots=True)
class UnlockKeys:
    """What the OPRF output proves: a commitment every realm shows, and the key behind the tags."""

    commitment: bytes = field(repr=False)
    key: bytes = field(repr=False)


def unlock_keys(oprf_output: bytes) -> UnlockKeys:
    """Derive commitment and unlock key (32 bytes each) from the 64-byte OPRF output."""
    digest = sha512(oprf_output).digest()
    return UnlockKeys(digest[:32], digest[32:])


def unlock_key_tag(unlock_key: bytes, realm_id: bytes) -> bytes:
    """Return the 16-byte tag that opens this realm's share; differs per realm."""
    return mac(16, unlock_key, "Unlock Key Tag", realm_id)


def encryption_key(seed: bytes, scalar: bytes) -> bytes:
    """Return the key of the user's secret, from the stretched PIN and the shared scalar."""
    return mac(32, seed, "User Secret Encryption Key", scalar)


def encrypt_secret(key: bytes, secret: bytes) -> bytes:
    """Pad a secret of at most 128 bytes and encrypt it to 145 bytes."""
    check(len(secret) <= SECRET_BYTES_MAX, "a secret has at most 128 bytes")
    padded = bytes((len(secret),)) + secret.ljust(_PADDED_SECRET_BYTES - 1, b"\0")
    return crypto_aead_chacha20poly1305_ietf_encrypt(padded, b"", _ZERO_NONCE, key)


def decrypt_secret(key: bytes, encrypted: bytes) -> bytes:
    """Decrypt and strip the padding; raises `DeriveError`."""
    if len(encrypted) != _ENCRYPTED_SECRET_BYTES:
        raise DeriveError(f"an encrypted secret has {_ENCRYPTED_SECRET_BYTES} bytes, not {len(encrypted)}")
    try:
        padded = crypto_aead_chacha20poly1305_ietf_decrypt(encrypted, b"", _ZERO_NONCE, key)
    except CryptoError:
        raise DeriveError("the encrypted secret does not open") from None
    if padded[0] > SECRET_BYTES_MAX:
        raise DeriveError("the decrypted secret is not padded as it should be")
    return padded[1 : 1 + padded[0]]


def encrypted_secret_commitment(unlock_key: bytes, realm_id: bytes, share: bytes, encrypted: bytes) -> bytes:
    """Return the 16 bytes by which a client recognises its own share and ciphertext."""
    return mac(16, unlock_key, "Encrypted User Secret Commitment", realm_id, share, encrypted)


class RegistrationSigner:
    """The Ed25519 key pair of one registration, made from 32 bytes of fresh entropy and used for all its realms."""

    __slots__ = ("_signing_key", "verifying_key")

    def __init__(self, seed: bytes) -> None:
        self.verifying_key, self._signing_key = crypto_sign_seed_keypair(seed)

    def __repr__(self) -> str:
        return "RegistrationSigner(redacted)"

    def sign(self, realm_id: bytes, public_key: bytes) -> bytes:
        """Return the 64-byte signature that ties an OPRF public key to a realm."""
        return crypto_sign(_signed_message(realm_id, public_key), self._signing_key)[:crypto_sign_BYTES]


def verify_public_key(realm_id: bytes, public_key: bytes, verifying_key: bytes, signature: bytes) -> bool:
    """Verify strictly (libsodium refuses non-canonical encodings and small-order keys) a signed OPRF public key."""
    if len(verifying_key) != 32 or len(signature) != crypto_sign_BYTES:
        return False
    try:
        crypto_sign_open(signature + _signed_message(realm_id, public_key), verifying_key)
    except CryptoError:
        return False
    return True


def _signed_message(realm_id: bytes, public_key: bytes) -> bytes:
    return len(realm_id).to_bytes(2, "big") + realm_id + len(public_key).to_bytes(2, "big") + public_key
