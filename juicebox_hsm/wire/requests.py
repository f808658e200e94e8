"""Inner messages between a client and the HSM that owns its record (client-protocol.md 8).

They travel inside Noise; nothing between the two ends sees them. Decoders check lengths, ranges and that scalars are
canonical, and raise `errors.DecodingError` for anything else; whether a point is valid is the receiver's to ask
(`crypto.oprf.is_valid_point`). Fields that carry secrets stay out of `repr`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from juicebox_hsm.errors import DecodingError, check
from juicebox_hsm.wire import cbor

VERSION_BYTES: Final = 16
KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
TAG_BYTES: Final = 16
ENCRYPTED_SECRET_BYTES: Final = 145
PADDED_RESPONSE_BYTES: Final = 436
"""Every `SecretsResponse` is padded to this, so that sizes hide the outcome (client-protocol.md 8)."""

GUESS_COUNT_MAX: Final = 255
"""Highest guess count whose Recover2 answer still fits the padding; the effective limit of any policy."""


@dataclass(frozen=True, slots=True)
class SignedPublicKey:
    """A realm's OPRF public key, signed by the registering client with a key used for all its realms."""

    public_key: bytes
    verifying_key: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Register1:
    """Ask whether the realm would take a registration."""


@dataclass(frozen=True, slots=True)
class Register2:
    """Store a registration, replacing whatever was there. `num_guesses` is 0 to 65535."""

    version: bytes
    oprf_private_key: bytes = field(repr=False)
    oprf_signed_public_key: SignedPublicKey = field(repr=False)
    unlock_key_commitment: bytes = field(repr=False)
    unlock_key_tag: bytes = field(repr=False)
    encryption_key_scalar_share: bytes = field(repr=False)
    encrypted_secret: bytes = field(repr=False)
    encrypted_secret_commitment: bytes = field(repr=False)
    num_guesses: int


@dataclass(frozen=True, slots=True)
class Recover1:
    """Ask for the version of the registration."""


@dataclass(frozen=True, slots=True)
class Recover2:
    """Spend a guess on one OPRF evaluation. The input is a claimed point of 32 bytes, not yet checked."""

    version: bytes
    oprf_blinded_input: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Recover3:
    """Show the unlock key's tag to get the share and reset the guess count."""

    version: bytes
    unlock_key_tag: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete the registration, if any."""


SecretsRequest = Register1 | Register2 | Recover1 | Recover2 | Recover3 | Delete


class Phase(enum.Enum):
    """The recover request that an answer without data belongs to; values are the wire texts."""

    RECOVER1 = "Recover1"
    RECOVER2 = "Recover2"
    RECOVER3 = "Recover3"


@dataclass(frozen=True, slots=True)
class OprfProof:
    """Proof that an OPRF evaluation used the key behind the signed public key (client-protocol.md 10)."""

    c: bytes = field(repr=False)
    beta_z: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Register1Ok:
    """The realm would take a registration."""


@dataclass(frozen=True, slots=True)
class Register2Ok:
    """The registration is stored."""


@dataclass(frozen=True, slots=True)
class DeleteOk:
    """Nothing is registered any more."""


@dataclass(frozen=True, slots=True)
class Recover1Ok:
    """The version of the registration."""

    version: bytes


@dataclass(frozen=True, slots=True)
class Recover2Ok:
    """An OPRF evaluation; `guess_count` already counts this guess."""

    oprf_signed_public_key: SignedPublicKey = field(repr=False)
    oprf_blinded_result: bytes = field(repr=False)
    oprf_proof: OprfProof = field(repr=False)
    unlock_key_commitment: bytes = field(repr=False)
    num_guesses: int
    guess_count: int


@dataclass(frozen=True, slots=True)
class Recover3Ok:
    """The realm's share of the encryption key scalar, and the encrypted secret."""

    encryption_key_scalar_share: bytes = field(repr=False)
    encrypted_secret: bytes = field(repr=False)
    encrypted_secret_commitment: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class NotRegistered:
    """Nothing is registered; answer to any recover request."""

    request: Phase


@dataclass(frozen=True, slots=True)
class NoGuesses:
    """All guesses are spent and the registration is destroyed; answer to any recover request."""

    request: Phase


@dataclass(frozen=True, slots=True)
class VersionMismatch:
    """Another registration has taken place since Recover1; answer to Recover2 and Recover3 only."""

    request: Phase

    def __post_init__(self) -> None:
        """Hold callers to the requests that can be answered so."""
        check(self.request is not Phase.RECOVER1, "Recover1 is never answered with a version mismatch")


@dataclass(frozen=True, slots=True)
class BadUnlockKeyTag:
    """The tag of Recover3 was wrong."""

    guesses_remaining: int


SecretsResponse = (
    Register1Ok
    | Register2Ok
    | DeleteOk
    | Recover1Ok
    | Recover2Ok
    | Recover3Ok
    | NotRegistered
    | NoGuesses
    | VersionMismatch
    | BadUnlockKeyTag
)


def needs_forward_secrecy(request: SecretsRequest) -> bool:
    """Tell whether `request` may only travel in an open session, never in a handshake (client-protocol.md 6)."""
    return isinstance(request, Register2 | Recover2 | Recover3)


# Requests -----------------------------------------------------------------------------------------------------


def _keys(fields: int, *names: str) -> tuple[bytes, ...]:
    """Encode the constant keys of a struct; the map's head is joined to the first one."""
    encoded = [cbor.text(name) for name in names]
    return (cbor.map_head(fields) + encoded[0], *encoded[1:])


def _variant(name: str) -> bytes:
    return cbor.map_head(1) + cbor.text(name)


_UNIT_REQUESTS: Final[dict[str, SecretsRequest]] = {
    "Register1": Register1(),
    "Recover1": Recover1(),
    "Delete": Delete(),
}
_REGISTER1: Final = cbor.text("Register1")
_RECOVER1: Final = cbor.text("Recover1")
_DELETE: Final = cbor.text("Delete")
_REGISTER2: Final = _variant("Register2")
_RECOVER2: Final = _variant("Recover2")
_RECOVER3: Final = _variant("Recover3")
_REGISTER2_KEYS: Final = _keys(
    9,
    "version",
    "oprf_private_key",
    "oprf_signed_public_key",
    "unlock_key_commitment",
    "unlock_key_tag",
    "encryption_key_scalar_share",
    "encrypted_secret",
    "encrypted_secret_commitment",
    "policy",
)
_POLICY_NUM_GUESSES: Final = _keys(1, "num_guesses")[0]
_SIGNED_KEYS: Final = _keys(3, "public_key", "verifying_key", "signature")
_RECOVER2_KEYS: Final = _keys(2, "version", "oprf_blinded_input")
_RECOVER3_KEYS: Final = _keys(2, "version", "unlock_key_tag")


def encode_secrets_request(request: SecretsRequest) -> bytes:
    """Encode an inner request. Register2 takes 663 to 665 bytes."""
    match request:
        case Register1():
            return _REGISTER1
        case Recover1():
            return _RECOVER1
        case Delete():
            return _DELETE
        case Recover2():
            return _RECOVER2 + _interleave(
                _RECOVER2_KEYS,
                (cbor.byte_string(request.version), cbor.byte_string(request.oprf_blinded_input)),
            )
        case Recover3():
            return _RECOVER3 + _interleave(
                _RECOVER3_KEYS,
                (cbor.byte_string(request.version), cbor.byte_string(request.unlock_key_tag)),
            )
        case Register2():
            values = (
                cbor.byte_string(request.version),
                cbor.byte_string(request.oprf_private_key),
                _encode_signed_public_key(request.oprf_signed_public_key),
                cbor.byte_string(request.unlock_key_commitment),
                cbor.byte_string(request.unlock_key_tag),
                cbor.byte_string(request.encryption_key_scalar_share),
                cbor.byte_string(request.encrypted_secret),
                cbor.byte_string(request.encrypted_secret_commitment),
                _POLICY_NUM_GUESSES + cbor.uint(request.num_guesses),
            )
            return _REGISTER2 + _interleave(_REGISTER2_KEYS, values)


def decode_secrets_request(data: bytes) -> SecretsRequest:
    """Decode an inner request; raises `DecodingError`."""
    name, value = cbor.as_variant(cbor.decode(data))
    if value is cbor.UNIT:
        unit = _UNIT_REQUESTS.get(name)
        if unit is None:
            raise DecodingError("unknown secrets request")
        return unit
    fields = cbor.as_map(value)
    try:
        if name == "Recover2":
            return Recover2(
                cbor.as_fixed(fields["version"], VERSION_BYTES),
                cbor.as_fixed(fields["oprf_blinded_input"], KEY_BYTES),
            )
        if name == "Recover3":
            return Recover3(
                cbor.as_fixed(fields["version"], VERSION_BYTES),
                cbor.as_fixed(fields["unlock_key_tag"], TAG_BYTES),
            )
        if name == "Register2":
            return Register2(
                cbor.as_fixed(fields["version"], VERSION_BYTES),
                cbor.as_scalar(fields["oprf_private_key"]),
                _signed_public_key(fields["oprf_signed_public_key"]),
                cbor.as_fixed(fields["unlock_key_commitment"], KEY_BYTES),
                cbor.as_fixed(fields["unlock_key_tag"], TAG_BYTES),
                cbor.as_scalar(fields["encryption_key_scalar_share"]),
                cbor.as_fixed(fields["encrypted_secret"], ENCRYPTED_SECRET_BYTES),
                cbor.as_fixed(fields["encrypted_secret_commitment"], TAG_BYTES),
                cbor.as_uint(cbor.as_map(fields["policy"])["num_guesses"], cbor.U16_MAX),
            )
    except KeyError as missing:
        raise DecodingError(f"secrets request lacks {missing}") from None
    raise DecodingError("unknown secrets request")


def _interleave(keys: tuple[bytes, ...], values: tuple[bytes, ...]) -> bytes:
    check(len(keys) == len(values), "every key of a struct has one value")
    return b"".join([part for pair in zip(keys, values, strict=True) for part in pair])


def _encode_signed_public_key(key: SignedPublicKey) -> bytes:
    values = (
        cbor.byte_string(key.public_key),
        cbor.byte_string(key.verifying_key),
        cbor.byte_string(key.signature),
    )
    return _interleave(_SIGNED_KEYS, values)


def _signed_public_key(item: object) -> SignedPublicKey:
    fields = cbor.as_map(item)
    return SignedPublicKey(
        cbor.as_fixed(fields["public_key"], KEY_BYTES),
        cbor.as_fixed(fields["verifying_key"], KEY_BYTES),
        cbor.as_fixed(fields["signature"], SIGNATURE_BYTES),
    )


# Responses ----------------------------------------------------------------------------------------------------

_OK_TEXT: Final = cbor.text("Ok")
_RESPONSE_REGISTER1_OK: Final = _REGISTER2.replace(b"Register2", b"Register1") + _OK_TEXT
_RESPONSE_REGISTER2_OK: Final = _REGISTER2 + _OK_TEXT
_RESPONSE_DELETE_OK: Final = _variant("Delete") + _OK_TEXT
_PHASE: Final = {phase: _variant(phase.value) for phase in Phase}
_OK_VARIANT: Final = _variant("Ok")
_NOT_REGISTERED: Final = cbor.text("NotRegistered")
_NO_GUESSES: Final = cbor.text("NoGuesses")
_VERSION_MISMATCH: Final = cbor.text("VersionMismatch")
_BAD_UNLOCK_KEY_TAG: Final = _PHASE[Phase.RECOVER3] + _variant("BadUnlockKeyTag") + _keys(1, "guesses_remaining")[0]
_RECOVER1_OK: Final = _PHASE[Phase.RECOVER1] + _OK_VARIANT + _keys(1, "version")[0]
_RECOVER2_OK_KEYS: Final = _keys(
    6,
    "oprf_signed_public_key",
    "oprf_blinded_result",
    "oprf_proof",
    "unlock_key_commitment",
    "num_guesses",
    "guess_count",
)
_PROOF_KEYS: Final = _keys(2, "c", "beta_z")
_RECOVER3_OK_KEYS: Final = _keys(3, "encryption_key_scalar_share", "encrypted_secret", "encrypted_secret_commitment")


def encode_secrets_response(response: SecretsResponse) -> bytes:
    """Encode an inner response, not yet padded; at most 436 bytes while `guess_count` is at most 255."""
    match response:
        case Register1Ok():
            return _RESPONSE_REGISTER1_OK
        case Register2Ok():
            return _RESPONSE_REGISTER2_OK
        case DeleteOk():
            return _RESPONSE_DELETE_OK
        case Recover1Ok():
            return _RECOVER1_OK + cbor.byte_string(response.version)
        case Recover2Ok():
            c, beta_z = _PROOF_KEYS
            proof = response.oprf_proof
            values = (
                _encode_signed_public_key(response.oprf_signed_public_key),
                cbor.byte_string(response.oprf_blinded_result),
                c + cbor.byte_string(proof.c) + beta_z + cbor.byte_string(proof.beta_z),
                cbor.byte_string(response.unlock_key_commitment),
                cbor.uint(response.num_guesses),
                cbor.uint(response.guess_count),
            )
            return _PHASE[Phase.RECOVER2] + _OK_VARIANT + _interleave(_RECOVER2_OK_KEYS, values)
        case Recover3Ok():
            shares = (
                cbor.byte_string(response.encryption_key_scalar_share),
                cbor.byte_string(response.encrypted_secret),
                cbor.byte_string(response.encrypted_secret_commitment),
            )
            return _PHASE[Phase.RECOVER3] + _OK_VARIANT + _interleave(_RECOVER3_OK_KEYS, shares)
        case NotRegistered():
            return _PHASE[response.request] + _NOT_REGISTERED
        case NoGuesses():
            return _PHASE[response.request] + _NO_GUESSES
        case VersionMismatch():
            return _PHASE[response.request] + _VERSION_MISMATCH
        case BadUnlockKeyTag():
            return _BAD_UNLOCK_KEY_TAG + cbor.uint(response.guesses_remaining)


_UNIT_RESPONSES: Final[dict[tuple[str, str], SecretsResponse]] = {
    ("Register1", "Ok"): Register1Ok(),
    ("Register2", "Ok"): Register2Ok(),
    ("Delete", "Ok"): DeleteOk(),
    **{(phase.value, "NotRegistered"): NotRegistered(phase) for phase in Phase},
    **{(phase.value, "NoGuesses"): NoGuesses(phase) for phase in Phase},
    ("Recover2", "VersionMismatch"): VersionMismatch(Phase.RECOVER2),
    ("Recover3", "VersionMismatch"): VersionMismatch(Phase.RECOVER3),
}


def decode_secrets_response(data: bytes) -> SecretsResponse:
    """Decode an inner response without its padding; raises `DecodingError`."""
    request, answer = cbor.as_variant(cbor.decode(data))
    name, value = cbor.as_variant(answer)
    if value is cbor.UNIT:
        unit = _UNIT_RESPONSES.get((request, name))
        if unit is None:
            raise DecodingError("unknown secrets response")
        return unit
    fields = cbor.as_map(value)
    decoder = _RESPONSE_DECODERS.get((request, name))
    if decoder is None:
        raise DecodingError("unknown secrets response")
    try:
        return decoder(fields)
    except KeyError as missing:
        raise DecodingError(f"secrets response lacks {missing}") from None


def _recover1_ok(fields: dict[str, object]) -> SecretsResponse:
    return Recover1Ok(cbor.as_fixed(fields["version"], VERSION_BYTES))


def _recover2_ok(fields: dict[str, object]) -> SecretsResponse:
    proof = cbor.as_map(fields["oprf_proof"])
    return Recover2Ok(
        _signed_public_key(fields["oprf_signed_public_key"]),
        cbor.as_fixed(fields["oprf_blinded_result"], KEY_BYTES),
        OprfProof(cbor.as_scalar(proof["c"]), cbor.as_scalar(proof["beta_z"])),
        cbor.as_fixed(fields["unlock_key_commitment"], KEY_BYTES),
        cbor.as_uint(fields["num_guesses"], cbor.U16_MAX),
        cbor.as_uint(fields["guess_count"], cbor.U16_MAX),
    )


def _recover3_ok(fields: dict[str, object]) -> SecretsResponse:
    return Recover3Ok(
        cbor.as_scalar(fields["encryption_key_scalar_share"]),
        cbor.as_fixed(fields["encrypted_secret"], ENCRYPTED_SECRET_BYTES),
        cbor.as_fixed(fields["encrypted_secret_commitment"], TAG_BYTES),
    )


def _bad_unlock_key_tag(fields: dict[str, object]) -> SecretsResponse:
    return BadUnlockKeyTag(cbor.as_uint(fields["guesses_remaining"], cbor.U16_MAX))


_RESPONSE_DECODERS: Final[dict[tuple[str, str], Callable[[dict[str, object]], SecretsResponse]]] = {
    ("Recover1", "Ok"): _recover1_ok,
    ("Recover2", "Ok"): _recover2_ok,
    ("Recover3", "Ok"): _recover3_ok,
    ("Recover3", "BadUnlockKeyTag"): _bad_unlock_key_tag,
}


# Padding ------------------------------------------------------------------------------------------------------

_UNPADDED_LENGTH: Final = _keys(2, "unpadded_length")[0]
_PADDED_BYTES: Final = cbor.text("padded_bytes") + cbor.head(2, PADDED_RESPONSE_BYTES)


def pad_secrets_response(encoded: bytes) -> bytes:
    """Wrap an encoded `SecretsResponse` of at most 436 bytes into the CBOR `PaddedSecretsResponse`.

    The length of the length (1 to 3 bytes) stays visible; that is part of the deployed format.
    """
    size = len(encoded)
    check(size <= PADDED_RESPONSE_BYTES, "a secrets response fits its padding")
    return b"".join((_UNPADDED_LENGTH, cbor.uint(size), _PADDED_BYTES, encoded.ljust(PADDED_RESPONSE_BYTES, b"\0")))


def unpad_secrets_response(data: bytes) -> bytes:
    """Return the encoded `SecretsResponse` of a `PaddedSecretsResponse`; raises `DecodingError`."""
    fields = cbor.as_map(cbor.decode(data))
    try:
        size = cbor.as_uint(fields["unpadded_length"], PADDED_RESPONSE_BYTES)
        padded = cbor.as_fixed(fields["padded_bytes"], PADDED_RESPONSE_BYTES)
    except KeyError as missing:
        raise DecodingError(f"padded response lacks {missing}") from None
    return padded[:size]
