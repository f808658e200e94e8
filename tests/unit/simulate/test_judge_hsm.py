"""The judge of HSM calls sees each invariant of hsm.md broken, and nothing where all is well."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from juicebox_hsm.consensus.nvram import PersistentState, decode_state, encode_state
from juicebox_hsm.hsm import app, capture, leadership, records, transfer
from juicebox_hsm.hsm import messages as m
from juicebox_hsm.hsm.sessions import Sessions
from juicebox_hsm.hsm.state import GroupState, HsmState, LeaderState, Log, WitnessState
from juicebox_hsm.ids import FULL_RANGE, HsmId, RecordId
from juicebox_hsm.wire import requests as secrets
from tests.fakes.hsm import expect
from tests.unit.simulate.judged import LOWER, RECORD, UPPER, JudgedWorld, broken

Patch = pytest.MonkeyPatch


def registered(world: JudgedWorld) -> tuple[Any, Any]:
    """Return (group, client) of a registered user whose session is open."""
    group = world.grouped()
    client = world.user()
    world.ask(group, 0, client, secrets.Register1())
    world.ask(group, 0, client, client.register2(2))
    return group, client


def test_a_sound_realm_breaks_nothing(world: JudgedWorld) -> None:
    """Requests, guesses, a lost leader, a transfer of half a range and back: no rule is broken."""
    group, client = registered(world)
    world.ask(group, 0, client, secrets.Recover1())
    world.ask(group, 0, client, client.recover2())
    world.ask(group, 0, client, client.recover3(bytes(16)))
    world.ask(group, 0, client, client.recover3())
    other = world.new_group([0, 1, 2], 1)
    world.move(group, 0, other, 1, LOWER)
    world.ask(other, 1, world.user(), secrets.Recover1())
    world.move(other, 1, group, 0, LOWER)
    world.crash(0)
    world.lead(group, 2)
    world.commit(group, 2)
    client = world.user()
    world.ask(group, 2, client, secrets.Recover1())
    world.ask(group, 2, client, secrets.Delete())
    assert world.judge.violations == []
    assert len(world.judge.commits.histories[RECORD]) == 9


def test_what_a_dead_process_asks_counts_for_nothing(world: JudgedWorld) -> None:
    """The last step of a process that is killed may still reach its HSM, and nobody hears the answer."""
    group, client = registered(world)
    world.app(group, 0, client, secrets.Recover1())
    votes = world.witness(group)
    old = world.hsms[0]
    world.crash(0)
    reply = world.judge.hsm_handle("0", old, m.Commit(world.realm, group, votes))
    assert isinstance(reply, m.CommitOk)
    world.lead(group, 0)
    world.commit(group, 0)
    assert world.judge.violations == []


def test_i1_a_guess_that_is_not_counted(world: JudgedWorld, monkeypatch: Patch) -> None:
    """I1: a Recover2 that answers without raising the count."""
    group, client = registered(world)
    run = records.run

    def forgetful(record: records.Record, request: Any, random: Any) -> records.Effect:
        effect = run(record, request, random)
        return replace(effect, written=record) if isinstance(request, secrets.Recover2) else effect

    monkeypatch.setattr(records, "run", forgetful)
    broken("I1", lambda: world.ask(group, 0, client, client.recover2()))


def test_i1_more_guesses_than_the_limit(world: JudgedWorld, monkeypatch: Patch) -> None:
    """I1: a record that goes on answering when its guesses are spent."""
    group, client = registered(world)
    monkeypatch.setattr(records.Registered, "is_spent", property(lambda _: False))
    for _ in range(2):
        world.ask(group, 0, client, client.recover2())
    broken("I1", lambda: world.ask(group, 0, client, client.recover2()))


def test_i1_a_request_that_gives_guesses_back(world: JudgedWorld, monkeypatch: Patch) -> None:
    """I1: a wrong unlock key tag that resets the count."""
    group, client = registered(world)
    world.ask(group, 0, client, client.recover2())
    run = records.run

    def generous(record: records.Record, request: Any, random: Any) -> records.Effect:
        effect = run(record, request, random)
        if isinstance(request, secrets.Recover3) and isinstance(effect.written, records.Registered):
            return replace(effect, written=records.Registered(effect.written.registration, 0))
        return effect

    monkeypatch.setattr(records, "run", generous)
    broken("I1", lambda: world.ask(group, 0, client, client.recover3(bytes(16))))


def minority(voters: Any, votes: Any) -> int | None:
    """Elect the highest single vote."""
    return max(votes.values(), default=None)


def test_i3_a_commit_without_a_majority(world: JudgedWorld, monkeypatch: Patch) -> None:
    """I3: a leader that releases replies with one vote of three."""
    group, client = registered(world)
    world.app(group, 0, client, secrets.Recover1())
    monkeypatch.setattr(leadership, "elect", minority)
    broken("I3", lambda: world.commit(group, 0, [0]))


def test_i2_two_committed_entries_at_one_index(world: JudgedWorld) -> None:
    """I2: an entry that is said to be committed beside another one of its index."""
    group, client = registered(world)
    message = world.app_message(group, world.user(), world.user().handshake(secrets.Recover1()))
    world.lead(group, 1)
    rival = expect(world.send(1, message), m.AppRequestOk).entry
    world.ask(group, 0, client, secrets.Recover1())
    broken("I2", lambda: world.judge.check(lambda: world.judge.commits._extend(group, rival)))


def test_i4_signed_away_before_it_was_committed(world: JudgedWorld, monkeypatch: Patch) -> None:
    """I4: a source that signs a transfer whose going it has not committed."""
    group = world.grouped()
    other = world.new_group([0, 1, 2], 1)
    prepared = world.prepare(group, other, 1, LOWER)
    world.commit(other, 1)
    out = expect(world.send(0, world.out_request(group, other, LOWER, prepared)), m.TransferOutOk)
    world.store(group, out.entry, out.delta)
    sign = transfer.transfer_statement

    def hasty(state: HsmState, request: m.TransferStatement) -> Any:
        leader = state.groups[request.source].role
        assert isinstance(leader, LeaderState)
        kept, leader.committed = leader.committed, 2**40
        try:
            return sign(state, request)
        finally:
            leader.committed = kept

    monkeypatch.setattr(transfer, "transfer_statement", hasty)
    broken("I4", lambda: world.sign(group, 0, other, prepared.nonce))


def test_i4_out_without_a_preparation(world: JudgedWorld, monkeypatch: Patch) -> None:
    """I4: a range that leaves towards a group that never prepared for it."""
    group = world.grouped()
    other = world.new_group([0, 1, 2], 1)
    monkeypatch.setattr(transfer, "same", lambda *_: True)
    request = m.TransferOut(world.realm, group, other, FULL_RANGE, bytes(16), bytes(32), None)
    broken("I4", lambda: world.send(0, request))


def test_i4_two_owners(world: JudgedWorld) -> None:
    """I4: two groups whose committed logs own a record."""
    group = world.grouped()
    other = world.new_group([0, 1, 2], 1)
    commits = world.judge.commits
    commits.heads[other] = replace(commits.heads[other], partition=commits.heads[group].partition)
    broken("I4", lambda: world.judge.check(commits._check_ownership))


def test_i14_h2_a_transfer_is_taken_in_twice(world: JudgedWorld, monkeypatch: Patch) -> None:
    """H2: a destination that forgets which transfers it consumed takes the same one in again."""
    group = world.grouped()
    other = world.new_group([0, 1, 2], 1)
    monkeypatch.setattr(transfer, "_raise", lambda consumed, source, at: consumed)
    broken("I14", lambda: world.move(group, 0, other, 1, LOWER))


def test_i5_another_record_is_written(world: JudgedWorld, monkeypatch: Patch) -> None:
    """I5: a request that writes somebody else's leaf."""
    group = world.grouped()
    partition = world.partition(group)
    world_proof = world.nodes.proof(partition, b"\x21" * 32)
    monkeypatch.setattr(app, "proof_key", lambda _: RECORD)
    client = world.user()
    message = world.app_message(group, client, client.handshake(secrets.Register1()))
    world.send(0, replace(message, proof=world_proof))
    run = records.run
    monkeypatch.setattr(
        records,
        "run",
        lambda record, request, random: replace(run(record, request, random), written=records.NO_GUESSES),
    )
    broken("I5", lambda: world.send(0, replace(message, proof=world_proof)))


def test_i5_an_old_state_comes_back(world: JudgedWorld) -> None:
    """I5: a request that is computed from a state that was not the record's last."""
    group, client = registered(world)
    world.judge.commits.current[RECORD] = records.NO_GUESSES
    broken("I5", lambda: world.ask(group, 0, client, secrets.Recover1()))


def test_i6_nvram_goes_back(world: JudgedWorld) -> None:
    """I6: captured indexes, configurations and the realm never change backwards."""
    group = world.grouped()
    content = world.platforms[0].nvram
    state = decode_state(content)
    assert state is not None
    assert state.realm is not None
    kept = state.realm.groups[group]
    assert kept.captured is not None
    lower = {**state.realm.groups, group: replace(kept, captured=(1, kept.captured[1]))}
    fewer = {**state.realm.groups, group: replace(kept, configuration=kept.configuration[1:])}
    gone = {other: each for other, each in state.realm.groups.items() if other != group}
    for groups in (lower, fewer, gone, {**lower, group: replace(kept, captured=None)}):
        world.judge.hsm_wrote("0", content)
        forged = encode_state(replace(state, realm=replace(state.realm, groups=groups)))
        broken("I6", lambda forged=forged: world.judge.hsm_wrote("0", forged))  # type: ignore[misc]
        world.judge.ledger._persisted["0"] = state
    broken("I6", lambda: world.judge.hsm_wrote("0", encode_state(PersistentState(state.id, None))))
    world.judge.ledger._persisted["0"] = state
    broken("I6", lambda: world.judge.hsm_wrote("0", encode_state(replace(state, id=HsmId(bytes(16))))))


def test_i7_signed_before_it_is_durable(world: JudgedWorld, monkeypatch: Patch) -> None:
    """I7: an HSM that publishes and signs captures without writing them."""
    group, client = registered(world)
    world.app(group, 0, client, secrets.Recover1())
    monkeypatch.setattr(HsmState, "persist", lambda self, new: setattr(self, "persistent", new))
    broken("I7", lambda: world.witness(group, [1]))


def test_i8_h1_a_jump_without_a_majority(world: JudgedWorld, monkeypatch: Patch) -> None:
    """H1: a witness that jumps on one peer's word."""
    group, client = registered(world)
    entry = world.app(group, 0, client, secrets.Recover1()).entry
    votes = world.witness(group, [0])
    monkeypatch.setattr(capture, "elect", minority)
    broken("I8", lambda: world.send(2, m.CaptureJump(world.realm, group, (entry,), votes)))


def test_i8_another_branch(world: JudgedWorld) -> None:
    """I8: an HSM whose persisted head leaves its branch without a jump."""
    group, client = registered(world)
    world.lead(group, 1)
    message = world.app_message(group, world.user(), world.user().handshake(secrets.Recover1()))
    rival = expect(world.send(1, message), m.AppRequestOk).entry
    world.app(group, 0, client, secrets.Recover1())
    world.witness(group, [2])
    world.hsms[2]._state.captured[group] = (rival.index, rival.entry_mac)
    broken("I8", world.hsms[2]._state.persist_captured)


def test_i9_captured_what_no_hsm_made(world: JudgedWorld) -> None:
    """I9: a captured head that no HSM ever made."""
    group = world.grouped()
    world.hsms[1]._state.captured[group] = (99, bytes(32))
    broken("I9", lambda: world.send(1, m.Status()))


def test_i9_a_log_with_a_gap(world: JudgedWorld, monkeypatch: Patch) -> None:
    """I9: a leader's log that is not one chain."""
    group, client = registered(world)
    world.app(group, 0, client, secrets.Recover1())
    world.app(group, 0, client, secrets.Recover1())
    role = world.hsms[0]._state.groups[group].role
    assert isinstance(role, LeaderState)
    del role.log._elements[role.log.last.index - 1]
    broken("I9", lambda: world.send(0, m.Status()))
    assert isinstance(role.log, Log)


def test_i10_a_tree_of_another_entry(world: JudgedWorld) -> None:
    """I10: a leader whose tree is not that of its last entry."""
    group = world.grouped()
    role = world.hsms[0]._state.groups[group].role
    assert isinstance(role, LeaderState)
    role.tree = None
    broken("I10", lambda: world.send(0, m.Status()))


def test_i11_committed_falls(world: JudgedWorld) -> None:
    """I11: a leader whose committed index falls."""
    group, client = registered(world)
    world.judge.ledger.leaderships["0", group].committed = 10**6
    broken("I11", lambda: world.ask(group, 0, client, secrets.Recover1()))


def test_i12_a_reply_that_never_settles(world: JudgedWorld, monkeypatch: Patch) -> None:
    """I12: a leadership that ends while replies are neither released nor abandoned."""
    group, client = registered(world)
    world.app(group, 0, client, secrets.Recover1())
    monkeypatch.setattr(GroupState, "step_down_at", lambda self, leader, index: self.become(WitnessState()))
    broken("I12", lambda: world.send(0, m.StepDown(world.realm, group, force=False)))


def test_i12_a_reply_that_goes_out_twice(world: JudgedWorld, monkeypatch: Patch) -> None:
    """I12: an element whose reply stays with it after its release."""
    group, client = registered(world)
    released: list[Any] = []
    release = Log.release_to

    def again(self: Log, index: int) -> list[Any]:
        released.extend(release(self, index))
        return released

    monkeypatch.setattr(Log, "release_to", again)
    world.app(group, 0, client, secrets.Recover1())
    world.commit(group, 0)
    broken("I12", lambda: world.commit(group, 0))


def test_i13_what_is_written_tells_the_outcome(world: JudgedWorld, monkeypatch: Patch) -> None:
    """I13: a Recover1 on a registered record that writes nothing, or a leaf of another length."""
    group, client = registered(world)
    run = records.run
    encode = records.encode_record
    monkeypatch.setattr(records, "encode_record", lambda record: encode(record)[:-5] + encode(record)[-4:])
    broken("I13", lambda: world.app(group, 0, client, secrets.Recover1()))
    monkeypatch.setattr(records, "encode_record", encode)
    monkeypatch.setattr(
        records, "run", lambda record, request, random: replace(run(record, request, random), written=None)
    )
    fresh = world.user()
    message = world.app_message(group, fresh, fresh.handshake(secrets.Recover1()))
    broken("I13", lambda: world.send(0, message))


def test_i14_a_marker_vanishes(world: JudgedWorld, monkeypatch: Patch) -> None:
    """I14: a preparation that leaves no marker in the log."""
    group = world.grouped()
    other = world.new_group([0, 1, 2], 1)
    world.prepare(group, other, 1, LOWER)
    make = HsmState.new_entry

    def forget(
        self: HsmState, group: Any, last: Any, partition: Any, transferring: Any = None, consumed: Any = ()
    ) -> Any:
        return make(self, group, last, partition, None, consumed)

    monkeypatch.setattr(HsmState, "new_entry", forget)
    cancel = m.CancelPreparedTransfer(world.realm, group, other, LOWER)
    world.send(1, cancel)
    prepare = m.PrepareTransfer(world.realm, group, other, UPPER)
    broken("I14", lambda: world.send(1, prepare))


def test_i15_foreign_keys(world: JudgedWorld, monkeypatch: Patch) -> None:
    """I15: an HSM that starts with keys that its realm statement does not cover."""
    monkeypatch.setattr(HsmState, "has_own_keys", lambda *_: False)
    broken("I15", lambda: world.judge.hsm_started("0", world.hsms[0]))


def test_i16_a_refusal_that_leaves_a_trace(world: JudgedWorld, monkeypatch: Patch) -> None:
    """I16: a refused transfer that takes the nonce with it."""
    group = world.grouped()
    other = world.new_group([0, 1, 2], 1)
    prepared = world.prepare(group, other, 1, LOWER)

    def careless(state: HsmState, request: m.TransferIn) -> m.Outcome:
        leader = state.groups[request.destination].role
        assert isinstance(leader, LeaderState)
        leader.incoming = None
        return m.Outcome.INVALID_STATEMENT

    monkeypatch.setattr(transfer, "transfer_in", careless)
    request = m.TransferIn(world.realm, group, other, world.partition(group), 1, None, prepared.nonce, bytes(32))
    broken("I16", lambda: world.send(1, request))


def test_i17_a_request_that_raises(world: JudgedWorld, monkeypatch: Patch) -> None:
    """I17: a handler that lets an exception out."""
    group = world.grouped()

    def explode(*_: object) -> None:
        raise IndexError("out of range")

    monkeypatch.setattr(capture, "capture_next", explode)
    broken("I17", lambda: world.send(0, m.CaptureNext(world.realm, group, ())))


def test_i18_a_session_of_another_record(world: JudgedWorld, monkeypatch: Patch) -> None:
    """I18: a session cache that looks at the session id alone."""
    group, client = registered(world)
    other = RecordId(b"\x21" * 32)

    def take(self: Sessions, record: RecordId, session_id: int) -> Any:
        return next(iter(self._sessions.values()))

    monkeypatch.setattr(Sessions, "take", take)
    message = world.app_message(group, client, client.transport(secrets.Register1()))
    proof = world.nodes.proof(world.partition(group), other)
    broken("I18", lambda: world.send(0, replace(message, record_id=other, proof=proof)))


def test_i19_a_clock_that_stands_still(world: JudgedWorld, monkeypatch: Patch) -> None:
    """I19: a role change that does not advance the clock, or a restart that begins where another life was."""
    group = world.grouped()
    monkeypatch.setattr(GroupState, "become", lambda self, role: setattr(self, "role", role))
    broken("I19", lambda: world.send(0, m.StepDown(world.realm, group, force=True)))


def test_i19_across_restarts(world: JudgedWorld) -> None:
    """I19: an HSM that begins its next life with a clock value of the last one."""
    world.grouped()
    world.platforms[0].clock_start -= 1000
    world.crash(0)
    broken("I19", lambda: world.send(0, m.Status()))
