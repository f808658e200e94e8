"""Outer messages between a client and a realm (client-protocol.md 4 and 5), and the rules of their HTTP transport.

The balancer sees only these: a token, a session id and an opaque Noise message. `Ok` answers are represented by the
`NoiseResponse` itself, all others by `ClientOutcome`. Decoders raise `errors.DecodingError` and nothing else.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from juicebox_hsm.errors import DecodingError
from juicebox_hsm.ids import ID_BYTES, RealmId
from juicebox_hsm.wire import cbor

BODY_BYTES_MAX: Final = 2048
"""Largest request body a realm reads (client-protocol.md 2); the largest honest one is 1791 bytes."""

PROTOCOL_VERSION: Final = (0, 3)
"""(major, minor) of the protocol we serve; clients below it are asked to upgrade."""

SDK_UPGRADE_TEXT: Final = b"SDK upgrade required to version >=0.3"
"""Body of the 426 answer; deliberately not a decodable `ClientResponse`."""

_NANOS_PER_SECOND: Final = 1_000_000_000
_PUBLIC_KEY_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class HandshakeRequest:
    """First Noise message. The ephemeral key may have any length here: Noise answers another than 32 bytes."""

    client_ephemeral_public: bytes = field(repr=False)
    payload_ciphertext: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class TransportRequest:
    """A Noise transport message to the realm."""

    ciphertext: bytes = field(repr=False)


NoiseRequest = HandshakeRequest | TransportRequest


@dataclass(frozen=True, slots=True)
class HandshakeResponse:
    """Second Noise message. `session_lifetime_ns` (nanoseconds) is advice: the idle time to stop reusing after."""

    server_ephemeral_public: bytes = field(repr=False)
    payload_ciphertext: bytes = field(repr=False)
    session_lifetime_ns: int


@dataclass(frozen=True, slots=True)
class TransportResponse:
    """A Noise transport message from the realm."""

    ciphertext: bytes = field(repr=False)


NoiseResponse = HandshakeResponse | TransportResponse


class RequestKind(enum.Enum):
    """Tell the routing layer whether the user's record will be needed; values are the wire texts."""

    HANDSHAKE_ONLY = "HandshakeOnly"
    SECRETS_REQUEST = "SecretsRequest"


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """The body of `POST /req`. `session_id` is 32 bits, chosen by the client."""

    realm: RealmId
    auth_token: str = field(repr=False)
    session_id: int
    kind: RequestKind
    encrypted: NoiseRequest


class ClientOutcome(enum.Enum):
    """Every answer but Ok; values are the wire texts (client-protocol.md 5 says when each is given)."""

    UNAVAILABLE = "Unavailable"
    INVALID_AUTH = "InvalidAuth"
    MISSING_SESSION = "MissingSession"
    SESSION_ERROR = "SessionError"
    DECODING_ERROR = "DecodingError"
    PAYLOAD_TOO_LARGE = "PayloadTooLarge"
    RATE_LIMIT_EXCEEDED = "RateLimitExceeded"


ClientResponse = HandshakeResponse | TransportResponse | ClientOutcome

HTTP_STATUS_OK: Final = 200

HTTP_STATUS: Final[Mapping[ClientOutcome, int]] = MappingProxyType(
    {
        ClientOutcome.DECODING_ERROR: 400,
        ClientOutcome.MISSING_SESSION: 400,
        ClientOutcome.SESSION_ERROR: 400,
        ClientOutcome.INVALID_AUTH: 401,
        ClientOutcome.PAYLOAD_TOO_LARGE: 413,
        ClientOutcome.RATE_LIMIT_EXCEEDED: 429,
        ClientOutcome.UNAVAILABLE: 503,
    }
)
"""HTTP status of each outcome (client-protocol.md 2); Ok is `HTTP_STATUS_OK`."""

_OUTCOMES: Final = {outcome.value: outcome for outcome in ClientOutcome}
_ENCODED_OUTCOMES: Final = {outcome: cbor.text(outcome.value) for outcome in ClientOutcome}
_KINDS: Final = {kind.value: kind for kind in RequestKind}

_REQUEST_PREFIX: Final = cbor.map_head(5) + cbor.text("realm")
_AUTH_TOKEN: Final = cbor.text("auth_token")
_SESSION_ID: Final = cbor.text("session_id")
_KIND_AND_ENCRYPTED: Final = {
    kind: cbor.text("kind") + cbor.text(kind.value) + cbor.text("encrypted") for kind in RequestKind
}
_OK: Final = cbor.map_head(1) + cbor.text("Ok")
_TRANSPORT: Final = cbor.map_head(1) + cbor.text("Transport") + cbor.map_head(1) + cbor.text("ciphertext")
_HANDSHAKE_REQUEST: Final = (
    cbor.map_head(1)
    + cbor.text("Handshake")
    + cbor.map_head(1)
    + cbor.text("handshake")
    + cbor.map_head(2)
    + cbor.text("client_ephemeral_public")
)
_HANDSHAKE_RESPONSE: Final = (
    cbor.map_head(1)
    + cbor.text("Handshake")
    + cbor.map_head(2)
    + cbor.text("handshake")
    + cbor.map_head(2)
    + cbor.text("server_ephemeral_public")
)
_PAYLOAD_CIPHERTEXT: Final = cbor.text("payload_ciphertext")
_LIFETIME_SECS: Final = cbor.text("session_lifetime") + cbor.map_head(2) + cbor.text("secs")
_LIFETIME_NANOS: Final = cbor.text("nanos")


def encode_noise_request(noise: NoiseRequest) -> bytes:
    """Encode a `NoiseRequest` alone."""
    if isinstance(noise, TransportRequest):
        return _TRANSPORT + cbor.byte_string(noise.ciphertext)
    return (
        _HANDSHAKE_REQUEST
        + cbor.byte_string(noise.client_ephemeral_public)
        + _PAYLOAD_CIPHERTEXT
        + cbor.byte_string(noise.payload_ciphertext)
    )


def decode_noise_request(data: bytes) -> NoiseRequest:
    """Decode a `NoiseRequest` alone; raises `DecodingError`."""
    return _noise_request(cbor.decode(data))


def encode_noise_response(noise: NoiseResponse) -> bytes:
    """Encode a `NoiseResponse` alone."""
    if isinstance(noise, TransportResponse):
        return _TRANSPORT + cbor.byte_string(noise.ciphertext)
    secs, nanos = divmod(noise.session_lifetime_ns, _NANOS_PER_SECOND)
    return (
        _HANDSHAKE_RESPONSE
        + cbor.byte_string(noise.server_ephemeral_public)
        + _PAYLOAD_CIPHERTEXT
        + cbor.byte_string(noise.payload_ciphertext)
        + _LIFETIME_SECS
        + cbor.uint(secs)
        + _LIFETIME_NANOS
        + cbor.uint(nanos)
    )


def decode_noise_response(data: bytes) -> NoiseResponse:
    """Decode a `NoiseResponse` alone; raises `DecodingError`."""
    return _noise_response(cbor.decode(data))


def encode_client_request(request: ClientRequest) -> bytes:
    """Encode the body of `POST /req`."""
    return (
        _REQUEST_PREFIX
        + cbor.byte_string(request.realm)
        + _AUTH_TOKEN
        + cbor.text(request.auth_token)
        + _SESSION_ID
        + cbor.uint(request.session_id)
        + _KIND_AND_ENCRYPTED[request.kind]
        + encode_noise_request(request.encrypted)
    )


def decode_client_request(data: bytes) -> ClientRequest:
    """Decode the body of `POST /req`; raises `DecodingError`, also for HandshakeOnly with a transport message."""
    fields = cbor.as_map(cbor.decode(data))
    try:
        realm = RealmId(cbor.as_fixed(fields["realm"], ID_BYTES))
        token = cbor.as_text(fields["auth_token"])
        session_id = cbor.as_uint(fields["session_id"], cbor.U32_MAX)
        kind = _KINDS.get(cbor.as_text(fields["kind"]))
        encrypted = _noise_request(fields["encrypted"])
    except KeyError as missing:
        raise DecodingError(f"client request lacks {missing}") from None
    if kind is None:
        raise DecodingError("unknown request kind")
    if kind is RequestKind.HANDSHAKE_ONLY and isinstance(encrypted, TransportRequest):
        raise DecodingError("a handshake-only request carries a transport message")
    return ClientRequest(realm, token, session_id, kind, encrypted)


def encode_client_response(response: ClientResponse) -> bytes:
    """Encode the body of the answer to `POST /req`."""
    if isinstance(response, ClientOutcome):
        return _ENCODED_OUTCOMES[response]
    return _OK + encode_noise_response(response)


def decode_client_response(data: bytes) -> ClientResponse:
    """Decode the body of the answer to `POST /req`; raises `DecodingError`."""
    name, value = cbor.as_variant(cbor.decode(data))
    if value is cbor.UNIT:
        outcome = _OUTCOMES.get(name)
        if outcome is not None:
            return outcome
    elif name == "Ok":
        return _noise_response(value)
    raise DecodingError("unknown client response")


def _noise_request(item: object) -> NoiseRequest:
    name, value = cbor.as_variant(item)
    try:
        if name == "Transport":
            return TransportRequest(cbor.as_bytes(cbor.as_map(value)["ciphertext"]))
        if name == "Handshake":
            handshake = cbor.as_map(cbor.as_map(value)["handshake"])
            return HandshakeRequest(
                cbor.as_bytes(handshake["client_ephemeral_public"]),
                cbor.as_bytes(handshake["payload_ciphertext"]),
            )
    except KeyError as missing:
        raise DecodingError(f"noise request lacks {missing}") from None
    raise DecodingError("unknown noise request")


def _noise_response(item: object) -> NoiseResponse:
    name, value = cbor.as_variant(item)
    try:
        if name == "Transport":
            return TransportResponse(cbor.as_bytes(cbor.as_map(value)["ciphertext"]))
        if name == "Handshake":
            fields = cbor.as_map(value)
            handshake = cbor.as_map(fields["handshake"])
            lifetime = cbor.as_map(fields["session_lifetime"])
            secs = cbor.as_uint(lifetime["secs"], cbor.U64_MAX)
            nanos = cbor.as_uint(lifetime["nanos"], cbor.U32_MAX)
            return HandshakeResponse(
                cbor.as_fixed(handshake["server_ephemeral_public"], _PUBLIC_KEY_BYTES),
                cbor.as_bytes(handshake["payload_ciphertext"]),
                secs * _NANOS_PER_SECOND + nanos,
            )
    except KeyError as missing:
        raise DecodingError(f"noise response lacks {missing}") from None
    raise DecodingError("unknown noise response")


_VERSION_HEADER_CHARS_MAX: Final = 256
_SEMVER: Final = re.compile(
    r"(0|[1-9][0-9]{0,19})\.(0|[1-9][0-9]{0,19})\.(0|[1-9][0-9]{0,19})"
    r"(?:-(?:0|[1-9][0-9]*|[0-9]*[a-zA-Z-][0-9a-zA-Z-]*)(?:\.(?:0|[1-9][0-9]*|[0-9]*[a-zA-Z-][0-9a-zA-Z-]*))*)?"
    r"(?:\+[0-9a-zA-Z-]+(?:\.[0-9a-zA-Z-]+)*)?"
)
"""Semantic versions (semver.org 2.0.0); each number is at most an unsigned 64-bit integer, checked below."""


def accepts_sdk_version(header: str | None) -> bool:
    """Tell whether an `X-Juicebox-Version` header value may use this realm (client-protocol.md 2).

    Only (major, minor) count; missing, malformed and lower versions are refused.
    """
    if header is None or len(header) > _VERSION_HEADER_CHARS_MAX:
        return False
    match = _SEMVER.fullmatch(header)
    if match is None:
        return False
    major, minor, patch = int(match[1]), int(match[2]), int(match[3])
    return max(major, minor, patch) <= cbor.U64_MAX and (major, minor) >= PROTOCOL_VERSION
