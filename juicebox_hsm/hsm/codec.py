"""The transport envelope: requests and replies of an HSM as CBOR (hsm.md 8).

In process the objects themselves are passed; this form is for an HSM behind a socket, and it is the widest door a
host has. Decoders accept exactly what the encoders write and raise `errors.DecodingError` for everything else, before
anything reaches the HSM. Metrics are never produced: which request ran is the client's business (M20).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from juicebox_hsm.errors import DecodingError, check
from juicebox_hsm.hsm import messages as m
from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.hsm.fields import (
    BOOL,
    BYTES,
    CAPTURED,
    ENTRY,
    ID,
    MAC,
    NOISE_REQUEST,
    NOISE_RESPONSE,
    NONCE,
    PAIR,
    PARTITION,
    RANGE,
    RECORD_ID,
    RESULT,
    ROLE,
    TRANSFERRING,
    U32,
    U64,
    Codec,
    array,
    optional,
    read_fields,
    row,
    struct,
    write_map,
)
from juicebox_hsm.hsm.messages import Outcome
from juicebox_hsm.wire import cbor
from juicebox_hsm.wire.client import HandshakeResponse

REQUEST_BYTES_MAX: Final = 1024 * 1024

_REALM_GROUP: Final = (("realm", ID), ("group", ID))
_TRANSFER: Final = (("realm", ID), ("source", ID), ("destination", ID))


@dataclass(frozen=True, slots=True)
class Form:
    """A request's wire name and fields, its success, and the refusals it may get."""

    name: str
    request: Codec
    success: type
    response: Codec | None
    refusals: frozenset[Outcome]
    not_leader: bool = False
    role_in_not_leader: bool = False
    bare: bool = False


def _value(codec: Codec) -> Codec:
    """Return the codec of `RoleOk` where the wire carries the role status itself."""
    return Codec(lambda value: codec.write(value.role), lambda item: m.RoleOk(codec.read(item)))


def _write_handshake(request: m.Handshake) -> bytes:
    keys = ("client_ephemeral_public", "payload_ciphertext")
    handshake = write_map(keys, [BYTES.write(getattr(request, key)) for key in keys])
    ids = [ID.write(request.realm), ID.write(request.group), RECORD_ID.write(request.record_id)]
    return write_map(_HANDSHAKE_FIELDS, [*ids, U32.write(request.session_id), handshake])


def _read_handshake(item: object) -> m.Handshake:
    realm, group, record, session, handshake = read_fields(item, _HANDSHAKE_FIELDS)
    public, ciphertext = read_fields(handshake, ("client_ephemeral_public", "payload_ciphertext"))
    return m.Handshake(
        ID.read(realm),
        ID.read(group),
        RECORD_ID.read(record),
        U32.read(session),
        BYTES.read(public),
        BYTES.read(ciphertext),
    )


_HANDSHAKE_FIELDS: Final = ("realm", "group", "record_id", "session_id", "handshake")
_NANOS: Final = 1_000_000_000


def _write_handshake_ok(response: m.HandshakeOk) -> bytes:
    noise = response.noise
    check(isinstance(noise, HandshakeResponse), "a handshake is answered with a handshake")
    secs, nanos = divmod(noise.session_lifetime_ns, _NANOS)  # type: ignore[union-attr]  # checked above
    answer = write_map(
        ("server_ephemeral_public", "payload_ciphertext"),
        [
            cbor.byte_string(noise.server_ephemeral_public),  # type: ignore[union-attr]  # checked above
            cbor.byte_string(noise.payload_ciphertext),  # type: ignore[union-attr]  # checked above
        ],
    )
    lifetime = write_map(("secs", "nanos"), [cbor.uint(secs), cbor.uint(nanos)])
    return write_map(("noise", "session_lifetime"), [answer, lifetime])


def _read_handshake_ok(item: object) -> m.HandshakeOk:
    noise, lifetime = read_fields(item, ("noise", "session_lifetime"))
    public, ciphertext = read_fields(noise, ("server_ephemeral_public", "payload_ciphertext"))
    secs, nanos = read_fields(lifetime, ("secs", "nanos"))
    total = U64.read(secs) * _NANOS + cbor.as_uint(nanos, _NANOS - 1)
    return m.HandshakeOk(HandshakeResponse(RECORD_ID.read(public), BYTES.read(ciphertext), total))


_PROOFS_FIELDS: Final = ("owned", "transferring")
_PROOFS: Final = Codec(
    lambda pair: write_map(_PROOFS_FIELDS, [BYTES.write(pair[0]), BYTES.write(pair[1])]),
    lambda item: tuple(BYTES.read(proof) for proof in read_fields(item, _PROOFS_FIELDS)),
)
_LEADER: Final = struct(
    m.LeaderStatus,
    (
        ("committed", optional(U64)),
        ("last", ENTRY),
        ("owned_range", optional(RANGE)),
        ("transferring", optional(TRANSFERRING)),
    ),
)
_GROUP: Final = struct(
    m.GroupStatus,
    (
        ("id", ID),
        ("configuration", array(ID)),
        ("captured", optional(PAIR)),
        ("leader", optional(_LEADER)),
        ("role", ROLE),
    ),
)
_REALM: Final = struct(m.RealmStatus, (("id", ID), ("statement", MAC), ("groups", array(_GROUP))), ("generation", U64))
_GENERATIONS: Final = ("generations", array(U64))

_MEMBER: Final = frozenset({Outcome.INVALID_REALM, Outcome.INVALID_GROUP})
_ENTRY_AND_CLOCK: Final = struct(m.TransferEntryOk, (("entry", ENTRY), ("clock", U64)))

FORMS: Final[dict[type, Form]] = {
    m.Status: Form(
        "Status",
        struct(m.Status, ()),
        m.StatusOk,
        struct(m.StatusOk, (("id", ID), ("realm", optional(_REALM)), ("public_key", MAC))),
        frozenset(),
        bare=True,
    ),
    m.NewRealm: Form(
        "NewRealm",
        struct(m.NewRealm, ()),
        m.NewRealmOk,
        struct(m.NewRealmOk, (*_REALM_GROUP, ("entry", ENTRY), ("delta", BYTES), ("role", ROLE))),
        frozenset({Outcome.HAVE_REALM}),
    ),
    m.JoinRealm: Form(
        "JoinRealm",
        struct(m.JoinRealm, (("realm", ID), ("peer", ID), ("statement", MAC))),
        m.JoinRealmOk,
        struct(m.JoinRealmOk, (("hsm", ID),)),
        frozenset({Outcome.HAVE_OTHER_REALM, Outcome.INVALID_STATEMENT}),
    ),
    m.NewGroup: Form(
        "NewGroup",
        struct(m.NewGroup, (("realm", ID), ("members", array(row(ID, MAC)))), _GENERATIONS),
        m.NewGroupOk,
        struct(m.NewGroupOk, (("group", ID), ("statement", MAC), ("entry", ENTRY), ("role", ROLE))),
        frozenset(
            {Outcome.INVALID_REALM, Outcome.INVALID_CONFIGURATION, Outcome.INVALID_STATEMENT, Outcome.TOO_MANY_GROUPS}
            | {Outcome.STALE_GENERATION}
        ),
    ),
    m.JoinGroup: Form(
        "JoinGroup",
        struct(m.JoinGroup, (*_REALM_GROUP, ("configuration", array(ID)), ("statement", MAC)), _GENERATIONS),
        m.RoleOk,
        _value(ROLE),
        frozenset(
            {Outcome.INVALID_REALM, Outcome.INVALID_CONFIGURATION, Outcome.INVALID_STATEMENT, Outcome.TOO_MANY_GROUPS}
            | {Outcome.STALE_GENERATION}
        ),
    ),
    m.BecomeLeader: Form(
        "BecomeLeader",
        struct(m.BecomeLeader, (*_REALM_GROUP, ("last_entry", ENTRY))),
        m.RoleOk,
        struct(m.RoleOk, (("role", ROLE),)),
        _MEMBER | {Outcome.INVALID_MAC, Outcome.STEPDOWN_IN_PROGRESS},
    ),
    m.StepDown: Form(
        "StepDown",
        struct(m.StepDown, (*_REALM_GROUP, ("force", BOOL))),
        m.StepDownOk,
        struct(m.StepDownOk, (("last", U64), ("role", ROLE))),
        _MEMBER,
        not_leader=True,
        role_in_not_leader=True,
    ),
    m.CaptureNext: Form(
        "CaptureNext",
        struct(m.CaptureNext, (*_REALM_GROUP, ("entries", array(ENTRY)))),
        m.RoleOk,
        _value(ROLE),
        _MEMBER | {Outcome.INVALID_MAC, Outcome.INVALID_CHAIN, Outcome.MISSING_PREV, Outcome.MISSING_ENTRIES},
    ),
    m.CaptureJump: Form(
        "CaptureJump",
        struct(m.CaptureJump, (*_REALM_GROUP, ("entries", array(ENTRY)), ("captures", array(CAPTURED)))),
        m.CaptureJumpOk,
        None,
        _MEMBER
        | {Outcome.MISSING_ENTRIES, Outcome.INVALID_MAC, Outcome.INVALID_CHAIN, Outcome.NO_QUORUM, Outcome.STALE_INDEX},
    ),
    m.PersistState: Form(
        "PersistState",
        struct(m.PersistState, ()),
        m.PersistStateOk,
        struct(m.PersistStateOk, (("captured", array(CAPTURED)),)),
        frozenset(),
    ),
    m.Commit: Form(
        "Commit",
        struct(m.Commit, (*_REALM_GROUP, ("captures", array(CAPTURED)))),
        m.CommitOk,
        struct(
            m.CommitOk,
            (
                ("committed", U64),
                ("responses", array(row(MAC, NOISE_RESPONSE, RESULT))),
                ("abandoned", array(MAC)),
                ("role", ROLE),
            ),
        ),
        _MEMBER | {Outcome.NO_QUORUM},
        not_leader=True,
        role_in_not_leader=True,
    ),
    m.PrepareTransfer: Form(
        "PrepareTransfer",
        struct(m.PrepareTransfer, (*_TRANSFER, ("range", RANGE))),
        m.PrepareTransferOk,
        struct(
            m.PrepareTransferOk,
            (
                ("nonce", NONCE),
                ("entry", optional(ENTRY)),
                ("wait_til_committed", U64),
                ("clock", U64),
                ("statement", MAC),
            ),
        ),
        _MEMBER | {Outcome.UNACCEPTABLE_RANGE, Outcome.OTHER_TRANSFER_PENDING, Outcome.RETIRED},
        not_leader=True,
    ),
    m.CancelPreparedTransfer: Form(
        "CancelPreparedTransfer",
        struct(m.CancelPreparedTransfer, (*_TRANSFER, ("range", RANGE))),
        m.TransferEntryOk,
        _ENTRY_AND_CLOCK,
        _MEMBER | {Outcome.NOT_PREPARED},
        not_leader=True,
    ),
    m.TransferOut: Form(
        "TransferOut",
        struct(
            m.TransferOut,
            (*_TRANSFER, ("range", RANGE), ("nonce", NONCE), ("statement", MAC), ("proof", optional(BYTES))),
        ),
        m.TransferOutOk,
        struct(
            m.TransferOutOk,
            (
                ("entry", optional(ENTRY)),
                ("delta", BYTES),
                ("partition", PARTITION),
                ("wait_til_committed", U64),
                ("clock", U64),
            ),
        ),
        _MEMBER
        | {
            Outcome.NOT_OWNER,
            Outcome.STALE_PROOF,
            Outcome.INVALID_PROOF,
            Outcome.MISSING_PROOF,
            Outcome.OTHER_TRANSFER_PENDING,
        }
        | {Outcome.INVALID_STATEMENT},
        not_leader=True,
    ),
    m.TransferStatement: Form(
        "TransferStatement",
        struct(m.TransferStatement, (*_TRANSFER, ("nonce", NONCE))),
        m.TransferStatementOk,
        struct(m.TransferStatementOk, (("statement", MAC), ("at", U64))),
        _MEMBER | {Outcome.NOT_TRANSFERRING, Outcome.BUSY},
        not_leader=True,
    ),
    m.TransferIn: Form(
        "TransferIn",
        struct(
            m.TransferIn,
            (
                *_TRANSFER,
                ("transferring", PARTITION),
                ("at", U64),
                ("proofs", optional(_PROOFS)),
                ("nonce", NONCE),
                ("statement", MAC),
            ),
        ),
        m.TransferInOk,
        struct(m.TransferInOk, (("entry", ENTRY), ("delta", BYTES), ("clock", U64))),
        _MEMBER
        | {
            Outcome.INVALID_NONCE,
            Outcome.INVALID_STATEMENT,
            Outcome.STALE_PROOF,
            Outcome.INVALID_PROOF,
            Outcome.MISSING_PROOFS,
            Outcome.NOT_PREPARED,
        },
        not_leader=True,
    ),
    m.CompleteTransfer: Form(
        "CompleteTransfer",
        struct(m.CompleteTransfer, (*_TRANSFER, ("range", RANGE))),
        m.TransferEntryOk,
        _ENTRY_AND_CLOCK,
        _MEMBER | {Outcome.NOT_TRANSFERRING},
        not_leader=True,
    ),
    m.RetireGroup: Form(
        "RetireGroup",
        struct(m.RetireGroup, _REALM_GROUP),
        m.RetireGroupOk,
        struct(m.RetireGroupOk, (("entry", optional(ENTRY)), ("wait_til_committed", U64), ("clock", U64))),
        _MEMBER | {Outcome.STILL_OWNER, Outcome.OTHER_TRANSFER_PENDING},
        not_leader=True,
    ),
    m.ForgetGroup: Form(
        "ForgetGroup",
        struct(m.ForgetGroup, (*_REALM_GROUP, ("entry", ENTRY), ("captures", array(CAPTURED)))),
        m.ForgetGroupOk,
        struct(m.ForgetGroupOk, (("generation", U64),)),
        _MEMBER | {Outcome.INVALID_MAC, Outcome.NOT_RETIRED, Outcome.NO_QUORUM},
    ),
    m.Handshake: Form(
        "HandshakeRequest",
        Codec(_write_handshake, _read_handshake),
        m.HandshakeOk,
        Codec(_write_handshake_ok, _read_handshake_ok),
        _MEMBER | {Outcome.NOT_OWNER, Outcome.SESSION_ERROR},
        not_leader=True,
    ),
    m.AppRequest: Form(
        "AppRequest",
        struct(
            m.AppRequest,
            (
                *_REALM_GROUP,
                ("record_id", RECORD_ID),
                ("session_id", U32),
                ("encrypted", NOISE_REQUEST),
                ("proof", BYTES),
                ("index", U64),
            ),
        ),
        m.AppRequestOk,
        struct(m.AppRequestOk, (("entry", ENTRY), ("delta", BYTES))),
        _MEMBER
        | {
            Outcome.STALE_PROOF,
            Outcome.INVALID_PROOF,
            Outcome.NOT_OWNER,
            Outcome.INVALID_RECORD_DATA,
            Outcome.MISSING_SESSION,
        }
        | {Outcome.SESSION_ERROR, Outcome.DECODING_ERROR},
        not_leader=True,
        role_in_not_leader=True,
    ),
}

_BY_NAME: Final = {form.name: form for form in FORMS.values()}
_METRICS: Final = {"Skip": False, "Record": True}
_NO_METRICS: Final = b"\x80"
_OUTCOMES: Final = {outcome.value: outcome for outcome in Outcome}


# Envelopes ----------------------------------------------------------------------------------------------------


def encode_request(request: m.Request, *, record_metrics: bool = False) -> bytes:
    """Encode `{req: {"<Name>": {fields}}, metrics}`."""
    form = FORMS[type(request)]
    body = cbor.map_head(1) + cbor.text(form.name) + form.request.write(request)
    return write_map(("req", "metrics"), [body, cbor.text("Record" if record_metrics else "Skip")])


def decode_request(data: bytes) -> m.Request:
    """Decode a request of at most 1 MiB; raises `DecodingError`. Whether metrics were asked for changes nothing."""
    if len(data) > REQUEST_BYTES_MAX:
        raise DecodingError(f"a request has at most {REQUEST_BYTES_MAX} bytes, this one has {len(data)}")
    body, metrics = read_fields(cbor.decode(data), ("req", "metrics"))
    name, fields = cbor.as_variant(body)
    form = _BY_NAME.get(name)
    asked = _METRICS.get(cbor.as_text(metrics))
    if form is None or asked is None:
        raise DecodingError("unknown HSM request")
    request: m.Request = form.request.read(fields)
    if encode_request(request, record_metrics=asked) != data:
        raise DecodingError("the HSM request is not in canonical form")
    return request


def encode_response(request: type, response: m.Response) -> bytes:
    """Encode `{res, metrics}` for the answer to a request of the given type."""
    return write_map(("res", "metrics"), [_encode_answer(FORMS[request], response), _NO_METRICS])


def _encode_answer(form: Form, response: m.Response) -> bytes:
    if isinstance(response, Outcome):
        check(response in form.refusals, "an answer is one of those the request documents")
        return cbor.text(response.value)
    if isinstance(response, m.NotLeader):
        check(form.not_leader, "an answer is one of those the request documents")
        name = cbor.text("NotLeader")
        return name if response.role is None else cbor.map_head(1) + name + ROLE.write(response.role)
    if isinstance(response, m.NotWitness):
        return cbor.map_head(1) + cbor.text("NotWitness") + ROLE.write(response.role)
    if isinstance(response, m.NotCaptured):
        have = optional(U64).write(response.have)
        return cbor.map_head(1) + cbor.text("NotCaptured") + write_map(("have",), [have])
    check(type(response) is form.success, "an answer is one of those the request documents")
    if form.response is None:
        return cbor.text("Ok")
    encoded = form.response.write(response)
    return encoded if form.bare else cbor.map_head(1) + cbor.text("Ok") + encoded


def decode_response(request: type, data: bytes) -> m.Response:
    """Decode the answer to a request of the given type; raises `DecodingError`."""
    form = FORMS[request]
    item, metrics = read_fields(cbor.decode(data), ("res", "metrics"))
    if metrics != []:
        raise DecodingError("metrics were not asked for")
    response = _decode_answer(form, item)
    if encode_response(request, response) != data:
        raise DecodingError("the HSM response is not in canonical form")
    return response


def _decode_answer(form: Form, item: object) -> m.Response:
    answer: Any
    if form.bare and form.response is not None:
        answer = form.response.read(item)
        return answer  # type: ignore[no-any-return]  # the form's own success
    name, value = cbor.as_variant(item)
    if value is cbor.UNIT:
        outcome = _OUTCOMES.get(name)
        if outcome in form.refusals and outcome is not None:
            return outcome
        if name == "NotLeader" and form.not_leader and not form.role_in_not_leader:
            return m.NotLeader()
        if name == "Ok" and form.response is None:
            return m.CaptureJumpOk()
    elif name == "Ok" and form.response is not None:
        answer = form.response.read(value)
        return answer  # type: ignore[no-any-return]  # the form's own success
    elif name == "NotLeader" and form.role_in_not_leader:
        return m.NotLeader(ROLE.read(value))
    elif name == "NotWitness" and form.success is m.CaptureJumpOk:
        return m.NotWitness(ROLE.read(value))
    elif name == "NotCaptured" and form.name == "BecomeLeader":
        return m.NotCaptured(optional(U64).read(read_fields(value, ("have",))[0]))
    raise DecodingError("unknown HSM response")


def handle_bytes(hsm: Hsm, data: bytes) -> bytes:
    """Run one encoded request and return the encoded reply.

    Raises `DecodingError` without any change of state, or `Poisoned`.
    """
    request = decode_request(data)
    return encode_response(type(request), hsm.handle(request))
