"""An in-memory realm and a transport to it: the server side of client-protocol.md 2 to 9 in its simplest form.

The token text is the user's name; `auth=False` realms refuse all. Faults are functions that see the request about to be
handled; the first one that returns something replaces or spoils the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import trio

from juicebox_hsm.client import TransportError
from juicebox_hsm.client.configuration import Configuration, Realm
from juicebox_hsm.client.transport import Headers
from juicebox_hsm.crypto import Random, oprf
from juicebox_hsm.crypto.noise import NoiseError, Responder, Session, public_key
from juicebox_hsm.crypto.pin import PinHashingMode
from juicebox_hsm.errors import DecodingError
from juicebox_hsm.ids import RealmId
from juicebox_hsm.wire import client as wire
from juicebox_hsm.wire import requests as secrets
from juicebox_hsm.wire.client import ClientOutcome, ClientRequest, ClientResponse
from juicebox_hsm.wire.requests import Phase, SecretsRequest, SecretsResponse


@dataclass
class Registered:
    """A registration with its guess count."""

    request: secrets.Register2
    guess_count: int = 0


class NoGuessesLeft:
    """The state after the last guess."""


@dataclass
class FakeRealm:
    """A realm in memory. `spoil` may change an inner answer before it is encrypted."""

    realm_id: RealmId
    random: Random
    static_secret: bytes
    software: bool = False
    session_lifetime_ns: int = 5_000_000_000
    records: dict[str, Registered | NoGuessesLeft] = field(default_factory=dict)
    sessions: dict[tuple[str, int], Session] = field(default_factory=dict)
    requests: list[SecretsRequest] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    spoil: Callable[[SecretsResponse], SecretsResponse] = lambda answer: answer

    def __post_init__(self) -> None:
        """Derive the public key."""
        self.public_key = public_key(self.static_secret)
        self.responder = Responder(self.static_secret, self.public_key)

    @property
    def realm(self) -> Realm:
        """Return the realm as a client's configuration names it."""
        address = f"https://{self.realm_id.hex()}.test"
        return Realm(self.realm_id, address, None if self.software else self.public_key)

    def post(self, headers: Headers, body: bytes) -> tuple[int, bytes]:
        """Handle the body of `POST /req`."""
        if not wire.accepts_sdk_version(dict(headers).get("x-juicebox-version")):
            return 426, wire.SDK_UPGRADE_TEXT
        if self.software:
            user = dict(headers)["authorization"].removeprefix("Bearer ")
            answer = self.decide(user, secrets.decode_secrets_request(body))
            return 200, secrets.encode_secrets_response(self.spoil(answer))
        response = self._handle(body)
        status = wire.HTTP_STATUS[response] if isinstance(response, ClientOutcome) else 200
        return status, wire.encode_client_response(response)

    def _handle(self, body: bytes) -> ClientResponse:
        if len(body) > wire.BODY_BYTES_MAX:
            return ClientOutcome.PAYLOAD_TOO_LARGE
        try:
            request = wire.decode_client_request(body)
            if request.realm != self.realm_id:
                return ClientOutcome.UNAVAILABLE
            if isinstance(request.encrypted, wire.TransportRequest):
                return self._transport(request, request.encrypted)
            return self._handshake(request, request.encrypted)
        except DecodingError:
            return ClientOutcome.DECODING_ERROR
        except NoiseError:
            return ClientOutcome.SESSION_ERROR

    def _handshake(self, request: ClientRequest, message: wire.HandshakeRequest) -> ClientResponse:
        pending = self.responder.read(message.client_ephemeral_public, message.payload_ciphertext)
        payload = b""
        if request.kind is wire.RequestKind.HANDSHAKE_ONLY:
            self.kinds.append("HandshakeOnly")
            if pending.payload:
                return ClientOutcome.SESSION_ERROR
        else:
            inner = secrets.decode_secrets_request(pending.payload)
            if secrets.needs_forward_secrecy(inner):
                return ClientOutcome.SESSION_ERROR
            self.kinds.append(f"Handshake {type(inner).__name__}")
            payload = self._answer(request.auth_token, inner)
        ephemeral, ciphertext, session = pending.finish(payload, self.random(32))
        self.sessions[request.auth_token, request.session_id] = session
        return wire.HandshakeResponse(ephemeral, ciphertext, self.session_lifetime_ns)

    def _transport(self, request: ClientRequest, message: wire.TransportRequest) -> ClientResponse:
        key = (request.auth_token, request.session_id)
        session = self.sessions.pop(key, None)
        if session is None:
            return ClientOutcome.MISSING_SESSION
        inner = secrets.decode_secrets_request(session.decrypt(message.ciphertext))
        self.kinds.append(type(inner).__name__)
        answer = wire.TransportResponse(session.encrypt(self._answer(request.auth_token, inner)))
        self.sessions[key] = session
        return answer

    def _answer(self, user: str, inner: SecretsRequest) -> bytes:
        answer = self.spoil(self.decide(user, inner))
        return secrets.pad_secrets_response(secrets.encode_secrets_response(answer))

    def decide(self, user: str, request: SecretsRequest) -> SecretsResponse:
        """Run the state machine of client-protocol.md 9."""
        self.requests.append(request)
        match request:
            case secrets.Register1():
                return secrets.Register1Ok()
            case secrets.Register2():
                self.records[user] = Registered(request)
                return secrets.Register2Ok()
            case secrets.Delete():
                self.records.pop(user, None)
                return secrets.DeleteOk()
        phase = Phase(type(request).__name__)
        record = self.records.get(user)
        if record is None:
            return secrets.NotRegistered(phase)
        if isinstance(record, NoGuessesLeft):
            return secrets.NoGuesses(phase)
        registration = record.request
        limit = min(registration.num_guesses, secrets.GUESS_COUNT_MAX)
        if not isinstance(request, secrets.Recover1) and request.version != registration.version:
            return secrets.VersionMismatch(phase)
        if not isinstance(request, secrets.Recover3) and record.guess_count >= limit:
            self.records[user] = NoGuessesLeft()
            return secrets.NoGuesses(phase)
        match request:
            case secrets.Recover1():
                return secrets.Recover1Ok(registration.version)
            case secrets.Recover2():
                record.guess_count += 1
                evaluation = oprf.evaluate_and_prove(
                    registration.oprf_private_key,
                    registration.oprf_signed_public_key.public_key,
                    request.oprf_blinded_input,
                    self.random(64),
                )
                return secrets.Recover2Ok(
                    registration.oprf_signed_public_key,
                    evaluation.blinded_result,
                    secrets.OprfProof(evaluation.c, evaluation.beta_z),
                    registration.unlock_key_commitment,
                    registration.num_guesses,
                    record.guess_count,
                )
            case secrets.Recover3():
                if request.unlock_key_tag != registration.unlock_key_tag:
                    if record.guess_count >= limit:
                        self.records[user] = NoGuessesLeft()
                    return secrets.BadUnlockKeyTag(limit - record.guess_count)
                record.guess_count = 0
                return secrets.Recover3Ok(
                    registration.encryption_key_scalar_share,
                    registration.encrypted_secret,
                    registration.encrypted_secret_commitment,
                )


Fault = Callable[[FakeRealm, int], "tuple[int, bytes] | str | None"]
"""Sees (realm, number of the request to it, from 1); returns an answer, "drop" (lost before it arrived), "lose"
(processed, answer lost), "hang" (never answered), or None to let it pass."""


@dataclass
class FakeTransport:
    """Routes requests to fake realms by URL; `fault` may interfere."""

    realms: list[FakeRealm]
    fault: Fault = lambda realm, number: None
    posts: list[tuple[FakeRealm, bytes]] = field(default_factory=list)

    async def post(self, url: str, headers: Headers, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Deliver a request, yielding to other tasks as a network would."""
        await trio.lowlevel.checkpoint()
        realm = next(each for each in self.realms if each.realm.url == url)
        self.posts.append((realm, body))
        verdict = self.fault(realm, sum(1 for each, _ in self.posts if each is realm))
        if isinstance(verdict, tuple):
            return verdict
        if verdict == "drop":
            raise TransportError("dropped")
        if verdict == "hang":
            await trio.sleep_forever()
        answer = realm.post(headers, body)
        if verdict == "lose":
            raise TransportError("lost")
        return answer


def make_realms(count: int, random: Random, *, software: int = 0) -> list[FakeRealm]:
    """Return realms with ascending ids; the last `software` of them are software realms."""
    realms = [FakeRealm(RealmId(bytes((i + 1,)) * 16), random, random(32)) for i in range(count)]
    return [replace(realm, software=i >= count - software) for i, realm in enumerate(realms)]


def configure(realms: list[FakeRealm], register: int | None = None, recover: int | None = None) -> Configuration:
    """Return a configuration over fake realms: a bare majority to recover, all to register, fast PIN hashing."""
    return Configuration(
        tuple(realm.realm for realm in realms),
        register if register is not None else len(realms),
        recover if recover is not None else len(realms) // 2 + 1,
        PinHashingMode.FAST_INSECURE,
    )
