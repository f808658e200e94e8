"""HSM cores in one process with a host around them: platforms, a store of nodes and logs, and a client.

The host here is honest unless a test says otherwise: it stores every node for ever, so that old proofs stay readable.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from juicebox_hsm.consensus.types import Captured, LogEntry, Partition
from juicebox_hsm.crypto import noise, oprf
from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.hsm.keys import RealmKeys
from juicebox_hsm.hsm.messages import (
    AppRequest,
    AppRequestOk,
    BecomeLeader,
    CaptureNext,
    Commit,
    CommitOk,
    CompleteTransfer,
    ForgetGroup,
    ForgetGroupOk,
    Handshake,
    HandshakeOk,
    JoinGroup,
    JoinRealm,
    JoinRealmOk,
    NewGroup,
    NewGroupOk,
    NewRealm,
    NewRealmOk,
    PersistState,
    PersistStateOk,
    PrepareTransfer,
    PrepareTransferOk,
    Request,
    Response,
    RetireGroup,
    RetireGroupOk,
    RoleOk,
    Status,
    StatusOk,
    TransferEntryOk,
    TransferIn,
    TransferInOk,
    TransferOut,
    TransferOutOk,
    TransferStatement,
    TransferStatementOk,
)
from juicebox_hsm.hsm.state import LeaderState, Log, SteppingDownState
from juicebox_hsm.ids import GroupId, HsmId, OwnedRange, RealmId, RecordId
from juicebox_hsm.merkle.kernel import EdgeWalk, PathWalk, Side, delta_rows, finish_walk
from juicebox_hsm.wire import requests as secrets
from juicebox_hsm.wire.client import HandshakeRequest, HandshakeResponse, NoiseRequest, NoiseResponse, TransportRequest

T = TypeVar("T")


def expect(response: Response, kind: type[T]) -> T:
    """Return the response if it is of this kind; fails the test otherwise."""
    assert isinstance(response, kind), response
    return response


def realm_keys(seed: int = 0) -> RealmKeys:
    """Return the keys of a test realm."""
    return RealmKeys.generate(random.Random(f"keys{seed}").randbytes)


class NvramBroken(Exception):
    """The injected write failure."""


class MemoryPlatform:
    """A platform with deterministic entropy and NVRAM in memory; `on_write` may raise to inject failures."""

    def __init__(self, keys: RealmKeys, seed: object = 0, *, clock_start: int = 1) -> None:
        self.keys = keys
        self.clock_start = clock_start
        self.nvram = b""
        self.history: list[bytes] = []
        self.on_write: Callable[[bytes], None] | None = None
        self._random = random.Random(f"platform{seed}")

    def random(self, size: int) -> bytes:
        return self._random.randbytes(size)

    def nvram_read(self) -> bytes:
        return self.nvram

    def nvram_write(self, content: bytes) -> None:
        if self.on_write is not None:
            self.on_write(content)
        self.nvram = content
        self.history.append(content)

    def fail(self) -> None:
        """Fail every further write before it takes effect."""

        def broken(_: bytes) -> None:
            raise NvramBroken("disk full")

        self.on_write = broken

    def restart(self) -> Hsm:
        """Start a new life of the HSM from NVRAM."""
        self.clock_start += 1000
        return Hsm(self, max_sessions=4, tree_overlay_size=8)


class Nodes:
    """Every tree node ever written, by row key. Never deletes, so that proofs of any age can be read."""

    def __init__(self) -> None:
        self.rows: dict[bytes, bytes] = {}

    def put(self, delta: bytes) -> None:
        self.rows.update(delta_rows(delta).adds)

    def proof(self, partition: Partition, record: bytes) -> bytes:
        return finish_walk(PathWalk(record, partition.range, partition.root_hash), self.rows.get)

    def edge(self, partition: Partition, side: Side) -> bytes:
        return finish_walk(EdgeWalk(side, partition.range, partition.root_hash), self.rows.get)


class Client:
    """One user with one PIN; speaks Noise, keeps one session at a time."""

    def __init__(self, public: bytes, record: bytes, seed: object = 0, session_id: int = 1) -> None:
        self.public = public
        self.record = RecordId(record)
        self.session_id = session_id
        self.session: noise.Session | None = None
        self.random = random.Random(f"client{seed}").randbytes
        self._initiator: noise.Initiator | None = None
        self.oprf_key = oprf.scalar_from_entropy(self.random(64))
        self.version = self.random(16)
        self.tag = self.random(16)

    def handshake(self, request: secrets.SecretsRequest | None) -> HandshakeRequest:
        """Begin a session, with or without a first request."""
        self._initiator = noise.Initiator(self.public, self.random(32))
        payload = b"" if request is None else secrets.encode_secrets_request(request)
        return HandshakeRequest(*self._initiator.write(payload))

    def transport(self, request: secrets.SecretsRequest) -> TransportRequest:
        """Encrypt a request in the open session."""
        assert self.session is not None
        return TransportRequest(self.session.encrypt(secrets.encode_secrets_request(request)))

    def seal(self, request: secrets.SecretsRequest) -> NoiseRequest:
        """Use the open session if there is one, else a handshake."""
        return self.handshake(request) if self.session is None else self.transport(request)

    def open(self, answer: NoiseResponse) -> secrets.SecretsResponse:
        """Decrypt an answer to `seal`."""
        payload = self.read(answer)
        assert len(payload) in range(470, 473), "every reply has the padded length"
        return secrets.decode_secrets_response(secrets.unpad_secrets_response(payload))

    def read(self, answer: NoiseResponse) -> bytes:
        """Decrypt an answer and return its payload."""
        if isinstance(answer, HandshakeResponse):
            assert self._initiator is not None
            payload, self.session = self._initiator.read(answer.server_ephemeral_public, answer.payload_ciphertext)
            return payload
        assert self.session is not None
        return self.session.decrypt(answer.ciphertext)

    def register2(self, num_guesses: int = 3) -> secrets.Register2:
        return secrets.Register2(
            self.version,
            self.oprf_key,
            secrets.SignedPublicKey(oprf.multiply_base(self.oprf_key), b"\x01" * 32, b"\x02" * 64),
            b"\x03" * 32,
            self.tag,
            b"\x04" * 31 + b"\0",
            b"\x05" * 145,
            b"\x06" * 16,
            num_guesses,
        )

    def recover2(self, version: bytes | None = None) -> secrets.Recover2:
        element = oprf.blind(self.random(32), self.random(64)).element
        return secrets.Recover2(self.version if version is None else version, element)

    def recover3(self, tag: bytes | None = None, version: bytes | None = None) -> secrets.Recover3:
        return secrets.Recover3(self.version if version is None else version, self.tag if tag is None else tag)


@dataclass
class World:
    """A realm of `size` HSMs and its honest host."""

    size: int
    seed: object = 0
    hsms: list[Hsm] = field(default_factory=list)
    platforms: list[MemoryPlatform] = field(default_factory=list)
    nodes: Nodes = field(default_factory=Nodes)
    logs: dict[GroupId, list[LogEntry]] = field(default_factory=dict)
    members: dict[GroupId, list[int]] = field(default_factory=dict)
    platform: type[MemoryPlatform] = MemoryPlatform
    realm: RealmId = field(init=False)
    first: GroupId = field(init=False)

    def __post_init__(self) -> None:
        keys = realm_keys()
        self.platforms = [self.platform(keys, (self.seed, number)) for number in range(self.size)]
        self.hsms = [Hsm(platform, max_sessions=4, tree_overlay_size=8) for platform in self.platforms]
        created = expect(self.send(0, NewRealm()), NewRealmOk)
        self.realm, self.first = created.realm, created.group
        self.logs[self.first] = []
        self.members[self.first] = [0]
        self.store(self.first, created.entry, created.delta)
        status = self.status(0)
        assert status.realm is not None
        for number in range(1, self.size):
            expect(self.send(number, JoinRealm(self.realm, status.id, status.realm.statement)), JoinRealmOk)
        self.commit(self.first, 0)

    # requests -----------------------------------------------------------------------------------------------

    def send(self, number: int, request: Request) -> Response:
        return self.hsms[number].handle(request)

    def status(self, number: int) -> StatusOk:
        return expect(self.send(number, Status()), StatusOk)

    def id(self, number: int) -> HsmId:
        return self.hsms[number]._state.persistent.id

    def statement(self, number: int) -> bytes:
        realm = self.status(number).realm
        assert realm is not None
        return realm.statement

    def generation(self, number: int) -> int:
        realm = self.hsms[number]._state.persistent.realm
        assert realm is not None
        return realm.generation

    def crash(self, number: int) -> None:
        """Lose the volatile state of an HSM and start it again."""
        self.hsms[number] = self.platforms[number].restart()

    def new_group(self, members: list[int], leader: int | None = None, *, commit: bool = True) -> GroupId:
        """Create a group of these HSMs and let all of them follow it."""
        leader = members[0] if leader is None else leader
        ordered = sorted(members, key=self.id)
        signed = tuple((self.id(number), self.statement(number)) for number in ordered)
        generations = tuple(self.generation(number) for number in ordered)
        generations = generations if any(generations) else ()
        created = expect(self.send(leader, NewGroup(self.realm, signed, generations)), NewGroupOk)
        configuration = tuple(self.id(number) for number in ordered)
        for number in members:
            if number != leader:
                request = JoinGroup(self.realm, created.group, configuration, created.statement, generations)
                expect(self.send(number, request), RoleOk)
        self.logs[created.group] = []
        self.members[created.group] = ordered
        self.store(created.group, created.entry)
        if commit:
            self.commit(created.group, leader)
        return created.group

    # the host's duties --------------------------------------------------------------------------------------

    def store(self, group: GroupId, entry: LogEntry | None, delta: bytes | None = None) -> None:
        """Store nodes first, then the entry."""
        if delta is not None:
            self.nodes.put(delta)
        if entry is not None:
            self.logs[group].append(entry)

    def captured(self, number: int, group: GroupId) -> int:
        return self.hsms[number]._state.captured.get(group, (0, b""))[0]

    def capture(self, number: int, group: GroupId) -> None:
        """Let an HSM capture all stored entries it lacks."""
        missing = tuple(entry for entry in self.logs[group] if entry.index > self.captured(number, group))
        if missing:
            expect(self.send(number, CaptureNext(self.realm, group, missing)), RoleOk)

    def persist(self, number: int, group: GroupId) -> tuple[Captured, ...]:
        """Persist and return the HSM's capture of this group."""
        answer = expect(self.send(number, PersistState()), PersistStateOk)
        return tuple(captured for captured in answer.captured if captured.group == group)

    def witness(self, group: GroupId, voters: list[int] | None = None) -> tuple[Captured, ...]:
        """Let the voters (all members by default) capture and persist, and return their captures."""
        captures: tuple[Captured, ...] = ()
        for number in self.members[group] if voters is None else voters:
            self.capture(number, group)
            captures += self.persist(number, group)
        return captures

    def commit(self, group: GroupId, leader: int, voters: list[int] | None = None) -> CommitOk:
        """Let the voters capture everything stored, then commit at the leader."""
        return expect(self.send(leader, Commit(self.realm, group, self.witness(group, voters))), CommitOk)

    def lead(self, group: GroupId, number: int) -> None:
        """Let an HSM follow the whole log and lead the group."""
        self.capture(number, group)
        expect(self.send(number, BecomeLeader(self.realm, group, self.logs[group][-1])), RoleOk)

    # the end of a group --------------------------------------------------------------------------------------

    def retire(self, group: GroupId, leader: int) -> tuple[LogEntry, tuple[Captured, ...]]:
        """End a group that owns nothing; return its retired entry and the captures of all members."""
        ended = expect(self.send(leader, RetireGroup(self.realm, group)), RetireGroupOk)
        self.store(group, ended.entry)
        captures = self.witness(group)
        expect(self.send(leader, Commit(self.realm, group, captures)), CommitOk)
        return self.logs[group][-1], captures

    def forget(self, group: GroupId, number: int, entry: LogEntry, captures: tuple[Captured, ...]) -> int:
        return expect(self.send(number, ForgetGroup(self.realm, group, entry, captures)), ForgetGroupOk).generation

    # clients ------------------------------------------------------------------------------------------------

    def client(self, record: bytes, seed: object = 0, session_id: int = 1) -> Client:
        return Client(self.platforms[0].keys.communication_public, record, seed, session_id)

    def partition(self, group: GroupId) -> Partition:
        partition = self.logs[group][-1].partition
        assert partition is not None
        return partition

    def app_message(
        self, group: GroupId, client: Client, encrypted: NoiseRequest, proof: bytes | None = None
    ) -> AppRequest:
        """Return the request an honest agent makes from the tail of the log."""
        if proof is None:
            proof = self.nodes.proof(self.partition(group), client.record)
        index = self.logs[group][-1].index
        return AppRequest(self.realm, group, client.record, client.session_id, encrypted, proof, index)

    def app(self, group: GroupId, leader: int, client: Client, request: secrets.SecretsRequest) -> AppRequestOk:
        """Run a request and store what comes out, without committing."""
        answer = expect(self.send(leader, self.app_message(group, client, client.seal(request))), AppRequestOk)
        self.store(group, answer.entry, answer.delta)
        return answer

    def ask(
        self, group: GroupId, leader: int, client: Client, request: secrets.SecretsRequest
    ) -> secrets.SecretsResponse:
        """Run a request, commit it and return the decrypted answer."""
        entry = self.app(group, leader, client, request).entry
        committed = self.commit(group, leader)
        (reply,) = [noise for mac, noise, _ in committed.responses if mac == entry.entry_mac]
        return client.open(reply)

    def open_session(self, group: GroupId, leader: int, client: Client) -> None:
        """Open a session without a request."""
        message = client.handshake(None)
        request = Handshake(
            self.realm,
            group,
            client.record,
            client.session_id,
            message.client_ephemeral_public,
            message.payload_ciphertext,
        )
        assert client.read(expect(self.send(leader, request), HandshakeOk).noise) == b""

    # transfers ----------------------------------------------------------------------------------------------

    def prepare(self, source: GroupId, destination: GroupId, leader: int, owned: OwnedRange) -> PrepareTransferOk:
        request = PrepareTransfer(self.realm, source, destination, owned)
        prepared = expect(self.send(leader, request), PrepareTransferOk)
        self.store(destination, prepared.entry)
        return prepared

    def out_request(
        self, source: GroupId, destination: GroupId, owned: OwnedRange, prepared: PrepareTransferOk
    ) -> TransferOut:
        partition = self.logs[source][-1].partition
        middle = None if partition is None else partition.range.split_at(owned)
        proof = None if partition is None or middle is None else self.nodes.proof(partition, middle)
        return TransferOut(self.realm, source, destination, owned, prepared.nonce, prepared.statement, proof)

    def in_request(
        self, source: GroupId, destination: GroupId, moved: Partition, nonce: bytes, signed: TransferStatementOk
    ) -> TransferIn:
        partition = self.logs[destination][-1].partition
        proofs = None
        if partition is not None:
            lower_is_own = partition.range.end < moved.range.start
            sides = (Side.RIGHT, Side.LEFT) if lower_is_own else (Side.LEFT, Side.RIGHT)
            proofs = (self.nodes.edge(partition, sides[0]), self.nodes.edge(moved, sides[1]))
        return TransferIn(self.realm, source, destination, moved, signed.at, proofs, nonce, signed.statement)

    def move(self, source: GroupId, s: int, destination: GroupId, d: int, owned: OwnedRange) -> None:
        """Run a whole transfer as an honest manager does."""
        prepared = self.prepare(source, destination, d, owned)
        self.commit(destination, d)
        out = expect(self.send(s, self.out_request(source, destination, owned, prepared)), TransferOutOk)
        self.store(source, out.entry, out.delta)
        self.commit(source, s)
        signed = self.sign(source, s, destination, prepared.nonce)
        request = self.in_request(source, destination, out.partition, prepared.nonce, signed)
        arrived = expect(self.send(d, request), TransferInOk)
        self.store(destination, arrived.entry, arrived.delta)
        self.commit(destination, d)
        done = expect(self.send(s, CompleteTransfer(self.realm, source, destination, owned)), TransferEntryOk)
        self.store(source, done.entry)
        self.commit(source, s)

    def sign(self, source: GroupId, leader: int, destination: GroupId, nonce: bytes) -> TransferStatementOk:
        request = TransferStatement(self.realm, source, destination, nonce)
        return expect(self.send(leader, request), TransferStatementOk)


# State as plain values --------------------------------------------------------------------------------------------


def _log(log: Log) -> object:
    return [(e.entry, e.reply, e.result) for e in (log._elements[index] for index in sorted(log._elements))]


def _role(group: object) -> object:
    role = group.role  # type: ignore[attr-defined]  # a GroupState
    if isinstance(role, LeaderState):
        sessions = [
            (key, s._decrypt_key, s._decrypt_counter, s._encrypt_counter) for key, s in role.sessions._sessions.items()
        ]
        tree = None if role.tree is None else (role.tree.root, sorted(role.tree.valid_roots()))
        return ("leader", _log(role.log), role.committed, role.incoming, tree, sessions, role.starting)
    if isinstance(role, SteppingDownState):
        return ("down", _log(role.log), role.committed, list(role.abandoned), role.stepdown_at, role.leader_starting)
    return "witness"


def snapshot(hsm: Hsm) -> object:
    """Return everything an HSM knows as plain comparable values (I16)."""
    state = hsm._state
    groups = {group: (kept.clock, _role(kept)) for group, kept in state.groups.items()}
    return (state.persistent, dict(state.captured), groups, state._written_digest, hsm._poisoned)


def refused(hsm: Hsm, request: Request) -> Response:
    """Return the answer to a request that must change nothing whatever (I16)."""
    before = snapshot(hsm)
    answer = hsm.handle(request)
    assert snapshot(hsm) == before, f"{answer} changed the state"
    return answer
