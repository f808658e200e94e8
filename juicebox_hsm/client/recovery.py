"""What a client computes to recover: checks and combinations between its requests (client-protocol.md 17, Recover)."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from juicebox_hsm.client.configuration import Configuration, Realm
from juicebox_hsm.client.errors import AssertionFailed, InvalidPin, NotRegistered
from juicebox_hsm.crypto import derive, oprf, sharing
from juicebox_hsm.crypto.oprf import Blinded, OprfError
from juicebox_hsm.crypto.pin import StretchedPin
from juicebox_hsm.wire.requests import Recover1Ok, Recover2Ok, Recover3Ok

_Answer = TypeVar("_Answer")


def agreeing_group(
    answers: Mapping[Realm, _Answer], key: Callable[[_Answer], Hashable], size_min: int
) -> dict[Realm, _Answer] | None:
    """Return the answers that share one key, at least `size_min` of them, or None. A majority makes it unique."""
    groups: dict[Hashable, dict[Realm, _Answer]] = {}
    for realm, answer in answers.items():
        groups.setdefault(key(answer), {})[realm] = answer
    for group in groups.values():
        if len(group) >= size_min:
            return group
    return None


def agree_on_version(configuration: Configuration, answers: Mapping[Realm, Recover1Ok]) -> tuple[bytes, list[Realm]]:
    """Return the version that enough realms hold, and those realms. Raises `NotRegistered`."""
    group = agreeing_group(answers, lambda answer: answer.version, configuration.recover_threshold)
    if group is None:
        raise NotRegistered("no version is registered on enough realms")
    return next(iter(group.values())).version, list(group)


def check_evaluation(realm: Realm, blinded: Blinded, answer: Recover2Ok) -> None:
    """Check a realm's signed key and proof. Raises `AssertionFailed`."""
    key = answer.oprf_signed_public_key
    if not derive.verify_public_key(realm.id, key.public_key, key.verifying_key, key.signature):
        raise AssertionFailed(f"realm {realm.id.hex()} shows an OPRF key that was not signed for it")
    proof = answer.oprf_proof
    if not oprf.verify_proof(key.public_key, blinded.element, answer.oprf_blinded_result, proof.c, proof.beta_z):
        raise AssertionFailed(f"realm {realm.id.hex()} did not prove its OPRF evaluation")


def derive_unlock_key(
    configuration: Configuration, stretched: StretchedPin, blinded: Blinded, answers: Mapping[Realm, Recover2Ok]
) -> bytes:
    """Combine the evaluations and return the unlock key (32 bytes). Raises `InvalidPin` or `AssertionFailed`."""
    group = agreeing_group(
        answers,
        lambda answer: (answer.unlock_key_commitment, answer.oprf_signed_public_key.verifying_key),
        configuration.recover_threshold,
    )
    if group is None:
        raise AssertionFailed("the realms disagree about the registration")
    shares = {configuration.share_number(realm): answer.oprf_blinded_result for realm, answer in group.items()}
    try:
        output = oprf.finalize(stretched.access_key, blinded.factor, sharing.combine_points(shares))
    except OprfError:
        raise AssertionFailed("the realms' evaluations do not combine") from None
    unlock = derive.unlock_keys(output)
    commitment = next(iter(group.values())).unlock_key_commitment
    if not hmac.compare_digest(unlock.commitment, commitment):
        raise InvalidPin(min(max(0, answer.num_guesses - answer.guess_count) for answer in group.values()))
    return unlock.key


def open_secret(
    configuration: Configuration,
    stretched: StretchedPin,
    unlock_key: bytes,
    answers: Mapping[Realm, Recover3Ok],
) -> bytes:
    """Combine the shares and return the secret. Raises `AssertionFailed`."""
    genuine = {
        realm: answer
        for realm, answer in answers.items()
        if hmac.compare_digest(
            derive.encrypted_secret_commitment(
                unlock_key, realm.id, answer.encryption_key_scalar_share, answer.encrypted_secret
            ),
            answer.encrypted_secret_commitment,
        )
    }
    group = agreeing_group(genuine, lambda answer: answer.encrypted_secret, configuration.recover_threshold)
    if group is None:
        raise AssertionFailed("too few realms returned the secret as it was registered")
    scalar = sharing.combine_scalars(
        {configuration.share_number(realm): answer.encryption_key_scalar_share for realm, answer in group.items()}
    )
    key = derive.encryption_key(stretched.encryption_key_seed, scalar)
    try:
        return derive.decrypt_secret(key, next(iter(group.values())).encrypted_secret)
    except derive.DeriveError:
        raise AssertionFailed("the secret does not open with the recovered key") from None
