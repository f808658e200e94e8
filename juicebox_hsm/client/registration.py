"""Compute a registration: keys, shares and the encrypted secret (client-protocol.md 17, Register 2 to 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from juicebox_hsm.crypto import Random, derive, oprf, sharing
from juicebox_hsm.crypto.pin import StretchedPin
from juicebox_hsm.ids import RealmId
from juicebox_hsm.wire.requests import Register2, SignedPublicKey

SIGNING_SEED_BYTES: Final = 32


def create_registration(
    realms: Sequence[RealmId],
    recover_threshold: int,
    version: bytes,
    stretched: StretchedPin,
    secret: bytes,
    num_guesses: int,
    random: Random,
) -> list[Register2]:
    """Return each realm's request, in the order of `realms` (sorted by id).

    Draws, in this order: OPRF key 64 bytes, its coefficients 64 each, signing seed 32, encryption key scalar 64, its
    coefficients 64 each. `secret` has at most 128 bytes. Raises `OprfError` with negligible probability.
    """
    count = len(realms)
    oprf_key = oprf.scalar_from_entropy(random(oprf.WIDE_SCALAR_BYTES))
    oprf_shares = sharing.create_shares(oprf_key, recover_threshold, count, random)
    signer = derive.RegistrationSigner(random(SIGNING_SEED_BYTES))
    unlock = derive.unlock_keys(oprf.local_evaluate(stretched.access_key, oprf_key))

    scalar = oprf.scalar_from_entropy(random(oprf.WIDE_SCALAR_BYTES))
    scalar_shares = sharing.create_shares(scalar, recover_threshold, count, random)
    encrypted = derive.encrypt_secret(derive.encryption_key(stretched.encryption_key_seed, scalar), secret)

    requests = []
    for realm_id, oprf_share, scalar_share in zip(realms, oprf_shares, scalar_shares, strict=True):
        public_key = oprf.multiply_base(oprf_share)
        requests.append(
            Register2(
                version=version,
                oprf_private_key=oprf_share,
                oprf_signed_public_key=SignedPublicKey(
                    public_key, signer.verifying_key, signer.sign(realm_id, public_key)
                ),
                unlock_key_commitment=unlock.commitment,
                unlock_key_tag=derive.unlock_key_tag(unlock.key, realm_id),
                encryption_key_scalar_share=scalar_share,
                encrypted_secret=encrypted,
                encrypted_secret_commitment=derive.encrypted_secret_commitment(
                    unlock.key, realm_id, scalar_share, encrypted
                ),
                num_guesses=num_guesses,
            )
        )
    return requests
