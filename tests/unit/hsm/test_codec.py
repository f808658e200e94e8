"""The CBOR transport, and I17: no bytes and no field contents, however malformed, end an HSM."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.consensus.types import Leader, LogEntry, Role, RoleStatus, SteppingDown, Witness
from juicebox_hsm.errors import DecodingError, InvariantViolation
from juicebox_hsm.hsm.codec import (
    FORMS,
    REQUEST_BYTES_MAX,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
    handle_bytes,
)
from juicebox_hsm.hsm.fields import (
    BOOL,
    BYTES,
    PARTITION,
    RESULT,
    ROLE,
    Codec,
    array,
    fixed,
    optional,
    row,
    struct,
    uint,
)
from juicebox_hsm.hsm.messages import (
    CaptureJump,
    CaptureJumpOk,
    CaptureNext,
    Handshake,
    JoinRealmOk,
    NewRealm,
    NotCaptured,
    NotLeader,
    NotWitness,
    Outcome,
    Request,
    Response,
    ResultKind,
    ResultType,
    Status,
    StepDown,
    StepDownOk,
    TransferOutOk,
)
from juicebox_hsm.ids import FULL_RANGE, GroupId, HsmId, OwnedRange, RealmId, RecordId
from juicebox_hsm.wire import requests as secrets
from tests.examples import examples
from tests.fakes.hsm import World, expect, snapshot

LOWER = OwnedRange(RecordId(bytes(32)), RecordId(b"\x7f" + b"\xff" * 31))


@dataclass
class WireWorld(World):
    """A world whose every request and answer travels as bytes; keeps them."""

    traffic: list[tuple[Request, Response]] = field(default_factory=list)

    def send(self, number: int, request: Request) -> Response:
        """Send through the transport form, both ways."""
        data = encode_request(request)
        assert decode_request(data) == request
        reply = handle_bytes(self.hsms[number], data)
        response = decode_response(type(request), reply)
        self.traffic.append((request, response))
        return response


def busy_world() -> WireWorld:
    """Run something of everything over the wire."""
    world = WireWorld(3)
    group = world.new_group([0, 1, 2])
    world.move(world.first, 0, group, 0, FULL_RANGE)
    client = world.client(b"\1" * 32)
    world.open_session(group, 0, client)
    for request in (
        client.register2(),
        secrets.Recover1(),
        client.recover2(),
        client.recover3(),
        client.recover3(bytes(16)),
    ):
        world.ask(group, 0, client, request)
    other = world.new_group([0])
    world.move(group, 0, other, 0, LOWER)
    world.move(other, 0, group, 0, LOWER)
    world.ask(group, 0, client, secrets.Recover1())
    entry = world.app(group, 0, client, secrets.Recover1()).entry
    captures = world.witness(group, [0, 1])
    assert world.send(2, CaptureJump(world.realm, group, (entry,), captures)) == CaptureJumpOk()
    assert isinstance(world.send(0, CaptureJump(world.realm, group, (entry,), captures)), NotWitness)
    expect(world.send(0, StepDown(world.realm, group, force=False)), StepDownOk)
    assert isinstance(world.send(1, StepDown(world.realm, group, force=False)), NotLeader)
    world.commit(group, 0, [0, 1])
    world.lead(group, 1)
    world.send(0, CaptureNext(world.realm, group, (dataclasses.replace(entry, index=1),)))
    prepared = world.prepare(group, other, 0, LOWER)
    world.lead(group, 0)
    expect(world.send(0, world.out_request(group, other, LOWER, prepared)), TransferOutOk)
    ending = world.new_group([1, 2])
    entry, captures = world.retire(ending, 1)
    for number in (1, 2):
        world.forget(ending, number, entry, captures)
    world.new_group([0, 1])
    for number in (0, 1):
        world.status(number)
    return world


def test_everything_survives_the_wire() -> None:
    """Every kind of request and every kind of success round-trips in real use."""
    world = busy_world()
    sent = {type(request) for request, _ in world.traffic}
    missing = {form.name for kind, form in FORMS.items() if kind not in sent}
    assert missing == {"CancelPreparedTransfer"}
    answered = {type(response) for _, response in world.traffic}
    successes = {form.success for form in FORMS.values()}
    assert successes - answered <= set()
    assert all(platform.nvram for platform in world.platforms)


def test_every_documented_refusal_has_a_form() -> None:
    """Each request's refusals round-trip, and no other request's are accepted in its answer."""
    for kind, form in FORMS.items():
        for outcome in Outcome:
            if outcome in form.refusals:
                assert decode_response(kind, encode_response(kind, outcome)) is outcome
            else:
                with pytest.raises(DecodingError):
                    decode_response(kind, cbor2.dumps({"res": outcome.value, "metrics": []}))
        if form.not_leader and not form.role_in_not_leader:
            assert decode_response(kind, encode_response(kind, NotLeader())) == NotLeader()
    become = next(kind for kind, form in FORMS.items() if form.name == "BecomeLeader")
    for have in (None, 7):
        assert decode_response(become, encode_response(become, NotCaptured(have))) == NotCaptured(have)


def test_names_are_the_published_ones() -> None:
    """The wire names of the requests are those of the specification."""
    names = (
        "Status NewRealm JoinRealm NewGroup JoinGroup BecomeLeader StepDown CaptureJump CaptureNext PersistState "
        "Commit PrepareTransfer CancelPreparedTransfer TransferOut TransferStatement TransferIn CompleteTransfer "
        "HandshakeRequest AppRequest RetireGroup ForgetGroup"
    )
    assert {form.name for form in FORMS.values()} == set(names.split())
    assert encode_request(Status()) == cbor2.dumps({"req": {"Status": {}}, "metrics": "Skip"})


def test_m20_metrics_stay_empty() -> None:
    """Asking for metrics changes nothing: the list is empty."""
    world = World(1)
    for request in (Status(), NewRealm()):
        replies = [
            handle_bytes(world.hsms[0], encode_request(request, record_metrics=asked)) for asked in (False, True)
        ]
        assert replies[0] == replies[1]
        assert cbor2.loads(replies[1])["metrics"] == []
    with pytest.raises(DecodingError):
        decode_response(Status, cbor2.dumps({"res": "HaveRealm", "metrics": [["app.recover2", 5]]}))


def test_size_limit() -> None:
    """A request of 1 MiB is read, and one byte more makes it too large, however well-formed it is."""

    def sized(payload_bytes: int) -> bytes:
        ids = RealmId(bytes(16)), GroupId(bytes(16)), RecordId(bytes(32))
        return encode_request(Handshake(*ids, 1, bytes(32), bytes(payload_bytes)))

    room = 2 * REQUEST_BYTES_MAX - len(sized(REQUEST_BYTES_MAX))
    assert len(sized(room)) == REQUEST_BYTES_MAX
    decode_request(sized(room))
    with pytest.raises(DecodingError, match="at most 1048576 bytes"):
        decode_request(sized(room + 1))


def test_only_the_canonical_form_is_read() -> None:
    """The same request or answer in other bytes is refused: longer lengths, bytes behind, another order of fields."""
    request, answer = encode_request(Status()), encode_response(NewRealm, Outcome.HAVE_REALM)
    assert decode_request(request) == Status()
    assert decode_response(NewRealm, answer) is Outcome.HAVE_REALM
    for data, decode in ((request, decode_request), (answer, lambda data: decode_response(NewRealm, data))):
        document = cbor2.loads(data)
        others = [
            data + b"\0",
            b"\xb8\x02" + data[1:],
            data[:1] + b"\x78\x03" + data[2:],
            cbor2.dumps(dict(reversed(document.items()))),
        ]
        for other in others[1:]:
            assert cbor2.loads(other) == document
        for other in others:
            with pytest.raises(DecodingError):
                decode(other)


def test_answers_that_no_request_documents_are_never_sent() -> None:
    """An HSM stops rather than answer what its request does not document."""
    for kind, form in FORMS.items():
        wrong: list[Response] = [outcome for outcome in Outcome if outcome not in form.refusals]
        wrong += [] if form.not_leader else [NotLeader()]
        wrong += [CaptureJumpOk()] if form.success is not CaptureJumpOk else [JoinRealmOk(HsmId(bytes(16)))]
        for answer in wrong:
            with pytest.raises(InvariantViolation, match="documents"):
                encode_response(kind, answer)


BAD_ITEMS: list[tuple[Codec, list[object]]] = [
    (fixed(4), [bytes(3), bytes(5), "abcd", [0] * 4, None]),
    (uint(9), [10, -1, True, "1", None, 1.0]),
    (BYTES, ["x", None, [1]]),
    (BOOL, [1, 0, None, "true"]),
    (array(BOOL), [None, {}, [1], b""]),
    (row(BOOL, BOOL), [[True], [True] * 3, [True, 1], {}, None]),
    (PARTITION, [None, {}, {"range": {}, "root_hash": bytes(32)}, {"range": None}]),
    (optional(BOOL), [1, []]),
    (struct(Status, ()), [{"a": 1}, [], None]),
    (
        ROLE,
        [
            None,
            {"role": "Leader", "at": 1},
            {"role": "Witness", "at": -1},
            {"at": 1, "role": "Witness"},
            {"role": {"Witness": {}}, "at": 1},
            {"role": "Other", "at": 1},
            {"role": {"Leader": {"leader_starting": 1}}, "at": 1},
            {"role": {"SteppingDown": {"starting": 1}}, "at": 1},
        ],
    ),
    (
        RESULT,
        [
            None,
            "Other",
            "Recover2",
            "Recover3",
            {"Register1": None},
            {"Recover2": {"updated": 1}},
            {"Recover2": {"updated": {"num_guesses": 1}}},
            {"Recover2": {"updated": {"num_guesses": 65536, "guess_count": 1}}},
            {"Recover3": {"recovered": 1}},
            {"Recover3": {}},
        ],
    ),
]


@pytest.mark.parametrize(("codec", "items"), BAD_ITEMS)
def test_fields_refuse_other_types(codec: Codec, items: list[object]) -> None:
    """Each field kind refuses wrong types, lengths, ranges, names and missing data with a decoding error."""
    for item in items:
        with pytest.raises(DecodingError):
            codec.read(item)


@pytest.mark.parametrize("kind", list(ResultKind))
def test_results_round_trip(kind: ResultKind) -> None:
    """Every result type survives the wire."""
    results = [ResultType(kind)]
    if kind is ResultKind.RECOVER2:
        results.append(ResultType(kind, 300, 7))
    if kind is ResultKind.RECOVER3:
        results.append(ResultType(kind, recovered=True))
    for result in results:
        assert RESULT.read(cbor2.loads(RESULT.write(result))) == result


@pytest.mark.parametrize("role", [Leader(5), SteppingDown(2**64 - 1), Witness()])
def test_roles_round_trip(role: Role) -> None:
    """Every role status survives the wire in its published form."""
    status = RoleStatus(role, 9)
    document = cbor2.loads(ROLE.write(status))
    assert document["at"] == 9
    assert list(document) == ["role", "at"]
    assert ROLE.read(document) == status


def test_unknown_answers_are_refused() -> None:
    """Answers that do not belong to the request are decoding errors."""
    answers: tuple[object, ...] = (
        {"res": {"Ok": {}}, "metrics": []},
        {"res": {"NotWitness": {"role": "Witness", "at": 1}}, "metrics": []},
        {"res": {"NotCaptured": {"have": 1}}, "metrics": []},
        {"res": "NotLeader", "metrics": []},
        {"res": "Ok", "metrics": []},
        {"res": "Nonsense", "metrics": []},
        {"metrics": [], "res": "InvalidRealm"},
        {"res": "InvalidRealm"},
        [],
    )
    for answer in answers:
        with pytest.raises(DecodingError):
            decode_response(CaptureNext, cbor2.dumps(answer))
    with pytest.raises(DecodingError):
        decode_response(CaptureNext, cbor2.dumps({"res": "InvalidRealm", "metrics": []}) + b"\0")
    requests: tuple[object, ...] = (
        {"req": "Status", "metrics": "Skip"},
        {"req": {"Nope": {}}, "metrics": "Skip"},
        {"req": {}},
    )
    for request in requests:
        with pytest.raises(DecodingError):
            decode_request(cbor2.dumps(request))
    with pytest.raises(DecodingError):
        decode_request(cbor2.dumps({"req": {"Status": {}}, "metrics": "All"}))


CORPUS = [(encode_request(request), request) for request, _ in busy_world().traffic]


def target() -> World:
    """Return a world in the middle of everything: leading, stepping down, mid-transfer, with sessions."""
    world = World(2)
    group = world.new_group([0, 1])
    world.move(world.first, 0, group, 0, FULL_RANGE)
    client = world.client(b"\1" * 32)
    world.open_session(group, 0, client)
    world.ask(group, 0, client, client.register2())
    other = world.new_group([0])
    world.prepare(group, other, 0, LOWER)
    return world


def is_documented(request: type, response: Response) -> bool:
    """Tell whether the answer is one of those the request's table names."""
    form = FORMS[request]
    return (
        isinstance(response, form.success)
        or response in form.refusals
        or (isinstance(response, NotLeader) and form.not_leader)
        or (isinstance(response, NotWitness) and form.success is CaptureJumpOk)
        or (isinstance(response, NotCaptured) and form.name == "BecomeLeader")
    )


def feed(world: World, data: bytes) -> None:
    """Give bytes to an HSM: a documented answer, or a decoding error that changed nothing."""
    before = snapshot(world.hsms[0])
    try:
        reply = handle_bytes(world.hsms[0], data)
    except DecodingError:
        assert snapshot(world.hsms[0]) == before
    else:
        decode_response(type(decode_request(data)), reply)


@examples(40)
@given(st.binary(max_size=200))
def test_i17_random_bytes(data: bytes) -> None:
    """Random bytes never get past the decoder."""
    with pytest.raises(DecodingError):
        decode_request(data)


@examples(30)
@given(st.integers(0, 2**32))
def test_i17_mutated_bytes(seed: int) -> None:
    """Flipped, cut, duplicated and swapped bytes of real requests end in a refusal or a documented answer."""
    chooser = random.Random(seed)
    world = target()
    for _ in range(20):
        data = bytearray(chooser.choice(CORPUS)[0])
        for _ in range(chooser.choice((0, 1, 1, 2, 5))):
            at = chooser.randrange(len(data))
            match chooser.randrange(4):
                case 0:
                    data[at] ^= 1 << chooser.randrange(8)
                case 1:
                    del data[at : at + chooser.randrange(1, 40)]
                case 2:
                    data[at:at] = data[at : at + chooser.randrange(1, 40)]
                case _:
                    data[at] = chooser.choice((0, 0x5F, 0x7F, 0x9F, 0xBF, 0xF6, 0xFB, 0xFF, 0xC2))
            data = data or bytearray(1)
        feed(world, bytes(data))


STRANGE: list[object] = [
    None, True, 0, 1, -1, 2**16, 2**32, 2**64 - 1, 1.5, "", "Ok", "x" * 300, b"", bytes(15), bytes(16), bytes(32),
    bytes(33), bytes(3000), [], [0] * 16, {}, {"a": 1}, [[]], {"In": {}}, {"Ok": None},
]  # fmt: skip


def mutate_item(item: Any, chooser: random.Random) -> Any:
    """Replace one node of a decoded document by something strange."""
    if isinstance(item, dict) and item and chooser.random() < 0.9:
        key = chooser.choice(list(item))
        match chooser.randrange(12):
            case 0:
                return {name: value for name, value in item.items() if name != key}
            case 1:
                return {**item, "extra": chooser.choice(STRANGE)}
            case 2:
                return dict(reversed(item.items()))
            case _:
                return {**item, key: mutate_item(item[key], chooser)}
    if isinstance(item, list) and item and chooser.random() < 0.9:
        at = chooser.randrange(len(item))
        return [*item[:at], mutate_item(item[at], chooser), *item[at + 1 :]]
    if isinstance(item, bytes) and item and chooser.random() < 0.6:
        at = chooser.randrange(len(item))
        return item[:at] + bytes([item[at] ^ (1 << chooser.randrange(8))]) + item[at + 1 :]
    return chooser.choice(STRANGE)


@examples(30)
@given(st.integers(0, 2**32))
def test_i17_mutated_documents(seed: int) -> None:
    """Well-formed CBOR with one strange node ends in a refusal or a documented answer."""
    chooser = random.Random(seed)
    world = target()
    for _ in range(20):
        document = cbor2.loads(chooser.choice(CORPUS)[0])
        feed(world, cbor2.dumps(mutate_item(document, chooser)))


LENGTHS = [
    b"",
    b"\0",
    bytes(15),
    bytes(16),
    bytes(17),
    bytes(31),
    bytes(32),
    bytes(33),
    b"\xff" * 32,
    bytes(2048),
    bytes(2049),
]
INTEGERS = [-(2**70), -1, 0, 1, 2, 255, 256, 2**16, 2**32, 2**63, 2**64 - 1, 2**64, 2**70]


def mutate_object(value: Any, chooser: random.Random) -> Any:
    """Replace contents, never types: what an agent hands over unchecked in process."""
    if isinstance(value, bytes):
        if value and chooser.random() < 0.5:
            at = chooser.randrange(len(value))
            return value[:at] + bytes([value[at] ^ (1 << chooser.randrange(8))]) + value[at + 1 :]
        return chooser.choice(LENGTHS)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chooser.choice([*INTEGERS, value + 1, value - 1])
    if isinstance(value, tuple):
        if not value:
            return value
        if len(value) == 2 and isinstance(value[0], bytes):  # a typed pair: contents may be hostile, arity is not
            at = chooser.randrange(2)
            return (*value[:at], mutate_object(value[at], chooser), *value[at + 1 :])
        match chooser.randrange(5):
            case 0:
                return ()
            case 1:
                return value * 2 if not isinstance(value[0], bytes) else value
            case 2:
                return value[::-1] if all(type(item) is type(value[0]) for item in value) else value
            case _:
                at = chooser.randrange(len(value))
                return (*value[:at], mutate_object(value[at], chooser), *value[at + 1 :])
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and dataclasses.fields(value):
        name = chooser.choice(dataclasses.fields(value)).name
        return dataclasses.replace(value, **{name: mutate_object(getattr(value, name), chooser)})
    return value


def retarget(request: Request, world: World, chooser: random.Random) -> Request:
    """Point a recorded request at a realm and group that exist, so that it gets past the first checks."""
    group = chooser.choice(list(world.logs))
    changes: dict[str, Any] = {}
    for entry in dataclasses.fields(request):
        match entry.name:
            case "realm":
                changes["realm"] = world.realm
            case "group" | "source" | "destination":
                changes[entry.name] = group if entry.name == "group" else chooser.choice(list(world.logs))
            case "last_entry":
                changes["last_entry"] = world.logs[group][-1]
            case "entries":
                changes["entries"] = tuple(world.logs[group][-2:])
    return dataclasses.replace(request, **changes)


@examples(40)
@given(st.integers(0, 2**32))
def test_i17_hostile_contents_in_process(seed: int) -> None:
    """Requests whose fields have impossible lengths and numbers get a documented answer, never an exception."""
    chooser = random.Random(seed)
    world = target()
    for _ in range(30):
        request = chooser.choice(CORPUS)[1]
        if chooser.random() < 0.8:
            request = retarget(request, world, chooser)
        for _ in range(chooser.choice((0, 1, 1, 2))):
            request = mutate_object(request, chooser)
        response = world.hsms[0].handle(request)
        assert is_documented(type(request), response), (request, response)


def test_group_ids_of_wrong_length_never_enter_a_log() -> None:
    """After all that, every entry an HSM made encodes and decodes strictly: nothing malformed got in."""
    world = target()
    chooser = random.Random(1)
    for _ in range(300):
        request = mutate_object(retarget(chooser.choice(CORPUS)[1], world, chooser), chooser)
        response = world.hsms[0].handle(request)
        entry = getattr(response, "entry", None)
        if isinstance(entry, LogEntry):
            decode_response(type(request), encode_response(type(request), response))
            assert len(GroupId(entry.hsm)) == 16
