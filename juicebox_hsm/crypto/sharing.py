"""Shamir's secret sharing over the scalars of ristretto255, and its reading on points (client-protocol.md 11).

Share number i belongs to x = i, counted from 1 in the order of realm ids. Any `threshold` shares give the secret back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import rbcl

from juicebox_hsm.crypto import Random
from juicebox_hsm.crypto.oprf import WIDE_SCALAR_BYTES, OprfError, multiply, scalar_from_entropy
from juicebox_hsm.errors import check
from juicebox_hsm.wire.cbor import SCALAR_ORDER


def create_shares(secret: bytes, threshold: int, count: int, random: Random) -> list[bytes]:
    """Split the scalar `secret` into `count` shares, `threshold` of which recover it.

    Draws 64 bytes for each of the threshold - 1 coefficients, highest degree first.
    """
    check(1 <= threshold <= count, "1 <= threshold <= number of shares")
    coefficients = [scalar_from_entropy(random(WIDE_SCALAR_BYTES)) for _ in range(threshold - 1)]
    return [evaluate_polynomial(coefficients, secret, x) for x in range(1, count + 1)]


def evaluate_polynomial(coefficients: Iterable[bytes], secret: bytes, x: int) -> bytes:
    """Return ((a_1*x + a_2)*x + ...)*x + secret, by Horner's rule in constant-time scalar arithmetic."""
    at = x.to_bytes(32, "little")
    value = bytes(32)
    for coefficient in (*coefficients, secret):
        value = rbcl.crypto_core_ristretto255_scalar_add(
            rbcl.crypto_core_ristretto255_scalar_mul(value, at), coefficient
        )
    return value


def lagrange_coefficients(xs: Iterable[int]) -> dict[int, bytes]:
    """Return for each distinct x >= 1 the factor of its share in the value at 0. Indices are public."""
    points = list(xs)
    check(len(set(points)) == len(points) and all(x >= 1 for x in points), "share numbers are distinct, from 1")
    factors = {}
    for i in points:
        numerator = denominator = 1
        for j in points:
            if j != i:
                numerator = numerator * j % SCALAR_ORDER
                denominator = denominator * (j - i) % SCALAR_ORDER
        factors[i] = (numerator * pow(denominator, -1, SCALAR_ORDER) % SCALAR_ORDER).to_bytes(32, "little")
    return factors


def combine_scalars(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret scalar of shares by number."""
    total = bytes(32)
    for x, factor in lagrange_coefficients(shares).items():
        total = rbcl.crypto_core_ristretto255_scalar_add(
            total, rbcl.crypto_core_ristretto255_scalar_mul(factor, shares[x])
        )
    return total


def combine_points(shares: Mapping[int, bytes]) -> bytes:
    """Return the point whose shares by number are given; raises `OprfError` for an invalid point.

    A share alone is the point itself and is returned as it is, unchecked: whoever uses it multiplies it.
    """
    if len(shares) == 1:
        return next(iter(shares.values()))
    total: bytes | None = None
    for x, factor in lagrange_coefficients(shares).items():
        term = multiply(factor, shares[x])
        total = term if total is None else rbcl.crypto_core_ristretto255_add(total, term)
    if total is None:
        raise OprfError("no shares to combine")
    return total
