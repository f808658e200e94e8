"""Agents as values: what the managers' rules are given to look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from juicebox_hsm.host.cluster.view import AgentView, ClusterView, build_view
from juicebox_hsm.ids import FULL_RANGE, GroupId, HsmId, OwnedRange, RealmId, RecordId, next_record_id, prev_record_id
from juicebox_hsm.wire import rpc

REALM = RealmId(b"R" * 16)


OTHER_REALM = RealmId(b"S" * 16)


def hsm(number: int) -> HsmId:
    """Return an HSM id that sorts by number."""
    return HsmId(bytes([number]) * 16)


def group(number: int) -> GroupId:
    """Return a group id that sorts by number."""
    return GroupId(b"G" + bytes([number]) * 15)


def record(prefix: str, fill: int = 0) -> RecordId:
    """Return the record id that begins with these hex digits."""
    raw = bytes.fromhex(prefix)
    return RecordId(raw + bytes([fill]) * (32 - len(raw)))


@dataclass
class FakeGroup:
    """One group at one HSM."""

    configuration: list[bytes]
    role: rpc.GroupRole = rpc.GroupRole.WITNESS
    clock: int = 1
    starting: int | None = None
    captured: int | None = 5
    committed: int | None = None
    owned: OwnedRange | None = None
    transferring: rpc.TransferringInfo | None = None
    requests_per_s: float = 0.0
    alive: int | None = None
    stalled_s: float | None = None
    ended: bool = False


@dataclass
class FakeAgent:
    """One agent with its HSM. `refuse` maps a method to what it answers instead of doing it; `hang` is not answered."""

    url: str
    hsm: HsmId
    realm: RealmId = REALM
    groups: dict[GroupId, FakeGroup] = field(default_factory=dict)
    down: bool = False
    refuse: dict[str, Any] = field(default_factory=dict)
    hang: set[str] = field(default_factory=set)
    instance: bytes = b""

    def lead(self, wanted: GroupId, owned: OwnedRange | None = None, starting: int = 6) -> FakeAgent:
        """Make this HSM the leader of a group."""
        found = self.groups[wanted]
        found.role, found.starting, found.owned = rpc.GroupRole.LEADER, starting, owned
        found.committed = found.captured
        return self

    def status(self) -> rpc.AgentStatus:
        """Return what the agent answers to `status`."""
        infos = []
        for key, found in self.groups.items():
            leader = None
            if found.role is rpc.GroupRole.LEADER:
                owned = None if found.owned is None else rpc.Range(found.owned.start, found.owned.end)
                leader = rpc.LeaderInfo(found.committed, found.captured or 0, owned, found.transferring)
            captured = None if found.captured is None else (found.captured, b"m" * 32)
            role = rpc.RoleInfo(found.role, found.clock, found.starting)
            infos.append(rpc.GroupInfo(key, found.configuration, captured, leader, role))
        own = [
            rpc.AgentGroupInfo(
                self.realm,
                key,
                rpc.RoleInfo(found.role, found.clock, found.starting),
                found.role is rpc.GroupRole.LEADER,
                requests_per_s=found.requests_per_s,
                members_alive=found.alive,
                stalled_s=found.stalled_s,
                ended=found.ended,
            )
            for key, found in self.groups.items()
        ]
        info = rpc.HsmInfo(self.hsm, rpc.RealmInfo(self.realm, b"statement", infos), b"k" * 32)
        return rpc.AgentStatus(1.0, info, self.url, "build", own, instance=self.instance or self.url.encode())


def three(groups: int = 1, realm: RealmId = REALM, first: int = 1) -> list[FakeAgent]:
    """Return three agents that are members of the same groups; nobody leads. They are numbered from `first`."""
    numbers = range(first, first + 3)
    return [
        FakeAgent(
            f"tls://a{number}",
            hsm(number),
            realm,
            groups={group(index): FakeGroup([hsm(member) for member in numbers]) for index in range(1, groups + 1)},
        )
        for number in numbers
    ]


FULL = FULL_RANGE


def view_of(agents: list[FakeAgent]) -> ClusterView:
    """Return what one look at the agents shows."""
    return build_view(
        [AgentView(agent.url, None, "down") if agent.down else AgentView(agent.url, agent.status()) for agent in agents]
    )


def subtract(owned: OwnedRange, part: OwnedRange) -> OwnedRange | None:
    """Return what is left of a range without one of its ends."""
    if owned == part:
        return None
    if owned.start == part.start:
        return OwnedRange(next_record_id(part.end) or part.end, owned.end)
    return OwnedRange(owned.start, prev_record_id(part.start) or part.start)
