"""The safety invariants of hsm.md 14, kept by an observer that sees every request, answer and NVRAM write.

`Ledger.observe` is called after every request; it collects everything the HSMs ever output (the host keeps it all) and
raises `AssertionError` naming the invariant that broke. Entries are known by mac; a group's history is a tree of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from juicebox_hsm.consensus.nvram import PersistentState, decode_state
from juicebox_hsm.consensus.types import (
    ZERO_MAC,
    Captured,
    Leader,
    LogEntry,
    Partition,
    RoleStatus,
    TransferringIn,
    TransferringOut,
)
from juicebox_hsm.crypto.sealing import open_sealed
from juicebox_hsm.hsm import messages as m
from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.hsm.records import NOT_REGISTERED, Record, Registered, decode_record
from juicebox_hsm.hsm.state import GroupState, LeaderState, SteppingDownState, WitnessState
from juicebox_hsm.ids import GroupId, HsmId, RecordId
from juicebox_hsm.merkle.kernel import Tree
from tests.fakes.hsm import Nodes

RECORDS = [RecordId(b"\x20" * 32), RecordId(b"\xa0" * 32)]
"""The users of the simulated realm: one in each half of the range."""


@dataclass
class Leadership:
    """One leadership of one HSM in one group, with the fate of every reply it attached."""

    hsm: int
    group: GroupId
    fates: dict[bytes, str] = field(default_factory=dict)
    results: dict[bytes, m.ResultType] = field(default_factory=dict)
    abandoned: set[bytes] = field(default_factory=set)
    committed: int = 0


@dataclass
class Ledger:
    """Everything the outside could know, and what must be true of it."""

    nodes: Nodes
    record_key: bytes
    entries: dict[GroupId, dict[bytes, LogEntry]] = field(default_factory=dict)
    children: dict[tuple[GroupId, bytes], list[LogEntry]] = field(default_factory=dict)
    captures: dict[GroupId, list[Captured]] = field(default_factory=dict)
    signed: dict[tuple[HsmId, GroupId, int], bytes] = field(default_factory=dict)
    statements: set[Captured] = field(default_factory=set)
    prepared: list[tuple[m.PrepareTransfer, m.PrepareTransferOk]] = field(default_factory=list)
    transfers: list[tuple[m.TransferStatement, m.TransferStatementOk, Partition]] = field(default_factory=list)
    persisted: dict[int, PersistentState] = field(default_factory=dict)
    jumped: dict[tuple[int, GroupId], bytes] = field(default_factory=dict)
    configurations: dict[GroupId, tuple[HsmId, ...]] = field(default_factory=dict)
    leaderships: dict[tuple[int, GroupId], Leadership] = field(default_factory=dict)
    clocks: dict[tuple[int, GroupId, int], tuple[str, int]] = field(default_factory=dict)
    touched: dict[bytes, tuple[RecordId, m.ResultType]] = field(default_factory=dict)
    committed: dict[GroupId, dict[int, bytes]] = field(default_factory=dict)
    current: dict[RecordId, Record] = field(default_factory=lambda: dict.fromkeys(RECORDS, NOT_REGISTERED))
    spent: dict[RecordId, int] = field(default_factory=lambda: dict.fromkeys(RECORDS, 0))
    forgotten: set[tuple[int, GroupId]] = field(default_factory=set)
    released: set[bytes] = field(default_factory=set)
    releases: int = 0

    # NVRAM --------------------------------------------------------------------------------------------------

    def wrote(self, number: int, content: bytes) -> None:
        """Check a completed NVRAM write against the one before (I6, I8)."""
        new = decode_state(content)
        assert new is not None
        old = self.persisted.get(number)
        self.persisted[number] = new
        if old is None:
            return
        assert old.id == new.id, "I6: an HSM keeps its id"
        if old.realm is None:
            return
        assert new.realm is not None, "I6: an HSM keeps its realm"
        assert new.realm.id == old.realm.id, "I6: an HSM keeps its realm"
        assert new.realm.generation >= old.realm.generation, "I21: a generation never falls"
        for group, before in old.realm.groups.items():
            if group not in new.realm.groups:
                self._forgot(number, group, old.realm.generation, new.realm.generation)
                continue
            after = new.realm.groups[group]
            assert after.configuration == before.configuration, "I6: configurations never change"
            if before.captured is None:
                continue
            assert after.captured is not None, "I6: a captured pair is never forgotten"
            assert after.captured[0] >= before.captured[0], "I6: captured indexes never fall"
            if not self._is_ancestor(group, before.captured, after.captured[1]):
                target = self.jumped.get((number, group))
                assert target is not None, "I8: heads are descendants or follow a jump"
                jumped = (self.entries[group][target].index, target)
                assert self._is_ancestor(group, jumped, after.captured[1]), "I8: heads follow the jump's target"

    def _forgot(self, number: int, group: GroupId, before: int, after: int) -> None:
        """I6, I21: a membership ends only when a strict majority signed its end, and so does a generation."""
        assert after == before + 1, "I21: leaving a group ends a generation"
        configuration = self.configurations[group]
        votes = {
            (vote.mac, vote.hsm)
            for vote in self.captures.get(group, [])
            if vote.hsm in configuration and self.entries[group][vote.mac].retired
        }
        assert len({mac for mac, _ in votes}) == 1, "I6: a membership ends only with its group"
        assert 2 * len(votes) > len(configuration), "I6: a group has ended when a strict majority signed that"
        self.forgotten.add((number, group))
        leadership = self.leaderships.pop((number, group), None)
        if leadership is not None:
            self._drop(leadership)

    def _is_ancestor(self, group: GroupId, pair: tuple[int, bytes], mac: bytes) -> bool:
        """Tell whether the entry `pair` is `mac` or lies below it."""
        entry = self.entries[group].get(mac)
        while entry is not None and entry.index > pair[0]:
            entry = self.entries[group].get(entry.prev_mac)
        return entry is not None and entry.entry_mac == pair[1]

    # requests -----------------------------------------------------------------------------------------------

    def observe(self, number: int, hsm: Hsm, request: m.Request, response: m.Response) -> None:
        """Take in one request and its answer and check everything it may have affected."""
        delta = getattr(response, "delta", None)
        if isinstance(delta, bytes):
            self.nodes.put(delta)
        self._new_entry(number, hsm, request, response)
        if isinstance(response, m.PersistStateOk):
            self._signed(number, response.captured)
        if isinstance(request, m.CaptureJump) and isinstance(response, m.CaptureJumpOk):
            self.jumped[number, request.group] = hsm._state.captured[request.group][1]
        if isinstance(request, m.PrepareTransfer) and isinstance(response, m.PrepareTransferOk):
            self.prepared.append((request, response))
        if isinstance(request, m.TransferOut) and isinstance(response, m.TransferOutOk):
            wanted = (request.source, request.destination, request.range)
            prepared = [(asked.source, asked.destination, asked.range) for asked, _ in self.prepared]
            assert wanted in prepared, "I4: a range leaves only towards a group that prepared for it"
        if isinstance(request, m.TransferStatement) and isinstance(response, m.TransferStatementOk):
            role = hsm._state.groups[request.source].role
            assert isinstance(role, LeaderState)
            marker = role.log.last.transferring
            assert isinstance(marker, TransferringOut)
            self.transfers.append((request, response, marker.partition))
        if isinstance(request, m.Commit) and isinstance(response, m.CommitOk):
            self._committed(number, hsm, request, response)
        self._follow_roles(number, hsm, request)
        for group in hsm._state.groups.values():
            configuration = self.configurations.setdefault(group.id, group.configuration)
            assert group.configuration == configuration, "I6: a group has one configuration"
            self._check_role(number, group)
        for id_ in (*hsm._state.groups, *hsm._state.captured):
            assert (number, id_) not in self.forgotten, "I21: a forgotten group stays forgotten"
        for id_, (index, mac) in hsm._state.captured.items():
            made = self.entries[id_].get(mac)
            assert made is not None, "I9: only entries that an HSM made are captured"
            assert made.index == index, "I9: an entry is captured at its index"

    def crashed(self, number: int) -> None:
        """Take in that an HSM lost its volatile state."""
        for (hsm, _), leadership in list(self.leaderships.items()):
            if hsm == number:
                self._drop(leadership)
        self.leaderships = {key: value for key, value in self.leaderships.items() if key[0] != number}

    def _drop(self, leadership: Leadership) -> None:
        for mac, fate in leadership.fates.items():
            if fate == "pending":
                leadership.fates[mac] = "dropped"

    # entries ------------------------------------------------------------------------------------------------

    def _new_entry(self, number: int, hsm: Hsm, request: m.Request, response: m.Response) -> None:
        entry = getattr(response, "entry", None)
        if not isinstance(entry, LogEntry):
            return
        group = _led_group(request, response)
        parent = self.entries.setdefault(group, {}).get(entry.prev_mac)
        if entry.index > 1:
            assert parent is not None, "I9: a new entry continues a known one"
            assert parent.index == entry.index - 1, "I9: indexes are consecutive"
            assert not parent.retired, "I20: no entry follows a retired one"
        if entry.retired:
            assert isinstance(request, m.RetireGroup), "I20: only RetireGroup ends a log"
            assert entry.partition is None, "I20: what is retired owns nothing"
        if entry.entry_mac not in self.entries[group]:
            self.entries[group][entry.entry_mac] = entry
            self.children.setdefault((group, entry.prev_mac), []).append(entry)
        if isinstance(request, m.NewRealm | m.NewGroup):
            self.leaderships[number, group] = Leadership(number, group)
        self._check_marker(request, entry, parent)
        if isinstance(request, m.AppRequest):
            leadership = self.leaderships[number, group]
            role = hsm._state.groups[group].role
            assert isinstance(role, LeaderState)
            element = role.log.get(entry.index)
            assert element is not None
            assert element.result is not None
            assert leadership.fates.get(entry.entry_mac) is None, "I12: one reply per entry of a leadership"
            leadership.fates[entry.entry_mac] = "pending"
            leadership.results[entry.entry_mac] = element.result
            self.touched[entry.entry_mac] = (request.record_id, element.result)

    def _check_marker(self, request: m.Request, entry: LogEntry, parent: LogEntry | None) -> None:
        """I14: markers appear and disappear only through the transfer handlers, and say where they appeared."""
        if parent is None:
            assert entry.transferring is None
            assert not entry.consumed
            return
        before, after = dict(parent.consumed), dict(entry.consumed)
        assert all(after.get(source, 0) >= at for source, at in before.items()), "I14: consumed never decreases"
        if isinstance(request, m.PrepareTransfer | m.TransferOut):
            assert parent.transferring is None, "I14: one marker at a time"
            assert entry.transferring is not None
            assert entry.transferring.at == entry.index, "I14: a marker says where it appeared"
        elif isinstance(request, m.TransferIn | m.CancelPreparedTransfer):
            assert isinstance(parent.transferring, TransferringIn)
            assert entry.transferring is None
        elif isinstance(request, m.CompleteTransfer):
            assert isinstance(parent.transferring, TransferringOut)
            assert entry.transferring is None
        else:
            assert entry.transferring == parent.transferring, "I14: markers travel unchanged"
        if not isinstance(request, m.TransferIn):
            assert entry.consumed == parent.consumed, "I14: only TransferIn raises consumed"

    # signatures ---------------------------------------------------------------------------------------------

    def _signed(self, number: int, captured: tuple[Captured, ...]) -> None:
        realm = self.persisted[number].realm
        for statement in captured:
            assert realm is not None
            durable = realm.groups[statement.group].captured
            assert durable == (statement.index, statement.mac), "I7: signed implies durable"
            key = (statement.hsm, statement.group, statement.index)
            assert self.signed.setdefault(key, statement.mac) == statement.mac, "I8: no two macs at one index"
            if statement not in self.statements:
                self.statements.add(statement)
                self.captures.setdefault(statement.group, []).append(statement)

    # commits ------------------------------------------------------------------------------------------------

    def _committed(self, number: int, hsm: Hsm, request: m.Commit, response: m.CommitOk) -> None:
        group = request.group
        leadership = self.leaderships[number, group]
        assert response.committed >= leadership.committed, "I11: committed never falls"
        leadership.committed = response.committed
        chain = self.committed.setdefault(group, {})
        head = self._committed_head(hsm, request, response)
        fresh: list[LogEntry] = []
        entry: LogEntry | None = head
        while entry is not None and entry.index not in chain:
            fresh.append(entry)
            entry = self.entries[group].get(entry.prev_mac)
        if entry is not None:
            assert chain[entry.index] == entry.entry_mac, "I2: one committed entry per index"
        for entry in reversed(fresh):
            chain[entry.index] = entry.entry_mac
            self._apply(group, entry)
        self._check_ownership()
        configuration = hsm._state.groups[group].configuration
        for mac, _, result in response.responses:
            assert chain.get(self.entries[group][mac].index) == mac, "I3: released replies are committed"
            assert self._has_majority(group, mac, request, configuration), "I3: released with a strict majority"
            assert leadership.fates.get(mac) == "pending", "I3, I12: released at most once and never after abandoning"
            assert leadership.results[mac] == result
            leadership.fates[mac] = "released"
            self.releases += 1
        for mac in leadership.fates:
            index = self.entries[group][mac].index
            assert index > response.committed or chain[index] == mac, "6.3: an index the host counts as committed is"
        for mac in response.abandoned:
            assert leadership.fates.get(mac, "none") in {"pending", "none"}, "I12: abandoned once, never released"
            assert mac not in leadership.abandoned, "I12: abandoned macs are told once"
            if mac in leadership.fates:
                leadership.fates[mac] = "abandoned"
            leadership.abandoned.add(mac)
        assert not any(entry.entry_mac in leadership.abandoned for entry in fresh), "I12: nothing abandoned commits"

    def _committed_head(self, hsm: Hsm, request: m.Commit, response: m.CommitOk) -> LogEntry:
        """Return the entry that the commit speaks of: the first of the log, or what the votes prove."""
        role = hsm._state.groups[request.group].role
        if not isinstance(role, WitnessState):
            assert role.log.first == response.committed, "I9: the first element is the committed one"
            element = role.log.get(role.log.first)
            assert element is not None
            return element.entry
        votes = {vote.mac for vote in request.captures if vote.group == request.group and vote in self.statements}
        heads = set()
        for mac in votes:
            entry = self.entries[request.group].get(mac)
            while entry is not None and entry.index > response.committed:
                entry = self.entries[request.group].get(entry.prev_mac)
            if entry is not None and entry.index == response.committed:
                configuration = hsm._state.groups[request.group].configuration
                if self._has_majority(request.group, entry.entry_mac, request, configuration):
                    heads.add(entry.entry_mac)
        assert len(heads) == 1, "I3: a commit is proven by its votes"
        return self.entries[request.group][heads.pop()]

    def _has_majority(self, group: GroupId, mac: bytes, request: m.Commit, configuration: tuple[HsmId, ...]) -> bool:
        target = self.entries[group][mac]
        voters = {
            vote.hsm
            for vote in request.captures
            if vote.group == group
            and vote.hsm in configuration
            and vote in self.statements
            and self._is_ancestor(group, (target.index, mac), vote.mac)
        }
        return 2 * len(voters) > len(configuration)

    def _apply(self, group: GroupId, entry: LogEntry) -> None:
        """Run one committed entry against the one true state of every record (I1, I5)."""
        parent = self.entries[group].get(entry.prev_mac)
        for record in RECORDS:
            if entry.partition is None or not entry.partition.range.contains(record):
                continue
            after = self.record(entry.partition, record)
            owned_before = parent is not None and parent.partition is not None
            owned_before = owned_before and parent.partition.range.contains(record)  # type: ignore[union-attr]
            if not owned_before:
                assert after == self.current[record], "I5: a range arrives with its current records"
                continue
            before = self.record(parent.partition, record)  # type: ignore[union-attr, arg-type]  # owned before
            assert before == self.current[record], "I5: computed from the committed state"
            touched = self.touched.get(entry.entry_mac)
            if touched is None or touched[0] != record:
                assert after == before, "I5: only the asked record changes"
                continue
            self._count(record, before, after, touched[1])
            self.current[record] = after

    def _count(self, record: RecordId, before: Record, after: Record, result: m.ResultType) -> None:
        if result.kind is m.ResultKind.REGISTER2 or (result.kind is m.ResultKind.RECOVER3 and result.recovered):
            self.spent[record] = 0
        elif result.kind is m.ResultKind.RECOVER2 and result.guess_count is not None:
            assert isinstance(before, Registered)
            assert isinstance(after, Registered)
            assert after.guess_count == before.guess_count + 1 == result.guess_count, "I1: a guess is counted"
            self.spent[record] += 1
            assert self.spent[record] <= before.registration.num_guesses, "I1: guesses stay below the limit"

    def record(self, partition: Partition, record: RecordId) -> Record:
        """Read a record from the stored tree with the realm's own key."""
        bounds = partition.range
        proof = self.nodes.proof(partition, record)
        leaf = Tree(partition.root_hash, bounds.start, bounds.end, 1).latest(proof).leaf
        return NOT_REGISTERED if leaf is None else decode_record(open_sealed(self.record_key, leaf))

    def _check_ownership(self) -> None:
        """I4: every record has at most one owner, and none while its range is in flight."""
        tails = {group: self.entries[group][chain[max(chain)]] for group, chain in self.committed.items()}
        for record in RECORDS:
            owners = [
                group for group, tail in tails.items() if tail.partition and tail.partition.range.contains(record)
            ]
            assert len(owners) <= 1, "I4: one owner"
            for source, tail in tails.items():
                marker = tail.transferring
                if not isinstance(marker, TransferringOut) or not marker.partition.range.contains(record):
                    continue
                arrived = tails.get(marker.destination)
                if arrived is None or dict(arrived.consumed).get(source, 0) < marker.at:
                    assert not owners, "I4: a range in flight is owned by none"

    # roles --------------------------------------------------------------------------------------------------

    def _follow_roles(self, number: int, hsm: Hsm, request: m.Request) -> None:
        for group, state in hsm._state.groups.items():
            key = (number, group)
            known = self.leaderships.get(key)
            if isinstance(state.role, WitnessState):
                if known is not None:
                    if isinstance(request, m.StepDown) and request.force:
                        self._drop(known)
                    pending = [mac for mac, fate in known.fates.items() if fate == "pending"]
                    assert not pending, "I12: a leadership ends with every reply settled"
                    del self.leaderships[key]
            elif known is None:
                self.leaderships[key] = Leadership(number, group)

    def _check_role(self, number: int, group: GroupState) -> None:
        role = group.role
        self._check_clock(number, group.id, group.status())
        if isinstance(role, WitnessState):
            return
        log = role.log
        chained: LogEntry | None = None
        assert len(log) > 0, "I9: never empty"
        for index in range(log.first, log.last.index + 1):
            element = log.get(index)
            assert element is not None, "I9: consecutive"
            assert element.entry == self.entries[group.id].get(element.entry.entry_mac), "I9: entries stay as made"
            if chained is not None:
                assert element.entry.prev_mac == chained.entry_mac, "I9: chained"
            chained = element.entry
        assert chained is log.last
        if role.committed is not None:
            assert log.first <= role.committed <= log.last.index, "I9: committed lies within the log"
        if isinstance(role, SteppingDownState):
            assert role.committed is None or role.committed <= role.stepdown_at, "I11: not beyond the step-down"
            return
        partition = log.last.partition
        assert (role.tree is None) == (partition is None), "I10: a tree iff a partition"
        if role.tree is not None and partition is not None:
            assert role.tree.root == partition.root_hash, "I10: the tree is at the last root"

    def _check_clock(self, number: int, group: GroupId, status: RoleStatus) -> None:
        """I19: one clock value, one leadership (the index it starts at tells leaderships of a life apart)."""
        starting = status.role.starting if isinstance(status.role, Leader) else 0
        value = (type(status.role).__name__, starting)
        assert self.clocks.setdefault((number, group, status.at), value) == value, "I19: a role status is not reused"


def _led_group(request: m.Request, response: m.Response) -> GroupId:
    """Return the group in whose log a request's entry stands."""
    if isinstance(response, m.NewRealmOk | m.NewGroupOk):
        return response.group
    if isinstance(request, m.PrepareTransfer | m.TransferIn | m.CancelPreparedTransfer):
        return request.destination
    if isinstance(request, m.TransferOut | m.CompleteTransfer):
        return request.source
    assert isinstance(request, m.AppRequest | m.RetireGroup)
    return request.group


__all__ = ["RECORDS", "ZERO_MAC", "Leadership", "Ledger"]
