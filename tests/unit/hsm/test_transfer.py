"""Ownership transfer and the attack that H2 closes (hsm.md 12; M14 to M18, I4, I14)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from juicebox_hsm.consensus.types import Partition, TransferringIn, TransferringOut
from juicebox_hsm.hsm import transfer
from juicebox_hsm.hsm.messages import (
    CancelPreparedTransfer,
    CompleteTransfer,
    NotLeader,
    Outcome,
    PrepareTransfer,
    PrepareTransferOk,
    StepDown,
    StepDownOk,
    TransferEntryOk,
    TransferIn,
    TransferInOk,
    TransferOut,
    TransferOutOk,
    TransferStatement,
    TransferStatementOk,
)
from juicebox_hsm.hsm.state import LeaderState
from juicebox_hsm.ids import FULL_RANGE, GroupId, OwnedRange, RealmId, RecordId
from juicebox_hsm.merkle.kernel import EMPTY_DELTA, Side
from juicebox_hsm.wire import requests as secrets
from tests.fakes.hsm import World, expect, refused

LOWER = OwnedRange(RecordId(bytes(32)), RecordId(b"\x7f" + b"\xff" * 31))
UPPER = OwnedRange(RecordId(b"\x80" + bytes(31)), RecordId(b"\xff" * 32))
MIDDLE = OwnedRange(RecordId(b"\x40" + bytes(31)), RecordId(b"\x7f" + b"\xff" * 31))
FIRST = OwnedRange(RecordId(bytes(32)), RecordId(b"\x3f" + b"\xff" * 31))
INVERTED = OwnedRange(UPPER.start, LOWER.end)
RECORDS = [bytes([number]) + bytes(31) for number in (0x20, 0x60, 0xA0, 0xE0)]


def registered(groups: int = 2) -> tuple[World, list[GroupId]]:
    """Return one HSM leading `groups` groups; the first owns everything and holds four registrations."""
    world = World(1)
    for record in RECORDS:
        client = world.client(record, record)
        world.open_session(world.first, 0, client)
        world.ask(world.first, 0, client, client.register2())
    return world, [world.first, *(world.new_group([0]) for _ in range(groups - 1))]


def versions(world: World, group: GroupId) -> list[bool]:
    """Tell for each record whether the group serves it with its registration."""
    served = []
    for record in RECORDS:
        client = world.client(record, record)
        partition = world.logs[group][-1].partition
        if partition is None or not partition.range.contains(record):
            served.append(False)
            continue
        served.append(isinstance(world.ask(group, 0, client, secrets.Recover1()), secrets.Recover1Ok))
    return served


def test_i4_i5_split_and_merge_round_trip() -> None:
    """A half moves out and back: records follow, the root is restored, and each record has one owner (I4)."""
    world, (s, d) = registered()
    before = world.partition(s)
    world.move(s, 0, d, 0, UPPER)
    assert world.partition(d).range == UPPER
    assert (versions(world, s), versions(world, d)) == ([True, True, False, False], [False, False, True, True])
    world, (s, d) = registered()
    world.move(s, 0, d, 0, LOWER)
    world.move(d, 0, s, 0, LOWER)
    assert world.partition(s).range == FULL_RANGE
    assert world.partition(s).root_hash == before.root_hash
    assert world.logs[d][-1].partition is None
    assert versions(world, s) == [True] * 4


def test_everything_moves_and_grows_by_pieces() -> None:
    """A whole range moves without proof; a destination that owns something grows at either end."""
    world, (s, d) = registered()
    world.move(s, 0, d, 0, FULL_RANGE)
    assert world.logs[s][-1].partition is None
    world.move(d, 0, s, 0, LOWER)
    world.move(d, 0, s, 0, OwnedRange(UPPER.start, RecordId(b"\xbf" + b"\xff" * 31)))
    assert versions(world, s) == [True, True, True, False]
    assert versions(world, d) == [False, False, False, True]


@dataclass
class Prepared:
    """A transfer of LOWER from s to d, prepared and committed."""

    world: World
    s: GroupId
    d: GroupId
    ok: PrepareTransferOk

    @property
    def out(self) -> TransferOut:
        return self.world.out_request(self.s, self.d, LOWER, self.ok)


def prepared() -> Prepared:
    world, (s, d, _) = registered(3)
    ok = world.prepare(s, d, 0, LOWER)
    world.commit(d, 0)
    return Prepared(world, s, d, ok)


def test_m14_prepare_checks_in_order() -> None:
    """Same group, range, leadership, fit, pending: each is refused and changes nothing."""
    world, (s, d, x) = registered(3)
    hsm = world.hsms[0]
    good = PrepareTransfer(world.realm, s, d, LOWER)

    def answer(**changes: object) -> object:
        return refused(hsm, replace(good, **changes))  # type: ignore[arg-type]  # one field each

    assert answer(source=d, range=INVERTED, realm=RealmId(b"")) is Outcome.INVALID_GROUP
    assert answer(source=GroupId(b"short")) is Outcome.INVALID_GROUP
    assert answer(range=INVERTED, realm=RealmId(b"")) is Outcome.UNACCEPTABLE_RANGE
    assert answer(range=OwnedRange(RecordId(b""), RecordId(b""))) is Outcome.UNACCEPTABLE_RANGE
    assert answer(realm=RealmId(b"")) is Outcome.INVALID_REALM
    assert answer(destination=GroupId(b"")) is Outcome.INVALID_GROUP
    world.move(s, 0, d, 0, UPPER)
    assert answer(range=FIRST) is Outcome.UNACCEPTABLE_RANGE, "not adjacent"
    assert answer(range=FULL_RANGE) is Outcome.UNACCEPTABLE_RANGE, "overlapping"
    assert answer(range=UPPER) is Outcome.UNACCEPTABLE_RANGE, "owned already"
    ok = world.prepare(s, d, 0, LOWER)
    assert answer(range=MIDDLE) is Outcome.OTHER_TRANSFER_PENDING
    assert answer(source=x) is Outcome.OTHER_TRANSFER_PENDING
    out = world.send(0, world.out_request(s, d, LOWER, ok))
    expect(out, TransferOutOk)
    assert answer(source=d, destination=s) is Outcome.OTHER_TRANSFER_PENDING
    expect(world.send(0, StepDown(world.realm, d, force=True)), StepDownOk)
    assert answer() == NotLeader()


def test_prepare_again_draws_a_fresh_nonce() -> None:
    """Repeating a preparation makes no entry, names the old index, and replaces the nonce."""
    p = prepared()
    again = p.world.prepare(p.s, p.d, 0, LOWER)
    assert again.entry is None
    assert again.wait_til_committed == p.ok.wait_til_committed
    assert again.nonce != p.ok.nonce
    assert again.statement != p.ok.statement
    marker = p.world.logs[p.d][-1].transferring
    assert marker == TransferringIn(p.s, LOWER, p.world.logs[p.d][-1].index)


def test_sixteen_sources_at_most() -> None:
    """A 17th distinct source is refused, a known one is not; nothing is ever evicted (H2)."""
    world = World(1)
    other = world.new_group([0])
    state = world.hsms[0]._state
    role = state.groups[other].role
    known = tuple((GroupId(bytes([number]) * 16), 1) for number in range(1, 17))
    tail = replace(world.logs[other][-1], consumed=known)
    role.log.last = tail  # type: ignore[union-attr]  # a leader
    request = PrepareTransfer(world.realm, world.first, other, LOWER)
    assert refused(world.hsms[0], request) is Outcome.UNACCEPTABLE_RANGE
    expect(world.send(0, replace(request, source=known[3][0])), PrepareTransferOk)


def test_m15_transfer_out_checks_in_order() -> None:
    """Each wrong transfer out is refused, the tree stays, and the leader keeps serving."""
    p = prepared()
    world, hsm, good = p.world, p.world.hsms[0], p.out
    macs = hsm._state.macs
    assert good.proof is not None

    def answer(**changes: object) -> object:
        return refused(hsm, replace(good, **changes))  # type: ignore[arg-type]  # one field each

    def signed(owned: OwnedRange) -> dict[str, object]:
        statement = macs.prepared_transfer(world.realm, p.s, p.d, owned, p.ok.nonce)
        return {"range": owned, "statement": statement}

    assert answer(source=p.d, range=INVERTED) is Outcome.INVALID_GROUP
    assert answer(range=INVERTED, realm=RealmId(b"")) is Outcome.NOT_OWNER
    assert answer(realm=RealmId(b"")) is Outcome.INVALID_REALM
    assert answer(source=GroupId(b"")) is Outcome.INVALID_GROUP
    assert answer(statement=bytes(32)) is Outcome.INVALID_STATEMENT
    assert answer(statement=b"") is Outcome.INVALID_STATEMENT
    assert answer(range=FIRST) is Outcome.INVALID_STATEMENT, "prepared for another range"
    assert answer(destination=GroupId(bytes(16))) is Outcome.INVALID_STATEMENT, "prepared by another destination"
    assert answer(nonce=bytes(16)) is Outcome.INVALID_STATEMENT
    assert answer(nonce=b"") is Outcome.INVALID_STATEMENT
    assert answer(source=p.d, destination=p.s) is Outcome.INVALID_STATEMENT
    assert answer(proof=None) is Outcome.MISSING_PROOF
    assert answer(**signed(MIDDLE)) is Outcome.NOT_OWNER, "the middle of the range"
    assert answer(proof=good.proof[:2] + LOWER.end + good.proof[34:]) is Outcome.MISSING_PROOF, "wrong split key"
    assert answer(proof=b"") is Outcome.MISSING_PROOF
    assert answer(proof=good.proof[:-1]) is Outcome.INVALID_PROOF
    assert answer(proof=good.proof[:98] + bytes(32) + good.proof[130:]) is Outcome.STALE_PROOF
    assert versions(world, p.s) == [True] * 4
    other_way = macs.prepared_transfer(world.realm, p.d, p.s, LOWER, p.ok.nonce)
    pending_in = replace(good, source=p.d, destination=p.s, statement=other_way)
    assert refused(hsm, pending_in) is Outcome.OTHER_TRANSFER_PENDING, "a destination that prepared gives nothing away"


def test_m15_only_what_is_owned_moves() -> None:
    """More than the owned range, or from a group without one, is refused."""
    p = prepared()
    world = p.world
    proof = p.out.proof
    first = expect(world.send(0, p.out), TransferOutOk)
    world.store(p.s, first.entry, first.delta)
    _, _, x = world.members
    world.commit(p.s, 0)
    done = expect(world.send(0, CompleteTransfer(world.realm, p.s, p.d, LOWER)), TransferEntryOk)
    world.store(p.s, done.entry)
    macs = world.hsms[0]._state.macs
    for owned in (FULL_RANGE, LOWER):
        statement = macs.prepared_transfer(world.realm, p.s, x, owned, bytes(16))
        request = TransferOut(world.realm, p.s, x, owned, bytes(16), statement, proof)
        assert refused(world.hsms[0], request) is Outcome.NOT_OWNER
    statement = macs.prepared_transfer(world.realm, x, p.s, LOWER, bytes(16))
    request = TransferOut(world.realm, x, p.s, LOWER, bytes(16), statement, None)
    assert refused(world.hsms[0], request) is Outcome.NOT_OWNER, "owns nothing"


def test_m15_one_target_at_a_time() -> None:
    """While a transfer out stands, the same one is confirmed; another target or another range is refused."""
    p = prepared()
    world = p.world
    request = p.out
    out = expect(world.send(0, request), TransferOutOk)
    assert out.entry is not None
    assert out.entry.transferring == TransferringOut(p.d, out.partition, out.entry.index)
    again = refused(world.hsms[0], replace(request, proof=None))
    assert again == TransferOutOk(None, EMPTY_DELTA, out.partition, out.entry.index, out.clock)
    _, _, x = world.members
    ok = world.prepare(p.s, x, 0, LOWER)
    other = TransferOut(world.realm, p.s, x, LOWER, ok.nonce, ok.statement, request.proof)
    assert refused(world.hsms[0], other) is Outcome.OTHER_TRANSFER_PENDING
    world.commit(p.d, 0)
    cancelled = expect(world.send(0, CancelPreparedTransfer(world.realm, p.s, p.d, LOWER)), TransferEntryOk)
    world.store(p.d, cancelled.entry)
    anew = world.prepare(p.s, p.d, 0, FIRST)
    changed = replace(request, range=FIRST, nonce=anew.nonce, statement=anew.statement, proof=None)
    assert refused(world.hsms[0], changed) is Outcome.OTHER_TRANSFER_PENDING, "the same target, another prepared range"


def test_m15_stale_proof_can_be_retried() -> None:
    """A proof older than the overlay is refused without harm; a fresh one succeeds."""
    p = prepared()
    old = p.out
    client = p.world.client(RECORDS[0], RECORDS[0])
    for _ in range(9):
        p.world.app(p.s, 0, client, secrets.Recover1())
        client.session = None
    assert refused(p.world.hsms[0], old) is Outcome.STALE_PROOF
    expect(p.world.send(0, p.out), TransferOutOk)


@dataclass
class Sent:
    """A transfer of LOWER that the source committed and signed."""

    p: Prepared
    out: TransferOutOk
    signed: TransferStatementOk

    @property
    def arriving(self) -> TransferIn:
        return self.p.world.in_request(self.p.s, self.p.d, self.out.partition, self.p.ok.nonce, self.signed)


def sent(*, owner: bool = False) -> Sent:
    """Return a transfer ready to arrive; with `owner` the destination owns the upper half already."""
    world, (s, d, _) = registered(3)
    if owner:
        world.move(s, 0, d, 0, UPPER)
    ok = world.prepare(s, d, 0, LOWER)
    world.commit(d, 0)
    p = Prepared(world, s, d, ok)
    out = expect(world.send(0, p.out), TransferOutOk)
    world.store(s, out.entry, out.delta)
    world.commit(s, 0)
    return Sent(p, out, world.sign(s, 0, d, ok.nonce))


def test_m16_statement_needs_the_sources_commit() -> None:
    """Nothing is signed before commit, for another destination, without a transfer, or right after a leader change."""
    p = prepared()
    world, hsm = p.world, p.world.hsms[0]
    good = TransferStatement(world.realm, p.s, p.d, p.ok.nonce)

    def answer(**changes: object) -> object:
        return refused(hsm, replace(good, **changes))  # type: ignore[arg-type]  # one field each

    assert answer(source=p.d) is Outcome.INVALID_GROUP
    assert answer(realm=RealmId(b"")) is Outcome.INVALID_REALM
    assert answer() is Outcome.NOT_TRANSFERRING
    assert answer(source=p.d, destination=p.s) is Outcome.NOT_TRANSFERRING, "an In marker is not an Out marker"
    out = expect(world.send(0, p.out), TransferOutOk)
    world.store(p.s, out.entry, out.delta)
    assert answer() is Outcome.BUSY
    assert answer(destination=GroupId(bytes(16))) is Outcome.NOT_TRANSFERRING
    assert answer(nonce=b"") is Outcome.NOT_TRANSFERRING
    world.commit(p.s, 0)
    assert isinstance(answer(), TransferStatementOk)
    assert isinstance(answer(nonce=bytes(16)), TransferStatementOk), "may be repeated with any nonce"
    expect(world.send(0, StepDown(world.realm, p.s, force=True)), StepDownOk)
    assert answer() == NotLeader()
    world.lead(p.s, 0)
    assert answer() is Outcome.BUSY
    world.commit(p.s, 0)
    done = expect(world.send(0, CompleteTransfer(world.realm, p.s, p.d, LOWER)), TransferEntryOk)
    world.store(p.s, done.entry)
    assert answer() is Outcome.NOT_TRANSFERRING


def test_m17_transfer_in_checks_in_order() -> None:
    """Marker, nonce and statement must all be those of this very transfer; a refusal can be retried."""
    t = sent(owner=True)
    world, hsm, good = t.p.world, t.p.world.hsms[0], t.arriving
    assert good.proofs is not None
    own, other = good.proofs

    def answer(**changes: object) -> object:
        return refused(hsm, replace(good, **changes))  # type: ignore[arg-type]  # one field each

    assert answer(source=t.p.d) is Outcome.INVALID_GROUP
    assert answer(realm=RealmId(b"")) is Outcome.INVALID_REALM
    assert answer(source=GroupId(bytes(16))) is Outcome.NOT_PREPARED
    assert answer(transferring=Partition(FIRST, good.transferring.root_hash)) is Outcome.NOT_PREPARED
    assert answer(nonce=bytes(16)) is Outcome.INVALID_NONCE
    assert answer(nonce=b"") is Outcome.INVALID_NONCE
    assert answer(statement=bytes(32)) is Outcome.INVALID_STATEMENT
    assert answer(statement=b"") is Outcome.INVALID_STATEMENT
    assert answer(at=good.at + 1) is Outcome.INVALID_STATEMENT
    assert answer(at=-1) is Outcome.INVALID_STATEMENT
    assert answer(at=2**64) is Outcome.INVALID_STATEMENT
    assert answer(transferring=Partition(LOWER, bytes(32))) is Outcome.INVALID_STATEMENT
    assert answer(proofs=None) is Outcome.MISSING_PROOFS
    assert answer(proofs=(other, own)) is Outcome.INVALID_PROOF, "swapped"
    assert answer(proofs=(b"", b"")) is Outcome.INVALID_PROOF
    assert answer(proofs=(b"", other)) is Outcome.INVALID_PROOF
    assert answer(proofs=(own, other[:-1])) is Outcome.INVALID_PROOF
    assert answer(proofs=(own[:98] + bytes(32) + own[130:], other)) is Outcome.STALE_PROOF
    left = world.nodes.edge(world.partition(t.p.d), Side.RIGHT)
    assert answer(proofs=(left, other)) is Outcome.INVALID_PROOF, "the far edge of the own tree"
    far = world.nodes.edge(good.transferring, Side.LEFT)
    assert answer(proofs=(own, far)) is Outcome.INVALID_PROOF, "the far edge of the arriving tree"
    arrived = expect(world.send(0, good), TransferInOk)
    assert arrived.entry.partition is not None
    assert arrived.entry.partition.range == FULL_RANGE
    assert arrived.entry.transferring is None
    assert dict(arrived.entry.consumed)[t.p.s] == good.at
    assert hsm._state.groups[t.p.d].role.incoming is None  # type: ignore[union-attr]  # a leader
    world.store(t.p.d, arrived.entry, arrived.delta)
    assert versions(world, t.p.d) == [True] * 4


def test_m17_statements_are_bound_to_everything() -> None:
    """A statement for another realm, source, destination, root, range, at or nonce does not fit."""
    t = sent()
    world, good = t.p.world, t.arriving
    macs = world.hsms[0]._state.macs
    whole = (world.realm, t.p.s, t.p.d, good.transferring, good.at, good.nonce)
    for position, value in enumerate(
        (RealmId(bytes(16)), t.p.d, t.p.s, Partition(LOWER, bytes(32)), good.at + 1, bytes(16))
    ):
        parts = list(whole)
        parts[position] = value
        statement = macs.transfer(*parts)  # type: ignore[arg-type]  # positional on purpose
        assert refused(world.hsms[0], replace(good, statement=statement)) is Outcome.INVALID_STATEMENT


def test_m17_nonces_of_earlier_preparations_and_leaders() -> None:
    """Re-preparing, cancelling or changing the leader makes outstanding statements useless."""
    t = sent()
    world = t.p.world
    old = t.arriving
    fresh = world.prepare(t.p.s, t.p.d, 0, LOWER)
    assert refused(world.hsms[0], old) is Outcome.INVALID_NONCE
    world.commit(t.p.d, 0)
    expect(world.send(0, StepDown(world.realm, t.p.d, force=True)), StepDownOk)
    world.lead(t.p.d, 0)
    signed = world.sign(t.p.s, 0, t.p.d, fresh.nonce)
    request = world.in_request(t.p.s, t.p.d, t.out.partition, fresh.nonce, signed)
    assert refused(world.hsms[0], request) is Outcome.INVALID_NONCE, "nonce of the previous leadership"
    cancel = CancelPreparedTransfer(world.realm, t.p.s, t.p.d, LOWER)
    done = expect(world.send(0, cancel), TransferEntryOk)
    world.store(t.p.d, done.entry)
    assert refused(world.hsms[0], request) is Outcome.NOT_PREPARED
    last = world.prepare(t.p.s, t.p.d, 0, LOWER)
    signed = world.sign(t.p.s, 0, t.p.d, last.nonce)
    request = world.in_request(t.p.s, t.p.d, t.out.partition, last.nonce, signed)
    expect(world.send(0, request), TransferInOk)


def test_arriving_range_must_join() -> None:
    """Were the own range no longer adjacent, the transfer is refused rather than merged (defence in depth)."""
    t = sent(owner=True)
    world, good = t.p.world, t.arriving
    role = world.hsms[0]._state.groups[t.p.d].role
    last = role.log.last  # type: ignore[union-attr]  # a leader
    assert last.partition is not None
    role.log.last = replace(last, partition=Partition(FULL_RANGE, last.partition.root_hash))  # type: ignore[union-attr]
    assert refused(world.hsms[0], good) is Outcome.NOT_PREPARED


def test_m17_stale_own_proof_keeps_the_nonce() -> None:
    """A merge with a proof older than the overlay is refused and can be retried with the same statement."""
    t = sent(owner=True)
    world, old = t.p.world, t.arriving
    client = world.client(RECORDS[3], RECORDS[3])
    for _ in range(9):
        world.app(t.p.d, 0, client, secrets.Recover1())
        client.session = None
    assert refused(world.hsms[0], old) is Outcome.STALE_PROOF
    expect(world.send(0, t.arriving), TransferInOk)


def test_m18_complete_and_cancel_fit_exactly() -> None:
    """Complete and cancel need the very marker, on the right side, once."""
    t = sent()
    world, hsm = t.p.world, t.p.world.hsms[0]
    complete = CompleteTransfer(world.realm, t.p.s, t.p.d, LOWER)
    cancel = CancelPreparedTransfer(world.realm, t.p.s, t.p.d, LOWER)
    assert refused(hsm, replace(complete, destination=t.p.s)) is Outcome.INVALID_GROUP
    assert refused(hsm, replace(cancel, destination=t.p.s)) is Outcome.INVALID_GROUP
    assert refused(hsm, replace(complete, realm=RealmId(b""))) is Outcome.INVALID_REALM
    assert refused(hsm, replace(cancel, realm=RealmId(b""))) is Outcome.INVALID_REALM
    assert refused(hsm, replace(complete, range=FIRST)) is Outcome.NOT_TRANSFERRING
    assert refused(hsm, replace(complete, destination=GroupId(bytes(16)))) is Outcome.NOT_TRANSFERRING
    assert refused(hsm, replace(complete, source=t.p.d, destination=t.p.s)) is Outcome.NOT_TRANSFERRING
    assert refused(hsm, replace(cancel, range=FIRST)) is Outcome.NOT_PREPARED
    assert refused(hsm, replace(cancel, source=GroupId(bytes(16)))) is Outcome.NOT_PREPARED
    assert refused(hsm, replace(cancel, source=t.p.d, destination=t.p.s)) is Outcome.NOT_PREPARED, "at the source"
    for request, outcome in ((complete, Outcome.NOT_TRANSFERRING), (cancel, Outcome.NOT_PREPARED)):
        entry = expect(world.send(0, request), TransferEntryOk).entry
        assert entry.transferring is None
        assert refused(hsm, request) is outcome


def test_m18_a_cancelled_preparation_forgets_its_nonce() -> None:
    """The nonce goes with the marker: should a marker ever come back without a fresh one, nothing fits it."""
    t = prepared()
    role = t.world.hsms[0]._state.groups[t.d].role
    assert isinstance(role, LeaderState)
    assert role.incoming == t.ok.nonce
    expect(t.world.send(0, CancelPreparedTransfer(t.world.realm, t.s, t.d, LOWER)), TransferEntryOk)
    assert role.incoming is None


def test_i14_marker_travels_unchanged() -> None:
    """The marker and consumed are copied into every later entry, across requests and leader changes."""
    t = sent(owner=True)
    world = t.p.world
    client = world.client(RECORDS[3], RECORDS[3])
    before = world.logs[t.p.d][-1]
    assert before.consumed
    for _ in range(2):
        entry = world.app(t.p.d, 0, client, secrets.Recover1()).entry
        assert (entry.transferring, entry.consumed) == (before.transferring, before.consumed)
        assert isinstance(entry.transferring, TransferringIn)
        assert entry.transferring.at < entry.index
        world.commit(t.p.d, 0)
        expect(world.send(0, StepDown(world.realm, t.p.d, force=True)), StepDownOk)
        world.lead(t.p.d, 0)
        client.session = None


def h2_attack() -> tuple[World, GroupId, GroupId, GroupId, TransferIn]:
    """Move LOWER from S to D without completing, then on to X; return the request that replays the first move."""
    t = sent()
    world, s, d = t.p.world, t.p.s, t.p.d
    arrived = expect(world.send(0, t.arriving), TransferInOk)
    world.store(d, arrived.entry, arrived.delta)
    world.commit(d, 0)
    client = world.client(RECORDS[0], RECORDS[0])
    assert isinstance(world.ask(d, 0, client, secrets.Recover1()), secrets.Recover1Ok)
    guess = world.ask(d, 0, client, client.recover2())
    assert isinstance(guess, secrets.Recover2Ok)
    x = next(group for group in world.members if group not in (s, d))
    world.move(d, 0, x, 0, LOWER)
    fresh = world.prepare(s, d, 0, LOWER)
    world.commit(d, 0)
    signed = world.sign(s, 0, d, fresh.nonce)
    assert signed.at == t.signed.at
    return world, s, d, x, world.in_request(s, d, t.out.partition, fresh.nonce, signed)


def test_h2_m17_a_transfer_is_taken_in_once() -> None:
    """Nonce and statement of the replay are genuine; it is refused because D remembers what it consumed from S."""
    world, s, _, _, replay = h2_attack()
    hsm = world.hsms[0]
    assert hsm._state.groups[replay.destination].role.incoming == replay.nonce  # type: ignore[union-attr]  # a leader
    expected = hsm._state.macs.transfer(
        world.realm, s, replay.destination, replay.transferring, replay.at, replay.nonce
    )
    assert expected == replay.statement
    assert refused(hsm, replay) is Outcome.NOT_PREPARED


def test_h2_attack_succeeds_against_a_core_without_h2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the memory of consumed transfers two groups own the range, one at the old root: the test can see it."""
    world, _, d, x, replay = h2_attack()
    monkeypatch.setattr(transfer, "is_consumed", lambda *_: False)
    arrived = expect(world.send(0, replay), TransferInOk)
    world.store(d, arrived.entry, arrived.delta)
    world.commit(d, 0)
    assert world.partition(d).range == world.partition(x).range == LOWER
    client = world.client(RECORDS[0], RECORDS[0])
    assert isinstance(world.ask(d, 0, client, secrets.Recover1()), secrets.Recover1Ok)
    guess = world.ask(d, 0, client, client.recover2())
    assert isinstance(guess, secrets.Recover2Ok)
    assert guess.guess_count == 1, "the guess that was spent before is back"


def test_retries_after_lost_leaders() -> None:
    """A source leader lost before commit repeats TransferOut; a destination leader lost before commit starts over."""
    p = prepared()
    world = p.world
    stored = list(world.logs[p.s])
    out = expect(world.send(0, p.out), TransferOutOk)
    expect(world.send(0, StepDown(world.realm, p.s, force=True)), StepDownOk)
    world.logs[p.s] = stored
    world.lead(p.s, 0)
    world.commit(p.s, 0)
    again = expect(world.send(0, p.out), TransferOutOk)
    assert again.partition == out.partition
    world.store(p.s, again.entry, again.delta)
    world.commit(p.s, 0)
    signed = world.sign(p.s, 0, p.d, p.ok.nonce)
    request = world.in_request(p.s, p.d, again.partition, p.ok.nonce, signed)
    expect(world.send(0, request), TransferInOk)
    expect(world.send(0, StepDown(world.realm, p.d, force=True)), StepDownOk)
    world.lead(p.d, 0)
    world.commit(p.d, 0)
    fresh = world.prepare(p.s, p.d, 0, LOWER)
    assert fresh.entry is None
    signed = world.sign(p.s, 0, p.d, fresh.nonce)
    request = world.in_request(p.s, p.d, again.partition, fresh.nonce, signed)
    arrived = expect(world.send(0, request), TransferInOk)
    world.store(p.d, arrived.entry, arrived.delta)
    assert versions(world, p.d) == [True, True, False, False]
