"""Crypto properties: an independent Noise library as oracle, round trips, tampering, sharing over any subset."""

from __future__ import annotations

import itertools
import warnings

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from juicebox_hsm.crypto import oprf, sharing
from juicebox_hsm.crypto.noise import Initiator, NoiseError, Responder, public_key
from juicebox_hsm.crypto.oprf import OprfError
from juicebox_hsm.crypto.sealing import SealError, open_sealed
from juicebox_hsm.wire.cbor import SCALAR_ORDER
from tests.fakes.random import SeededRandom

with warnings.catch_warnings():
    # The oracle imports deprecated names of the cryptography package; only its own import may warn.
    warnings.simplefilter("ignore")
    from noise.connection import Keypair, NoiseConnection

keys = st.binary(min_size=32, max_size=32)
payloads = st.binary(max_size=500)
expects_oracle_warning = pytest.mark.filterwarnings("ignore:One of ephemeral keypairs is already set:UserWarning")
"""The oracle warns whoever fixes its ephemeral key, which is the point of a deterministic test."""

ORACLE_NAME = b"Noise_NK_25519_ChaChaPoly_BLAKE2s"


def oracle(*, initiator: bool, static: bytes, ephemeral: bytes) -> NoiseConnection:
    """Return the independent library's side of a handshake."""
    connection = NoiseConnection.from_name(ORACLE_NAME)
    if initiator:
        connection.set_as_initiator()
        connection.set_keypair_from_public_bytes(Keypair.REMOTE_STATIC, static)
    else:
        connection.set_as_responder()
        connection.set_keypair_from_private_bytes(Keypair.STATIC, static)
    connection.set_keypair_from_private_bytes(Keypair.EPHEMERAL, ephemeral)
    connection.start_handshake()
    return connection


@expects_oracle_warning
@given(static=keys, mine=keys, theirs=keys, request=payloads, answer=payloads, messages=st.lists(payloads, max_size=3))
def test_responder_against_oracle(
    static: bytes, mine: bytes, theirs: bytes, request: bytes, answer: bytes, messages: list[bytes]
) -> None:
    """Our realm side talks to an independent client."""
    client = oracle(initiator=True, static=public_key(static), ephemeral=theirs)
    first = bytes(client.write_message(request))
    pending = Responder(static, public_key(static)).read(first[:32], first[32:])
    assert pending.payload == request
    ephemeral, ciphertext, session = pending.finish(answer, mine)
    assert bytes(client.read_message(ephemeral + ciphertext)) == answer
    for message in messages:
        assert session.decrypt(bytes(client.encrypt(message))) == message
        assert bytes(client.decrypt(session.encrypt(message))) == message


@expects_oracle_warning
@given(static=keys, mine=keys, theirs=keys, request=payloads, answer=payloads, messages=st.lists(payloads, max_size=3))
def test_initiator_against_oracle(
    static: bytes, mine: bytes, theirs: bytes, request: bytes, answer: bytes, messages: list[bytes]
) -> None:
    """Our client side talks to an independent realm."""
    server = oracle(initiator=False, static=static, ephemeral=theirs)
    initiator = Initiator(public_key(static), mine)
    ephemeral, ciphertext = initiator.write(request)
    assert bytes(server.read_message(ephemeral + ciphertext)) == request
    response = bytes(server.write_message(answer))
    payload, session = initiator.read(response[:32], response[32:])
    assert payload == answer
    for message in messages:
        assert bytes(server.decrypt(session.encrypt(message))) == message
        assert session.decrypt(bytes(server.encrypt(message))) == message


@given(key=st.binary(max_size=64), ciphertext=st.binary(max_size=100))
def test_responder_on_garbage(key: bytes, ciphertext: bytes) -> None:
    """Random first messages never open and raise nothing but `NoiseError`."""
    with pytest.raises(NoiseError):
        Responder(b"s" * 32, public_key(b"s" * 32)).read(key, ciphertext)


@given(payload=payloads, data=st.data())
def test_flipped_bits(payload: bytes, data: st.DataObject) -> None:
    """One flipped bit anywhere in the client's message makes it fail."""
    ephemeral, ciphertext = Initiator(public_key(b"s" * 32), b"e" * 32).write(payload)
    message = bytearray(ephemeral + ciphertext)
    bit = data.draw(st.integers(0, len(message) * 8 - 1))
    assume(bit != 255)  # X25519 ignores the key's top bit; the handshake hash does not, tested below
    message[bit // 8] ^= 1 << bit % 8
    with pytest.raises(NoiseError):
        Responder(b"s" * 32, public_key(b"s" * 32)).read(bytes(message[:32]), bytes(message[32:]))


def test_flipped_top_bit_of_the_key() -> None:
    """The one bit that X25519 ignores is still covered by the handshake hash."""
    ephemeral, ciphertext = Initiator(public_key(b"s" * 32), b"e" * 32).write(b"x")
    changed = ephemeral[:31] + bytes((ephemeral[31] ^ 0x80,))
    with pytest.raises(NoiseError):
        Responder(b"s" * 32, public_key(b"s" * 32)).read(changed, ciphertext)


@given(secret=st.binary(min_size=1, max_size=40), seed=keys)
def test_oprf_agrees_with_itself(secret: bytes, seed: bytes) -> None:
    """Blinded evaluation with proof equals local evaluation, and the blinded input says nothing twice."""
    random = SeededRandom(seed)
    key = oprf.scalar_from_entropy(random(64))
    public = oprf.multiply_base(key)
    blinded, again = oprf.blind(secret, random(64)), oprf.blind(secret, random(64))
    assert blinded.element != again.element
    evaluation = oprf.evaluate_and_prove(key, public, blinded.element, random(64))
    assert oprf.verify_proof(public, blinded.element, evaluation.blinded_result, evaluation.c, evaluation.beta_z)
    output = oprf.finalize(secret, blinded.factor, evaluation.blinded_result)
    assert output == oprf.local_evaluate(secret, key)
    assert len(output) == 64


@given(point=st.binary(max_size=40), scalar=st.binary(min_size=32, max_size=32))
def test_oprf_on_garbage(point: bytes, scalar: bytes) -> None:
    """Random operands verify nothing and raise nothing but `OprfError`."""
    assert not oprf.verify_proof(point, point, point, scalar, scalar)
    if oprf.is_canonical_scalar(scalar):
        try:
            oprf.evaluate_and_prove(scalar, point, point, scalar * 2)
        except OprfError:
            pass
        else:
            assert oprf.is_valid_point(point)


@given(count=st.integers(1, 6), data=st.data(), seed=keys)
def test_any_threshold_of_shares_recovers(count: int, data: st.DataObject, seed: bytes) -> None:
    """Every subset of threshold size gives the secret back, in scalars and in points; smaller ones do not."""
    threshold = data.draw(st.integers(1, count))
    random = SeededRandom(seed)
    secret = oprf.scalar_from_entropy(random(64))
    base = oprf.hash_to_point(seed)
    shares = dict(enumerate(sharing.create_shares(secret, threshold, count, random), start=1))
    for subset in itertools.combinations(shares, threshold):
        chosen = {x: shares[x] for x in subset}
        assert sharing.combine_scalars(chosen) == secret
        points = {x: oprf.multiply(share, base) for x, share in chosen.items()}
        assert sharing.combine_points(points) == oprf.multiply(secret, base)
    if threshold > 1:
        assert sharing.combine_scalars({x: shares[x] for x in list(shares)[: threshold - 1]}) != secret


@given(coefficients=st.lists(st.integers(0, SCALAR_ORDER - 1), max_size=4), x=st.integers(1, 300))
def test_polynomial_against_integers(coefficients: list[int], x: int) -> None:
    """Horner's rule in libsodium equals plain modular integers."""
    encoded = [value.to_bytes(32, "little") for value in coefficients]
    degree = len(coefficients)
    expected = sum(value * x ** (degree - i) for i, value in enumerate(coefficients)) + 7
    share = sharing.evaluate_polynomial(encoded, (7).to_bytes(32, "little"), x)
    assert int.from_bytes(share, "little") == expected % SCALAR_ORDER


@given(leaf=st.binary(max_size=900))
def test_leaves_on_garbage(leaf: bytes) -> None:
    """Random leaves never open and raise nothing but `SealError`."""
    with pytest.raises(SealError):
        open_sealed(b"k" * 32, leaf)
