"""Fresh signing keys of tenants, for `tokens random` and the commands that write a secrets file."""

from __future__ import annotations

import os
from typing import Final

from juicebox_hsm.tenant_keys import SecretAlgorithm

ALGORITHMS: Final = {
    "HS256": SecretAlgorithm.HMAC_SHA256,
    "RS256": SecretAlgorithm.RSA_PKCS1_SHA256,
    "EdDSA": SecretAlgorithm.EDWARDS25519,
}
HMAC_KEY_BYTES: Final = 32
RSA_BITS: Final = 4096


def draw_keys(algorithm: str) -> tuple[bytes, bytes | None]:
    """Return a fresh (private or shared, public or None) key; DER for the asymmetric ones."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    if algorithm == "HS256":
        return os.urandom(HMAC_KEY_BYTES), None
    private = Ed25519PrivateKey.generate() if algorithm == "EdDSA" else generate_private_key(65537, RSA_BITS)
    return (
        private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
        private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
    )
