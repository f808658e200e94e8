"""The routing table: which agents claim to lead the group that owns a record (load-balancer.md 8.1).

Pure values. A table is never changed: the poller builds a new one and swaps it, so that reading needs no lock. Claims
may be stale or doubled; only one leader can commit, and the freshest claim is tried first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from juicebox_hsm.ids import (
    GroupId,
    OwnedRange,
    RealmId,
    RecordId,
    uncovered,
)
from juicebox_hsm.wire.rpc import AgentStatus

RouteKey = tuple[str, GroupId, int]
"""(agent URL, group, first index of the leadership)."""

LEADER: Final = "Leader"
"""Only this role takes requests; an HSM that is stepping down refuses new ones."""


@dataclass(frozen=True, slots=True)
class Route:
    """One HSM's claim to lead `group` and own `range`. `since_s` is when this leadership was first seen (monotonic)."""

    group: GroupId
    range: OwnedRange
    url: str
    starting: int
    committed: int
    since_s: float

    @property
    def key(self) -> RouteKey:
        """Identify the leadership behind this route."""
        return (self.url, self.group, self.starting)


@dataclass(frozen=True, slots=True)
class AgentSlice:
    """What one agent contributes: the realm its HSM is in, and its routes."""

    realm: RealmId | None = None
    routes: tuple[Route, ...] = ()

    def same_shape(self, other: AgentSlice) -> bool:
        """Tell whether two slices differ at most in committed indexes, which only order rival claims."""
        return (
            self.realm == other.realm
            and len(self.routes) == len(other.routes)
            and all(
                mine.key == theirs.key and mine.range == theirs.range
                for mine, theirs in zip(self.routes, other.routes, strict=True)
            )
        )


def slice_of(url: str, status: AgentStatus, now_s: float, known: Mapping[RouteKey, float]) -> AgentSlice:
    """Read an agent's status; `known` tells since when its leaderships are known. Malformed claims are left out."""
    realm = status.hsm.realm if status.hsm is not None else None
    if realm is None:
        return AgentSlice()
    routes = []
    for group in realm.groups:
        leader = group.leader
        if leader is None or leader.owned_range is None or group.role.name != LEADER:
            continue
        owned = OwnedRange(RecordId(leader.owned_range.start), RecordId(leader.owned_range.end))
        if not owned.is_valid:
            continue
        starting = group.role.starting or 0
        key = (url, GroupId(group.id), starting)
        committed = -1 if leader.committed is None else leader.committed
        routes.append(Route(GroupId(group.id), owned, url, starting, committed, known.get(key, now_s)))
    routes.sort(key=lambda route: route.group)
    return AgentSlice(RealmId(realm.id), tuple(routes))


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """All routes by realm, each realm's sorted freshest claim first. `contested`: some record has several claims."""

    realms: Mapping[RealmId, tuple[Route, ...]] = field(default_factory=dict)
    contested: bool = False

    def candidates(self, realm: RealmId, record: RecordId) -> list[Route]:
        """Return the routes that cover `record`, freshest claim first."""
        return [route for route in self.realms.get(realm, ()) if route.range.contains(record)]

    def gaps(self, realm: RealmId) -> list[OwnedRange]:
        """Return the ranges of `realm` that nobody claims."""
        return uncovered(route.range for route in self.realms.get(realm, ()))

    @property
    def route_count(self) -> int:
        """Return the number of routes of all realms."""
        return sum(len(routes) for routes in self.realms.values())


def build_table(slices: Iterable[AgentSlice]) -> RoutingTable:
    """Merge the agents' slices into a table."""
    realms: dict[RealmId, list[Route]] = {}
    for each in slices:
        if each.realm is not None:
            realms.setdefault(each.realm, []).extend(each.routes)
    contested = False
    for routes in realms.values():
        routes.sort(key=lambda route: (-route.starting, -route.committed, route.url))
        contested = contested or _overlap(routes)
    return RoutingTable({realm: tuple(routes) for realm, routes in realms.items()}, contested)


def _overlap(routes: Iterable[Route]) -> bool:
    ordered = sorted(routes, key=lambda route: route.range.start)
    return any(later.range.start <= earlier.range.end for earlier, later in itertools.pairwise(ordered))
