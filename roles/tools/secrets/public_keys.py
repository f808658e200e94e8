"""Read the public halves of tenants' signing keys, from PEM or a JWK set (RFC 7517, RFC 8037), for `secrets import`.

A private key is refused, not reduced to its public half: a realm that was given one must not have it, and whoever gave
it should know. The texts come from tenants, so every shape of them ends in a key or in one sentence.
"""

from __future__ import annotations

import binascii
import json
import re
from base64 import urlsafe_b64decode
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey, RSAPublicNumbers
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.tenant_keys import VERSION_MAX, SecretAlgorithm, TenantSecret
from juicebox_hsm.tokens import BadKeyError, TokenKey

FILE_BYTES_MAX: Final = 65_536
"""Own: a set of a dozen RSA keys has some 10 kB."""
KEYS_MAX: Final = 16
"""Own: a tenant signs with one key, and with two while it changes them."""
RSA_BITS_MAX: Final = 16_384
"""Own: larger moduli cost a balancer milliseconds for each token, and nobody uses them."""

_BLOCK: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----")
_PUBLIC: Final = frozenset((b"PUBLIC KEY", b"RSA PUBLIC KEY"))
_PRIVATE_MEMBERS: Final = ("d", "p", "q", "dp", "dq", "qi", "oth", "k")
_VERSION: Final = re.compile(r"0|[1-9][0-9]{0,19}")

PRIVATE: Final = (
    "holds a private key, which a realm must not have; nothing was imported. Make its public half with "
    "`openssl pkey -in PRIVATE.pem -pubout -out PUBLIC.pem`, and let the tenant draw a new pair if others saw this one"
)
NO_SET: Final = 'is no JWK set: an object with a list "keys" of keys was expected'


class UnusableKey(ValueError):
    """No key of the file can be imported; the message says why, and goes behind the file's name."""


@dataclass(frozen=True, slots=True)
class ImportedKey:
    """A public key as a secrets file holds it. `version` is the one that its key id names, None when it names none."""

    secret: TenantSecret
    kind: str
    version: int | None = None


def read_public_keys(data: bytes, tenant: str) -> list[ImportedKey]:
    """Return the keys of a PEM file or a JWK set. Raises `UnusableKey`."""
    if len(data) > FILE_BYTES_MAX:
        raise UnusableKey(f"is larger than {FILE_BYTES_MAX} bytes")
    if data.lstrip().startswith(b"{"):
        return _read_jwks(data, tenant)
    return [_read_pem(data)]


def _read_pem(data: bytes) -> ImportedKey:
    blocks = _BLOCK.findall(data)
    if any(name.endswith(b"PRIVATE KEY") for name in blocks):
        raise UnusableKey(PRIVATE)
    if b"CERTIFICATE" in blocks:
        raise UnusableKey("holds a certificate; take its key with `openssl x509 -in FILE -pubkey -noout > PUBLIC.pem`")
    if len(blocks) != 1 or blocks[0] not in _PUBLIC:
        raise UnusableKey("is neither one public key in PEM (-----BEGIN PUBLIC KEY-----) nor a JWK set")
    try:
        found = load_pem_public_key(data)
    except Exception:  # noqa: BLE001 - whatever a parser raises at a tenant's bytes, it is no key
        raise UnusableKey("is damaged: there is no key in its PEM block") from None
    return _imported(found)


def _imported(found: object, version: int | None = None) -> ImportedKey:
    """Return a usable key. Raises `UnusableKey` for another kind and for weak ones."""
    if isinstance(found, RSAPublicKey):
        algorithm, kind = SecretAlgorithm.RSA_PKCS1_SHA256, f"RS256, {found.key_size} bits"
        if found.key_size > RSA_BITS_MAX:
            raise UnusableKey(f"holds an RSA key of {found.key_size} bits; {RSA_BITS_MAX} is the most")
    elif isinstance(found, Ed25519PublicKey):
        algorithm, kind = SecretAlgorithm.EDWARDS25519, "EdDSA"
    else:
        raise UnusableKey("holds a key that is neither RSA (for RS256) nor Ed25519 (for EdDSA)")
    secret = TenantSecret(Secret(found.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)), algorithm)
    try:
        TokenKey(secret).verifier()
    except BadKeyError as error:
        raise UnusableKey(f"cannot be used: {error}") from None
    return ImportedKey(secret, kind, version)


def _read_jwks(data: bytes, tenant: str) -> list[ImportedKey]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise UnusableKey("is not JSON") from None
    keys = document.get("keys", [document]) if isinstance(document, dict) else None
    if not isinstance(keys, list) or not keys or not all(isinstance(key, dict) for key in keys):
        raise UnusableKey(NO_SET)
    if len(keys) > KEYS_MAX:
        raise UnusableKey(f"holds {len(keys)} keys; {KEYS_MAX} are the most")
    if any(name in key for key in keys for name in _PRIVATE_MEMBERS):
        raise UnusableKey(PRIVATE)
    return [_read_jwk(key, tenant) for key in keys]


def _read_jwk(key: dict[str, Any], tenant: str) -> ImportedKey:
    name = str(key.get("kid", ""))[:80]
    what = f"the key {name!r} " if name else "a key "
    if key.get("use", "sig") != "sig":
        raise UnusableKey(f"{what}is not for signatures")
    make: Callable[[], RSAPublicKey | Ed25519PublicKey]
    match key.get("kty"), key.get("crv"), key.get("alg"):
        case ("RSA", _, None | "RS256"):
            numbers = RSAPublicNumbers(_number(key, "e", what), _number(key, "n", what))
            if numbers.n.bit_length() > RSA_BITS_MAX:
                raise UnusableKey(f"{what}has {numbers.n.bit_length()} bits; {RSA_BITS_MAX} is the most")
            make = numbers.public_key
        case ("OKP", "Ed25519", None | "EdDSA" | "Ed25519"):
            make = partial(Ed25519PublicKey.from_public_bytes, _bytes(key, "x", what))
        case None, _, _:
            raise UnusableKey(NO_SET)
        case _:
            raise UnusableKey(f"{what}is neither of RSA for RS256 nor of Ed25519 for EdDSA")
    try:
        found = make()
    except Exception:  # noqa: BLE001 - whatever a parser raises at a tenant's numbers, they are no key
        raise UnusableKey(f"{what}is damaged") from None
    return _imported(found, _version_of(name, tenant))


def _version_of(name: str, tenant: str) -> int | None:
    """Return N of a key id `TENANT:N`, under which the tenant's tokens already name the key."""
    holder, colon, version = name.rpartition(":")
    if not colon or holder != tenant or _VERSION.fullmatch(version) is None or int(version) > VERSION_MAX:
        return None
    return int(version)


def _bytes(key: dict[str, Any], member: str, what: str) -> bytes:
    text = key.get(member)
    if not isinstance(text, str):
        raise UnusableKey(f"{what}has no {member!r}")
    try:
        return urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (ValueError, binascii.Error):
        raise UnusableKey(f"{what}is damaged: {member!r} is not base64url") from None


def _number(key: dict[str, Any], member: str, what: str) -> int:
    return int.from_bytes(_bytes(key, member, what), "big")
