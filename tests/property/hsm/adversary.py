"""A malicious host over several HSMs: replays, reorders and alters everything, crashes, runs many leaders at once.

Every action draws what it needs from a `random.Random`, so that hypothesis can choose seeds and a plain loop can run
thousands of steps. Checks are the ledger's, after every request.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from juicebox_hsm.consensus.types import ZERO_MAC, Captured, LogEntry, TransferringIn, TransferringOut
from juicebox_hsm.hsm import messages as m
from juicebox_hsm.hsm.state import GroupState, LeaderState, Poisoned, RoleState, WitnessState
from juicebox_hsm.ids import FULL_RANGE, GroupId, OwnedRange, RecordId
from juicebox_hsm.merkle.kernel import Side
from juicebox_hsm.wire import requests as secrets
from tests.fakes.counter_nvram import CounterPlatform, PowerCut, RollbackRefused
from tests.fakes.hsm import Client, MemoryPlatform, World, realm_keys
from tests.property.hsm.forgery import alter
from tests.property.hsm.ledger import RECORDS, Ledger

LOWER = OwnedRange(FULL_RANGE.start, RecordId(b"\x7f" + b"\xff" * 31))
UPPER = OwnedRange(RecordId(b"\x80" + bytes(31)), FULL_RANGE.end)
RANGES = [FULL_RANGE, LOWER, UPPER]
GROUPS_MAX = 8
"""Replaced groups are replaced in turn only so often: every one makes the ledger's checks slower."""


@dataclass
class Adversary(World):
    """The host. `groups` 1 to 3: the realm's first group of HSM 0 alone, then groups of all HSMs."""

    platform: type[MemoryPlatform] = CounterPlatform
    groups: int = 2
    ledger: Ledger = field(init=False)
    users: list[Client] = field(init=False)
    sent: dict[type[m.Request], list[m.Request]] = field(default_factory=dict)
    """Everything ever asked, by kind; what the HSMs ever output is kept by the ledger and stands in later requests."""
    steps: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    """How often what happened: answers by `answer_name`, alterations, replays, refused rollbacks."""
    tampering: random.Random | None = None
    """Alters about half of the requests on their way while it is set."""
    withheld: GroupId | None = None
    """The source whose transfers this host never completes."""
    neglected: int | None = None
    """The HSM that this host shows no entries, so that only a jump takes it along."""

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
        """Send one request, perhaps altered, and let the ledger see it, and every NVRAM write before it."""
        if self.tampering is not None and self.tampering.random() < 0.5:
            request = self.altered(request, self.tampering)
        self.sent.setdefault(type(request), []).append(request)
        hsm, platform = self.hsms[number], self.platforms[number]
        written = len(platform.history)
        try:
            response = hsm.handle(request)
        finally:
            self._tell_writes(number, written if number in self.ledger.persisted else 0)
        self.ledger.observe(number, hsm, request, response)
        self.seen[answer_name(request, response)] += 1
        if isinstance(response, m.NewGroupOk):  # also of a replayed request, which nobody else knows of
            self.logs[response.group] = []
            self.members[response.group] = [number]
        return response

    def _tell_writes(self, number: int, known: int) -> None:
        for content in self.platforms[number].history[known:]:
            self.ledger.wrote(number, content)

    def altered(self, request: m.Request, chooser: random.Random) -> m.Request:
        """Return the request with one thing changed, perhaps for something that was asked before."""
        altered = alter(request, chooser, [self.recorded(chooser) for _ in range(4)])
        self.seen["altered"] += altered != request
        return altered

    def recorded(self, chooser: random.Random) -> m.Request:
        """Choose a request of any age; rare kinds are as likely as frequent ones."""
        return chooser.choice(chooser.choice(list(self.sent.values())))

    def crash(self, number: int) -> None:
        """Lose volatile state; start again from what lies on disk. Raises `RollbackRefused` and `PowerCut`."""
        self.ledger.crashed(number)
        written = len(self.platforms[number].history)
        super().crash(number)
        self._tell_writes(number, written)

    def counted(self, number: int) -> CounterPlatform:
        """Return an HSM's platform as its host sees it."""
        platform = self.platforms[number]
        assert isinstance(platform, CounterPlatform)
        return platform

    def restore(self, number: int, files: list[bytes]) -> bool:
        """Restart an HSM on these files instead of those it wrote; False if it refused or the power failed again.

        Then the host shows it everything it ever wrote, as an operator would who wants it back.
        """
        platform = self.counted(number)
        platform.files = files
        try:
            self.crash(number)
        except (RollbackRefused, PowerCut) as refusal:
            self.seen[type(refusal).__name__] += 1
            platform.cut_after = None
            platform.files = list(platform.envelopes)
            self.crash(number)
            return False
        finally:
            platform.cut_after = None
        return True

    def replace_group(self, chooser: random.Random, group: GroupId) -> None:
        """Make another group of the same members, so that there is something left to do after the end of this one."""
        numbers = self.members[group]
        leader = chooser.choice(numbers)
        ordered = sorted(numbers, key=self.id)
        signed = tuple((self.id(number), self.statement(number)) for number in ordered)
        made = self.send(leader, m.NewGroup(self.realm, signed, self.generations(chooser, ordered)))
        if not isinstance(made, m.NewGroupOk):
            return
        configuration = tuple(self.id(number) for number in ordered)
        sent = self.sent[m.NewGroup][-1]
        assert isinstance(sent, m.NewGroup)
        for number in ordered:
            if number != leader:
                self.send(number, m.JoinGroup(self.realm, made.group, configuration, made.statement, sent.generations))
        self.members[made.group] = ordered

    def generations(self, chooser: random.Random, numbers: list[int]) -> tuple[int, ...]:
        """Return these HSMs' generations, now and then with lies about them."""
        found = []
        for number in numbers:
            lie = chooser.choice((-1, 1)) if chooser.random() < 0.3 else 0
            found.append(max(self.generation(number) + lie, 0))
        return tuple(found) if any(found) else ()

    # choices ------------------------------------------------------------------------------------------------

    def pick(self, chooser: random.Random) -> tuple[int, GroupId, GroupState]:
        """Choose a group, more often one that owns something, and one of its members."""
        live = [group for group in self.logs if any(self.role(number, group) for number in self.members[group])]
        live = live or [self.new_group(list(range(self.size)))]
        hot = [group for group in live if any(entry.partition for entry in self._tails(group))]
        group = chooser.choice(hot if hot and chooser.random() < 0.8 else live)
        number = chooser.choice([one for one in self.members[group] if self.role(one, group)])
        return number, group, self.hsms[number]._state.groups[group]

    def role(self, number: int, group: GroupId) -> RoleState | None:
        """Return an HSM's role in a group, None where it is not (or no longer) a member."""
        member = self.hsms[number]._state.groups.get(group)
        return None if member is None else member.role

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
        """Choose captures to show: the newest, some of any age, another group's, or one under every member's name."""
        known = self.ledger.captures.get(group, [])
        match chooser.randrange(7):
            case 0:
                return tuple(chooser.choices(known, k=3)) if known else ()
            case 2 if known:
                shown = chooser.choice(known[-3 * self.size :])
                return tuple(replace(shown, hsm=self.id(voter)) for voter in self.members[group])
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
        if missing and number != self.neglected:
            self.send(number, m.CaptureNext(self.realm, group, missing))

    def serve(self, chooser: random.Random, number: int, group: GroupId, leader: LeaderState) -> None:
        """Send one user's request to this leader."""
        user = chooser.choice(self.users)
        client = Client(user.public, user.record, (self.steps, user.record), chooser.randrange(3))
        client.version, client.tag, client.oprf_key = user.version, user.tag, user.oprf_key
        kinds: list[Callable[[], secrets.SecretsRequest]] = [  # made when chosen: a blinded input is not cheap
            secrets.Register1,
            lambda: client.register2(2),
            secrets.Recover1,
            client.recover2,
            client.recover2,
            client.recover2,
            lambda: client.recover3(bytes(16)),
            client.recover3,
            secrets.Delete,
        ]
        request = chooser.choice(kinds)()
        shown = leader.log.last
        if chooser.random() < 0.2:
            shown = chooser.choice(self.path(group, shown, 6))
        if shown.partition is None or not shown.partition.range.contains(client.record):
            return
        proof = self.nodes.proof(shown.partition, client.record)
        index = shown.index + (1 if chooser.random() < 0.02 else 0)
        if chooser.random() < 0.1:
            message = client.handshake(request)
            self.send(number, m.AppRequest(self.realm, group, client.record, client.session_id, message, proof, index))
            return
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
        sealed = client.transport(request)
        self.send(number, m.AppRequest(self.realm, group, client.record, client.session_id, sealed, proof, index))

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
        """Move an HSM that lags onto a committed entry with its certificate, or any HSM onto anything."""
        number, group, _ = self.pick(chooser)
        last = chooser.choice(list(self.ledger.entries[group].values())[-8:])
        lagging = [
            (voter, behind, max(chain))
            for behind, chain in self.ledger.committed.items()
            for voter in self.members[behind]
            if self.captured(voter, behind) < max(chain)
        ]
        if lagging and chooser.random() < 0.7:
            number, group, index = chooser.choice(lagging)
            last = self.ledger.entries[group][self.ledger.committed[group][index]]
        if not isinstance(self.role(number, group), WitnessState):  # deposed first if it leads
            self.send(number, m.StepDown(self.realm, group, force=True))
        entries = self.path(group, last, chooser.randint(1, 4))
        votes = tuple(self.ledger.captures.get(group, []))
        if chooser.random() < 0.2:
            votes = self.votes(chooser, group)
        self.send(number, m.CaptureJump(self.realm, group, entries, votes))

    def act_splice(self, chooser: random.Random) -> None:
        """Jump onto an entry with another branch's successor behind it, so that votes for that one seem to count.

        Sometimes the successor's link is altered too: then its place is right and its mac is not.
        """
        splices = [splice for group in self.logs for splice in self._splices(group)]
        if not splices:  # for want of branches
            self.act_rival(chooser)
            return
        number, group, entry, other = chooser.choice(splices)
        if chooser.random() < 0.5:
            other = replace(other, prev_mac=entry.entry_mac)
        if not isinstance(self.role(number, group), WitnessState):
            self.send(number, m.StepDown(self.realm, group, force=True))
        self.seen["spliced"] += 1
        votes = tuple(self.ledger.captures[group])
        self.send(number, m.CaptureJump(self.realm, group, (*self.path(group, entry, 2), other), votes))

    def _splices(self, group: GroupId) -> list[tuple[int, GroupId, LogEntry, LogEntry]]:
        """Return HSMs that captured less with two entries that are consecutive, not linked, and both voted for."""
        voted = dict.fromkeys(vote.mac for vote in self.ledger.captures.get(group, [])[-32:])
        known = [self.ledger.entries[group][mac] for mac in voted]
        return [
            (number, group, entry, other)
            for entry in known
            for other in known
            if other.index == entry.index + 1 and other.prev_mac != entry.entry_mac
            for number in self.members[group]
            if entry.index > self.captured(number, group)
        ]

    def act_crash(self, chooser: random.Random) -> None:
        """Crash an HSM between requests."""
        self.crash(chooser.randrange(self.size))

    def act_crash_in_write(self, chooser: random.Random) -> None:
        """Cut the power between any two steps of an NVRAM write, and perhaps of the start after it."""
        number = chooser.randrange(self.size)
        platform = self.counted(number)
        platform.cut_after = chooser.randrange(3)
        try:
            self.send(number, m.PersistState())
        except Poisoned:
            self.seen["PowerCut"] += 1
        platform.cut_after = chooser.choice([None, None, *range(4)])
        self.restore(number, chooser.sample(platform.files, len(platform.files)))

    def act_restore(self, chooser: random.Random) -> None:
        """Restart an HSM on files of any age, perhaps of another HSM or damaged."""
        number = chooser.randrange(self.size)
        owner = number if chooser.random() < 0.8 else chooser.randrange(self.size)
        files = chooser.choices(self.counted(owner).envelopes[-chooser.choice([2, 4, 10**6]) :], k=2)
        if chooser.random() < 0.2:
            files[0] = files[0][:-1] + bytes([files[0][-1] ^ 1])
        self.restore(number, files)

    def act_replay(self, chooser: random.Random) -> None:
        """Send anything that was ever asked again, to anyone."""
        self.seen["replayed"] += 1
        self.send(chooser.randrange(self.size), self.recorded(chooser))

    def act_forge(self, chooser: random.Random) -> None:
        """Alter anything that was ever asked and send it to anyone."""
        self.send(chooser.randrange(self.size), self.altered(self.recorded(chooser), chooser))

    def act_tamper(self, chooser: random.Random) -> None:
        """Do something else, with about half of its requests altered on the way: fresh ones, at the right HSM."""
        self.tampering = chooser
        chooser.choice(HONEST_ACTIONS)(self, chooser)
        self.tampering = None

    def act_retire(self, chooser: random.Random) -> None:
        """End a group if it will, let members follow, and let some forget it; perhaps make another."""
        found = self.pick_leader(chooser)
        if found is None or len(self.logs) > GROUPS_MAX:
            return
        number, group, leader = found
        self.send(number, m.RetireGroup(self.realm, group))
        if leader.log.last.retired:
            self.settle(chooser, number, group, leader)
            self.make_forget(chooser, group, leader.log.last)
            if chooser.random() < 0.5:
                self.replace_group(chooser, group)

    def act_forget(self, chooser: random.Random) -> None:
        """Ask some members to forget a group, retired or not."""
        group = chooser.choice(list(self.logs))
        known = list(self.ledger.entries[group].values())
        retired = [entry for entry in known if entry.retired]
        self.make_forget(chooser, group, chooser.choice(retired or known))

    def make_forget(self, chooser: random.Random, group: GroupId, entry: LogEntry) -> None:
        """Ask some members to forget a group, with the captures of this entry, or others."""
        votes = tuple(vote for vote in self.ledger.captures.get(group, []) if vote.mac == entry.entry_mac)
        if chooser.random() < 0.2:
            votes = self.votes(chooser, group)
        for number in self.members[group]:
            if chooser.random() < 0.6:
                self.send(number, m.ForgetGroup(self.realm, group, entry, votes))

    def act_come_back(self, chooser: random.Random) -> None:
        """Join a group again that was joined once, and follow its log from the start as far as the host likes."""
        joins = [request for request in self.sent.get(m.JoinGroup, []) if isinstance(request, m.JoinGroup)]
        if not joins:
            return
        join = chooser.choice(joins)
        for number in self.members.get(join.group, []):
            if isinstance(self.send(number, join), m.RoleOk) and self.captured(number, join.group) == 0:
                entries = list(self.ledger.entries[join.group].values())
                path = self.path(join.group, chooser.choice(entries), 10**6)
                self.send(number, m.CaptureNext(self.realm, join.group, path))
                self.send(number, m.PersistState())
                self.send(number, m.BecomeLeader(self.realm, join.group, path[-1]))

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
            if isinstance(self.role(found[0], found[1]), LeaderState):
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


HONEST_ACTIONS = [
    Adversary.act_client,
    Adversary.act_capture,
    Adversary.act_settle,
    Adversary.act_lead,
    Adversary.act_jump,
    Adversary.act_transfer,
    Adversary.act_move,
    Adversary.act_retire,
    Adversary.act_forget,
]
"""What the host does for its users, so that altering its requests is most likely to matter."""


def answer_name(request: m.Request, response: m.Response) -> str:
    """Return a name for what a request came to, as `CaptureNext: INVALID_MAC`."""
    answer = response.name if isinstance(response, m.Outcome) else type(response).__name__
    return f"{type(request).__name__}: {answer}"
