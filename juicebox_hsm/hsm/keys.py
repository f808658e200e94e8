"""The four keys that every HSM of a realm shares (hsm.md 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from juicebox_hsm.crypto import Random, noise
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.errors import LocalError

KEY_BYTES: Final = 32
BUNDLE_BYTES: Final = 3 * KEY_BYTES


@dataclass(frozen=True, slots=True)
class RealmKeys:
    """Communication key pair (X25519), record key (XChaCha20-Poly1305) and MAC key (BLAKE2s), 32 bytes each.

    Raises `LocalError` when a size is wrong or the public key does not belong to the secret.
    """

    communication_secret: Secret
    communication_public: bytes
    record_key: Secret
    mac_key: Secret

    def __post_init__(self) -> None:
        """Refuse keys that cannot be one realm's."""
        if any(len(key) != KEY_BYTES for key in (self.communication_secret, self.record_key, self.mac_key)):
            raise LocalError(f"every realm key has {KEY_BYTES} bytes")
        if noise.public_key(self.communication_secret.expose()) != self.communication_public:
            raise LocalError("the realm's public key does not belong to its secret")

    @classmethod
    def from_bundle(cls, bundle: bytes) -> RealmKeys:
        """Take the 96-byte bundle apart (communication secret, record key, MAC key); raises `LocalError`."""
        if len(bundle) != BUNDLE_BYTES:
            raise LocalError(f"a key bundle has {BUNDLE_BYTES} bytes")
        secret, record, mac = (bundle[at : at + KEY_BYTES] for at in range(0, BUNDLE_BYTES, KEY_BYTES))
        return cls(Secret(secret), noise.public_key(secret), Secret(record), Secret(mac))

    @classmethod
    def generate(cls, random: Random) -> RealmKeys:
        """Draw the keys of a new realm."""
        return cls.from_bundle(b"".join(random(KEY_BYTES) for _ in range(3)))

    def bundle(self) -> Secret:
        """Return the three secrets as the 96-byte bundle."""
        return Secret(self.communication_secret.expose() + self.record_key.expose() + self.mac_key.expose())

    def signed_parts(self) -> tuple[bytes, bytes, bytes, bytes]:
        """Return the four keys in the order in which the hsmrealm statement covers them. Secret."""
        return (
            self.communication_secret.expose(),
            self.communication_public,
            self.record_key.expose(),
            self.mac_key.expose(),
        )
