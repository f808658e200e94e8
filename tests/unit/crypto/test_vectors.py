"""Every crypto vector of the client protocol (client-protocol.md 19.3 to 19.8)."""

from __future__ import annotations

import hashlib

import pytest

from juicebox_hsm.crypto import derive, oprf, pin, sharing
from juicebox_hsm.crypto.noise import Initiator, Responder, public_key
from juicebox_hsm.crypto.pin import PinHashingMode
from tests.vectors import VECTORS, raw

REALM = raw("jwt", "realm_id")


@pytest.mark.parametrize("name", ["noise", "noise_empty"])
def test_noise_handshake(name: str) -> None:
    """Both sides of a handshake give the vector's bytes, with and without payloads."""
    request_payload = raw(name, "request_payload") if name == "noise" else b""
    response_payload = raw(name, "response_payload") if name == "noise" else b""
    initiator = Initiator(raw("noise", "server_static_public"), raw("noise", "client_ephemeral_secret"))
    ephemeral, ciphertext = initiator.write(request_payload)
    assert (ephemeral, ciphertext) == (raw(name, "client_ephemeral_public"), raw(name, "request_ciphertext"))

    responder = Responder(raw("noise", "server_static_secret"), raw("noise", "server_static_public"))
    pending = responder.read(ephemeral, ciphertext)
    assert pending.payload == request_payload
    server_ephemeral, answer, _ = pending.finish(response_payload, raw("noise", "server_ephemeral_secret"))
    assert (server_ephemeral, answer) == (raw(name, "server_ephemeral_public"), raw(name, "response_ciphertext"))
    assert initiator.read(server_ephemeral, answer)[0] == response_payload


def test_noise_transport() -> None:
    """Transport messages of both directions follow the vector's keys and counters."""
    initiator = Initiator(raw("noise", "server_static_public"), raw("noise", "client_ephemeral_secret"))
    responder = Responder(raw("noise", "server_static_secret"), raw("noise", "server_static_public"))
    pending = responder.read(*initiator.write(raw("noise", "request_payload")))
    ephemeral, answer, server = pending.finish(
        raw("noise", "response_payload"), raw("noise", "server_ephemeral_secret")
    )
    _, client = initiator.read(ephemeral, answer)
    for message in VECTORS["noise"]["transport"]:
        sender, receiver = (client, server) if message["dir"] == "c2s" else (server, client)
        assert sender.encrypt(bytes.fromhex(message["pt"])).hex() == message["ct"]
        assert receiver.decrypt(bytes.fromhex(message["ct"])).hex() == message["pt"]


def test_noise_public_key() -> None:
    """The static public key follows from its secret."""
    assert public_key(raw("noise", "server_static_secret")) == raw("noise", "server_static_public")


@pytest.mark.parametrize("mode", PinHashingMode)
def test_pin_stretching(mode: PinHashingMode) -> None:
    """Argon2id parameters and salt give the vector's halves in both modes."""
    version, info = raw("pin", "version"), raw("pin", "info")
    assert pin.salt(version, info) == raw("pin", "salt")
    stretched = pin.stretch(mode, raw("pin", "pin"), version, info)
    assert stretched.access_key == raw("pin", mode.value, "access_key")
    assert stretched.encryption_key_seed == raw("pin", mode.value, "encryption_key_seed")


def test_oprf_points_and_results() -> None:
    """Hash to group, keys, blinding, evaluation and finalization give the vector's bytes."""
    assert oprf.hash_to_point(raw("oprf", "input")) == raw("oprf", "input_point")
    assert oprf.multiply_base(raw("oprf", "private_key")) == raw("oprf", "public_key")
    factor = raw("oprf", "blinding_factor")
    assert oprf.multiply(factor, raw("oprf", "input_point")) == raw("oprf", "blinded_input")
    assert oprf.multiply(raw("oprf", "private_key"), raw("oprf", "blinded_input")) == raw("oprf", "blinded_output")
    output = raw("oprf", "output")
    assert oprf.finalize(raw("oprf", "input"), factor, raw("oprf", "blinded_output")) == output
    assert oprf.local_evaluate(raw("oprf", "input"), raw("oprf", "private_key")) == output


def test_oprf_proof() -> None:
    """A scalar already below the order survives reduction, so the vector's nonce can be fed in; the proof verifies."""
    nonce = raw("oprf", "dleq_nonce_t") + bytes(32)
    evaluation = oprf.evaluate_and_prove(
        raw("oprf", "private_key"), raw("oprf", "public_key"), raw("oprf", "blinded_input"), nonce
    )
    assert evaluation.blinded_result == raw("oprf", "blinded_output")
    assert evaluation.c == raw("oprf", "proof_c")
    assert evaluation.beta_z == raw("oprf", "proof_beta_z")
    challenge = hashlib.sha512(raw("oprf", "challenge_preimage")).digest()
    assert oprf.scalar_from_entropy(challenge) == evaluation.c
    assert oprf.verify_proof(
        raw("oprf", "public_key"),
        raw("oprf", "blinded_input"),
        evaluation.blinded_result,
        evaluation.c,
        evaluation.beta_z,
    )


def test_derived_keys() -> None:
    """Commitment, tags, key, ciphertext and signature give the vector's bytes, and open again."""
    keys = derive.unlock_keys(raw("oprf", "output"))
    assert keys.commitment == raw("keys", "unlock_key_commitment")
    assert keys.key == raw("keys", "unlock_key")
    assert derive.unlock_key_tag(keys.key, REALM) == raw("keys", "unlock_key_tag")
    scalar = raw("keys", "encryption_key_scalar")
    key = derive.encryption_key(raw("keys", "encryption_key_seed"), scalar)
    assert key == raw("keys", "encryption_key")
    encrypted = derive.encrypt_secret(key, raw("keys", "secret"))
    assert encrypted == raw("keys", "encrypted_secret")
    assert derive.decrypt_secret(key, encrypted) == raw("keys", "secret")
    commitment = derive.encrypted_secret_commitment(keys.key, REALM, scalar, encrypted)
    assert commitment == raw("keys", "encrypted_secret_commitment")
    signer = derive.RegistrationSigner(raw("keys", "signing_seed"))
    assert signer.verifying_key == raw("keys", "verifying_key")
    public = raw("oprf", "public_key")
    assert signer.sign(REALM, public) == raw("keys", "signature")
    assert derive.verify_public_key(REALM, public, signer.verifying_key, raw("keys", "signature"))


def test_sharing() -> None:
    """Shares and Lagrange coefficients give the vector's bytes; any two of three shares recover."""
    secret = raw("shamir", "secret")
    coefficients = [raw("shamir", "coefficients", 0)]
    shares = [sharing.evaluate_polynomial(coefficients, secret, x) for x in (1, 2, 3)]
    assert shares == [raw("shamir", "shares", i) for i in range(3)]
    draws = iter([coefficients[0] + bytes(32)])
    assert sharing.create_shares(secret, 2, 3, lambda size: next(draws)[:size]) == shares
    factors = sharing.lagrange_coefficients([1, 3])
    assert [factors[1], factors[3]] == [raw("shamir", "lagrange_for_1_and_3", i) for i in range(2)]
    for one, other in ((1, 2), (1, 3), (2, 3)):
        assert sharing.combine_scalars({one: shares[one - 1], other: shares[other - 1]}) == secret
