"""Outer messages: every vector, the leniency of section 3 and the version gate (client-protocol.md 2 to 5, 19.9)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cbor2
import pytest

from juicebox_hsm.errors import DecodingError
from juicebox_hsm.ids import RealmId
from juicebox_hsm.wire import client as wire
from juicebox_hsm.wire.client import (
    ClientOutcome,
    ClientRequest,
    HandshakeRequest,
    HandshakeResponse,
    RequestKind,
    TransportRequest,
    TransportResponse,
)
from tests.vectors import VECTORS

REQUESTS = [name for name in VECTORS["cbor"] if name.startswith("ClientRequest ")]
RESPONSES = [name for name in VECTORS["cbor"] if name.startswith("ClientResponse ")]


def vector(name: str) -> bytes:
    """Return a CBOR vector's bytes."""
    return bytes.fromhex(VECTORS["cbor"][name]["hex"])


@pytest.mark.parametrize("name", REQUESTS)
def test_request_vectors(name: str) -> None:
    """Each request vector decodes to its values and encodes to its bytes."""
    value = VECTORS["cbor"][name]["value"]
    request = wire.decode_client_request(vector(name))
    assert wire.encode_client_request(request) == vector(name)
    assert len(vector(name)) == VECTORS["cbor"][name]["len"]
    assert request.realm.hex() == value["realm"]
    assert (request.auth_token, request.session_id, request.kind.value) == (
        value["auth_token"],
        value["session_id"],
        value["kind"],
    )
    if isinstance(request.encrypted, TransportRequest):
        assert request.encrypted.ciphertext.hex() == value["encrypted"]["Transport"]["ciphertext"]
    else:
        handshake = value["encrypted"]["Handshake"]["handshake"]
        assert request.encrypted.client_ephemeral_public.hex() == handshake["client_ephemeral_public"]
        assert request.encrypted.payload_ciphertext.hex() == handshake["payload_ciphertext"]


@pytest.mark.parametrize("name", RESPONSES)
def test_response_vectors(name: str) -> None:
    """Each response vector decodes to its values and encodes to its bytes."""
    value = VECTORS["cbor"][name]["value"]
    response = wire.decode_client_response(vector(name))
    assert wire.encode_client_response(response) == vector(name)
    match response:
        case ClientOutcome():
            assert response.value == value
        case TransportResponse():
            assert response.ciphertext.hex() == value["Ok"]["Transport"]["ciphertext"]
        case HandshakeResponse():
            answer = value["Ok"]["Handshake"]
            assert response.server_ephemeral_public.hex() == answer["handshake"]["server_ephemeral_public"]
            assert response.payload_ciphertext.hex() == answer["handshake"]["payload_ciphertext"]
            assert response.session_lifetime_ns == 5_000_000_000


@pytest.mark.parametrize("name", REQUESTS + [name for name in RESPONSES if VECTORS["cbor"][name]["len"] > 20])
def test_noise_messages_alone(name: str) -> None:
    """The inner Noise messages round-trip alone and are the tail of the whole message."""
    if name in REQUESTS:
        noise = wire.decode_client_request(vector(name)).encrypted
        alone = wire.encode_noise_request(noise)
        assert wire.decode_noise_request(alone) == noise
    else:
        response = wire.decode_client_response(vector(name))
        assert not isinstance(response, ClientOutcome)
        alone = wire.encode_noise_response(response)
        assert wire.decode_noise_response(alone) == response
    assert vector(name).endswith(alone)


def members(name: str = "ClientRequest transport") -> dict[Any, Any]:
    """Return a vector as plain maps, to be changed and encoded by the general encoder."""
    decoded: dict[Any, Any] = cbor2.loads(vector(name))
    return decoded


def test_lenient_forms() -> None:
    """Any key order, unknown keys, byte arrays and trailing bytes are accepted."""
    expected = wire.decode_client_request(vector("ClientRequest transport"))
    plain = members()
    reordered = dict(reversed(plain.items()))
    unknown = {"new": {"x": [1, None, 1.5]}, **plain, 7: 8, b"bytes": True}
    arrays = {**plain, "realm": list(plain["realm"])}
    arrays["encrypted"] = {"Transport": {"ciphertext": list(plain["encrypted"]["Transport"]["ciphertext"]), "y": 1}}
    for form in (reordered, unknown, arrays):
        assert wire.decode_client_request(cbor2.dumps(form)) == expected
    assert wire.decode_client_request(vector("ClientRequest transport") + b"\xff\x00") == expected


@pytest.mark.parametrize("field", ["realm", "auth_token", "session_id", "kind", "encrypted"])
def test_missing_fields(field: str) -> None:
    """Every field is required."""
    plain = members()
    del plain[field]
    with pytest.raises(DecodingError):
        wire.decode_client_request(cbor2.dumps(plain))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("realm", b"r" * 15), ("realm", b"r" * 17), ("realm", "r" * 16), ("realm", [0] * 15), ("realm", [256] * 16),
        ("realm", [True] * 16), ("realm", [-1] * 16), ("realm", None), ("realm", [1.0] * 16),
        ("auth_token", b"token"), ("auth_token", 5), ("session_id", -1), ("session_id", 2**32),
        ("session_id", True), ("session_id", 1.0), ("session_id", "1"), ("kind", "handshakeonly"), ("kind", 1),
        ("kind", "HandshakeOnly"), ("encrypted", "Transport"), ("encrypted", {"Transport": b"x"}),
        ("encrypted", {"Transport": {}}), ("encrypted", {"Handshake": {}}), ("encrypted", {"Other": {}}),
        ("encrypted", {"Handshake": {"handshake": {"client_ephemeral_public": b"x" * 32}}}),
        ("encrypted", {"Transport": {"ciphertext": b"x"}, "Handshake": {}}), ("encrypted", {}),
        ("encrypted", {5: {"ciphertext": b"x"}}), ("encrypted", {"Transport": {"ciphertext": "text"}}),
    ],
)  # fmt: skip
def test_wrong_fields(field: str, value: object) -> None:
    """Wrong types, lengths, ranges and variants are refused, HandshakeOnly with a transport message too."""
    with pytest.raises(DecodingError):
        wire.decode_client_request(cbor2.dumps({**members(), field: value}))


@pytest.mark.parametrize("known", [True, False])
def test_duplicate_keys(known: bool) -> None:
    """A key that appears twice is an error; own decision: also an unknown one."""
    body = vector("ClientRequest transport")
    extra = cbor2.dumps("session_id" if known else "zz") + b"\x01"
    twice = b"\xa7" + body[1:] + extra + (extra if not known else cbor2.dumps("yy") + b"\x01")
    with pytest.raises(DecodingError):
        wire.decode_client_request(twice)


def test_ephemeral_key_of_any_length_decodes() -> None:
    """A wrong ephemeral key is Noise's to refuse (SessionError), so it must survive decoding."""
    plain = members("ClientRequest handshake only")
    plain["encrypted"]["Handshake"]["handshake"]["client_ephemeral_public"] = b"short"
    request = wire.decode_client_request(cbor2.dumps(plain))
    assert isinstance(request.encrypted, HandshakeRequest)
    assert request.encrypted.client_ephemeral_public == b"short"


@pytest.mark.parametrize(
    "value",
    [
        "Ok", "ok", "Unknown", 5, None, {"Ok": "Unavailable"}, {"Unavailable": None}, {"Ok": {"Handshake": {}}},
        {"Ok": {"Transport": {"ciphertext": b""}, "x": 1}}, [], {},
    ],
)  # fmt: skip
def test_wrong_responses(value: object) -> None:
    """Responses of unknown shape are refused."""
    with pytest.raises(DecodingError):
        wire.decode_client_response(cbor2.dumps(value))


@pytest.mark.parametrize(
    ("secs", "nanos", "good"),
    [(0, 0, True), (2**64 - 1, 2**32 - 1, True), (2**64, 0, False), (0, 2**32, False), (-1, 0, False), (1.5, 0, False)],
)
def test_durations(secs: Any, nanos: Any, good: bool) -> None:
    """Durations are a u64 of seconds and a u32 of nanoseconds."""
    plain = members("ClientResponse handshake only")
    plain["Ok"]["Handshake"]["session_lifetime"] = {"secs": secs, "nanos": nanos}
    if good:
        response = wire.decode_client_response(cbor2.dumps(plain))
        assert isinstance(response, HandshakeResponse)
        assert response.session_lifetime_ns == secs * 10**9 + nanos
    else:
        with pytest.raises(DecodingError):
            wire.decode_client_response(cbor2.dumps(plain))


def test_statuses() -> None:
    """Every outcome has its HTTP status."""
    by_status = {400: 3, 401: 1, 413: 1, 429: 1, 503: 1}
    statuses = list(wire.HTTP_STATUS.values())
    assert {status: statuses.count(status) for status in statuses} == by_status
    assert set(wire.HTTP_STATUS) == set(ClientOutcome)


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("0.3.7", True), ("0.3.0", True), ("0.4.0", True), ("1.0.0", True), ("0.3.0-rc.1", True), ("0.3.0+b.1", True),
        ("0.3.0-rc.1+b", True), ("18446744073709551615.0.0", True), ("0.2.9", False), ("0.0.0", False), (None, False),
        ("", False), ("0.3", False), ("0.3.0.0", False), ("v0.3.0", False), ("00.3.0", False), ("0.03.0", False),
        ("0.3.0-", False), ("0.3.0-01", False), ("0.3.0 ", False), ("0.3.0\n", False), ("+1.0.0", False),
        ("18446744073709551616.0.0", False), ("9" * 300 + ".0.0", False), ("\u0661.0.0", False),
        ("1.0.0-" + "a" * 300, False),
    ],
)  # fmt: skip
def test_version_gate(header: str | None, accepted: bool) -> None:
    """Semantic versions from (0, 3) on are accepted, everything else is refused without a crash."""
    assert wire.accepts_sdk_version(header) is accepted


def test_upgrade_text_is_not_a_response() -> None:
    """SDKs try to decode error bodies first; the 426 text must not look like an answer."""
    with pytest.raises(DecodingError):
        wire.decode_client_response(wire.SDK_UPGRADE_TEXT)


def test_largest_honest_request_fits() -> None:
    """A Register2 with a 1000-character token stays under the body limit, at the documented size."""
    request = ClientRequest(
        RealmId(bytes(16)), "t" * 1000, 2**32 - 1, RequestKind.SECRETS_REQUEST, TransportRequest(bytes(665 + 16))
    )
    assert len(wire.encode_client_request(request)) == 1791 <= wire.BODY_BYTES_MAX
    assert wire.decode_client_request(wire.encode_client_request(request)) == request
    assert replace(request, session_id=0) != request
