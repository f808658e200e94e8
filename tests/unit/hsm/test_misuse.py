"""Misuse of client requests by a host that has real proofs, trees and logs of elsewhere (hsm.md 15, M10 and M12)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from juicebox_hsm.hsm.messages import (
    AppRequest,
    AppRequestOk,
    CaptureNext,
    Commit,
    CommitOk,
    Outcome,
    PersistState,
    PersistStateOk,
)
from juicebox_hsm.hsm.state import LeaderState
from juicebox_hsm.ids import FULL_RANGE
from juicebox_hsm.merkle.kernel import Tree
from juicebox_hsm.wire import requests as secrets
from tests.fakes.hsm import World, expect, refused
from tests.merkle_model import model
from tests.merkle_model.codec import Branch, Interior, Proof

RECORD = b"\x40" + bytes(31)
BITS = format(int.from_bytes(RECORD, "big"), "0256b")
BOUNDS = (FULL_RANGE.start, FULL_RANGE.end)


def test_m10_a_proof_for_another_group_or_realm() -> None:
    """A true proof about this record is refused where another group, or another realm, made the tree."""
    world = World(1)
    client = world.client(RECORD)
    world.open_session(world.first, 0, client)
    world.ask(world.first, 0, client, client.register2())
    of_first = world.nodes.proof(world.partition(world.first), RECORD)
    world.ask(world.first, 0, client, client.recover2())
    second = world.new_group([0])
    world.move(world.first, 0, second, 0, FULL_RANGE)
    client.session = None
    world.open_session(second, 0, client)

    elsewhere = World(1, "elsewhere")
    other = elsewhere.client(RECORD)
    elsewhere.open_session(elsewhere.first, 0, other)
    elsewhere.ask(elsewhere.first, 0, other, client.register2())
    of_realm = elsewhere.nodes.proof(elsewhere.partition(elsewhere.first), RECORD)

    message = world.app_message(second, client, client.seal(client.recover2()))
    for proof in (of_first, of_realm):
        assert refused(world.hsms[0], replace(message, proof=proof)) is Outcome.STALE_PROOF, "the root is not known"
        relabelled = proof[:98] + message.proof[98:130] + proof[130:]
        assert refused(world.hsms[0], replace(message, proof=relabelled)) is Outcome.INVALID_PROOF, "a root of ours"
    assert isinstance(world.send(0, message), AppRequestOk)


@pytest.mark.parametrize(
    ("below", "what"),
    [
        (Interior(Branch(BITS[8:], b"\x11" * 32), None), "a non-root node with one child"),
        (Interior(None, Branch("1", b"\x11" * 32)), "a non-root node with the other child only"),
        (Interior(None, None), "a non-root node without children"),
        (Interior(Branch("", b"\x11" * 32), Branch("1", b"\x22" * 32)), "an empty prefix"),
        (Interior(Branch("10", b"\x11" * 32), Branch("1", b"\x22" * 32)), "a left branch that goes right"),
        (Interior(Branch("0", b"\x11" * 32), Branch("01", b"\x22" * 32)), "a right branch that goes left"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_m10_malformed_nodes(below: Interior, what: str) -> None:
    """A node that no tree has is refused, even when all hashes up to a root that the leader knows are right."""
    world, message = below_a_known_root(below)
    assert refused(world.hsms[0], message) is Outcome.INVALID_PROOF, what


def test_m10_a_well_formed_node_is_no_misuse() -> None:
    """The same with a node that a tree may have is served, so that it is the node's form that was refused."""
    world, message = below_a_known_root(Interior(Branch("01", b"\x11" * 32), Branch("1", b"\x22" * 32)))
    assert isinstance(world.send(0, message), AppRequestOk)


def below_a_known_root(below: Interior) -> tuple[World, AppRequest]:
    """Return a world whose leader knows a root above this node, and a request with the proof that it has no leaf."""
    world = World(1)
    client = world.client(RECORD)
    world.open_session(world.first, 0, client)
    root = Interior(Branch(BITS[:8], model._interior_hash(below, None)), Branch("1", b"\x33" * 32))
    proof = Proof(RECORD, *BOUNDS, model._interior_hash(root, BOUNDS), (root, below), None)
    role = world.hsms[0]._state.groups[world.first].role
    assert isinstance(role, LeaderState)
    role.tree = Tree(proof.root, *BOUNDS, 1)
    message = world.app_message(world.first, client, client.seal(secrets.Recover1()))
    return world, replace(message, proof=proof.encode())


def test_m12_a_guess_retried_at_another_leader() -> None:
    """The host drops a guess's entry and asks another leader: only what commits is answered, and it costs a guess."""
    world = World(2)
    group = world.new_group([0, 1], 0)
    world.move(world.first, 0, group, 0, FULL_RANGE)
    client = world.client(RECORD)
    world.open_session(group, 0, client)
    world.ask(group, 0, client, client.register2())
    stored = list(world.logs[group])
    for turn in range(3):
        dropped = world.app(group, 0, client, client.recover2()).entry
        world.logs[group] = list(stored)  # never stored, so nobody captures it
        world.lead(group, 1)
        client.session = None
        world.open_session(group, 1, client)
        counted = world.ask(group, 1, client, client.recover2())
        if turn == 2:
            assert isinstance(counted, secrets.Recover2Ok)
            assert counted.guess_count == 3, "the third committed guess, whatever was dropped"
        [last] = world.logs[group][len(stored) :]
        stored = list(world.logs[group])
        captures = tuple(
            vote
            for number in (0, 1)
            for vote in expect(world.send(number, PersistState()), PersistStateOk).captured
            if vote.group == group
        )
        settled = expect(world.send(0, Commit(world.realm, group, captures)), CommitOk)
        assert (settled.responses, settled.abandoned) == ((), (dropped.entry_mac,)), "the dropped guess is unanswered"
        assert refused(world.hsms[0], CaptureNext(world.realm, group, (dropped,))) is Outcome.MISSING_PREV
        assert last.entry_mac != dropped.entry_mac
        world.lead(group, 0)
        client.session = None
        world.open_session(group, 0, client)
    spent = world.ask(group, 0, client, client.recover2())
    assert spent == secrets.NoGuesses(secrets.Phase.RECOVER2), "three guesses were registered"
