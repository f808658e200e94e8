"""OPRF and sharing refusals: identities, invalid points, forged proofs (client-protocol.md 10 and 11)."""

from __future__ import annotations

from typing import Any

import pytest
from nacl.bindings import crypto_aead_chacha20poly1305_ietf_encrypt

from juicebox_hsm.crypto import derive, oprf, sharing
from juicebox_hsm.crypto.oprf import OprfError
from juicebox_hsm.errors import InvariantViolation
from juicebox_hsm.wire.cbor import SCALAR_ORDER
from tests.vectors import raw

IDENTITY, ZERO = bytes(32), bytes(32)
INVALID_POINTS = {
    "identity": IDENTITY,
    "negative": b"\1" + bytes(31),
    "above the field": b"\xff" * 32,
    "field prime": (2**255 - 19).to_bytes(32, "little"),
    "non-square": bytes.fromhex("26948d35ca62e643e26a83177332e6b6afeb9d08e4268b650f1f5bbd8d81d371"),
    "short": b"p" * 31,
    "long": b"p" * 33,
    "empty": b"",
}
KEY, INPUT, NONCE = raw("oprf", "private_key"), raw("oprf", "input"), b"n" * 64


def evaluated() -> dict[str, Any]:
    """Return the operands of a good proof."""
    public, element = oprf.multiply_base(KEY), oprf.blind(INPUT, b"r" * 64).element
    evaluation = oprf.evaluate_and_prove(KEY, public, element, NONCE)
    return {
        "public_key": public,
        "blinded_input": element,
        "blinded_result": evaluation.blinded_result,
        "c": evaluation.c,
        "beta_z": evaluation.beta_z,
    }


@pytest.mark.parametrize("point", INVALID_POINTS.values(), ids=INVALID_POINTS)
def test_invalid_points(point: bytes) -> None:
    """The identity and every non-canonical encoding are refused everywhere, with the documented error."""
    assert not oprf.is_valid_point(point)
    with pytest.raises(OprfError):
        oprf.evaluate_and_prove(KEY, oprf.multiply_base(KEY), point, NONCE)
    with pytest.raises(OprfError):
        oprf.finalize(INPUT, KEY, point)
    with pytest.raises(OprfError):
        sharing.combine_points({1: point, 2: raw("oprf", "input_point")})
    for field in ("public_key", "blinded_input", "blinded_result"):
        assert not oprf.verify_proof(**{**evaluated(), field: point})


def test_zero_scalars() -> None:
    """A zero key or nonce gives no identity results but errors; zero is canonical all the same."""
    assert oprf.is_canonical_scalar(ZERO)
    element = raw("oprf", "blinded_input")
    with pytest.raises(OprfError):
        oprf.evaluate_and_prove(ZERO, raw("oprf", "public_key"), element, NONCE)
    with pytest.raises(OprfError):
        oprf.evaluate_and_prove(KEY, raw("oprf", "public_key"), element, bytes(64))
    with pytest.raises(OprfError):
        oprf.blind(INPUT, bytes(64))
    with pytest.raises(OprfError):
        oprf.local_evaluate(INPUT, ZERO)
    with pytest.raises(OprfError):
        oprf.multiply_base(ZERO)
    with pytest.raises(OprfError):
        sharing.combine_points({})


@pytest.mark.parametrize(
    ("scalar", "canonical"),
    [
        (SCALAR_ORDER - 1, True),
        (SCALAR_ORDER, False),
        (SCALAR_ORDER + 1, False),
        (2**255 - 1, False),
        (2**256 - 1, False),
    ],
)
def test_canonical_scalars(scalar: int, canonical: bool) -> None:
    """Scalars are canonical exactly below the group order."""
    assert oprf.is_canonical_scalar(scalar.to_bytes(32, "little")) is canonical
    assert not oprf.is_canonical_scalar(scalar.to_bytes(33, "little"))


@pytest.mark.parametrize("field", ["public_key", "blinded_input", "blinded_result", "c", "beta_z"])
def test_forged_proofs(field: str) -> None:
    """A proof with any operand exchanged for another valid one does not verify."""
    good = evaluated()
    assert oprf.verify_proof(**good)
    other = raw("oprf", "blinding_factor") if field in {"c", "beta_z"} else raw("oprf", "unblinded_result")
    assert not oprf.verify_proof(**{**good, field: other})
    assert not oprf.verify_proof(**{**good, field: ZERO})
    if field in {"c", "beta_z"}:
        aliased = (int.from_bytes(good[field], "little") + SCALAR_ORDER).to_bytes(32, "little")
        assert not oprf.verify_proof(**{**good, field: aliased})


def test_evaluation_under_another_key_is_noticed() -> None:
    """A realm that evaluates with a key other than the signed one cannot prove it."""
    good = evaluated()
    other = oprf.evaluate_and_prove(raw("oprf", "blinding_factor"), good["public_key"], good["blinded_input"], NONCE)
    assert not oprf.verify_proof(good["public_key"], good["blinded_input"], other.blinded_result, other.c, other.beta_z)


def test_sharing_refuses_nonsense() -> None:
    """Thresholds and share numbers out of range are invariants."""
    for threshold, count in ((0, 1), (2, 1)):
        with pytest.raises(InvariantViolation):
            sharing.create_shares(KEY, threshold, count, bytes)
    for xs in ([1, 1], [0, 1], [-1, 2]):
        with pytest.raises(InvariantViolation):
            sharing.lagrange_coefficients(xs)


def test_secret_padding() -> None:
    """Secrets of 0 to 128 bytes survive; longer ones are an invariant; foreign ciphertexts are the documented error."""
    key = b"k" * 32
    for size in (0, 1, 127, 128):
        encrypted = derive.encrypt_secret(key, b"s" * size)
        assert len(encrypted) == 145
        assert derive.decrypt_secret(key, encrypted) == b"s" * size
    with pytest.raises(InvariantViolation):
        derive.encrypt_secret(key, b"s" * 129)
    overlong = crypto_aead_chacha20poly1305_ietf_encrypt(bytes([129]) + bytes(128), b"", bytes(12), key)
    for forged in (b"", b"x" * 15, b"x" * 145, overlong):
        with pytest.raises(derive.DeriveError):
            derive.decrypt_secret(key, forged)


@pytest.mark.parametrize("change", ["realm", "key", "signature", "verifying key", "short", "small order", "malleable"])
def test_signed_public_keys(change: str) -> None:
    """A signature vouches for one key at one realm, in its canonical form, by a key of full order."""
    signer = derive.RegistrationSigner(b"s" * 32)
    realm, public, verifying = b"r" * 16, raw("oprf", "public_key"), signer.verifying_key
    signature = signer.sign(realm, public)
    assert derive.verify_public_key(realm, public, verifying, signature)
    order = SCALAR_ORDER
    changed = {
        "realm": (b"q" * 16, public, verifying, signature),
        "key": (realm, raw("oprf", "blinded_input"), verifying, signature),
        "signature": (realm, public, verifying, bytes([signature[0] ^ 1]) + signature[1:]),
        "verifying key": (realm, public, derive.RegistrationSigner(b"t" * 32).verifying_key, signature),
        "short": (realm, public, verifying, signature[:-1]),
        "small order": (realm, public, b"\1" + bytes(31), b"\1" + bytes(63)),
        "malleable": (
            realm,
            public,
            verifying,
            signature[:32] + (int.from_bytes(signature[32:], "little") + order).to_bytes(32, "little"),
        ),
    }
    assert not derive.verify_public_key(*changed[change])
