"""What all agents together say: realms, groups, members and their work (manager.md 3-5, operator-tools.md 2).

Pure functions over `status` replies, shared by the manager and the command line. Reports are claims, not facts: they
may be stale or uncommitted, and nothing that matters for safety is decided from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from juicebox_hsm.host.clocks import Reading
from juicebox_hsm.host.copies import Place, copied
from juicebox_hsm.ids import GroupId, HsmId, OwnedRange, RealmId, RecordId
from juicebox_hsm.wire.rpc import AgentGroupInfo, AgentStatus, GroupInfo, GroupRole, LeaderInfo, Range

GroupKey = tuple[RealmId, GroupId]

WITNESS_WORK: Final = 1
LEADER_WORK: Final = 2
WIDTH_WORK_MAX: Final = 255
MEASURED_RATE_MIN: Final = 1.0  # requests/s of a realm from which measured load replaces range width


@dataclass(frozen=True, slots=True)
class AgentView:
    """One agent's answer; `status` is None when it did not answer, and `error` says why.

    `clock` is its wall clock as the asker read it.
    """

    url: str
    status: AgentStatus | None
    error: str = ""
    clock: Reading | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a group that answered: what its HSM and its agent say about the group."""

    hsm: HsmId
    url: str
    name: str
    info: GroupInfo
    agent: AgentGroupInfo | None

    @property
    def leads(self) -> bool:
        """Tell whether the HSM says it leads (stepping down does not count)."""
        return self.info.role.name is GroupRole.LEADER

    @property
    def starting(self) -> int:
        """Return the first index of its leadership, 0 when it has none; orders leaderships of one group."""
        return self.info.role.starting or 0

    @property
    def captured_index(self) -> int | None:
        """Return the highest persisted capture."""
        return None if self.info.captured is None else self.info.captured[0]

    @property
    def written_index(self) -> int:
        """Return the last index its leadership is known to have written or begun after, 0 when it has none."""
        if self.agent is not None and self.agent.last_appended is not None:
            return self.agent.last_appended[0]
        committed = None if self.info.leader is None else self.info.leader.committed
        return max(self.starting - 1, committed or 0, 0)

    @property
    def owned_range(self) -> OwnedRange | None:
        """Return the range the leader says its group owns."""
        leader = self.info.leader
        return None if leader is None else owned_range(leader.owned_range)


@dataclass(frozen=True, slots=True)
class GroupView:
    """A group as its answering members describe it; `members` are sorted by HSM id."""

    realm: RealmId
    id: GroupId
    configuration: tuple[HsmId, ...]
    members: tuple[Member, ...]

    @property
    def key(self) -> GroupKey:
        """Return (realm, group)."""
        return (self.realm, self.id)

    @property
    def leader(self) -> Member | None:
        """Return the member with the freshest claim to lead: highest `starting` (manager.md 6.3a)."""
        leaders = [member for member in self.members if member.leads]
        return max(leaders, key=lambda member: (member.starting, member.hsm)) if leaders else None

    @property
    def is_complete(self) -> bool:
        """Tell whether every configured member answered, so that "nobody leads" is not a lost reply."""
        return len(self.members) == len(self.configuration)

    @property
    def losses_tolerated(self) -> int:
        """Return how many more members may be lost until nothing can be committed, negative when that is so already."""
        return len(self.members) - (len(self.configuration) // 2 + 1)

    @property
    def owned_range(self) -> OwnedRange | None:
        """Return the range its leader says the group owns."""
        leader = self.leader
        return None if leader is None else leader.owned_range

    @property
    def has_ended(self) -> bool:
        """Tell whether a member that answered has captured the end of the log: the group serves nobody any more."""
        return any(member.agent is not None and member.agent.ended for member in self.members)

    @property
    def requests_per_s(self) -> float:
        """Return the leader's agent's 60 s mean of requests per second, 0 without a leader."""
        leader = self.leader
        return leader.agent.requests_per_s if leader is not None and leader.agent is not None else 0.0

    def member(self, hsm: bytes) -> Member | None:
        """Return the answering member with this HSM id."""
        return next((member for member in self.members if member.hsm == hsm), None)


@dataclass(frozen=True, slots=True)
class HsmView:
    """An HSM that answered; `groups` are its memberships in order of group id, `generation` counts those it forgot."""

    id: HsmId
    url: str
    name: str
    public_key: bytes
    realm: RealmId | None
    statement: bytes
    groups: tuple[GroupInfo, ...]
    generation: int = 0


@dataclass(frozen=True, slots=True)
class ClusterView:
    """Everything the agents said in one round, indexed."""

    agents: tuple[AgentView, ...]
    hsms: Mapping[HsmId, HsmView] = field(default_factory=dict)
    groups: Mapping[GroupKey, GroupView] = field(default_factory=dict)
    copied: Mapping[HsmId, tuple[str, ...]] = field(default_factory=dict)
    """HSMs that answer at several addresses, with those: one of them is a copy, and nobody can tell which."""

    @property
    def realms(self) -> list[RealmId]:
        """Return the realms that any HSM is in, sorted."""
        return sorted({hsm.realm for hsm in self.hsms.values() if hsm.realm is not None})

    def groups_of(self, realm: bytes) -> list[GroupView]:
        """Return a realm's groups sorted by id."""
        return [view for key, view in sorted(self.groups.items()) if key[0] == realm]

    def led_by(self, hsm: bytes) -> list[GroupView]:
        """Return the groups that an HSM leads, by realm and id."""
        groups = (view for _, view in sorted(self.groups.items()))
        return [group for group in groups if group.leader is not None and group.leader.hsm == hsm]

    def by_url(self, url: str) -> HsmView | None:
        """Return the HSM behind an agent URL."""
        return next((hsm for hsm in self.hsms.values() if hsm.url == url), None)

    def group(self, realm: bytes, group: bytes) -> GroupView | None:
        """Return one group."""
        return self.groups.get((RealmId(realm), GroupId(group)))


def name_of(key: GroupKey) -> str:
    """Return `realm/group` in hex, for messages and settings."""
    return f"{key[0].hex()}/{key[1].hex()}"


def owned_range(value: Range | None) -> OwnedRange | None:
    """Translate a range of the internal RPC; a malformed one counts as none."""
    if value is None:
        return None
    owned = OwnedRange(RecordId(value.start), RecordId(value.end))
    return owned if owned.is_valid else None


def wire_range(value: OwnedRange) -> Range:
    """Translate a range for the internal RPC."""
    return Range(start=value.start, end=value.end)


def build_view(agents: Sequence[AgentView]) -> ClusterView:
    """Index the answers of one round. Of two addresses of one HSM the one that leads counts, else the last by URL."""
    ordered = tuple(sorted(agents, key=lambda agent: agent.url))
    hsms: dict[HsmId, HsmView] = {}
    own_views: dict[tuple[HsmId, GroupKey], AgentGroupInfo] = {}
    places: list[Place] = []
    for agent in ordered:
        if agent.status is None or agent.status.hsm is None:
            continue
        info = agent.status.hsm
        places.append(Place(agent.url, HsmId(info.id), agent.status.instance))
        known = hsms.get(HsmId(info.id))
        if known is not None and _leads(known.groups) and (info.realm is None or not _leads(info.realm.groups)):
            continue
        realm = info.realm
        hsms[HsmId(info.id)] = HsmView(
            id=HsmId(info.id),
            url=agent.url,
            name=agent.status.name,
            public_key=info.public_key,
            realm=None if realm is None else RealmId(realm.id),
            statement=b"" if realm is None else realm.statement,
            groups=() if realm is None else tuple(sorted(realm.groups, key=lambda group: group.id)),
            generation=0 if realm is None else realm.generation,
        )
        for own in agent.status.groups:
            own_views[HsmId(info.id), (RealmId(own.realm), GroupId(own.group))] = own
    members: dict[GroupKey, list[Member]] = {}
    for hsm in hsms.values():
        for group in hsm.groups:
            if hsm.realm is not None:
                key = (hsm.realm, GroupId(group.id))
                member = Member(hsm.id, hsm.url, hsm.name, group, own_views.get((hsm.id, key)))
                members.setdefault(key, []).append(member)
    groups = {
        key: GroupView(
            realm=key[0],
            id=key[1],
            configuration=tuple(sorted(HsmId(hsm) for hsm in found[0].info.configuration)),
            members=tuple(sorted(found, key=lambda member: member.hsm)),
        )
        for key, found in members.items()
    }
    return ClusterView(agents=ordered, hsms=hsms, groups=groups, copied=copied(places))


def _leads(groups: Iterable[GroupInfo]) -> bool:
    return any(group.role.name is GroupRole.LEADER for group in groups)


def width(value: OwnedRange | None) -> int:
    """Return the difference of the first bytes: 255 for the full range, 0 for none (manager.md 5)."""
    return 0 if value is None else value.end[0] - value.start[0]


def leader_work(view: ClusterView, group: GroupView, leader: LeaderInfo | None) -> int:
    """Return what leading `group` adds to an HSM's work: 2 plus measured load, or the range's width."""
    if leader is None or leader.owned_range is None:
        return LEADER_WORK
    realm_rate = sum(other.requests_per_s for other in view.groups_of(group.realm))
    if realm_rate >= MEASURED_RATE_MIN:
        return LEADER_WORK + round(WIDTH_WORK_MAX * group.requests_per_s / realm_rate)
    return LEADER_WORK + width(owned_range(leader.owned_range))


def group_work(view: ClusterView, group: GroupView, member: Member) -> int:
    """Return the work of a group at one member: 1, and more when it leads."""
    return WITNESS_WORK + (leader_work(view, group, member.info.leader) if member.leads else 0)


def hsm_work(view: ClusterView, hsm: HsmView) -> int:
    """Return an HSM's work over all its groups."""
    total = 0
    for info in hsm.groups:
        group = view.group(hsm.realm or b"", info.id)
        member = None if group is None else group.member(hsm.id)
        if group is not None and member is not None:
            total += group_work(view, group, member)
    return total
