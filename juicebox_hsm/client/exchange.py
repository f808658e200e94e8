"""One request to one realm: sessions, attempts and the reading of answers (client-protocol.md 17, "One request")."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import trio

from juicebox_hsm import __version__
from juicebox_hsm.client.configuration import Realm, parse_realm_id
from juicebox_hsm.client.errors import (
    AssertionFailed,
    InvalidAuth,
    RateLimitExceeded,
    Transient,
    UpgradeRequired,
)
from juicebox_hsm.client.transport import Transport, TransportError
from juicebox_hsm.crypto import Random
from juicebox_hsm.crypto.noise import Initiator, NoiseError, Session
from juicebox_hsm.errors import DecodingError
from juicebox_hsm.ids import RealmId
from juicebox_hsm.wire import requests as secrets
from juicebox_hsm.wire.client import (
    ClientOutcome,
    ClientRequest,
    HandshakeRequest,
    HandshakeResponse,
    NoiseRequest,
    NoiseResponse,
    RequestKind,
    TransportRequest,
    TransportResponse,
    decode_client_response,
    encode_client_request,
)
from juicebox_hsm.wire.requests import SecretsRequest, SecretsResponse

ATTEMPTS_MAX: Final = 5
SOFTWARE_REALM_ATTEMPTS_MAX: Final = 2
RETRY_PAUSE_S: Final = 0.005
REQUEST_TIMEOUT_S: Final = 30.0
SDK_VERSION: Final = "0.3.7"
"""Version of the official SDK whose protocol behaviour this client has."""

_HEADERS: Final = (("x-juicebox-version", SDK_VERSION), ("user-agent", f"juicebox-hsm-python/{__version__}"))
_SESSION_ID_BYTES: Final = 4

Token = str | None
AuthSource = (
    Mapping[str, str] | Mapping[RealmId, str] | Callable[[RealmId], Token] | Callable[[RealmId], Awaitable[Token]]
)
"""Where tokens come from: a mapping by realm id (16 bytes, or hex) or a function, called for every HTTP request."""


@dataclass(slots=True)
class _OpenSession:
    """A Noise session with a realm. Idle for `lifetime_s` seconds or more it is not used again."""

    session_id: int
    noise: Session
    lifetime_s: float
    answered_at_s: float = 0.0


@dataclass(slots=True)
class _RealmState:
    """Serializes requests to one realm and keeps its session between them."""

    url: str
    lock: trio.Lock = field(default_factory=trio.Lock)
    session: _OpenSession | None = None


class _SessionLost(Exception):
    """The realm no longer knows a session; internal."""


class Exchange:
    """Sends requests to realms. Keeps sessions per realm on demand, so any configuration may be used."""

    def __init__(self, auth: AuthSource, transport: Transport, random: Random) -> None:
        self._token_of = _token_source(auth)
        self._transport = transport
        self._random = random
        self._states: dict[Realm, _RealmState] = {}

    async def request(self, realm: Realm, request: SecretsRequest) -> SecretsResponse:
        """Return the realm's answer to `request`. Raises `ClientError`s other than InvalidPin and NotRegistered."""
        state = self._states.get(realm)
        if state is None:
            state = self._states[realm] = _RealmState(realm.url)
        attempts_max = ATTEMPTS_MAX if realm.public_key is not None else SOFTWARE_REALM_ATTEMPTS_MAX
        async with state.lock:
            for attempt in range(1, attempts_max):
                try:
                    return await self._attempt(realm, state, request)
                except _SessionLost:
                    pass  # only the first attempt can have had a cached session to lose
                except Transient:
                    await trio.sleep(RETRY_PAUSE_S * attempt)
            return await self._attempt(realm, state, request)

    async def _attempt(self, realm: Realm, state: _RealmState, request: SecretsRequest) -> SecretsResponse:
        if realm.public_key is None:
            return await self._ask_software(realm, request)
        return await self._ask(realm, realm.public_key, state, request)

    async def _ask(
        self, realm: Realm, public_key: bytes, state: _RealmState, request: SecretsRequest
    ) -> SecretsResponse:
        """Make one attempt. Until it succeeds the realm has no session here: it may have used it up."""
        session, state.session = state.session, None
        if session is not None and trio.current_time() - session.answered_at_s >= session.lifetime_s:
            session = None
        encoded = secrets.encode_secrets_request(request)
        if session is not None:
            padded = await self._send_in_session(realm, session, encoded)
        elif secrets.needs_forward_secrecy(request):
            session, payload = await self._open_session(realm, public_key, RequestKind.HANDSHAKE_ONLY, b"")
            if payload:
                raise AssertionFailed("a handshake was answered with a payload")
            try:
                padded = await self._send_in_session(realm, session, encoded)
            except _SessionLost:
                raise AssertionFailed("the realm lost a session it had just opened") from None
        else:
            session, padded = await self._open_session(realm, public_key, RequestKind.SECRETS_REQUEST, encoded)
        try:
            answer = secrets.decode_secrets_response(secrets.unpad_secrets_response(padded))
        except DecodingError:
            raise AssertionFailed("the answer inside the session is malformed") from None
        _check_answers(request, answer)
        session.answered_at_s = trio.current_time()
        state.session = session
        return answer

    async def _open_session(
        self, realm: Realm, public_key: bytes, kind: RequestKind, payload: bytes
    ) -> tuple[_OpenSession, bytes]:
        """Do a handshake carrying `payload`; return the session and the answer's payload."""
        initiator = Initiator(public_key, self._random(32))
        session_id = int.from_bytes(self._random(_SESSION_ID_BYTES), "little")
        try:
            handshake = HandshakeRequest(*initiator.write(payload))
            answer = await self._post(realm, session_id, kind, handshake)
            if not isinstance(answer, HandshakeResponse):
                raise AssertionFailed("a handshake was answered with a transport message")
            answer_payload, noise = initiator.read(answer.server_ephemeral_public, answer.payload_ciphertext)
        except NoiseError:
            raise AssertionFailed("the handshake with the realm failed") from None
        except _SessionLost:
            raise AssertionFailed("a handshake was answered with MissingSession") from None
        return _OpenSession(session_id, noise, answer.session_lifetime_ns / 1e9), answer_payload

    async def _send_in_session(self, realm: Realm, session: _OpenSession, payload: bytes) -> bytes:
        message = TransportRequest(session.noise.encrypt(payload))
        answer = await self._post(realm, session.session_id, RequestKind.SECRETS_REQUEST, message)
        if not isinstance(answer, TransportResponse):
            raise AssertionFailed("a transport message was answered with a handshake")
        try:
            return session.noise.decrypt(answer.ciphertext)
        except NoiseError:
            raise AssertionFailed("the answer does not open in the session") from None

    async def _post(self, realm: Realm, session_id: int, kind: RequestKind, noise: NoiseRequest) -> NoiseResponse:
        """Send one `ClientRequest` and read the answer, translating everything but Ok to exceptions."""
        token = await self._token(realm)
        body = encode_client_request(ClientRequest(realm.id, token, session_id, kind, noise))
        try:
            status, answer = await self._transport.post(self._states[realm].url, _HEADERS, body, REQUEST_TIMEOUT_S)
        except TransportError as failure:
            raise Transient(str(failure)) from failure
        try:
            response = decode_client_response(answer)
        except DecodingError:
            if 200 <= status < 300:
                raise AssertionFailed(f"realm {realm.id.hex()} answered {status} with something else") from None
            raise _status_error(realm, status) from None
        if isinstance(response, ClientOutcome):
            raise _outcome_error(realm, response)
        return response

    async def _ask_software(self, realm: Realm, request: SecretsRequest) -> SecretsResponse:
        """Make one attempt at a software realm: the bare request in the clear inside TLS."""
        token = await self._token(realm)
        headers = (*_HEADERS, ("authorization", f"Bearer {token}"))
        body = secrets.encode_secrets_request(request)
        try:
            status, answer = await self._transport.post(self._states[realm].url, headers, body, REQUEST_TIMEOUT_S)
        except TransportError as failure:
            raise Transient(str(failure)) from failure
        if not 200 <= status < 300:
            raise _status_error(realm, status)
        try:
            response = secrets.decode_secrets_response(answer)
        except DecodingError:
            raise AssertionFailed(f"realm {realm.id.hex()} answered {status} with something else") from None
        _check_answers(request, response)
        return response

    async def _token(self, realm: Realm) -> str:
        token = await self._token_of(realm.id)
        if token is None:
            raise InvalidAuth(f"no token for realm {realm.id.hex()}")
        if not token.isascii():
            raise InvalidAuth(f"the token for realm {realm.id.hex()} is not a token")
        return token


def _token_source(auth: AuthSource) -> Callable[[RealmId], Awaitable[Token]]:
    if isinstance(auth, Mapping):
        by_realm: dict[RealmId, str] = {}
        for key, value in auth.items():
            by_realm[parse_realm_id(key) if isinstance(key, str) else key] = value

        async def look_up(realm: RealmId) -> Token:
            return by_realm.get(realm)

        return look_up

    async def call(realm: RealmId) -> Token:
        result = auth(realm)
        return await result if inspect.isawaitable(result) else result

    return call


def _status_error(realm: Realm, status: int) -> InvalidAuth | UpgradeRequired | RateLimitExceeded | Transient:
    text = f"realm {realm.id.hex()} answered {status}"
    if status == 401:
        return InvalidAuth(text)
    if status == 426:
        return UpgradeRequired(text)
    if status == 429:
        return RateLimitExceeded(text)
    return Transient(text)


def _outcome_error(realm: Realm, outcome: ClientOutcome) -> Exception:
    text = f"realm {realm.id.hex()} answered {outcome.value}"
    match outcome:
        case ClientOutcome.UNAVAILABLE:
            return Transient(text)
        case ClientOutcome.INVALID_AUTH:
            return InvalidAuth(text)
        case ClientOutcome.MISSING_SESSION:
            return _SessionLost()
        case ClientOutcome.RATE_LIMIT_EXCEEDED:
            return RateLimitExceeded(text)
        case ClientOutcome.SESSION_ERROR | ClientOutcome.DECODING_ERROR | ClientOutcome.PAYLOAD_TOO_LARGE:
            return AssertionFailed(text)


_ANSWER_TYPES: Final[dict[type[SecretsRequest], tuple[type[SecretsResponse], ...]]] = {
    secrets.Register1: (secrets.Register1Ok,),
    secrets.Register2: (secrets.Register2Ok,),
    secrets.Delete: (secrets.DeleteOk,),
    secrets.Recover1: (secrets.Recover1Ok,),
    secrets.Recover2: (secrets.Recover2Ok,),
    secrets.Recover3: (secrets.Recover3Ok, secrets.BadUnlockKeyTag),
}
_PHASES: Final[dict[type[SecretsRequest], secrets.Phase]] = {
    secrets.Recover1: secrets.Phase.RECOVER1,
    secrets.Recover2: secrets.Phase.RECOVER2,
    secrets.Recover3: secrets.Phase.RECOVER3,
}


def _check_answers(request: SecretsRequest, answer: SecretsResponse) -> None:
    """Raise `AssertionFailed` unless `answer` belongs to `request`."""
    if isinstance(answer, _ANSWER_TYPES[type(request)]):
        return
    if isinstance(answer, secrets.NotRegistered | secrets.NoGuesses | secrets.VersionMismatch) and (
        _PHASES.get(type(request)) is answer.request
    ):
        return
    raise AssertionFailed("the answer belongs to another request")
