"""The invariants of hsm.md 14 on everything that HSMs make and sign: entries, NVRAM, captures, transfers, roles.

`Ledger` is told of every request, its answer and every completed write to NVRAM. It keeps all entries by mac (a group's
history is a tree of them), all statements, and how each HSM's roles go; what commits is `judge_commits`'. Each check
costs what the request changed, not what the realm holds. Raises `BrokenRule` with the invariant's name.

It reads the HSMs' state, which nothing else outside the core does: what an observer could only infer is seen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from juicebox_hsm.consensus.nvram import PersistentState, decode_state
from juicebox_hsm.consensus.types import Captured, Leader, LogEntry
from juicebox_hsm.hsm import messages as m
from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.hsm.messages import ResultKind
from juicebox_hsm.hsm.records import NOT_REGISTERED
from juicebox_hsm.hsm.state import GroupState, HsmState, LeaderState, SteppingDownState, WitnessState
from juicebox_hsm.ids import GroupId, HsmId, RecordId
from juicebox_hsm.wire.client import HandshakeRequest
from roles.tools.simulate.judge_rules import EveryNode, leaf_row, require, written_leaves
from roles.tools.simulate.judge_transfers import Transfers

PADDED_LEAF_BYTES: Final = 790
"""Every leaf of a registered or locked record (hsm.md 13.3)."""
_PENDING, _RELEASED, _ABANDONED, _DROPPED = "pending", "released", "abandoned", "dropped"
_RECOVERS: Final = (ResultKind.RECOVER1, ResultKind.RECOVER2, ResultKind.RECOVER3)


class Leadership:
    """One leadership of one HSM in one group, with the fate of every reply it attached."""

    __slots__ = ("abandoned", "checked", "committed", "fates", "number", "results", "sessions")

    def __init__(self, number: int) -> None:
        self.number = number
        self.fates: dict[bytes, str] = {}
        self.results: dict[bytes, m.ResultType] = {}
        self.abandoned: set[bytes] = set()  # asked, never walked
        self.committed = 0
        self.sessions: set[tuple[RecordId, int]] = set()  # asked, never walked
        self.checked: tuple[int, bytes] | None = None

    def drop(self) -> None:
        """Note that what is pending will never be answered."""
        self.fates = {mac: _DROPPED if fate == _PENDING else fate for mac, fate in self.fates.items()}


class Ledger:
    """Everything HSMs put out, and what must be true of it. HSMs go by any stable name."""

    def __init__(self, record_key: bytes) -> None:
        self.nodes = EveryNode(record_key)
        self.entries: dict[GroupId, dict[bytes, LogEntry]] = {}
        self.statements: dict[Captured, None] = {}
        self.configurations: dict[GroupId, tuple[HsmId, ...]] = {}
        self.leaderships: dict[tuple[str, GroupId], Leadership] = {}
        self.begun: list[GroupId] = []
        """The groups of leaderships that began since somebody looked."""
        self.touched: dict[bytes, list[tuple[RecordId, m.ResultType]]] = {}
        """The requests of each client's entry. Several, if an HSM made it anew: what changes nothing looks the same."""
        self.made_by: dict[bytes, int] = {}
        """The number of the leadership that first made an entry."""
        self.gave_away: set[int] = set()
        """Leaderships that made a range leave; asked, never walked."""
        self._signed: dict[tuple[HsmId, GroupId, int], bytes] = {}
        self._persisted: dict[str, PersistentState] = {}
        self._jumped: dict[tuple[str, GroupId], tuple[int, bytes]] = {}
        self._clocks: dict[tuple[str, GroupId, int], tuple[str, int, int]] = {}
        self._lives: dict[str, int] = {}
        self._captured: dict[tuple[str, GroupId], tuple[int, bytes]] = {}
        self._transfers = Transfers()
        self._forgotten: set[tuple[str, GroupId]] = set()  # asked, never walked
        self._leaderships = 0

    # --- lives and NVRAM ------------------------------------------------------------------------------

    def started(self, name: str, hsm: Hsm) -> None:
        """Check an HSM that has just started (I15, I7)."""
        state = state_of(hsm)
        realm = state.persistent.realm
        if realm is not None:
            own = state.has_own_keys(realm.id, state.persistent.id, realm.statement)
            require("I15", own, f"HSM {name} serves with keys that its realm statement does not cover")
        require("I7", self._persisted.get(name) == state.persistent, f"HSM {name} started from what was never written")

    def ended(self, name: str) -> None:
        """Take in that an HSM lost its volatile state."""
        self._lives[name] = self._lives.get(name, 0) + 1
        for key in [key for key in self.leaderships if key[0] == name]:
            del self.leaderships[key]

    def wrote(self, name: str, content: bytes) -> None:
        """Check a completed NVRAM write against the one before (I6, I8)."""
        new = decode_state(content)
        require("I6", new is not None, f"HSM {name} wrote an empty state")
        old, self._persisted[name] = self._persisted.get(name), new  # type: ignore[assignment]  # required above
        if old is None or new is None:
            return
        require("I6", old.id == new.id, f"HSM {name} got another id")
        if old.realm is None:
            return
        require("I6", new.realm is not None and new.realm.id == old.realm.id, f"HSM {name} left its realm")
        groups = new.realm.groups if new.realm is not None else {}
        for group, before in old.realm.groups.items():
            after = groups.get(group)
            if after is None and new.realm is not None:
                self._check_forgotten(name, group, old.realm.generation, new.realm.generation)
            elif after is None or after.configuration != before.configuration:
                require("I6", condition=False, detail=f"HSM {name} changed its membership in {group.hex()}")
            elif before.captured is not None and after.captured != before.captured:
                self._check_head(name, group, before.captured, after.captured)

    def _check_head(
        self, name: str, group: GroupId, before: tuple[int, bytes], after: tuple[int, bytes] | None
    ) -> None:
        require("I6", after is not None, f"HSM {name} forgot what it captured of {group.hex()}")
        if after is None:
            return
        require("I6", after[0] >= before[0], f"HSM {name} fell from {before[0]} to {after[0]} of {group.hex()}")
        if not self.is_ancestor(group, before, after[1]):
            jump = self._jumped.get((name, group))
            follows = jump is not None and self.is_ancestor(group, jump, after[1])
            require("I8", follows, f"HSM {name} left its branch of {group.hex()} at {before[0]} without a jump")

    def _check_forgotten(self, name: str, group: GroupId, before: int, after: int) -> None:
        """I6, I21: a membership ends only when a strict majority signed its end, and so does a generation."""
        configuration, known = self.configurations[group], self.entries.get(group, {})
        votes = {
            vote.hsm
            for vote in self.statements
            if vote.group == group and vote.hsm in configuration and known[vote.mac].retired
        }
        ended = 2 * len(votes) > len(configuration)
        require("I6", ended, f"HSM {name} left {group.hex()}, which has not ended")
        require("I21", after == before + 1, f"HSM {name} left {group.hex()} without a new generation")
        self._forgotten.add((name, group))
        self.leaderships.pop((name, group), None)

    def is_ancestor(self, group: GroupId, pair: tuple[int, bytes], mac: bytes) -> bool:
        """Tell whether the entry `pair` is `mac` or lies below it."""
        known = self.entries.get(group, {})
        entry = known.get(mac)
        while entry is not None and entry.index > pair[0]:
            entry = known.get(entry.prev_mac)
        return entry is not None and (entry.index, entry.entry_mac) == pair

    # --- requests -------------------------------------------------------------------------------------

    def observe(self, name: str, hsm: Hsm, request: m.Request, response: m.Response) -> None:
        """Take in one request and its answer; what it committed comes afterwards, in `judge_commits`."""
        delta = getattr(response, "delta", None)
        if isinstance(delta, bytes):
            self.nodes.put(delta)
        self._new_entry(name, hsm, request, response)
        match request, response:
            case m.PersistState(), m.PersistStateOk():
                self._note_signed(name, response.captured)
            case m.CaptureJump(), m.CaptureJumpOk():
                self._check_jump(name, hsm, request)
            case m.PrepareTransfer(), m.PrepareTransferOk():
                self._transfers.prepared(request)
            case m.TransferOut(), m.TransferOutOk():
                self._transfers.left(request)
            case m.TransferStatement(), m.TransferStatementOk():
                self._transfers.signed(name, state_of(hsm), request, response)
            case m.Handshake(), m.HandshakeOk():
                self._note_session(name, request.group, request.record_id, request.session_id)
            case _:
                pass

    def _new_entry(self, name: str, hsm: Hsm, request: m.Request, response: m.Response) -> None:
        entry = getattr(response, "entry", None)
        if not isinstance(entry, LogEntry):
            return
        group = _led_group(request, response)
        known = self.entries.setdefault(group, {})
        parent = known.get(entry.prev_mac)
        if entry.index > 1:
            follows = parent is not None and parent.index == entry.index - 1
            require("I9", follows, f"entry {entry.index} of {group.hex()} continues nothing")
            ended = parent is not None and parent.retired
            require("I20", not ended, f"entry {entry.index} of {group.hex()} follows a retired one")
        lasting = not entry.retired or (isinstance(request, m.RetireGroup) and entry.partition is None)
        require("I20", lasting, f"entry {entry.index} of {group.hex()} ends a log that owns something")
        known.setdefault(entry.entry_mac, entry)
        require("I9", known[entry.entry_mac] == entry, f"two entries {entry.index} of {group.hex()} have one mac")
        if isinstance(request, m.NewRealm | m.NewGroup):
            self._begin(name, group)
        leadership = self.leaderships.get((name, group))
        if leadership is not None:
            self.made_by.setdefault(entry.entry_mac, leadership.number)
            if isinstance(request, m.TransferOut):
                self.gave_away.add(leadership.number)
        self._transfers.made(request, entry, parent)
        if isinstance(request, m.AppRequest) and parent is not None:
            self._client_entry(name, hsm, request, entry, parent, getattr(response, "delta", b""))
        elif parent is not None and not isinstance(request, m.TransferOut | m.TransferIn):
            require("I5", entry.partition == parent.partition, f"entry {entry.index} of {group.hex()} changed the tree")

    def _begin(self, name: str, group: GroupId) -> Leadership:
        self._leaderships += 1
        found = self.leaderships[name, group] = Leadership(self._leaderships)
        return found

    def _client_entry(
        self, name: str, hsm: Hsm, request: m.AppRequest, entry: LogEntry, parent: LogEntry, delta: bytes
    ) -> None:
        """Check what a client's request did, before anybody knows whether it was right (I12, I13, I18)."""
        group = request.group
        leadership = self.leaderships.get((name, group))
        role = state_of(hsm).groups[group].role
        element = role.log.get(entry.index) if isinstance(role, LeaderState) else None
        result = None if element is None else element.result
        if leadership is None or result is None:
            require("I12", condition=False, detail=f"entry {entry.index} of {group.hex()} has no reply to settle")
            return
        require("I12", entry.entry_mac not in leadership.fates, "one entry got two replies")
        leadership.fates[entry.entry_mac] = _PENDING
        leadership.results[entry.entry_mac] = result
        requests = self.touched.setdefault(entry.entry_mac, [])
        requests.append((request.record_id, result))
        alone = len(requests) == 1 or entry.partition == parent.partition
        require("I5", alone, f"entry {entry.index} of {group.hex()} stands for two changes")
        session = (request.record_id, request.session_id)
        if not isinstance(request.encrypted, HandshakeRequest):
            require("I18", session in leadership.sessions, f"HSM {name} used a session of another record or leadership")
        leadership.sessions.add(session)
        self._check_effect(request.record_id, entry, parent, delta, result)

    def _check_effect(
        self, record: RecordId, entry: LogEntry, parent: LogEntry, delta: bytes, result: m.ResultType
    ) -> None:
        leaves = written_leaves(delta)
        own = all(row == leaf_row(record) for row, _ in leaves)
        require("I5", own and len(leaves) <= 1, f"entry {entry.index} writes another record than the asked one")
        partition = parent.partition
        ranged = partition is not None and entry.partition is not None and entry.partition.range == partition.range
        require("I4", ranged and partition and partition.range.contains(record), "a group served what it does not own")
        if partition is None:
            return
        is_known = self.nodes.record(partition, record) != NOT_REGISTERED
        expected = result.kind is ResultKind.REGISTER2 or (is_known and result.kind is not ResultKind.REGISTER1)
        require("I13", expected == bool(leaves), f"{result.kind.value} shows in whether a leaf is written")
        if result.kind is not ResultKind.DELETE:
            padded = all(size == PADDED_LEAF_BYTES for _, size in leaves)
            require("I13", padded, f"{result.kind.value} shows in the length of the leaf")

    def _check_jump(self, name: str, hsm: Hsm, request: m.CaptureJump) -> None:
        """H1: a jump needs a strict majority that captured the target or a descendant."""
        group = state_of(hsm).groups[request.group]
        target = state_of(hsm).captured[request.group]
        voters = {
            vote.hsm
            for vote in request.captures
            if vote.group == request.group
            and vote.hsm in group.configuration
            and vote in self.statements
            and self.is_ancestor(request.group, target, vote.mac)
        }
        require("I8", 2 * len(voters) > len(group.configuration), f"HSM {name} jumped without a strict majority")
        self._jumped[name, request.group] = target

    def _note_signed(self, name: str, captured: tuple[Captured, ...]) -> None:
        persisted = self._persisted.get(name)
        realm = None if persisted is None else persisted.realm
        for statement in captured:
            kept = None if realm is None else realm.groups[statement.group].captured
            require("I7", kept == (statement.index, statement.mac), f"HSM {name} signed what is not in its NVRAM")
            key = (statement.hsm, statement.group, statement.index)
            first = self._signed.setdefault(key, statement.mac)
            require("I8", first == statement.mac, f"HSM {name} signed two entries {statement.index}")
            self.statements[statement] = None

    def _note_session(self, name: str, group: GroupId, record: RecordId, session: int) -> None:
        leadership = self.leaderships.get((name, group))
        if leadership is not None:
            leadership.sessions.add((record, session))

    # --- roles ----------------------------------------------------------------------------------------

    def follow(self, name: str, hsm: Hsm, request: m.Request, changed: Sequence[GroupState]) -> None:
        """Check roles, logs and captured heads after a request; what it committed is known by now."""
        state = state_of(hsm)
        for own in changed:
            group = own.id
            require("I21", (name, group) not in self._forgotten, f"HSM {name} is in {group.hex()} again")
            configuration = self.configurations.setdefault(group, own.configuration)
            require("I6", own.configuration == configuration, f"{group.hex()} has two configurations")
            self._follow_role(name, own, request)
        for group, head in state.captured.items():
            if self._captured.get((name, group)) != head:
                made = self.entries.get(group, {}).get(head[1])
                require("I9", made is not None and made.index == head[0], f"HSM {name} captured what no HSM made")
                self._captured[name, group] = head

    def _follow_role(self, name: str, own: GroupState, request: m.Request) -> None:
        key = (name, own.id)
        status = own.status()
        starting = status.role.starting if isinstance(status.role, Leader) else 0
        value = (type(status.role).__name__, starting, self._lives.get(name, 0))
        first = self._clocks.setdefault((name, own.id, status.at), value)
        require("I19", first == value, f"HSM {name} used role clock {status.at} for {first[0]} and {value[0]}")
        known = self.leaderships.get(key)
        role = own.role
        if isinstance(role, WitnessState):
            if known is not None:
                if isinstance(request, m.StepDown) and request.force:
                    known.drop()
                settled = _PENDING not in known.fates.values()
                require("I12", settled, f"HSM {name} ended a leadership with replies that never settle")
                del self.leaderships[key]
            return
        if known is None:
            known = self._begin(name, own.id)
            self.begun.append(own.id)
        self._check_log(name, own.id, role, known)
        if isinstance(role, SteppingDownState):
            within = role.committed is None or role.committed <= role.stepdown_at
            require("I11", within, f"HSM {name} committed beyond its step-down")
            return
        partition = role.log.last.partition
        root = None if role.tree is None else role.tree.root
        same = root == (None if partition is None else partition.root_hash)
        require("I10", same, f"HSM {name}'s tree is not that of its last entry")

    def _check_log(self, name: str, group: GroupId, role: LeaderState | SteppingDownState, known: Leadership) -> None:
        """I9: consecutive, chained, entries as made; only what is new since the last look is walked."""
        log, made = role.log, self.entries.get(group, {})
        require("I9", len(log) == log.last.index - log.first + 1 > 0, f"HSM {name}'s log has gaps")
        index = log.first
        before: LogEntry | None = None
        if known.checked is not None and known.checked[0] >= log.first:
            element = log.get(known.checked[0])
            if element is not None and element.entry.entry_mac == known.checked[1]:
                index, before = known.checked[0] + 1, element.entry
        for at in range(index, log.last.index + 1):
            element = log.get(at)
            entry = None if element is None else element.entry
            right = entry is not None and made.get(entry.entry_mac) == entry and entry.index == at
            require("I9", right, f"HSM {name}'s log has an entry {at} that no HSM made")
            chained = before is None or (entry is not None and entry.prev_mac == before.entry_mac)
            require("I9", chained, f"HSM {name}'s log is not chained at {at}")
            before = entry
        known.checked = (log.last.index, log.last.entry_mac)
        if role.committed is not None:
            within = log.first <= role.committed <= log.last.index
            require("I9", within, f"HSM {name} counts entries as committed that it does not have")


def state_of(hsm: Hsm) -> HsmState:
    """Return an HSM's state. Only a judge may look."""
    return hsm._state  # noqa: SLF001 -- the judge sees what an attacker with the HSM open would see


def _led_group(request: m.Request, response: m.Response) -> GroupId:
    """Return the group in whose log a request's entry stands."""
    match request, response:
        case _, m.NewRealmOk() | m.NewGroupOk():
            return response.group
        case m.PrepareTransfer() | m.TransferIn() | m.CancelPreparedTransfer(), _:
            return request.destination
        case m.TransferOut() | m.CompleteTransfer(), _:
            return request.source
        case m.AppRequest() | m.RetireGroup(), _:
            return request.group
        case _:
            require("I9", condition=False, detail=f"{type(request).__name__} made an entry")
            raise AssertionError
