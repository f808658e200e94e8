"""Noise refusals: lengths, forgeries, order and low-order keys (client-protocol.md 6)."""

from __future__ import annotations

import pytest

from juicebox_hsm.crypto.noise import Initiator, NoiseError, Responder, Session, public_key
from juicebox_hsm.errors import InvariantViolation

STATIC, EPHEMERAL, SERVER_EPHEMERAL = b"s" * 32, b"e" * 32, b"f" * 32
LOW_ORDER = [
    bytes(32),
    b"\1" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
]


def responder() -> Responder:
    """Return a realm's side."""
    return Responder(STATIC, public_key(STATIC))


def sessions() -> tuple[Session, Session]:
    """Return (client, server) sides of an open session."""
    initiator = Initiator(public_key(STATIC), EPHEMERAL)
    pending = responder().read(*initiator.write(b"hello"))
    ephemeral, ciphertext, server = pending.finish(b"answer", SERVER_EPHEMERAL)
    payload, client = initiator.read(ephemeral, ciphertext)
    assert payload == b"answer"
    return client, server


@pytest.mark.parametrize("key", LOW_ORDER)
def test_low_order_keys(key: bytes) -> None:
    """Low-order keys give an all-zero agreement and are refused on both sides."""
    with pytest.raises(NoiseError):
        responder().read(key, bytes(26))
    with pytest.raises(NoiseError):
        Initiator(key, EPHEMERAL).write(b"")
    initiator = Initiator(public_key(STATIC), EPHEMERAL)
    initiator.write(b"")
    with pytest.raises(NoiseError):
        initiator.read(key, bytes(16))


@pytest.mark.parametrize("size", [0, 1, 31, 33, 64])
def test_ephemeral_key_lengths(size: int) -> None:
    """Keys of another length are refused before the bindings, which would read past them."""
    with pytest.raises(NoiseError):
        responder().read(b"k" * size, bytes(16))
    initiator = Initiator(public_key(STATIC), EPHEMERAL)
    initiator.write(b"")
    with pytest.raises(NoiseError):
        initiator.read(b"k" * size, bytes(16))
    with pytest.raises(InvariantViolation):
        Responder(b"k" * size, public_key(STATIC))
    with pytest.raises(InvariantViolation):
        Initiator(public_key(STATIC), b"k" * size)


@pytest.mark.parametrize("size", [0, 1, 15])
def test_ciphertexts_without_a_tag(size: int) -> None:
    """Ciphertexts shorter than a tag are refused."""
    client, server = sessions()
    with pytest.raises(NoiseError):
        responder().read(public_key(EPHEMERAL), bytes(size))
    for side in (client, server):
        with pytest.raises(NoiseError):
            side.decrypt(bytes(size))


def test_handshake_is_bound_to_the_realms_key() -> None:
    """A handshake for another realm does not open."""
    message = Initiator(public_key(b"o" * 32), EPHEMERAL).write(b"hello")
    with pytest.raises(NoiseError):
        responder().read(*message)


def test_transport_order() -> None:
    """A replayed, skipped or reflected message fails; afterwards the right one still opens."""
    client, server = sessions()
    first, second = client.encrypt(b"first"), client.encrypt(b"second")
    with pytest.raises(NoiseError):
        server.decrypt(second)
    assert server.decrypt(first) == b"first"
    with pytest.raises(NoiseError):
        server.decrypt(first)
    with pytest.raises(NoiseError):
        client.decrypt(first)
    assert server.decrypt(second) == b"second"


def test_fresh_ephemeral_gives_fresh_keys() -> None:
    """Two handshakes with one client message but fresh server keys share no ciphertext."""
    message = Initiator(public_key(STATIC), EPHEMERAL).write(b"")
    _, _, one = responder().read(*message).finish(b"", b"1" * 32)
    _, _, two = responder().read(*message).finish(b"", b"2" * 32)
    assert one.encrypt(b"x" * 16) != two.encrypt(b"x" * 16)


def test_counters_never_wrap() -> None:
    """A counter at its end is an invariant, not a reused nonce."""
    session = Session(b"k" * 32, b"k" * 32, 2**64 - 1, 2**64 - 1)
    with pytest.raises(InvariantViolation):
        session.encrypt(b"")
    with pytest.raises(InvariantViolation):
        session.decrypt(bytes(16))
