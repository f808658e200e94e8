"""Client traffic (hsm.md 13; M10 to M13, I3, I10, I13, I16, I18)."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import pytest

from juicebox_hsm.consensus.types import Partition, SteppingDown, Witness
from juicebox_hsm.crypto import noise, oprf
from juicebox_hsm.crypto.sealing import seal
from juicebox_hsm.hsm.messages import (
    AppRequest,
    AppRequestOk,
    Commit,
    Handshake,
    NotLeader,
    Outcome,
    Request,
    ResultKind,
    ResultType,
    StepDown,
    StepDownOk,
)
from juicebox_hsm.hsm.records import RECORD_BYTES, Registered, decode_record, encode_record
from juicebox_hsm.hsm.state import LeaderState
from juicebox_hsm.ids import FULL_RANGE, GroupId, OwnedRange, RealmId, RecordId
from juicebox_hsm.merkle.kernel import Tree, decode_delta
from juicebox_hsm.wire import requests as secrets
from juicebox_hsm.wire.client import HandshakeRequest, TransportRequest
from tests.fakes.hsm import Client, World, expect, refused, snapshot

RECORD = b"\x40" + bytes(31)
LOWER = OwnedRange(RecordId(bytes(32)), RecordId(b"\x7f" + b"\xff" * 31))
UPPER = OwnedRange(RecordId(b"\x80" + bytes(31)), RecordId(b"\xff" * 32))


def alone() -> tuple[World, GroupId, Client]:
    """Return one HSM that leads a group owning everything, and a client with an open session."""
    world = World(1)
    client = world.client(RECORD)
    world.open_session(world.first, 0, client)
    return world, world.first, client


def leader(world: World, group: GroupId, number: int = 0) -> LeaderState:
    role = world.hsms[number]._state.groups[group].role
    assert isinstance(role, LeaderState)
    return role


def with_record() -> tuple[World, GroupId, Client]:
    """Return the same with a registration."""
    world, group, client = alone()
    assert world.ask(group, 0, client, client.register2()) == secrets.Register2Ok()
    return world, group, client


def test_life_of_a_secret() -> None:
    """Register, guess, succeed, delete: the client reads what the protocol promises."""
    world, group, client = alone()
    client.session = None
    assert world.ask(group, 0, client, secrets.Register1()) == secrets.Register1Ok()
    assert world.ask(group, 0, client, client.register2()) == secrets.Register2Ok()
    assert world.ask(group, 0, client, secrets.Recover1()) == secrets.Recover1Ok(client.version)
    blinded = oprf.blind(b"\1" * 32, client.random(64))
    evaluated = world.ask(group, 0, client, secrets.Recover2(client.version, blinded.element))
    assert isinstance(evaluated, secrets.Recover2Ok)
    assert (evaluated.num_guesses, evaluated.guess_count) == (3, 1)
    assert oprf.verify_proof(
        evaluated.oprf_signed_public_key.public_key,
        blinded.element,
        evaluated.oprf_blinded_result,
        evaluated.oprf_proof.c,
        evaluated.oprf_proof.beta_z,
    )
    expected = oprf.local_evaluate(b"\1" * 32, client.oprf_key)
    assert oprf.finalize(b"\1" * 32, blinded.factor, evaluated.oprf_blinded_result) == expected
    assert world.ask(group, 0, client, client.recover3(bytes(16))) == secrets.BadUnlockKeyTag(2)
    assert isinstance(world.ask(group, 0, client, client.recover3()), secrets.Recover3Ok)
    assert world.ask(group, 0, client, secrets.Delete()) == secrets.DeleteOk()
    assert world.ask(group, 0, client, secrets.Recover1()) == secrets.NotRegistered(secrets.Phase.RECOVER1)


def test_i1_guesses_run_out() -> None:
    """After num_guesses evaluations the record is locked and its keys are gone."""
    world, group, client = with_record()
    for number in range(3):
        answer = world.ask(group, 0, client, client.recover2())
        assert isinstance(answer, secrets.Recover2Ok)
        assert answer.guess_count == number + 1
    assert world.ask(group, 0, client, client.recover2()) == secrets.NoGuesses(secrets.Phase.RECOVER2)
    assert world.ask(group, 0, client, client.recover3()) == secrets.NoGuesses(secrets.Phase.RECOVER3)


def test_checks_in_order_change_nothing() -> None:
    """Realm, group, owner, proof key, proof, size: each refusal leaves all state as it was."""
    world, group, client = with_record()
    hsm = world.hsms[0]
    good = world.app_message(group, client, client.seal(secrets.Recover1()))
    other = world.nodes.proof(world.partition(group), b"\x41" + bytes(31))

    def answer(**changes: object) -> object:
        return refused(hsm, replace(good, **changes))  # type: ignore[arg-type]  # one field each

    assert answer(realm=RealmId(b""), proof=b"") is Outcome.INVALID_REALM
    assert answer(group=GroupId(b""), proof=b"") is Outcome.INVALID_GROUP
    assert answer(record_id=RecordId(b""), proof=b"") is Outcome.NOT_OWNER
    assert answer(record_id=RecordId(RECORD + b"\0"), proof=b"") is Outcome.NOT_OWNER
    assert answer(proof=b"") is Outcome.INVALID_PROOF
    assert answer(proof=other) is Outcome.INVALID_PROOF
    assert answer(proof=good.proof[:-1]) is Outcome.INVALID_PROOF
    assert answer(proof=good.proof + b"\0") is Outcome.INVALID_PROOF
    assert answer(proof=good.proof[:98] + bytes(32) + good.proof[130:]) is Outcome.STALE_PROOF
    assert answer(proof=good.proof[:-1] + bytes([good.proof[-1] ^ 1])) is Outcome.INVALID_PROOF
    assert answer(encrypted=TransportRequest(bytes(2049))) is Outcome.SESSION_ERROR
    assert answer(encrypted=HandshakeRequest(bytes(32), bytes(2049))) is Outcome.SESSION_ERROR
    assert answer(encrypted=HandshakeRequest(bytes(31), bytes(16))) is Outcome.SESSION_ERROR
    assert answer(encrypted=HandshakeRequest(bytes(32), bytes(16))) is Outcome.SESSION_ERROR, "low order key"
    assert answer(encrypted=HandshakeRequest(b"\x09" + bytes(31), b"")) is Outcome.SESSION_ERROR
    assert answer(session_id=2) is Outcome.MISSING_SESSION
    expect(hsm.handle(good), AppRequestOk)


def test_not_leader_carries_the_role() -> None:
    """A witness says what it is; one without a partition owns nothing."""
    world = World(2)
    group = world.new_group([0, 1])
    client = world.client(RECORD)
    message = world.app_message(world.first, client, client.seal(secrets.Register1()))
    message = replace(message, group=group)
    answer = refused(world.hsms[1], message)
    assert isinstance(answer, NotLeader)
    assert answer.role is not None
    assert refused(world.hsms[0], message) is Outcome.NOT_OWNER


def test_future_index_means_another_leader_wrote() -> None:
    """A proof from beyond the own log ends the leadership, at once or after what is uncommitted."""
    world, group, client = alone()
    beyond = world.logs[group][-1].index + 1
    ahead = replace(world.app_message(group, client, client.seal(secrets.Register1())), index=beyond)
    answer = world.send(0, ahead)
    assert isinstance(answer, NotLeader)
    assert answer.role is not None
    assert isinstance(answer.role.role, Witness)
    world.lead(group, 0)
    world.app(group, 0, world.client(RECORD, "other"), secrets.Register1())
    answer = world.send(0, replace(ahead, index=beyond + 1))
    assert isinstance(answer, NotLeader)
    assert answer.role is not None
    assert isinstance(answer.role.role, SteppingDown)


def test_i10_tree_matches_log() -> None:
    """After every request the tree's root is the last entry's, whether or not a leaf was written."""
    world, group, client = alone()
    for request in (secrets.Register1(), client.register2(), secrets.Recover1(), secrets.Delete(), secrets.Delete()):
        world.open_session(group, 0, client)
        entry = world.app(group, 0, client, request).entry
        tree = leader(world, group).tree
        assert tree is not None
        assert entry.partition is not None
        assert tree.root == entry.partition.root_hash
        world.commit(group, 0)
        role = world.hsms[0]._state.groups[group].role
        assert isinstance(role, LeaderState)


def test_pipelined_requests_refresh_through_the_overlay() -> None:
    """Requests whose proofs are older than the latest root are served while they are in the window."""
    world, group, client = with_record()
    partition = world.partition(group)
    others = [world.client(bytes([number]) * 32, number) for number in range(7)]
    proofs = [world.nodes.proof(partition, other.record) for other in others]
    for other, proof in zip(others, proofs, strict=True):
        message = world.app_message(group, other, other.seal(secrets.Register1()), proof)
        answer = expect(world.send(0, message), AppRequestOk)
        world.store(group, answer.entry, answer.delta)
    stale = world.nodes.proof(partition, RECORD)
    world.commit(group, 0)
    world.open_session(group, 0, client)
    for _ in range(9):
        world.app(group, 0, client, secrets.Recover1())
        done = world.commit(group, 0)
        client.open(done.responses[-1][1])
    message = world.app_message(group, client, client.seal(secrets.Recover1()), stale)
    assert refused(world.hsms[0], message) is Outcome.STALE_PROOF, "beyond the overlay"


def test_m10_proofs_that_do_not_belong() -> None:
    """A proof of another range or tree, of an absent leaf, or with another's leaf is refused."""
    world, group, client = with_record()
    stranger = world.client(b"\x41" * 32, "stranger")
    world.ask(group, 0, stranger, secrets.Register1())
    world.ask(group, 0, stranger, stranger.register2())
    partition = world.partition(group)
    mine = world.nodes.proof(partition, RECORD)
    theirs = world.nodes.proof(partition, stranger.record)
    message = world.app_message(group, client, client.seal(secrets.Recover1()))

    def answer(proof: bytes) -> object:
        return refused(world.hsms[0], replace(message, proof=proof))

    leaf = 2 + 2 + RECORD_BYTES + 40
    assert answer(mine[:34] + LOWER.start + LOWER.end + mine[98:]) is Outcome.INVALID_PROOF
    assert answer(mine[: -leaf - 5] + b"\0") is Outcome.INVALID_PROOF, "a truncated path that claims absence"
    assert answer(mine[:-leaf] + theirs[-leaf:]) is Outcome.INVALID_PROOF, "another record's leaf"
    assert answer(theirs[:2] + RECORD + theirs[34:]) is Outcome.INVALID_PROOF, "another record's proof relabelled"
    assert answer(mine[:132]) is Outcome.INVALID_PROOF
    assert answer(mine[:130] + b"\xff\xff" + mine[132:]) is Outcome.INVALID_PROOF, "oversized path"
    empty = Tree(partition.root_hash, FULL_RANGE.start, FULL_RANGE.end, 1)
    assert empty.root == partition.root_hash
    world.open_session(group, 0, client)
    world.app(group, 0, client, secrets.Recover1())
    fresh = world.nodes.proof(world.partition(group), RECORD)
    mixed = mine[:98] + fresh[98:-leaf] + mine[-leaf:]
    assert refused(world.hsms[0], replace(message, proof=mixed)) is Outcome.INVALID_PROOF, "old leaf, new path"


def test_m11_forward_secrecy() -> None:
    """Register2, Recover2 and Recover3 are refused in a handshake and leave no session behind."""
    world, group, client = with_record()
    for request in (client.register2(), client.recover2(), client.recover3()):
        message = world.app_message(group, client, client.handshake(request))
        assert refused(world.hsms[0], message) is Outcome.SESSION_ERROR
    for fine in (secrets.Register1(), secrets.Recover1(), secrets.Delete()):
        client.session = None
        world.ask(group, 0, client, fine)


def test_m11_transport_failures_cost_the_session() -> None:
    """A replayed, altered, undecodable or invalid transport message loses the session and nothing else (I16)."""
    world, group, client = with_record()

    def ask(encrypted: TransportRequest) -> tuple[object, object]:
        before = snapshot(world.hsms[0])
        answer = world.send(0, world.app_message(group, client, encrypted))
        return answer, (before, snapshot(world.hsms[0]))

    def opened() -> Client:
        world.open_session(group, 0, client)
        return client

    def only_the_session_went(states: object) -> bool:
        assert isinstance(states, tuple)
        before, after = states
        groups = [(state[2][group][1][:5], state[2][group][1][6]) for state in (before, after)]
        sessions = [dict.fromkeys(entry[0] for entry in state[2][group][1][5]) for state in (before, after)]
        key = (client.record, client.session_id)
        return groups[0] == groups[1] and key in sessions[0] and key not in sessions[1]

    used = opened().transport(secrets.Recover1())
    expect(world.send(0, world.app_message(group, client, used)), AppRequestOk)
    answer, states = ask(used)
    assert answer is Outcome.SESSION_ERROR
    assert only_the_session_went(states)
    assert ask(used)[0] is Outcome.MISSING_SESSION
    for spoiled in (TransportRequest(b""), TransportRequest(bytes(40))):
        opened()
        answer, states = ask(spoiled)
        assert answer is Outcome.SESSION_ERROR
        assert only_the_session_went(states)
    for request in (
        secrets.Recover2(client.version, bytes(32)),
        replace(client.register2(), oprf_private_key=bytes(32)),
    ):
        answer, states = ask(opened().transport(request))
        assert answer is Outcome.DECODING_ERROR
        assert only_the_session_went(states)
    assert opened().session is not None
    raw = client.session
    assert raw is not None
    answer, states = ask(TransportRequest(raw.encrypt(b"\xff\x00")))
    assert answer is Outcome.DECODING_ERROR
    assert only_the_session_went(states)


def test_ciphertexts_of_the_full_size_are_served() -> None:
    """2048 bytes of ciphertext are served in a handshake and in a session (bytes after the request are ignored)."""
    world, group, client = alone()
    payload = secrets.encode_secrets_request(secrets.Register1()).ljust(2048 - noise.TAG_BYTES, b"\0")
    public, ciphertext = noise.Initiator(client.public, bytes(range(32))).write(payload)
    assert len(ciphertext) == 2048
    expect(world.send(0, world.app_message(group, client, HandshakeRequest(public, ciphertext))), AppRequestOk)
    world.open_session(group, 0, client)
    assert client.session is not None
    message = TransportRequest(client.session.encrypt(payload))
    assert len(message.ciphertext) == 2048
    expect(world.send(0, world.app_message(group, client, message)), AppRequestOk)


@pytest.mark.parametrize("spoiled", [{"payload_ciphertext": bytes(2049)}, {"client_ephemeral_public": bytes(33)}])
@pytest.mark.parametrize("opening", [True, False])
def test_handshakes_of_a_wrong_size_are_refused_unread(
    opening: bool, spoiled: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be a handshake costs the HSM nothing: neither kind of request lets the responder see it."""
    world, group, client = alone()
    begun = replace(client.handshake(None), **spoiled)

    def unread(*_: object) -> NoReturn:
        raise AssertionError("the responder was asked")

    monkeypatch.setattr(noise.Responder, "read", unread)
    request: Request = world.app_message(group, client, begun)
    if opening:
        public, ciphertext = begun.client_ephemeral_public, begun.payload_ciphertext
        request = Handshake(world.realm, group, client.record, 5, public, ciphertext)
    assert refused(world.hsms[0], request) is Outcome.SESSION_ERROR


def test_m11_undecodable_handshake_payload() -> None:
    """A handshake whose payload is no request is a decoding error and opens nothing."""
    world, group, client = alone()
    client.handshake(None)
    assert client._initiator is not None
    fresh = world.client(RECORD, "fresh", session_id=9)
    message = fresh.handshake(None)
    assert refused(world.hsms[0], world.app_message(group, fresh, message)) is Outcome.DECODING_ERROR


def test_i18_m11_sessions_are_per_record_and_leadership() -> None:
    """A session serves neither another record nor a later leadership."""
    world, group, client = with_record()
    stranger = world.client(b"\x41" * 32, "stranger")
    message = world.app_message(group, stranger, client.transport(secrets.Recover1()))
    assert refused(world.hsms[0], message) is Outcome.MISSING_SESSION
    expect(world.send(0, StepDown(world.realm, group, force=True)), StepDownOk)
    world.lead(group, 0)
    message = world.app_message(group, client, client.transport(secrets.Recover1()))
    assert refused(world.hsms[0], message) is Outcome.MISSING_SESSION


def test_m11_record_outside_the_range_after_a_transfer() -> None:
    """Once a range is given away its records are refused, with handshake or without."""
    world = World(1)
    client = world.client(RECORD)
    other = world.new_group([0])
    world.open_session(world.first, 0, client)
    world.move(world.first, 0, other, 0, LOWER)
    proof = world.nodes.proof(world.partition(other), RECORD)
    message = AppRequest(world.realm, world.first, client.record, 1, client.transport(secrets.Register1()), proof, 1)
    assert refused(world.hsms[0], message) is Outcome.NOT_OWNER
    begun = client.handshake(None)
    request = Handshake(
        world.realm, world.first, client.record, 1, begun.client_ephemeral_public, begun.payload_ciphertext
    )
    assert refused(world.hsms[0], request) is Outcome.NOT_OWNER


def test_handshake_checks() -> None:
    """Handshakes need realm, group, leader, owner and an empty payload; nothing is logged."""
    world, group, client = alone()
    begun = client.handshake(None)
    good = Handshake(world.realm, group, client.record, 5, begun.client_ephemeral_public, begun.payload_ciphertext)
    hsm = world.hsms[0]
    assert refused(hsm, replace(good, realm=RealmId(b""))) is Outcome.INVALID_REALM
    assert refused(hsm, replace(good, group=GroupId(b""))) is Outcome.INVALID_GROUP
    assert refused(hsm, replace(good, record_id=RecordId(b""))) is Outcome.NOT_OWNER
    assert refused(hsm, replace(good, payload_ciphertext=b"")) is Outcome.SESSION_ERROR
    assert refused(hsm, replace(good, payload_ciphertext=bytes(4000))) is Outcome.SESSION_ERROR
    assert refused(hsm, replace(good, client_ephemeral_public=b"")) is Outcome.SESSION_ERROR
    assert refused(hsm, replace(good, client_ephemeral_public=bytes(32))) is Outcome.SESSION_ERROR
    full = client.handshake(secrets.Register1())
    loaded = replace(
        good, client_ephemeral_public=full.client_ephemeral_public, payload_ciphertext=full.payload_ciphertext
    )
    assert refused(hsm, loaded) is Outcome.SESSION_ERROR, "a payload"
    other = World(2)
    shared = other.new_group([0, 1])
    assert refused(other.hsms[1], replace(good, realm=other.realm, group=shared)) == NotLeader()


def test_i3_m12_discarded_results_reveal_nothing() -> None:
    """An entry that is never committed spends nothing and releases nothing; its retry spends one guess."""
    world, group, client = with_record()
    stored = list(world.logs[group])
    for _ in range(5):
        client.session = None
        world.logs[group] = list(stored)
        expect(world.send(0, StepDown(world.realm, group, force=True)), StepDownOk)
        world.lead(group, 0)
        world.commit(group, 0)
        world.open_session(group, 0, client)
        answer = expect(world.send(0, world.app_message(group, client, client.seal(client.recover2()))), AppRequestOk)
        assert vars_of(answer) == {"entry", "delta"}
    world.logs[group] = list(stored)
    expect(world.send(0, StepDown(world.realm, group, force=True)), StepDownOk)
    world.lead(group, 0)
    world.commit(group, 0)
    client.session = None
    world.open_session(group, 0, client)
    final = world.ask(group, 0, client, client.recover2())
    assert isinstance(final, secrets.Recover2Ok)
    assert final.guess_count == 1


def vars_of(answer: AppRequestOk) -> set[str]:
    return set(type(answer).__slots__)


def test_i13_effects_are_uniform() -> None:
    """For a registered record, delta shape, leaf and entry size tell nothing about right or wrong or counts."""
    shapes = set()
    for request_of in (
        lambda client: secrets.Recover1(),
        lambda client: client.recover2(),
        lambda client: client.recover2(bytes(16)),
        lambda client: client.recover3(),
        lambda client: client.recover3(bytes(16)),
    ):
        for spent in (0, 1, 3):
            world, group, client = with_record()
            stranger = world.client(b"\x41" * 32, "stranger")
            world.ask(group, 0, stranger, secrets.Register1())
            world.ask(group, 0, stranger, stranger.register2())
            for _ in range(spent):
                world.ask(group, 0, client, client.recover2())
            before = world.partition(group)
            answer = world.app(group, 0, client, request_of(client))
            delta = decode_delta(answer.delta)
            assert answer.entry.partition is not None
            assert answer.entry.partition.root_hash != before.root_hash
            shapes.add((tuple(len(add.node) for add in delta.adds), len(delta.removes), len(answer.delta)))
    assert len(shapes) == 1


def test_i13_replies_are_uniform() -> None:
    """All replies to requests against a record have one padded plaintext size up to the length's own encoding."""
    world, group, client = with_record()
    sizes = set()
    for request in (secrets.Recover1(), client.recover2(), client.recover3(bytes(16)), client.recover3()):
        world.app(group, 0, client, request)
        ((_, noise, _),) = world.commit(group, 0).responses
        sizes.add(len(client.read(noise)))
    assert sizes <= {470, 471, 472}


def test_results_are_withheld_until_commit() -> None:
    """Telemetry about a guess is only in the Commit answer."""
    world, group, client = with_record()
    entry = world.app(group, 0, client, client.recover2()).entry
    done = world.commit(group, 0)
    assert done.responses[0][0] == entry.entry_mac
    assert done.responses[0][2] == ResultType(ResultKind.RECOVER2, 3, 1)
    client.open(done.responses[0][1])
    world.app(group, 0, client, client.recover3())
    assert world.commit(group, 0).responses[0][2] == ResultType(ResultKind.RECOVER3, recovered=True)


def replace_leaf(world: World, group: GroupId, client: Client, leaf: bytes) -> AppRequest:
    """Put an arbitrary leaf into the leader's tree, as if an HSM had written it, and ask for it."""
    role = leader(world, group)
    tree = role.tree
    assert tree is not None
    root, delta = tree.insert(tree.latest(world.nodes.proof(world.partition(group), client.record)), leaf)
    world.nodes.put(delta)
    partition = Partition(FULL_RANGE, root)
    proof = world.nodes.proof(partition, client.record)
    return world.app_message(group, client, client.seal(secrets.Recover1()), proof)


@pytest.mark.parametrize("case", ["short", "tag", "truncated", "other key", "trailer", "garbage", "empty"])
def test_m13_bad_leaves(case: str) -> None:
    """A leaf that does not open or parse is InvalidRecordData, never an exception."""
    world, group, client = with_record()
    keys = world.platforms[0].keys
    record = encode_record(Registered(client.register2(), 0))
    good = seal(keys.record_key.expose(), bytes(24), record)
    leaf = {
        "short": bytes(24),
        "empty": b"",
        "tag": good[:-25] + bytes([good[-25] ^ 1]) + good[-24:],
        "truncated": good[:-1],
        "other key": seal(bytes(32), bytes(24), record),
        "trailer": seal(keys.record_key.expose(), bytes(24), record[:-4] + b"\xff" * 4),
        "garbage": seal(keys.record_key.expose(), bytes(24), b"\xff" * 750),
    }[case]
    message = replace_leaf(world, group, client, leaf)
    assert refused(world.hsms[0], message) is Outcome.INVALID_RECORD_DATA


def test_leaf_nonces_are_fresh() -> None:
    """Rewriting an unchanged record gives another leaf that holds the same record."""
    world, group, client = with_record()
    leaves = []
    for _ in range(2):
        world.app(group, 0, client, secrets.Recover1())
        tree = leader(world, group).tree
        assert tree is not None
        leaf = tree.latest(world.nodes.proof(world.partition(group), RECORD)).leaf
        assert leaf is not None
        assert len(leaf) == RECORD_BYTES + 40
        leaves.append(leaf)
        done = world.commit(group, 0)
        client.open(done.responses[-1][1])
    assert leaves[0] != leaves[1]
    assert decode_record(encode_record(Registered(client.register2(), 0))) == Registered(client.register2(), 0)


def test_commit_needs_no_tree_change() -> None:
    """A request that writes no leaf still makes an entry, with an empty delta, to carry its reply."""
    world, group, client = alone()
    before = world.logs[group][-1]
    answer = world.app(group, 0, client, secrets.Recover1())
    assert answer.delta == b"\x01\x50" + bytes(8)
    assert answer.entry.partition == before.partition
    assert answer.entry.index == before.index + 1
    assert refused(world.hsms[0], Commit(world.realm, group, ())) is Outcome.NO_QUORUM
