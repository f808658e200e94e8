"""Client traffic: sessions and requests against records (hsm.md 13).

Every fallible part of a request runs before its effect is computed; from then on nothing may fail. The reply stays
with the log entry and leaves only when the entry commits (I3).
"""

from __future__ import annotations

from typing import Final

from juicebox_hsm.consensus.types import Partition
from juicebox_hsm.crypto.noise import NoiseError, PendingHandshake, Session
from juicebox_hsm.crypto.sealing import NONCE_BYTES, SealError, open_sealed, seal
from juicebox_hsm.errors import DecodingError, check
from juicebox_hsm.hsm import records
from juicebox_hsm.hsm.messages import AppRequest, AppRequestOk, Handshake, HandshakeOk, NotLeader, Outcome
from juicebox_hsm.hsm.state import HsmState, LeaderState
from juicebox_hsm.ids import RECORD_ID_BYTES, RecordId
from juicebox_hsm.merkle.kernel import EMPTY_DELTA, BadEncoding, InvalidProof, Refreshed, StaleProof, Tree
from juicebox_hsm.wire.client import (
    HandshakeRequest,
    HandshakeResponse,
    NoiseRequest,
    NoiseResponse,
    TransportResponse,
)
from juicebox_hsm.wire.requests import (
    SecretsRequest,
    decode_secrets_request,
    encode_secrets_response,
    needs_forward_secrecy,
    pad_secrets_response,
)

SESSION_LIFETIME_NS: Final = 5_000_000_000
"""A hint for clients when to stop reusing a session; the HSM does not expire by time."""

CIPHERTEXT_BYTES_MAX: Final = 2048
EPHEMERAL_BYTES: Final = 32

_PROOF_KEY: Final = slice(2, 34)


def proof_key(proof: bytes) -> bytes:
    """Return the key an encoded proof claims to be for (merkle.md 3.2); short for a truncated proof."""
    return proof[_PROOF_KEY]


def _owned(leader: LeaderState, record: RecordId) -> tuple[Partition, Tree] | None:
    """Return the partition and tree if the record lies in the leader's range."""
    partition = leader.log.last.partition
    if partition is None or len(record) != RECORD_ID_BYTES or not partition.range.contains(record):
        return None
    tree = leader.tree
    check(tree is not None, "a leader with a partition has its tree")
    return partition, tree  # type: ignore[return-value]  # checked above


def handshake(state: HsmState, request: Handshake) -> HandshakeOk | Outcome | NotLeader:
    """Open a session without running a request; nothing to commit."""
    found = state.leading(request.realm, request.group)
    if not isinstance(found, tuple):
        return found
    leader = found[1]
    if _owned(leader, request.record_id) is None:
        return Outcome.NOT_OWNER
    if not _fits(request.client_ephemeral_public, request.payload_ciphertext):
        return Outcome.SESSION_ERROR
    try:
        pending = state.responder.read(request.client_ephemeral_public, request.payload_ciphertext)
        if pending.payload:
            return Outcome.SESSION_ERROR
        public, ciphertext, session = pending.finish(b"", state.platform.random(EPHEMERAL_BYTES))
    except NoiseError:
        return Outcome.SESSION_ERROR
    leader.sessions.put(request.record_id, request.session_id, session)
    return HandshakeOk(HandshakeResponse(public, ciphertext, SESSION_LIFETIME_NS))


def app_request(state: HsmState, request: AppRequest) -> AppRequestOk | Outcome | NotLeader:
    """Run one client request and append its entry, the reply attached."""
    member = state.member(request.realm, request.group)
    if isinstance(member, Outcome):
        return member
    leader = member.role
    if not isinstance(leader, LeaderState):
        return NotLeader(member.status())
    owned = _owned(leader, request.record_id)
    if owned is None:
        return Outcome.NOT_OWNER
    last = leader.log.last
    if request.index > last.index:
        member.step_down_at(leader, last.index)
        return NotLeader(member.status())
    partition, tree = owned
    opened = _open_record(state, tree, request)
    if isinstance(opened, Outcome):
        return opened
    refreshed, record = opened
    received = _receive(state, leader, request)
    if isinstance(received, Outcome):
        return received
    conversation, inner = received

    # Nothing may fail from here on.
    random = state.platform.random
    effect = records.run(record, inner, random)
    padded = pad_secrets_response(encode_secrets_response(effect.reply))
    session, reply = _answer(conversation, padded, state)
    leader.sessions.put(request.record_id, request.session_id, session)
    delta = EMPTY_DELTA
    if effect.written is not None:
        leaf = seal(state.record_key, random(NONCE_BYTES), records.encode_record(effect.written))
        root, delta = tree.insert(refreshed, leaf)
        partition = Partition(partition.range, root)
    entry = state.new_entry(member.id, last, partition, last.transferring, last.consumed)
    leader.log.append(entry, reply, effect.result)
    return AppRequestOk(entry, delta)


def _open_record(state: HsmState, tree: Tree, request: AppRequest) -> tuple[Refreshed, records.Record] | Outcome:
    """Verify the proof and read the record it shows."""
    if proof_key(request.proof) != request.record_id:
        return Outcome.INVALID_PROOF
    try:
        refreshed = tree.latest(request.proof)
    except StaleProof:
        return Outcome.STALE_PROOF
    except (InvalidProof, BadEncoding):
        return Outcome.INVALID_PROOF
    leaf = refreshed.leaf
    if leaf is None:
        return refreshed, records.NOT_REGISTERED
    try:
        return refreshed, records.decode_record(open_sealed(state.record_key, leaf))
    except (SealError, DecodingError):
        return Outcome.INVALID_RECORD_DATA


def _fits(ephemeral_public: bytes, ciphertext: bytes) -> bool:
    return len(ephemeral_public) == EPHEMERAL_BYTES and len(ciphertext) <= CIPHERTEXT_BYTES_MAX


def _receive(
    state: HsmState, leader: LeaderState, request: AppRequest
) -> tuple[PendingHandshake | Session, SecretsRequest] | Outcome:
    """Decrypt and parse the request. A transport message takes its session out, and a failed one costs it."""
    encrypted: NoiseRequest = request.encrypted
    conversation: PendingHandshake | Session
    try:
        if isinstance(encrypted, HandshakeRequest):
            if not _fits(encrypted.client_ephemeral_public, encrypted.payload_ciphertext):
                return Outcome.SESSION_ERROR
            conversation = state.responder.read(encrypted.client_ephemeral_public, encrypted.payload_ciphertext)
            inner = decode_secrets_request(conversation.payload)
            if needs_forward_secrecy(inner):
                return Outcome.SESSION_ERROR
        else:
            if len(encrypted.ciphertext) > CIPHERTEXT_BYTES_MAX:
                return Outcome.SESSION_ERROR
            session = leader.sessions.take(request.record_id, request.session_id)
            if session is None:
                return Outcome.MISSING_SESSION
            conversation = session
            inner = decode_secrets_request(session.decrypt(encrypted.ciphertext))
        records.refuse_invalid(inner)
    except NoiseError:
        return Outcome.SESSION_ERROR
    except DecodingError:
        return Outcome.DECODING_ERROR
    return conversation, inner


def _answer(conversation: PendingHandshake | Session, padded: bytes, state: HsmState) -> tuple[Session, NoiseResponse]:
    """Encrypt the padded reply and return it with the session to keep."""
    if isinstance(conversation, Session):
        return conversation, TransportResponse(conversation.encrypt(padded))
    ephemeral_secret = state.platform.random(EPHEMERAL_BYTES)
    public, ciphertext, session = conversation.finish(padded, ephemeral_secret)
    return session, HandshakeResponse(public, ciphertext, SESSION_LIFETIME_NS)
