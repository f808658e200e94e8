"""Every decoder of the wire, on random and mutated bytes: the documented error or success, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.errors import DecodingError
from juicebox_hsm.wire import cbor
from juicebox_hsm.wire import client as wire
from juicebox_hsm.wire import requests as secrets
from tests.vectors import VECTORS

CODECS: dict[str, tuple[Callable[[bytes], Any], Callable[[Any], bytes]]] = {
    "client request": (wire.decode_client_request, wire.encode_client_request),
    "client response": (wire.decode_client_response, wire.encode_client_response),
    "noise request": (wire.decode_noise_request, wire.encode_noise_request),
    "noise response": (wire.decode_noise_response, wire.encode_noise_response),
    "secrets request": (secrets.decode_secrets_request, secrets.encode_secrets_request),
    "secrets response": (secrets.decode_secrets_response, secrets.encode_secrets_response),
    "padding": (secrets.unpad_secrets_response, secrets.pad_secrets_response),
}
SEEDS = [bytes.fromhex(entry["hex"]) for entry in VECTORS["cbor"].values()]

plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=40)
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=12) | st.integers(0, 9) | st.binary(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Return a vector with a few bytes changed, removed, inserted or swapped for CBOR of another kind."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        removed = draw(st.integers(0, 3))
        inserted = draw(st.binary(max_size=3) | plain_values.map(cbor2.dumps))
        data[place : place + removed] = inserted
    return bytes(data)


@pytest.mark.parametrize("name", CODECS)
@given(data=st.binary(max_size=300) | mutated() | plain_values.map(cbor2.dumps))
def test_decoders(name: str, data: bytes) -> None:
    """A decoder returns something that round-trips, or raises `DecodingError`."""
    decode, encode = CODECS[name]
    try:
        decoded = decode(data)
    except DecodingError:
        return
    assert decode(encode(decoded)) == decoded


@given(data=st.binary(max_size=300) | mutated())
def test_strict(data: bytes) -> None:
    """The strict decoder accepts exactly what re-encodes to itself, and never more than the lenient one."""
    try:
        item = cbor.decode_strict(data)
    except DecodingError:
        return
    assert cbor2.dumps(item) == data
    cbor.decode(data)


@given(item=plain_values)
def test_strict_round_trip(item: object) -> None:
    """Whatever our encoder writes, the strict decoder reads."""
    encoded = cbor2.dumps(item)
    assert cbor2.dumps(cbor.decode_strict(encoded)) == encoded
