"""The oblivious PRF: 2HashDH over ristretto255 with SHA-512, and its proof of the key used (client-protocol.md 10).

Notation of the specification: input x, blinding factor r, blinded input u, private key k, public key v = k*G, blinded
result w = k*u; the proof (c, beta_z) shows that v and w have the same k.

Identity elements: an honest party never makes one. `is_valid_point` refuses the identity, and every operation whose
inputs or result would be one raises `OprfError` (or fails verification) instead of returning it.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from hashlib import sha512
from typing import Final

import rbcl

from juicebox_hsm.errors import RealmError, check
from juicebox_hsm.wire.cbor import SCALAR_ORDER

POINT_BYTES: Final = 32
SCALAR_BYTES: Final = 32
WIDE_SCALAR_BYTES: Final = 64
"""Entropy for a uniform scalar: 512 bits reduced mod q leave no measurable bias."""

_IDENTITY: Final = bytes(POINT_BYTES)
_ZERO: Final = bytes(SCALAR_BYTES)
_OPRF_LABEL: Final = b"Juicebox_OPRF_2023_1;"
_DLEQ_LABEL: Final = b"Juicebox_DLEQ_2023_1;"


class OprfError(RealmError, ValueError):
    """An operand is not a valid point or scalar, or a result is the identity."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A blinded result with its proof."""

    blinded_result: bytes = field(repr=False)
    c: bytes = field(repr=False)
    beta_z: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Blinded:
    """A blinded input and the factor that removes the blinding. The factor is secret."""

    factor: bytes = field(repr=False)
    element: bytes = field(repr=False)


def is_valid_point(point: bytes) -> bool:
    """Tell whether 32 bytes are the canonical encoding of a point other than the identity."""
    return (
        len(point) == POINT_BYTES and point != _IDENTITY and bool(rbcl.crypto_core_ristretto255_is_valid_point(point))
    )


def is_canonical_scalar(scalar: bytes) -> bool:
    """Tell whether 32 bytes are a scalar below the group order; zero counts."""
    return len(scalar) == SCALAR_BYTES and int.from_bytes(scalar, "little") < SCALAR_ORDER


def scalar_from_entropy(entropy: bytes) -> bytes:
    """Reduce 64 random bytes to a uniform scalar."""
    check(len(entropy) == WIDE_SCALAR_BYTES, "a scalar is drawn from 64 bytes")
    reduced: bytes = rbcl.crypto_core_ristretto255_scalar_reduce(entropy)
    return reduced


def multiply_base(scalar: bytes) -> bytes:
    """Return scalar * G; raises `OprfError` for the zero scalar."""
    try:
        product: bytes = rbcl.crypto_scalarmult_ristretto255_base(scalar)
    except RuntimeError:
        raise OprfError("the zero scalar has no public key") from None
    return product


def multiply(scalar: bytes, point: bytes) -> bytes:
    """Return scalar * point; raises `OprfError` for invalid points and an identity result."""
    try:
        product: bytes = rbcl.crypto_scalarmult_ristretto255(scalar, point)
    except (RuntimeError, ValueError):
        raise OprfError("not a valid point, or an identity result") from None
    return product


def hash_to_point(data: bytes) -> bytes:
    """Map arbitrary bytes to a point of unknown discrete logarithm (RFC 9496 one-way map over SHA-512)."""
    point: bytes = rbcl.crypto_core_ristretto255_from_hash(sha512(data).digest())
    return point


def blind(input_: bytes, entropy: bytes) -> Blinded:
    """Blind the 32-byte input with a factor drawn from 64 bytes of fresh entropy. Raises `OprfError` (negligibly)."""
    factor = scalar_from_entropy(entropy)
    return Blinded(factor, multiply(factor, hash_to_point(input_)))


def evaluate_and_prove(private_key: bytes, public_key: bytes, blinded_input: bytes, nonce: bytes) -> Evaluation:
    """Return the evaluation of `blinded_input` under `private_key` with its proof.

    `nonce` is 64 fresh uniformly random bytes: using it twice reveals the private key. `public_key` is taken as bytes,
    as registered; it is the client's business whether it belongs to the private key. Raises `OprfError` for an invalid
    or identity input and a zero key. Cost: two variable-base and one fixed-base multiplication, about 120 us.
    """
    blinded_result = multiply(private_key, blinded_input)
    t = scalar_from_entropy(nonce)
    v_t = multiply_base(t)
    w_t = multiply(t, blinded_input)
    c = _challenge(blinded_input, public_key, blinded_result, v_t, w_t)
    beta_z: bytes = rbcl.crypto_core_ristretto255_scalar_add(
        t, rbcl.crypto_core_ristretto255_scalar_mul(private_key, c)
    )
    return Evaluation(blinded_result, c, beta_z)


def verify_proof(public_key: bytes, blinded_input: bytes, blinded_result: bytes, c: bytes, beta_z: bytes) -> bool:
    """Tell whether the proof shows that `blinded_result` was made with the key behind `public_key`."""
    if not (is_canonical_scalar(c) and is_canonical_scalar(beta_z)) or _ZERO in (c, beta_z):
        return False
    try:  # each operand is multiplied at least once, which refuses invalid points and identities
        v_t = rbcl.crypto_core_ristretto255_sub(multiply_base(beta_z), multiply(c, public_key))
        w_t = rbcl.crypto_core_ristretto255_sub(multiply(beta_z, blinded_input), multiply(c, blinded_result))
    except OprfError:
        return False
    return hmac.compare_digest(c, _challenge(blinded_input, public_key, blinded_result, v_t, w_t))


def finalize(input_: bytes, factor: bytes, blinded_result: bytes) -> bytes:
    """Remove the blinding and return the 64-byte OPRF output. Raises `OprfError` for an invalid result."""
    inverse = rbcl.crypto_core_ristretto255_scalar_invert(factor)
    return sha512(_OPRF_LABEL + input_ + multiply(inverse, blinded_result)).digest()


def local_evaluate(input_: bytes, private_key: bytes) -> bytes:
    """Return the 64-byte OPRF output directly, knowing the private key. Raises `OprfError` for a zero key."""
    return sha512(_OPRF_LABEL + input_ + multiply(private_key, hash_to_point(input_))).digest()


def _challenge(u: bytes, v: bytes, w: bytes, v_t: bytes, w_t: bytes) -> bytes:
    return scalar_from_entropy(sha512(_DLEQ_LABEL + u + v + w + v_t + w_t).digest())
