"""A user's record: its state machine and its bytes in a leaf (hsm.md 13.3, client-protocol.md 9).

What reaches the host before commit must not depend on whether a request was right: a registered record is written
back even where it did not change, always at one size. The guess is spent before the evaluation exists, and the
guess count stops at 255 because a larger one would not fit the padded reply.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, replace
from typing import Final, assert_never

from juicebox_hsm.crypto import Random, oprf
from juicebox_hsm.errors import DecodingError, check
from juicebox_hsm.hsm.messages import ResultKind, ResultType
from juicebox_hsm.wire import cbor
from juicebox_hsm.wire import requests as secrets

PADDED_BYTES: Final = 746
"""Registered and NoGuesses are padded to this; the longest encoding is 723 bytes."""

TRAILER_BYTES: Final = 4
RECORD_BYTES: Final = PADDED_BYTES + TRAILER_BYTES
GUESSES_MAX: Final = secrets.GUESS_COUNT_MAX


@dataclass(frozen=True, slots=True)
class NotRegistered:
    """Nothing is registered; also the state of a record without a leaf."""


@dataclass(frozen=True, slots=True)
class NoGuesses:
    """All guesses were spent and the key material is gone."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A registration and the guesses spent on it."""

    registration: secrets.Register2
    guess_count: int

    @property
    def limit(self) -> int:
        """Return the effective limit of guesses."""
        return min(self.registration.num_guesses, GUESSES_MAX)

    @property
    def is_spent(self) -> bool:
        """Tell whether no guess is left."""
        return self.guess_count >= self.limit


Record = NotRegistered | NoGuesses | Registered

NOT_REGISTERED: Final = NotRegistered()
NO_GUESSES: Final = NoGuesses()


@dataclass(frozen=True, slots=True)
class Effect:
    """Answer to a request; `written` is the record to store, None where no leaf is written."""

    reply: secrets.SecretsResponse
    result: ResultType
    written: Record | None


# The state machine --------------------------------------------------------------------------------------------


def refuse_invalid(request: secrets.SecretsRequest) -> None:
    """Raise `DecodingError` for operands that decode but would make an evaluation an identity or no point."""
    if isinstance(request, secrets.Recover2):
        if not oprf.is_valid_point(request.oprf_blinded_input):
            raise DecodingError("the blinded input is not a valid point")
    elif isinstance(request, secrets.Register2) and not any(request.oprf_private_key):
        raise DecodingError("the OPRF key is zero")


def run(record: Record, request: secrets.SecretsRequest, random: Random) -> Effect:
    """Run a request that `refuse_invalid` let pass. Draws 64 bytes for the proof of a successful Recover2."""
    match request:
        case secrets.Register1():
            return Effect(secrets.Register1Ok(), ResultType(ResultKind.REGISTER1), None)
        case secrets.Register2():
            return Effect(secrets.Register2Ok(), ResultType(ResultKind.REGISTER2), Registered(request, 0))
        case secrets.Recover1():
            return _recover1(record)
        case secrets.Recover2():
            return _recover2(record, request, random)
        case secrets.Recover3():
            return _recover3(record, request)
        case secrets.Delete():
            written = None if isinstance(record, NotRegistered) else NOT_REGISTERED
            return Effect(secrets.DeleteOk(), ResultType(ResultKind.DELETE), written)
        case _:
            assert_never(request)


def _not_registered(phase: secrets.Phase, result: ResultType) -> Effect:
    return Effect(secrets.NotRegistered(phase), result, None)


def _no_guesses(phase: secrets.Phase, result: ResultType) -> Effect:
    return Effect(secrets.NoGuesses(phase), result, NO_GUESSES)


def _recover1(record: Record) -> Effect:
    result = ResultType(ResultKind.RECOVER1)
    if isinstance(record, NotRegistered):
        return _not_registered(secrets.Phase.RECOVER1, result)
    if isinstance(record, NoGuesses) or record.is_spent:
        return _no_guesses(secrets.Phase.RECOVER1, result)
    return Effect(secrets.Recover1Ok(record.registration.version), result, record)


def _recover2(record: Record, request: secrets.Recover2, random: Random) -> Effect:
    result = ResultType(ResultKind.RECOVER2)
    if isinstance(record, NotRegistered):
        return _not_registered(secrets.Phase.RECOVER2, result)
    if isinstance(record, NoGuesses):
        return _no_guesses(secrets.Phase.RECOVER2, result)
    kept = record.registration
    if not hmac.compare_digest(kept.version, request.version):
        return Effect(secrets.VersionMismatch(secrets.Phase.RECOVER2), result, record)
    if record.is_spent:
        return _no_guesses(secrets.Phase.RECOVER2, result)
    spent = Registered(kept, record.guess_count + 1)
    evaluation = oprf.evaluate_and_prove(
        kept.oprf_private_key,
        kept.oprf_signed_public_key.public_key,
        request.oprf_blinded_input,
        random(oprf.WIDE_SCALAR_BYTES),
    )
    reply = secrets.Recover2Ok(
        kept.oprf_signed_public_key,
        evaluation.blinded_result,
        secrets.OprfProof(evaluation.c, evaluation.beta_z),
        kept.unlock_key_commitment,
        kept.num_guesses,
        spent.guess_count,
    )
    return Effect(reply, ResultType(ResultKind.RECOVER2, kept.num_guesses, spent.guess_count), spent)


def _recover3(record: Record, request: secrets.Recover3) -> Effect:
    result = ResultType(ResultKind.RECOVER3)
    if isinstance(record, NotRegistered):
        return _not_registered(secrets.Phase.RECOVER3, result)
    if isinstance(record, NoGuesses):
        return _no_guesses(secrets.Phase.RECOVER3, result)
    kept = record.registration
    if not hmac.compare_digest(kept.version, request.version):
        return Effect(secrets.VersionMismatch(secrets.Phase.RECOVER3), result, record)
    if not hmac.compare_digest(kept.unlock_key_tag, request.unlock_key_tag):
        remaining = max(record.limit - record.guess_count, 0)
        return Effect(secrets.BadUnlockKeyTag(remaining), result, record if remaining else NO_GUESSES)
    reply = secrets.Recover3Ok(
        kept.encryption_key_scalar_share, kept.encrypted_secret, kept.encrypted_secret_commitment
    )
    return Effect(reply, replace(result, recovered=True), Registered(kept, 0))


# Bytes --------------------------------------------------------------------------------------------------------

_STATE: Final = cbor.map_head(1) + cbor.text("registration_state")
_REGISTERED: Final = _STATE + cbor.map_head(1) + cbor.text("Registered") + cbor.map_head(10)
_FIELDS: Final = (
    "version",
    "oprf_private_key",
    "oprf_signed_public_key",
    "unlock_key_commitment",
    "unlock_key_tag",
    "user_secret_encryption_key_scalar_share",
    "encrypted_user_secret",
    "encrypted_user_secret_commitment",
    "guess_count",
    "policy",
)
_VERSION: Final = _REGISTERED + cbor.text("version")
_PRIVATE_KEY: Final = cbor.text("oprf_private_key")
_PUBLIC_KEY: Final = cbor.text("oprf_signed_public_key") + cbor.map_head(3) + cbor.text("public_key")
_VERIFYING_KEY: Final = cbor.text("verifying_key")
_SIGNATURE: Final = cbor.text("signature")
_COMMITMENT: Final = cbor.text("unlock_key_commitment")
_TAG: Final = cbor.text("unlock_key_tag")
_SHARE: Final = cbor.text("user_secret_encryption_key_scalar_share")
_SECRET: Final = cbor.text("encrypted_user_secret")
_SECRET_COMMITMENT: Final = cbor.text("encrypted_user_secret_commitment")
_GUESS_COUNT: Final = cbor.text("guess_count")
_NUM_GUESSES: Final = cbor.text("policy") + cbor.map_head(1) + cbor.text("num_guesses")
_ENCODED_NOT_REGISTERED: Final = _STATE + cbor.text("NotRegistered")
_ENCODED_NO_GUESSES: Final = _STATE + cbor.text("NoGuesses")


def _encode_registered(record: Registered) -> bytes:
    kept = record.registration
    signed = kept.oprf_signed_public_key
    item = cbor.byte_string
    return b"".join(
        (
            _VERSION,
            item(kept.version),
            _PRIVATE_KEY,
            item(kept.oprf_private_key),
            _PUBLIC_KEY,
            item(signed.public_key),
            _VERIFYING_KEY,
            item(signed.verifying_key),
            _SIGNATURE,
            item(signed.signature),
            _COMMITMENT,
            item(kept.unlock_key_commitment),
            _TAG,
            item(kept.unlock_key_tag),
            _SHARE,
            item(kept.encryption_key_scalar_share),
            _SECRET,
            item(kept.encrypted_secret),
            _SECRET_COMMITMENT,
            item(kept.encrypted_secret_commitment),
            _GUESS_COUNT,
            cbor.uint(record.guess_count),
            _NUM_GUESSES,
            cbor.uint(kept.num_guesses),
        )
    )


def encode_record(record: Record) -> bytes:
    """Return the record's bytes: 750 for Registered and NoGuesses, short for NotRegistered."""
    if isinstance(record, NotRegistered):
        encoded = _ENCODED_NOT_REGISTERED
        return encoded + len(encoded).to_bytes(TRAILER_BYTES, "big")
    encoded = _ENCODED_NO_GUESSES if isinstance(record, NoGuesses) else _encode_registered(record)
    check(len(encoded) < PADDED_BYTES, "a record is shorter than its padding")
    return encoded.ljust(PADDED_BYTES, b"\0") + len(encoded).to_bytes(TRAILER_BYTES, "big")


def decode_record(data: bytes) -> Record:
    """Return the record; padding bytes are ignored. Raises `DecodingError`."""
    if not TRAILER_BYTES <= len(data) <= RECORD_BYTES:
        raise DecodingError(f"a record has {TRAILER_BYTES} to {RECORD_BYTES} bytes, this one has {len(data)}")
    size = int.from_bytes(data[-TRAILER_BYTES:], "big")
    if size > len(data) - TRAILER_BYTES:
        raise DecodingError(f"a record of {len(data)} bytes claims {size} encoded ones")
    encoded = data[:size]
    if encoded == _ENCODED_NO_GUESSES:
        return NO_GUESSES
    if encoded == _ENCODED_NOT_REGISTERED:
        return NOT_REGISTERED
    if not encoded.startswith(_REGISTERED):
        raise DecodingError("unknown registration state")
    record = _registered(
        cbor.as_map(cbor.as_map(cbor.as_map(cbor.decode(encoded))["registration_state"])["Registered"])
    )
    if _encode_registered(record) != encoded:
        raise DecodingError("the record is not in canonical form")
    return record


def _registered(fields: dict[str, object]) -> Registered:
    if tuple(fields) != _FIELDS:
        raise DecodingError("a registration has other fields")
    signed = cbor.as_map(fields["oprf_signed_public_key"])
    policy = cbor.as_map(fields["policy"])
    if len(signed) != 3 or len(policy) != 1:
        raise DecodingError("a registration has other fields")
    try:
        registration = secrets.Register2(
            cbor.as_fixed(fields["version"], secrets.VERSION_BYTES),
            cbor.as_scalar(fields["oprf_private_key"]),
            secrets.SignedPublicKey(
                cbor.as_fixed(signed["public_key"], secrets.KEY_BYTES),
                cbor.as_fixed(signed["verifying_key"], secrets.KEY_BYTES),
                cbor.as_fixed(signed["signature"], secrets.SIGNATURE_BYTES),
            ),
            cbor.as_fixed(fields["unlock_key_commitment"], secrets.KEY_BYTES),
            cbor.as_fixed(fields["unlock_key_tag"], secrets.TAG_BYTES),
            cbor.as_scalar(fields["user_secret_encryption_key_scalar_share"]),
            cbor.as_fixed(fields["encrypted_user_secret"], secrets.ENCRYPTED_SECRET_BYTES),
            cbor.as_fixed(fields["encrypted_user_secret_commitment"], secrets.TAG_BYTES),
            cbor.as_uint(policy["num_guesses"], cbor.U16_MAX),
        )
    except KeyError as missing:
        raise DecodingError(f"registration lacks {missing}") from None
    return Registered(registration, cbor.as_uint(fields["guess_count"], cbor.U16_MAX))
