"""A malicious host over several HSMs: it keeps everything, replays, reorders, crashes, and runs many leaders at once.

Every action draws what it needs from a `random.Random`, so that hypothesis can choose seeds and a plain loop can run
thousands of steps. Checks are the ledger's, after every request.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from juicebox_hsm.consensus.types import ZERO_MAC, Captured, LogEntry, TransferringIn, TransferringOut
from juicebox_hsm.hsm import messages as m
from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.hsm.state import GroupState, LeaderState, Poisoned, WitnessState
from juicebox_hsm.ids import FULL_RANGE, GroupId, OwnedRange, RecordId
from juicebox_hsm.merkle.kernel import Side
from juicebox_hsm.wire import secrets
from tests.fakes.hsm import Client, World, realm_keys
from tests.property.hsm.ledger import RECORDS, Ledger

LOWER = OwnedRange(FULL_RANGE.start, RecordId(b"\x7f" + b"\xff" * 31))
UPPER = OwnedRange(RecordId(b"\x80" + bytes(31)), FULL_RANGE.end)
RANGES = [FULL_RANGE, LOWER, UPPER]


class RollbackRefused(Exception):
    """The NVRAM back end noticed that an image is not the newest one."""


@dataclass
class Adversary(World):
    """The host. `groups` 1 to 3: the realm's first group of HSM 0 alone, then groups of all HSMs."""

    groups: int = 2
    ledger: Ledger = field(init=False)
    users: list[Client] = field(init=False)
    sent: list[tuple[int, m.Request]] = field(default_factory=list)
    steps: int = 0
    withheld: GroupId | None = None
    """The source whose transfers this host never completes."""

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.nodes, realm_keys().record_key.expose())
        super().__post_init__()
        for _ in range(self.groups - 1):
            self.new_group(list(range(self.size)), 0)
        if self.groups > 1:
            self.move(self.first, 0, list(self.logs)[1], 0, FULL_RANGE)
        public = self.platforms[0].keys.communication_public
        self.users = [Client(public, record, (self.seed, record)) for record in RECORDS]

    def send(self, number: int, request: m.Request) -> m.Response:
        """Send one request and let the ledger see it, and every NVRAM write before it."""
        hsm, platform = self.hsms[number], self.platforms[number]
        written = len(platform.history)
        try:
            response = hsm.handle(request)
        finally:
            if number not in self.ledger.persisted:
                written = 0
            for content in platform.history[written:]:
                self.ledger.wrote(number, content)
        self.ledger.observe(number, hsm, request, response)
        return response

    def crash(self, number: int) -> None:
        """Lose volatile state; start again from the newest image."""
        self.ledger.crashed(number)
        super().crash(number)

    # choices ------------------------------------------------------------------------------------------------

    def pick(self, chooser: random.Random) -> tuple[int, GroupId, GroupState]:
        """Choose a group, more often one that owns something, and one of its members."""
        hot = [group for group in self.logs if any(entry.partition for entry in self._tails(group))]
        group = chooser.choice(hot if hot and chooser.random() < 0.8 else list(self.logs))
        number = chooser.choice(self.members[group])
        return number, group, self.hsms[number]._state.groups[group]

    def pick_leader(self, chooser: random.Random) -> tuple[int, GroupId, LeaderState] | None:
        """Choose an HSM that leads something, if any does."""
        leading = [
            (number, group, state.role)
            for number, hsm in enumerate(self.hsms)
            for group, state in sorted(hsm._state.groups.items())
            if isinstance(state.role, LeaderState)
        ]
        return chooser.choice(leading) if leading else None

    def votes(self, chooser: random.Random, group: GroupId) -> tuple[Captured, ...]:
        """Choose captures to show: the newest ones, some of them, old ones, or another group's."""
        known = self.ledger.captures.get(group, [])
        match chooser.randrange(6):
            case 0:
                return tuple(chooser.choices(known, k=3)) if known else ()
            case 1:
                other = self.ledger.captures.get(chooser.choice(list(self.logs)), [])
                return (*known[-2:], *(replace(vote, group=group) for vote in other[-3:]))
            case _:
                return tuple(known[-3 * self.size :])

    def path(self, group: GroupId, last: LogEntry, length: int) -> tuple[LogEntry, ...]:
        """Return up to `length` consecutive entries that end at `last`."""
        found = [last]
        while len(found) < length and found[0].prev_mac in self.ledger.entries[group]:
            found.insert(0, self.ledger.entries[group][found[0].prev_mac])
        return tuple(found)

    # actions ------------------------------------------------------------------------------------------------

    def act_client(self, chooser: random.Random) -> None:
        """Let a user open a session and send a request to some leader, perhaps with an old proof."""
        found = self.pick_leader(chooser)
        if found is not None:
            self.serve(chooser, *found)

    def act_rival(self, chooser: random.Random) -> None:
        """Let an HSM lead whatever it captured, feed it a few requests, and let it capture its own entries."""
        number, group, state = self.pick(chooser)
        _, mac = self.hsms[number]._state.captured.get(group, (0, ZERO_MAC))
        if mac == ZERO_MAC:
            return
        self.send(number, m.BecomeLeader(self.realm, group, self.ledger.entries[group][mac]))
        for _ in range(chooser.randint(1, 3)):
            if isinstance(state.role, LeaderState):
                self.serve(chooser, number, group, state.role)
        if isinstance(state.role, LeaderState):
            self.follow(number, group, self.path(group, state.role.log.last, 10**6))
            self.send(number, m.PersistState())

    def follow(self, number: int, group: GroupId, entries: tuple[LogEntry, ...]) -> None:
        """Show an HSM what it lacks of these entries."""
        captured = self.captured(number, group)
        missing = tuple(entry for entry in entries if entry.index > captured)
        if missing:
            self.send(number, m.CaptureNext(self.realm, group, missing))

    def serve(self, chooser: random.Random, number: int, group: GroupId, leader: LeaderState) -> None:
        """Send one user's request to this leader."""
        user = chooser.choice(self.users)
        client = Client(user.public, user.record, (self.steps, user.record), chooser.randrange(3))
        client.version, client.tag, client.oprf_key = user.version, user.tag, user.oprf_key
        requests: list[secrets.SecretsRequest] = [
            secrets.Register1(),
            client.register2(2),
            secrets.Recover1(),
            client.recover2(),
            client.recover2(),
            client.recover2(),
            client.recover3(bytes(16)),
            client.recover3(),
            secrets.Delete(),
        ]
        request = chooser.choice(requests)
        begun = client.handshake(None)
        opened = self.send(
            number,
            m.Handshake(
                self.realm,
                group,
                client.record,
                client.session_id,
                begun.client_ephemeral_public,
                begun.payload_ciphertext,
            ),
        )
        if not isinstance(opened, m.HandshakeOk):
            return
        client.read(opened.noise)
        shown = leader.log.last
        if chooser.random() < 0.2:
            shown = chooser.choice(self.path(group, shown, 6))
        if shown.partition is None or not shown.partition.range.contains(client.record):
            return
        proof = self.nodes.proof(shown.partition, client.record)
        index = shown.index + (1 if chooser.random() < 0.02 else 0)
        message = m.AppRequest(
            self.realm, group, client.record, client.session_id, client.transport(request), proof, index
        )
        self.sent.append((number, message))
        self.send(number, message)

    def act_capture(self, chooser: random.Random) -> None:
        """Let an HSM capture up to three entries along some branch."""
        number, group, _ = self.pick(chooser)
        _, mac = self.hsms[number]._state.captured.get(group, (0, ZERO_MAC))
        shown: list[LogEntry] = []
        for _ in range(chooser.randint(1, 3)):
            children = self.ledger.children.get((group, mac), [])
            if not children:
                break
            shown.append(chooser.choice(children))
            mac = shown[-1].entry_mac
        if chooser.random() < 0.1:
            shown = [chooser.choice(list(self.ledger.entries[group].values()))]
        self.send(number, m.CaptureNext(self.realm, group, tuple(shown)))

    def act_persist(self, chooser: random.Random) -> None:
        """Let an HSM persist and sign."""
        self.send(chooser.randrange(self.size), m.PersistState())

    def act_commit(self, chooser: random.Random) -> None:
        """Show some captures to some HSM."""
        number, group, _ = self.pick(chooser)
        self.send(number, m.Commit(self.realm, group, self.votes(chooser, group)))

    def act_settle(self, chooser: random.Random) -> None:
        """Behave well for once: some members follow a leader's log, persist, and the leader commits."""
        found = self.pick_leader(chooser)
        if found is not None:
            self.settle(chooser, *found)

    def settle(self, chooser: random.Random, number: int, group: GroupId, leader: LeaderState) -> None:
        """Let some members follow this leader and commit there."""
        entries = self.path(group, leader.log.last, 10**6)
        voters = [voter for voter in self.members[group] if chooser.random() < 0.7]
        votes: tuple[Captured, ...] = ()
        for voter in voters:
            self.follow(voter, group, entries)
            answer = self.send(voter, m.PersistState())
            assert isinstance(answer, m.PersistStateOk)
            votes += tuple(vote for vote in answer.captured if vote.group == group)
        self.send(number, m.Commit(self.realm, group, votes))

    def act_lead(self, chooser: random.Random) -> None:
        """Make an HSM leader of its captured head, or try with any other entry."""
        number, group, _ = self.pick(chooser)
        _, mac = self.hsms[number]._state.captured.get(group, (0, ZERO_MAC))
        entry = self.ledger.entries[group].get(mac)
        if entry is None or chooser.random() < 0.1:
            entry = chooser.choice(list(self.ledger.entries[group].values()))
        self.send(number, m.BecomeLeader(self.realm, group, entry))

    def act_step_down(self, chooser: random.Random) -> None:
        """Depose some HSM, gently or not."""
        number, group, _ = self.pick(chooser)
        self.send(number, m.StepDown(self.realm, group, force=chooser.random() < 0.5))

    def act_jump(self, chooser: random.Random) -> None:
        """Try to move an HSM onto any entry, with any captures; depose it first if it leads."""
        number, group, state = self.pick(chooser)
        if not isinstance(state.role, WitnessState):
            self.send(number, m.StepDown(self.realm, group, force=True))
        last = chooser.choice(list(self.ledger.entries[group].values())[-8:])
        entries = self.path(group, last, chooser.randint(1, 4))
        votes = tuple(self.ledger.captures.get(group, [])[-12:])
        if chooser.random() < 0.3:
            votes = self.votes(chooser, group)
        self.send(number, m.CaptureJump(self.realm, group, entries, votes))

    def act_crash(self, chooser: random.Random) -> None:
        """Crash an HSM between requests."""
        self.crash(chooser.randrange(self.size))

    def act_crash_in_write(self, chooser: random.Random) -> None:
        """Crash an HSM while it writes NVRAM, before or after the bytes landed, and try to restore an old image."""
        number = chooser.randrange(self.size)
        platform = self.platforms[number]
        landed = chooser.random() < 0.5

        def fail(content: bytes) -> None:
            if landed:
                platform.nvram = content
                platform.history.append(content)
            raise OSError("power cut")

        platform.on_write = fail
        try:
            self.send(number, m.PersistState())
        except Poisoned:
            pass
        platform.on_write = None
        try:
            self.restore(number, chooser.choice(platform.history))
        except RollbackRefused:
            pass
        self.crash(number)

    def restore(self, number: int, image: bytes) -> None:
        """Put an NVRAM image back; a fresh back end (hardware.md 2.2) accepts the newest one only."""
        if image != self.platforms[number].nvram:
            raise RollbackRefused
        self.platforms[number].nvram = image

    def act_replay(self, chooser: random.Random) -> None:
        """Send an old client message again, to anyone."""
        if self.sent:
            number, message = chooser.choice(self.sent[-20:])
            if chooser.random() < 0.5:
                number = chooser.randrange(self.size)
            self.send(number, message)

    def act_transfer(self, chooser: random.Random) -> None:
        """Take some transfer a step further at some leader, or a step that does not fit."""
        found = self.pick_leader(chooser)
        if found is not None and self.groups > 1:
            self.advance(chooser, *found)

    def advance(self, chooser: random.Random, number: int, group: GroupId, leader: LeaderState) -> None:
        """Try the next step of a transfer at this leader."""
        marker = leader.log.last.transferring
        if isinstance(marker, TransferringOut):
            self._at_source(chooser, number, group, marker)
            return
        if isinstance(marker, TransferringIn):
            self._at_destination(chooser, number, group, leader, marker)
            return
        waiting = [
            (request, ok)
            for request, ok in self.ledger.prepared[-6:]
            if request.source == group
            and any(isinstance(entry.transferring, TransferringIn) for entry in self._tails(request.destination)[-1:])
        ]
        if chooser.random() < 0.1:
            waiting = self.ledger.prepared
        if waiting and chooser.random() < 0.8:
            self._out(number, group, leader, *chooser.choice(waiting[-4:]))
            return
        offers = [(other, owned) for other in self.logs if other != group for owned in self._offers(other, group)] or [
            (other, FULL_RANGE) for other in self.logs if other != group
        ]
        if chooser.random() < 0.1:
            offers = [(other, owned) for other in self.logs for owned in RANGES]
        other, owned = chooser.choice(offers)
        self.send(number, m.PrepareTransfer(self.realm, other, group, owned))

    def _offers(self, other: GroupId, group: GroupId) -> list[OwnedRange]:
        """Return ranges that `other` could give to `group`, or has given and never completed."""
        tail = self._tails(other)[-1]
        marker = tail.transferring
        if isinstance(marker, TransferringOut):
            return [marker.partition.range] * 3 if marker.destination == group else []
        if tail.partition is None:
            return []
        owned = tail.partition.range
        return [owned, *(part for part in RANGES if owned.split_at(part) is not None)]

    def act_move(self, chooser: random.Random) -> None:
        """Push transfers along: several steps at random leaders, each settled."""
        for _ in range(chooser.randint(2, 8)):
            found = self.pick_leader(chooser)
            if found is None or self.groups < 2:
                return
            self.advance(chooser, *found)
            if isinstance(self.hsms[found[0]]._state.groups[found[1]].role, LeaderState):
                self.settle(chooser, *found)

    def _tails(self, group: GroupId) -> list[LogEntry]:
        return list(self.ledger.entries[group].values())[-3:]

    def _out(
        self,
        number: int,
        group: GroupId,
        leader: LeaderState,
        request: m.PrepareTransfer,
        prepared: m.PrepareTransferOk,
    ) -> None:
        partition = leader.log.last.partition
        middle = None if partition is None else partition.range.split_at(request.range)
        proof = None if partition is None or middle is None else self.nodes.proof(partition, middle)
        self.send(
            number,
            m.TransferOut(
                self.realm, group, request.destination, request.range, prepared.nonce, prepared.statement, proof
            ),
        )

    def _at_source(self, chooser: random.Random, number: int, group: GroupId, marker: TransferringOut) -> None:
        nonces = [ok.nonce for request, ok in self.ledger.prepared if request.destination == marker.destination]
        arrived = any(dict(entry.consumed).get(group, 0) >= marker.at for entry in self._tails(marker.destination))
        if nonces and chooser.random() < (0.5 if arrived else 0.97):
            nonce = nonces[-1] if chooser.random() < 0.8 else chooser.choice(nonces)
            self.send(number, m.TransferStatement(self.realm, group, marker.destination, nonce))
        elif group != self.withheld:
            owned = marker.partition.range
            self.send(number, m.CompleteTransfer(self.realm, group, marker.destination, owned))

    def _at_destination(
        self, chooser: random.Random, number: int, group: GroupId, leader: LeaderState, marker: TransferringIn
    ) -> None:
        fitting = [found for found in self.ledger.transfers if found[0].destination == group]
        step = chooser.random()
        current = [found for found in fitting if found[0].nonce == leader.incoming]
        if step < (0.05 if current else 0.25):
            self.send(number, m.PrepareTransfer(self.realm, marker.source, group, marker.range))
        elif step < (0.07 if current else 0.4):
            self.send(number, m.CancelPreparedTransfer(self.realm, marker.source, group, marker.range))
        elif fitting and (current or step > 0.85):
            signed_for, signed, moved = chooser.choice(current or fitting)
            partition = leader.log.last.partition
            proofs = None
            if partition is not None and partition.range.join(moved.range) is not None:
                sides = (Side.RIGHT, Side.LEFT) if partition.range.end < moved.range.start else (Side.LEFT, Side.RIGHT)
                proofs = (self.nodes.edge(partition, sides[0]), self.nodes.edge(moved, sides[1]))
            self.send(
                number,
                m.TransferIn(
                    self.realm,
                    signed_for.source,
                    group,
                    moved,
                    signed.at,
                    proofs,
                    signed_for.nonce,
                    signed.statement,
                ),
            )

    # driving ------------------------------------------------------------------------------------------------

    def step(self, chooser: random.Random, weights: Sequence[int]) -> None:
        """Do one thing, chosen by weight."""
        action = chooser.choices(ACTIONS, weights)[0]
        self.steps += 1
        action(self, chooser)


ACTION_WEIGHTS: list[tuple[Callable[[Adversary, random.Random], None], int]] = [
    (Adversary.act_client, 10),
    (Adversary.act_capture, 8),
    (Adversary.act_persist, 4),
    (Adversary.act_commit, 6),
    (Adversary.act_settle, 8),
    (Adversary.act_lead, 5),
    (Adversary.act_step_down, 2),
    (Adversary.act_jump, 3),
    (Adversary.act_crash, 1),
    (Adversary.act_crash_in_write, 1),
    (Adversary.act_replay, 1),
    (Adversary.act_rival, 4),
    (Adversary.act_transfer, 6),
    (Adversary.act_move, 3),
]
ACTIONS = [action for action, _ in ACTION_WEIGHTS]
WEIGHTS = [weight for _, weight in ACTION_WEIGHTS]


def run(seed: int, steps: int, *, size: int = 0, groups: int = 0) -> Adversary:
    """Run one random schedule; raises `AssertionError` when an invariant breaks.

    Each schedule draws its own weights (swarm testing): attacks need runs in which the disturbing actions are rare.
    `size` (HSMs) and `groups` are drawn too unless given.
    """
    chooser = random.Random(seed)
    world = Adversary(
        size or chooser.choice([1, 2, 3, 3, 3, 4, 5]), seed, groups=groups or chooser.choice([1, 2, 2, 3, 3])
    )
    weights = [weight * chooser.choice((0, 1, 1, 4)) for weight in WEIGHTS]
    weights[0] += 1
    world.withheld = chooser.choice([None, *world.logs])
    for _ in range(steps):
        world.step(chooser, weights)
    return world


__all__ = ["ACTIONS", "Adversary", "Hsm", "run"]
