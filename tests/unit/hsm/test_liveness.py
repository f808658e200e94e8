"""With an honest host everything keeps moving (hsm.md 16.4 and 17), and the whole conversation is recorded."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from juicebox_hsm.hsm.codec import FORMS, encode_request, encode_response
from juicebox_hsm.hsm.messages import (
    AppRequestOk,
    CaptureJump,
    CaptureJumpOk,
    Commit,
    CommitOk,
    Outcome,
    Request,
    Response,
    StepDown,
    StepDownOk,
)
from juicebox_hsm.ids import FULL_RANGE, GroupId, OwnedRange, RecordId
from juicebox_hsm.wire import requests as secrets
from tests.fakes.hsm import World, expect

TRANSCRIPT = Path(__file__).parents[2] / "data" / "hsm-transcript.txt"
LOWER = OwnedRange(RecordId(bytes(32)), RecordId(b"\x7f" + b"\xff" * 31))
USERS = [bytes([number]) * 32 for number in (0x11, 0x55, 0x99, 0xDD)]


@dataclass
class RecordedWorld(World):
    """A world that writes down every request and answer: names, and digests of the exact bytes."""

    lines: list[str] = field(default_factory=list)

    def send(self, number: int, request: Request) -> Response:
        """Send and record, with the NVRAM the HSM is left with."""
        response = super().send(number, request)
        answer = response.value if isinstance(response, Outcome) else type(response).__name__
        digests = [
            hashlib.blake2s(data, digest_size=6).hexdigest()
            for data in (
                encode_request(request),
                encode_response(type(request), response),
                self.platforms[number].nvram,
            )
        ]
        name = FORMS[type(request)].name
        self.lines.append(f"hsm {number} {name:<22} {digests[0]} -> {answer:<19} {digests[1]} nvram {digests[2]}")
        return response

    def note(self, text: str) -> None:
        """Write a heading."""
        self.lines.append(f"# {text}")


def pipelined(world: World, group: GroupId, leader: int) -> None:
    """Serve all users at once: their proofs are all against the same root."""
    partition = world.partition(group)
    clients = [world.client(user, (user, len(world.logs[group]))) for user in USERS if partition.range.contains(user)]
    proofs = [world.nodes.proof(partition, client.record) for client in clients]
    for client, proof in zip(clients, proofs, strict=True):
        message = world.app_message(group, client, client.handshake(secrets.Recover1()), proof)
        answer = expect(world.send(leader, message), AppRequestOk)
        world.store(group, answer.entry, answer.delta)
    done = world.commit(group, leader)
    assert len(done.responses) == len(clients)
    for client, (_, noise, _) in zip(clients, done.responses, strict=True):
        assert isinstance(client.open(noise), secrets.Recover1Ok)


def scenario() -> RecordedWorld:
    """Run an honest realm of three HSMs through everything that happens in one."""
    world = RecordedWorld(3, seed="liveness")
    world.note("a group of three takes everything over")
    group = world.new_group([0, 1, 2])
    world.move(world.first, 0, group, 0, FULL_RANGE)
    world.note("four users register")
    for user in USERS:
        client = world.client(user, user)
        world.open_session(group, 0, client)
        assert world.ask(group, 0, client, client.register2()) == secrets.Register2Ok()
    world.note("pipelined requests")
    pipelined(world, group, 0)
    world.note("leadership moves to hsm 1 with an entry of hsm 0 uncommitted; hsm 2 sleeps")
    last = world.app(group, 0, world.client(USERS[0], "last"), secrets.Recover1()).entry
    expect(world.send(0, StepDown(world.realm, group, force=False)), StepDownOk)
    world.lead(group, 1)
    votes = world.witness(group, [0, 1])
    done = expect(world.send(0, Commit(world.realm, group, votes)), CommitOk)
    assert [mac for mac, _, _ in done.responses] == [last.entry_mac]
    expect(world.send(1, Commit(world.realm, group, votes)), CommitOk)
    for _ in range(3):
        world.app(group, 1, world.client(USERS[1], len(world.logs[group])), secrets.Recover1())
    certificate = world.witness(group, [0, 1])
    expect(world.send(1, Commit(world.realm, group, certificate)), CommitOk)
    world.note("the log is compacted; hsm 2 jumps with the certificate and goes on")
    tail = (world.logs[group][-1],)
    expect(world.send(2, CaptureJump(world.realm, group, tail, certificate)), CaptureJumpOk)
    pipelined(world, group, 1)
    world.note("hsm 0 crashes and comes back")
    world.crash(0)
    pipelined(world, group, 1)
    world.note("the lower half moves to a second group and back")
    second = world.new_group([0, 2], 2)
    world.move(group, 1, second, 2, LOWER)
    pipelined(world, second, 2)
    pipelined(world, group, 1)
    world.move(second, 2, group, 1, LOWER)
    pipelined(world, group, 1)
    return world


def test_an_honest_realm_keeps_moving() -> None:
    """Pipelining, leader change, compaction with a jump, a crash, a split and a merge: every client is answered."""
    world = scenario()
    (group,) = [group for group, log in world.logs.items() if log[-1].partition is not None]
    assert world.partition(group).range == FULL_RANGE


def test_transcript() -> None:
    """The exact bytes of the whole conversation are those recorded; set UPDATE_TRANSCRIPTS=1 to record anew."""
    text = "\n".join(scenario().lines) + "\n"
    if os.environ.get("UPDATE_TRANSCRIPTS"):
        TRANSCRIPT.write_text(text)
    assert text == TRANSCRIPT.read_text()
