"""State of the core: what is durable, what dies with the process, and how both change (hsm.md 5 to 7).

Theory of operation. `HsmState` is the only mutable object of an HSM; handlers are functions over it. A handler
checks everything first and changes state afterwards, so that every refusal leaves all state untouched (H3). The
persistent part is replaced as a whole: a copy is built, written, and published only once it is durable (H6). If the
write fails, the exception leaves `Hsm.handle` and the instance stays poisoned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, assert_never

from juicebox_hsm.consensus.macs import Macs, same
from juicebox_hsm.consensus.nvram import (
    DIGEST_BYTES,
    PersistentGroup,
    PersistentRealm,
    PersistentState,
    decode_state,
    encode_state,
)
from juicebox_hsm.consensus.types import (
    ZERO_MAC,
    Captured,
    Leader,
    LogEntry,
    Partition,
    RoleStatus,
    SteppingDown,
    Transferring,
    Witness,
)
from juicebox_hsm.crypto.noise import Responder
from juicebox_hsm.errors import RealmError, check
from juicebox_hsm.hsm.messages import NotLeader, Outcome, ResultType
from juicebox_hsm.hsm.platform import Platform
from juicebox_hsm.hsm.sessions import Sessions
from juicebox_hsm.ids import ID_BYTES, LOG_INDEX_MAX, GroupId, HsmId, RealmId
from juicebox_hsm.merkle.kernel import Tree
from juicebox_hsm.wire.client import NoiseResponse

GENERATION_MAX: Final = 2**64 - 1
"""The largest an HSM can store (nvram.py); nobody retires that many groups."""


class Poisoned(RealmError):
    """A write to NVRAM failed or a request ended abnormally; the HSM answers nothing until it is restarted."""


class InvalidRealmStatement(RealmError):
    """The keys and the NVRAM content belong to different realms; the HSM must not start."""


class LogElement:
    """An entry of a leader's log with the reply that its commit releases, if it has one."""

    __slots__ = ("entry", "reply", "result")

    def __init__(self, entry: LogEntry, reply: NoiseResponse | None, result: ResultType | None) -> None:
        self.entry = entry
        self.reply = reply
        self.result = result


class Log:
    """A contiguous, MAC-chained run of entries that is never empty (I9)."""

    __slots__ = ("_elements", "first", "last")

    def __init__(self, entry: LogEntry) -> None:
        self.first = entry.index
        self.last = entry
        self._elements = {entry.index: LogElement(entry, None, None)}

    def __len__(self) -> int:
        return len(self._elements)

    def get(self, index: int) -> LogElement | None:
        """Return the element at `index`, None outside the log."""
        return self._elements.get(index)

    def append(self, entry: LogEntry, reply: NoiseResponse | None = None, result: ResultType | None = None) -> None:
        """Append the successor of the last entry."""
        check(entry.index == self.last.index + 1, "a log is consecutive")
        check(entry.prev_mac == self.last.entry_mac, "a log is chained")
        self._elements[entry.index] = LogElement(entry, reply, result)
        self.last = entry

    def pop_from(self, index: int) -> list[bytes]:
        """Drop every element at or above `index` and return their macs in order."""
        check(index > self.first, "a log is never empty")
        macs = [self._elements.pop(at).entry.entry_mac for at in range(index, self.last.index + 1)]
        self.last = self._elements[min(index - 1, self.last.index)].entry
        return macs

    def release_to(self, index: int) -> list[tuple[bytes, NoiseResponse, ResultType]]:
        """Drop the elements below `index`, which becomes the first; return the replies up to and including it."""
        check(self.first <= index <= self.last.index, "a commit lies within the log")
        released: list[tuple[bytes, NoiseResponse, ResultType]] = []
        for at in range(self.first, index + 1):
            element = self._elements[at]
            if element.reply is not None and element.result is not None:
                released.append((element.entry.entry_mac, element.reply, element.result))
            if at < index:
                del self._elements[at]
            else:
                element.reply = element.result = None
        self.first = index
        return released


class LeaderState:
    """Leading. `tree` is present iff the last log entry owns a partition (I10)."""

    __slots__ = ("committed", "incoming", "log", "sessions", "starting", "tree")

    def __init__(self, log: Log, tree: Tree | None, sessions: Sessions) -> None:
        self.log = log
        self.committed: int | None = None
        self.incoming: bytes | None = None
        self.tree = tree
        self.sessions = sessions
        self.starting = log.last.index + 1


class SteppingDownState:
    """Releasing what this leadership created up to `stepdown_at`; nothing new."""

    __slots__ = ("abandoned", "committed", "leader_starting", "log", "stepdown_at")

    def __init__(
        self, log: Log, committed: int | None, abandoned: list[bytes], stepdown_at: int, leader_starting: int
    ) -> None:
        self.log = log
        self.committed = committed
        self.abandoned = abandoned
        self.stepdown_at = stepdown_at
        self.leader_starting = leader_starting


class WitnessState:
    """Capturing only; no state of its own."""

    __slots__ = ()


RoleState = LeaderState | SteppingDownState | WitnessState


class GroupState:
    """The role of this HSM in one group and the role clock. Changing the kind of role advances the clock."""

    __slots__ = ("clock", "configuration", "id", "role")

    def __init__(self, id_: GroupId, configuration: tuple[HsmId, ...], role: RoleState, clock: int) -> None:
        self.id: Final = id_
        self.configuration: Final = configuration
        self.role = role
        self.clock = clock

    def become(self, role: RoleState) -> None:
        """Enter another kind of role."""
        check(type(role) is not type(self.role), "a role change is between different roles")
        self.role = role
        self.clock += 1

    def status(self) -> RoleStatus:
        """Return the role as hosts see it."""
        match self.role:
            case LeaderState(starting=starting):
                return RoleStatus(Leader(starting), self.clock)
            case SteppingDownState(leader_starting=starting):
                return RoleStatus(SteppingDown(starting), self.clock)
            case WitnessState():
                return RoleStatus(Witness(), self.clock)
            case _:
                assert_never(self.role)

    def step_down_at(self, leader: LeaderState, index: int) -> None:
        """End the leadership at `index`: what lies beyond is abandoned, the rest may still commit."""
        log = leader.log
        if leader.committed == index and log.last.index == index:
            self.become(WitnessState())
            return
        abandoned = log.pop_from(index + 1)
        self.become(SteppingDownState(log, leader.committed, abandoned, index, leader.starting))


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes of a leadership's caches: sessions and retained tree deltas, 1 to 65535 each."""

    max_sessions: int
    tree_overlay_size: int


class HsmState:
    """Everything an HSM knows. Constructing it is the start of the HSM (hsm.md 7).

    Raises `InvalidChecksum`, `Deserialization`, `InvalidRealmStatement`, or what the platform's NVRAM raises.
    """

    __slots__ = (
        "_written_digest",
        "captured",
        "groups",
        "keys",
        "limits",
        "macs",
        "persistent",
        "platform",
        "record_key",
        "responder",
    )

    def __init__(self, platform: Platform, limits: Limits) -> None:
        check(1 <= limits.max_sessions <= 65535, "max_sessions is 1 to 65535")
        check(1 <= limits.tree_overlay_size <= 65535, "tree_overlay_size is 1 to 65535")
        self.platform: Final = platform
        self.limits: Final = limits
        self.keys: Final = platform.keys
        self.macs: Final = Macs(self.keys.mac_key.expose())
        self.record_key: Final = self.keys.record_key.expose()
        self.responder: Final = Responder(self.keys.communication_secret.expose(), self.keys.communication_public)
        self._written_digest: bytes | None = None
        self.captured: dict[GroupId, tuple[int, bytes]] = {}
        self.groups: dict[GroupId, GroupState] = {}
        stored = decode_state(platform.nvram_read())
        if stored is None:
            stored = PersistentState(HsmId(self.draw_id()), None)
            self.persist(stored)
        self.persistent = stored
        realm = stored.realm
        if realm is None:
            return
        if not self.has_own_keys(realm.id, stored.id, realm.statement):
            raise InvalidRealmStatement("the realm keys are not those this HSM joined its realm with")
        for group, kept in realm.groups.items():
            self.groups[group] = GroupState(group, kept.configuration, WitnessState(), platform.clock_start)
            if kept.captured is not None:
                self.captured[group] = kept.captured

    def draw_id(self) -> bytes:
        """Draw a fresh 16-byte id."""
        return self.platform.random(ID_BYTES)

    def has_own_keys(self, realm: RealmId, hsm: HsmId, statement: bytes) -> bool:
        """Tell whether `statement` is the hsmrealm statement of `hsm` over the very keys this HSM holds."""
        return same(self.macs.hsm_realm(realm, hsm, self.keys.signed_parts()), statement)

    # Durable state ------------------------------------------------------------------------------------------

    def persist(self, new: PersistentState) -> None:
        """Make `new` durable, then publish it. Skips the write if this instance wrote the very same bytes last."""
        content = encode_state(new)
        written = content[-DIGEST_BYTES:]
        if written != self._written_digest:
            try:
                self.platform.nvram_write(content)
            except Exception as error:
                raise Poisoned(f"writing the NVRAM failed: {error}") from error
            self._written_digest = written
        self.persistent = new

    def persist_group(self, realm: PersistentRealm, group: GroupId, configuration: tuple[HsmId, ...]) -> None:
        """Make the membership in a further group durable."""
        groups = {**realm.groups, group: PersistentGroup(configuration, None)}
        self.persist(PersistentState(self.persistent.id, replace(realm, groups=groups)))

    def persist_captured(self) -> None:
        """Make every captured pair durable."""
        realm = self.persistent.realm
        if realm is None:
            return
        groups = {
            group: PersistentGroup(kept.configuration, self.captured.get(group)) for group, kept in realm.groups.items()
        }
        self.persist(PersistentState(self.persistent.id, replace(realm, groups=groups)))

    def forget_group(self, realm: PersistentRealm, group: GroupId) -> int:
        """Drop a group for good, durably and then from memory, and return the generation this begins (I21).

        The generation rises in the same write that drops the group: no statement admits this HSM to it again.
        """
        check(realm.generation < GENERATION_MAX, "generations are exhausted")
        groups = {kept: membership for kept, membership in realm.groups.items() if kept != group}
        left = replace(realm, groups=groups, generation=realm.generation + 1)
        self.persist(PersistentState(self.persistent.id, left))
        self.groups.pop(group)
        self.captured.pop(group, None)
        return left.generation

    # Common checks ------------------------------------------------------------------------------------------

    def in_realm(self, realm: RealmId) -> PersistentRealm | None:
        """Return the realm if it is this HSM's."""
        own = self.persistent.realm
        return own if own is not None and own.id == realm else None

    def member(self, realm: RealmId, group: GroupId) -> GroupState | Outcome:
        """Return the group this HSM is a member of, else InvalidRealm or InvalidGroup."""
        if self.in_realm(realm) is None:
            return Outcome.INVALID_REALM
        return self.groups.get(group, Outcome.INVALID_GROUP)

    def leading(self, realm: RealmId, group: GroupId) -> tuple[GroupState, LeaderState] | Outcome | NotLeader:
        """Return the group and leader state, else the refusal of a request without role status in its table."""
        member = self.member(realm, group)
        if isinstance(member, Outcome):
            return member
        role = member.role
        return (member, role) if isinstance(role, LeaderState) else NotLeader()

    def is_valid_vote(self, captured: Captured, realm: RealmId, group: GroupState) -> bool:
        """Tell whether a capture is an authentic statement of a member about this group."""
        return (
            captured.realm == realm
            and captured.group == group.id
            and captured.hsm in group.configuration
            and self.macs.verify_captured(captured)
        )

    # New values ---------------------------------------------------------------------------------------------

    def new_tree(self, partition: Partition | None) -> Tree | None:
        """Return a tree that knows only the partition's root, or None without a partition."""
        if partition is None:
            return None
        owned = partition.range
        return Tree(partition.root_hash, owned.start, owned.end, self.limits.tree_overlay_size)

    def new_leader(self, last: LogEntry) -> LeaderState:
        """Return the state of a fresh leadership from `last`."""
        check(last.index < LOG_INDEX_MAX, "log indexes are exhausted")
        return LeaderState(Log(last), self.new_tree(last.partition), Sessions(self.limits.max_sessions))

    def new_entry(
        self,
        group: GroupId,
        last: LogEntry | None,
        partition: Partition | None,
        transferring: Transferring | None = None,
        consumed: tuple[tuple[GroupId, int], ...] = (),
        *,
        retired: bool = False,
    ) -> LogEntry:
        """Return the signed successor of `last`, or entry 1.

        The only place where entries are made, so that what it refuses is in no log: a successor of a retired entry
        (I20), and with it any later owner, marker or reply of that group.
        """
        realm = self.persistent.realm
        check(realm is not None, "entries are made by members of a realm")
        index, prev_mac = (1, ZERO_MAC) if last is None else (last.index + 1, last.entry_mac)
        check(index <= LOG_INDEX_MAX, "log indexes are exhausted")
        check(last is None or not last.retired, "no entry follows a retired one")
        hsm = self.persistent.id
        entry = LogEntry(index, partition, transferring, prev_mac, ZERO_MAC, hsm, consumed, retired)
        mac = self.macs.log_entry(realm.id, group, entry)  # type: ignore[union-attr]  # checked above
        return LogEntry(index, partition, transferring, prev_mac, mac, hsm, consumed, retired)
