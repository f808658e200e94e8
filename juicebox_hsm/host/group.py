"""A group as its member's agent knows it, and the rule by which roles are adopted (agent.md 1).

Nothing here survives a restart and nothing here is needed for safety.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from juicebox_hsm.consensus.types import Captured, Leader, LogEntry, Role, RoleStatus, SteppingDown, Witness
from juicebox_hsm.errors import check
from juicebox_hsm.host.leadership.machine import Leadership
from juicebox_hsm.host.leadership.state import Limits
from juicebox_hsm.host.witness import Following
from juicebox_hsm.ids import GroupId, HsmId, RealmId
from juicebox_hsm.wire.rpc import AgentStatus, GroupRole, Refusal


@dataclass(frozen=True, slots=True)
class RoleChange:
    """What adopting a role did: at most one of `started` and `ended`; `stale` when it was not adopted.

    The caller MUST tell `ended` its end, and otherwise the group's leadership the role, before it waits for anything.
    """

    started: Leadership | None = None
    ended: Leadership | None = None
    stale: bool = False


_UNCHANGED: Final = RoleChange()
_STALE: Final = RoleChange(stale=True)


@dataclass(slots=True)
class GroupState:
    """One group this agent's HSM is a member of."""

    realm: RealmId
    group: GroupId
    configuration: tuple[HsmId, ...]
    role: RoleStatus
    following: Following = field(default_factory=Following)
    """How far its HSM captured, and how it follows the log."""
    leader: Leadership | None = None
    captured: Captured | None = None
    """The HSM's own persisted capture, from the last PersistState."""
    limits: Limits = field(default_factory=Limits)
    end: LogEntry | None = None
    """The retired entry, once the HSM captured it: nothing follows, and the HSM shall forget the group."""
    ended_at_s: float = 0.0
    """When that was seen, monotonic."""
    has_left: bool = False
    """The HSM has forgotten the group; whoever still holds this object asks nothing more for it."""
    former: list[Leadership] = field(default_factory=list)
    """Leaderships that ended while rows were being written for their last answers."""

    @property
    def position(self) -> int:
        """The next index the HSM has to capture."""
        return self.following.position

    @property
    def is_leader(self) -> bool:
        """Tell whether requests may be accepted: Leader, not SteppingDown, and the log can still be appended to."""
        return self.leader is not None and self.leader.is_accepting

    @property
    def releasing(self) -> int:
        """Committed requests whose rows and answers are not out yet, also of leaderships that have ended."""
        self.former = [former for former in self.former if former.releasing]
        return sum(former.releasing for former in self.former) + (0 if self.leader is None else self.leader.releasing)

    def adopt(self, status: RoleStatus) -> RoleChange:
        """Apply the role clock rule: only a greater clock is adopted, an equal one must be equal."""
        if status.at < self.role.at:
            return _STALE
        if status.at == self.role.at:
            check(status.role == self.role.role, "equal role clocks mean equal roles")
            return _UNCHANGED
        self.role = status
        starting = leadership_start(status.role)
        ended = self.leader
        if starting is None:
            self.leader = None
        elif ended is not None and ended.starting == starting and isinstance(status.role, SteppingDown):
            return _UNCHANGED
        else:
            self.leader = Leadership(
                self.realm, self.group, self.configuration, starting, status, self.limits, self.captured
            )
        if ended is not None:
            self.former.append(ended)
        return RoleChange(started=self.leader, ended=ended)


def is_quiet(status: AgentStatus, realm: RealmId, group: GroupId) -> bool:
    """Tell whether a member's agent reports that it neither leads the group nor owes anybody an answer for it.

    Until then its last rows may be on their way.
    """
    return any(
        (info.realm, info.group) == (realm, group) and info.role.name is GroupRole.WITNESS and not info.waiting_clients
        for info in status.groups
    )


def leadership_start(role: Role) -> int | None:
    """Return the first index of the leadership, None for a witness."""
    match role:
        case Leader(starting):
            return starting
        case SteppingDown(leader_starting):
            return leader_starting
        case Witness():
            return None


class Groups:
    """All groups of the agent by (realm, group)."""

    __slots__ = ("_by_key",)

    def __init__(self) -> None:
        self._by_key: dict[tuple[bytes, bytes], GroupState] = {}

    def __iter__(self) -> Iterator[GroupState]:
        return iter(list(self._by_key.values()))

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, group: GroupState) -> None:
        """Insert a group that is not there yet."""
        key = (group.realm, group.group)
        check(key not in self._by_key, "a group is inserted once")
        self._by_key[key] = group

    def remove(self, group: GroupState) -> None:
        """Drop a group that its HSM has forgotten."""
        self._by_key.pop((group.realm, group.group), None)

    def get(self, realm: bytes, group: bytes) -> GroupState | None:
        """Return the group, if the HSM is a member."""
        return self._by_key.get((realm, group))

    def find(self, realm: bytes, group: bytes) -> GroupState | Refusal:
        """Return the group, or the refusal that names what is wrong."""
        found = self._by_key.get((realm, group))
        if found is not None:
            return found
        known_realm = any(key[0] == realm for key in self._by_key)
        return Refusal.INVALID_GROUP if known_realm else Refusal.INVALID_REALM

    def leading(self, realm: bytes, group: bytes) -> tuple[GroupState, Leadership] | Refusal:
        """Return the group and its leadership if requests may be made of it, else why not."""
        found = self.find(realm, group)
        if isinstance(found, Refusal):
            return found
        if found.leader is None or not found.is_leader:
            return Refusal.NOT_LEADER
        return found, found.leader

    @property
    def realms(self) -> Mapping[RealmId, None]:
        """The realms of the groups, in order of first appearance (an HSM has at most one)."""
        return dict.fromkeys(group.realm for group in self._by_key.values())
