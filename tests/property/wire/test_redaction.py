"""No printed form of any wire type shows secret bytes, raw or as hex."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.client.errors import InvalidPin
from juicebox_hsm.crypto.derive import RegistrationSigner, UnlockKeys
from juicebox_hsm.crypto.noise import Initiator, Responder, Session, public_key
from juicebox_hsm.crypto.oprf import Blinded, Evaluation
from juicebox_hsm.crypto.pin import StretchedPin
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.ids import RealmId
from juicebox_hsm.tenant_keys import SecretAlgorithm, TenantSecret
from juicebox_hsm.tokens import TokenKey
from juicebox_hsm.wire import client
from juicebox_hsm.wire import requests as secrets

PUBLIC_FIELDS = {"version", "realm"}
"""Byte fields that may be printed: a registration's version and the realm's id identify, they do not unlock."""


def messages(key: bytes) -> Iterator[Any]:
    """Yield one value of every type that carries secrets, each secret field made of `key`."""
    signed = secrets.SignedPublicKey(b"p" * 32, b"v" * 32, b"s" * 64)
    version = b"n" * 16
    yield secrets.Register2(version, key, signed, key, key[:16], key, key * 4, key[:16], 3)
    yield secrets.Recover2(version, key)
    yield secrets.Recover3(version, key[:16])
    yield secrets.OprfProof(key, key)
    yield secrets.Recover2Ok(signed, key, secrets.OprfProof(key, key), key, 3, 1)
    yield secrets.Recover3Ok(key, key * 4, key[:16])
    handshake = client.HandshakeRequest(key, key)
    yield handshake
    yield client.TransportRequest(key)
    yield client.HandshakeResponse(key, key, 5)
    yield client.TransportResponse(key)
    yield client.ClientRequest(
        RealmId(b"r" * 16), "token-" + key.hex(), 1, client.RequestKind.SECRETS_REQUEST, handshake
    )
    yield Secret(key)
    yield TenantSecret(Secret(key), SecretAlgorithm.HMAC_SHA256)
    yield TokenKey(TenantSecret(Secret(key), SecretAlgorithm.HMAC_SHA256))
    yield StretchedPin(key, key)
    yield UnlockKeys(key, key)
    yield Blinded(key, key)
    yield Evaluation(key, key, key)
    yield RegistrationSigner(key)
    yield Session(key, key)
    yield Initiator(public_key(b"x" * 32), key)
    responder = Responder(key, public_key(key))
    yield responder
    yield responder.read(*Initiator(public_key(key), b"e" * 32).write(key))


def printed(value: object) -> str:
    """Return every printed form of a value, alone and inside containers and errors."""
    return f"{value} {value!r} {value!s} {[value]} { ({'k': value}) } {Exception(value)!r} %s %r" % (value, value)


@given(key=st.binary(min_size=32, max_size=32).filter(lambda key: len(set(key)) > 8))
def test_nothing_prints_secrets(key: bytes) -> None:
    """Neither the bytes, nor their hex, nor an escape form of any run of 8 of them appears."""
    for value in messages(key):
        text = printed(value)
        for start in range(0, 24, 8):
            run = key[start : start + 8]
            assert run.hex() not in text
            assert repr(run)[2:-1] not in text


def test_every_wire_type_is_covered() -> None:
    """A new wire type with byte fields must be added above, or be known to be public."""
    covered = {type(value) for value in messages(bytes(range(32)))}
    public = {secrets.SignedPublicKey, secrets.Recover1Ok}
    for module in (secrets, client):
        for kind in vars(module).values():
            if isinstance(kind, type) and is_dataclass(kind) and any("bytes" in str(f.type) for f in fields(kind)):
                assert kind in covered | public, kind


def test_secret_refuses_copies_and_hashing() -> None:
    """A secret cannot be pickled or hashed, compares by value, and tells only its length."""
    secret = Secret(b"s" * 32)
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        hash(secret)
    assert secret == Secret(b"s" * 32)
    assert secret != Secret(b"s" * 31)
    assert secret != b"s" * 32
    assert len(secret) == 32
    assert secret.expose() == b"s" * 32
    assert str(InvalidPin(3)) == "wrong PIN, 3 guesses remaining"
