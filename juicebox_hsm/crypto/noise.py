"""Noise_NK_25519_ChaChaPoly_BLAKE2s with an empty prologue, both sides (client-protocol.md 6; noiseprotocol.org).

    NK:  <- s   (the realm's static key, known to the client)
         -> e, es
         <- e, ee

The message parts travel as separate fields. Entropy (ephemeral secrets) is handed in. A fresh ephemeral secret per
handshake is the caller's duty: reusing one reuses keys and nonces. Every malformed, forged or low-order input raises
`NoiseError`; lengths are checked here because the bindings read 32 bytes whatever they are given.
"""

from __future__ import annotations

from hashlib import blake2s
from typing import Final

from nacl.bindings import (
    crypto_aead_chacha20poly1305_ietf_decrypt,
    crypto_aead_chacha20poly1305_ietf_encrypt,
    crypto_scalarmult,
    crypto_scalarmult_base,
)
from nacl.exceptions import CryptoError
from nacl.exceptions import RuntimeError as SodiumRuntimeError

from juicebox_hsm.errors import RealmError, check

KEY_BYTES: Final = 32
TAG_BYTES: Final = 16

_PROTOCOL_NAME: Final = b"Noise_NK_25519_ChaChaPoly_BLAKE2s"
_CHAINING_KEY_0: Final = blake2s(_PROTOCOL_NAME).digest()
_HASH_PROLOGUE: Final = blake2s(_CHAINING_KEY_0).digest()
_NONCE_0: Final = bytes(12)
_COUNTER_MAX: Final = 2**64 - 2
"""Noise reserves the last counter value."""

_IPAD: Final = bytes(i ^ 0x36 for i in range(256))
_OPAD: Final = bytes(i ^ 0x5C for i in range(256))
_HMAC_BLOCK_BYTES: Final = 64


class NoiseError(RealmError, ValueError):
    """A Noise message is malformed, forged, out of order or built on a low-order key."""


def public_key(secret: bytes) -> bytes:
    """Return the X25519 public key of a 32-byte secret."""
    check(len(secret) == KEY_BYTES, "an X25519 secret has 32 bytes")
    return crypto_scalarmult_base(secret)


def _agree(secret: bytes, public: bytes) -> bytes:
    """Return the X25519 shared secret; raises `NoiseError` for an all-zero one."""
    try:
        return crypto_scalarmult(secret, public)
    except SodiumRuntimeError:
        raise NoiseError("low-order ephemeral key") from None


def _hkdf2(chaining_key: bytes, ikm: bytes) -> tuple[bytes, bytes]:
    """Return HKDF's two outputs. HMAC is written out: half the cost of `hmac.digest` for such short inputs."""
    padded = chaining_key.ljust(_HMAC_BLOCK_BYTES, b"\0")
    prk = blake2s(padded.translate(_OPAD) + blake2s(padded.translate(_IPAD) + ikm).digest()).digest()
    padded = prk.ljust(_HMAC_BLOCK_BYTES, b"\0")
    inner, outer = padded.translate(_IPAD), padded.translate(_OPAD)
    first = blake2s(outer + blake2s(inner + b"\x01").digest()).digest()
    second = blake2s(outer + blake2s(inner + first + b"\x02").digest()).digest()
    return first, second


def _open(key: bytes, nonce: bytes, associated: bytes, ciphertext: bytes) -> bytes:
    if len(ciphertext) < TAG_BYTES:
        raise NoiseError("ciphertext shorter than its tag")
    try:
        return crypto_aead_chacha20poly1305_ietf_decrypt(ciphertext, associated, nonce, key)
    except CryptoError:
        raise NoiseError("ciphertext does not open") from None


def _start(static_public: bytes) -> bytes:
    """Return the handshake hash after the steps that do not depend on the client."""
    check(len(static_public) == KEY_BYTES, "an X25519 public key has 32 bytes")
    return blake2s(_HASH_PROLOGUE + static_public).digest()


class Session:
    """Transport state of one side: a key and a counter per direction. Not shareable between tasks.

    Counters advance only with success, so a caller may keep a session after `NoiseError`; the protocol says not to.
    """

    __slots__ = ("_decrypt_counter", "_decrypt_key", "_encrypt_counter", "_encrypt_key")

    def __init__(
        self, decrypt_key: bytes, encrypt_key: bytes, decrypt_counter: int = 0, encrypt_counter: int = 0
    ) -> None:
        self._decrypt_key = decrypt_key
        self._encrypt_key = encrypt_key
        self._decrypt_counter = decrypt_counter
        self._encrypt_counter = encrypt_counter

    def decrypt(self, ciphertext: bytes) -> bytes:
        """Return the peer's next message; raises `NoiseError` if it is not exactly that."""
        counter = self._decrypt_counter
        check(counter <= _COUNTER_MAX, "a Noise counter never wraps")
        plaintext = _open(self._decrypt_key, b"\0\0\0\0" + counter.to_bytes(8, "little"), b"", ciphertext)
        self._decrypt_counter = counter + 1
        return plaintext

    def encrypt(self, plaintext: bytes) -> bytes:
        """Return our next message, 16 bytes longer than `plaintext`."""
        counter = self._encrypt_counter
        check(counter <= _COUNTER_MAX, "a Noise counter never wraps")
        self._encrypt_counter = counter + 1
        return crypto_aead_chacha20poly1305_ietf_encrypt(
            plaintext, b"", b"\0\0\0\0" + counter.to_bytes(8, "little"), self._encrypt_key
        )

    def __repr__(self) -> str:
        return f"Session(decrypted={self._decrypt_counter}, encrypted={self._encrypt_counter})"


class PendingHandshake:
    """A handshake whose request was read and whose answer is due. `payload` is the request's plaintext."""

    __slots__ = ("_chaining_key", "_client_ephemeral_public", "_hash", "payload")

    def __init__(self, chaining_key: bytes, hash_: bytes, client_ephemeral_public: bytes, payload: bytes) -> None:
        self._chaining_key = chaining_key
        self._hash = hash_
        self._client_ephemeral_public = client_ephemeral_public
        self.payload = payload

    def __repr__(self) -> str:
        return f"PendingHandshake(payload of {len(self.payload)} bytes)"

    def finish(self, response_payload: bytes, ephemeral_secret: bytes) -> tuple[bytes, bytes, Session]:
        """Return (server ephemeral public key, payload ciphertext, our side of the session).

        `ephemeral_secret` is 32 fresh random bytes. Raises `NoiseError` if the client's key is of low order.
        """
        ephemeral_public = public_key(ephemeral_secret)
        hash_ = blake2s(self._hash + ephemeral_public).digest()
        chaining_key, key = _hkdf2(self._chaining_key, _agree(ephemeral_secret, self._client_ephemeral_public))
        ciphertext = crypto_aead_chacha20poly1305_ietf_encrypt(response_payload, hash_, _NONCE_0, key)
        from_client, to_client = _hkdf2(chaining_key, b"")
        return ephemeral_public, ciphertext, Session(from_client, to_client)


class Responder:
    """The realm's side. One per realm key pair; holds no per-handshake state. About 105 us per handshake."""

    __slots__ = ("_hash", "_static_secret")

    def __init__(self, static_secret: bytes, static_public: bytes) -> None:
        check(len(static_secret) == KEY_BYTES, "an X25519 secret has 32 bytes")
        self._static_secret = static_secret
        self._hash = _start(static_public)

    def __repr__(self) -> str:
        return "Responder(redacted)"

    def read(self, client_ephemeral_public: bytes, payload_ciphertext: bytes) -> PendingHandshake:
        """Read the client's first message; raises `NoiseError`."""
        if len(client_ephemeral_public) != KEY_BYTES:
            raise NoiseError(f"an ephemeral key has {KEY_BYTES} bytes, not {len(client_ephemeral_public)}")
        hash_ = blake2s(self._hash + client_ephemeral_public).digest()
        chaining_key, key = _hkdf2(_CHAINING_KEY_0, _agree(self._static_secret, client_ephemeral_public))
        payload = _open(key, _NONCE_0, hash_, payload_ciphertext)
        return PendingHandshake(
            chaining_key, blake2s(hash_ + payload_ciphertext).digest(), client_ephemeral_public, payload
        )


class Initiator:
    """The client's side of one handshake: `write` once, then `read` once."""

    __slots__ = ("_chaining_key", "_ephemeral_secret", "_hash", "_server_public")

    def __init__(self, server_public: bytes, ephemeral_secret: bytes) -> None:
        check(len(ephemeral_secret) == KEY_BYTES, "an X25519 secret has 32 bytes")
        self._server_public = server_public
        self._ephemeral_secret = ephemeral_secret
        self._hash = _start(server_public)
        self._chaining_key = _CHAINING_KEY_0

    def __repr__(self) -> str:
        return "Initiator(redacted)"

    def write(self, payload: bytes) -> tuple[bytes, bytes]:
        """Return (client ephemeral public key, payload ciphertext). Raises `NoiseError` for a low-order realm key."""
        ephemeral_public = public_key(self._ephemeral_secret)
        hash_ = blake2s(self._hash + ephemeral_public).digest()
        self._chaining_key, key = _hkdf2(self._chaining_key, _agree(self._ephemeral_secret, self._server_public))
        ciphertext = crypto_aead_chacha20poly1305_ietf_encrypt(payload, hash_, _NONCE_0, key)
        self._hash = blake2s(hash_ + ciphertext).digest()
        return ephemeral_public, ciphertext

    def read(self, server_ephemeral_public: bytes, payload_ciphertext: bytes) -> tuple[bytes, Session]:
        """Return (payload, our side of the session); raises `NoiseError`."""
        if len(server_ephemeral_public) != KEY_BYTES:
            raise NoiseError(f"an ephemeral key has {KEY_BYTES} bytes, not {len(server_ephemeral_public)}")
        hash_ = blake2s(self._hash + server_ephemeral_public).digest()
        chaining_key, key = _hkdf2(self._chaining_key, _agree(self._ephemeral_secret, server_ephemeral_public))
        payload = _open(key, _NONCE_0, hash_, payload_ciphertext)
        to_server, from_server = _hkdf2(chaining_key, b"")
        return payload, Session(from_server, to_server)
