"""The routing table: which agents claim to lead the group that owns a record, and since when (load-balancer.md 8).

A table is never changed: whoever polls builds a new one and swaps it, so that reading needs no lock. Claims may be
stale or doubled; only one leader can commit, and the freshest claim is tried first. `AgentClaims` decides what an
agent's answers, and its silence, do to its part of the table. Times are in seconds, on the caller's clock.
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
from juicebox_hsm.wire.rpc import AgentStatus, GroupRole

RouteKey = tuple[str, GroupId, int]
"""(agent URL, group, first index of the leadership)."""

"""Only this role takes requests; an HSM that is stepping down refuses new ones."""

STALE_S: Final = 3.0
"""An agent that has not answered for this long loses its routes (load-balancer.md 8.2)."""

HOPE_S: Final = 5.0
"""A range without a leader for longer is not in a hand-over or a move; waiting would only delay clients (own)."""


@dataclass(frozen=True, slots=True)
class Stall:
    """Why a leader takes no requests: it cannot commit, `alive` of the group's `members` answer it.

    `lacks_store`: because the store fails.
    """

    alive: int
    members: int
    lacks_store: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """One HSM's claim to lead `group` and own `range`. `since_s` is when this leadership was first seen (monotonic)."""

    group: GroupId
    range: OwnedRange
    url: str
    starting: int
    committed: int
    since_s: float
    stall: Stall | None = None

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
                mine.key == theirs.key and mine.range == theirs.range and mine.stall == theirs.stall
                for mine, theirs in zip(self.routes, other.routes, strict=True)
            )
        )


def slice_of(url: str, status: AgentStatus, now_s: float, known: Mapping[RouteKey, float]) -> AgentSlice:
    """Read an agent's status; `known` tells since when its leaderships are known. Malformed claims are left out."""
    realm = status.hsm.realm if status.hsm is not None else None
    if realm is None:
        return AgentSlice()
    routes = []
    stalls = {
        group.group: (group.members_alive or 0, group.lacks_store)
        for group in status.groups
        if group.leading and group.stalled_s is not None
    }
    for group in realm.groups:
        leader = group.leader
        if leader is None or leader.owned_range is None or group.role.name is not GroupRole.LEADER:
            continue
        owned = OwnedRange(RecordId(leader.owned_range.start), RecordId(leader.owned_range.end))
        if not owned.is_valid:
            continue
        starting = group.role.starting or 0
        key = (url, GroupId(group.id), starting)
        committed = -1 if leader.committed is None else leader.committed
        stall = None
        if group.id in stalls:
            alive, lacks_store = stalls[group.id]
            stall = Stall(alive, len(group.configuration), lacks_store)
        routes.append(Route(GroupId(group.id), owned, url, starting, committed, known.get(key, now_s), stall))
    routes.sort(key=lambda route: route.group)
    return AgentSlice(RealmId(realm.id), tuple(routes))


class AgentClaims:
    """What one agent claims. Polls may overlap, and are numbered, so that an older answer does not undo a newer one.

    A leadership's first report is remembered (`Route.since_s`) for as long as the agent reports it. The methods that
    take an outcome tell whether the table is to be built anew; committed indexes alone are not worth that unless
    claims compete (`contested`).
    """

    __slots__ = ("_applied", "_asked", "_heard_at_s", "_known", "slice", "url")

    def __init__(self, url: str, now_s: float) -> None:
        self.url = url
        self.slice = AgentSlice()
        self._known: dict[RouteKey, float] = {}
        self._asked = 0
        self._applied = 0
        self._heard_at_s = now_s

    def ask(self) -> int:
        """Return the number of a poll that is about to be sent."""
        self._asked += 1
        return self._asked

    def heard(self, poll: int, status: AgentStatus, now_s: float, *, contested: bool) -> bool:
        """Take in an answer."""
        self._heard_at_s = now_s
        if poll <= self._applied:
            return False
        fresh = slice_of(self.url, status, now_s, self._known)
        self._known = {route.key: route.since_s for route in fresh.routes}
        return self._apply(poll, fresh, contested=contested)

    def missed(self, poll: int, now_s: float, *, is_unreachable: bool, contested: bool) -> bool:
        """Take in that no answer came. Without a stream the routes go at once, else when the agent is long silent."""
        if poll <= self._applied or not (is_unreachable or now_s - self._heard_at_s >= STALE_S):
            return False
        return self._apply(poll, AgentSlice(self.slice.realm), contested=contested)

    def _apply(self, poll: int, fresh: AgentSlice, *, contested: bool) -> bool:
        old, self.slice, self._applied = self.slice, fresh, poll
        return contested or not fresh.same_shape(old)


@dataclass(frozen=True, slots=True)
class Gap:
    """A range that nobody claims, since `since_s`."""

    range: OwnedRange
    since_s: float


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """All routes by realm, each realm's sorted freshest claim first. `contested`: some record has several claims.

    Leaders that cannot commit are no routes, and their ranges are unclaimed; `stalled` tells who they are.
    """

    realms: Mapping[RealmId, tuple[Route, ...]] = field(default_factory=dict)
    unclaimed: Mapping[RealmId, tuple[Gap, ...]] = field(default_factory=dict)
    contested: bool = False
    stalled: Mapping[RealmId, tuple[Route, ...]] = field(default_factory=dict)

    def candidates(self, realm: RealmId, record: RecordId) -> list[Route]:
        """Return the routes that cover `record`, freshest claim first."""
        return [route for route in self.realms.get(realm, ()) if route.range.contains(record)]

    def gaps(self, realm: RealmId) -> list[OwnedRange]:
        """Return the ranges of `realm` that nobody claims."""
        known = self.unclaimed.get(realm)
        return uncovered(()) if known is None else [gap.range for gap in known]

    def is_hopeless(self, realm: RealmId, record: RecordId, now_s: float) -> bool:
        """Tell whether `record` has been without a leader for so long that none is to be expected soon."""
        gaps = self.unclaimed.get(realm, ())
        return any(gap.range.contains(record) and gap.since_s < now_s - HOPE_S for gap in gaps)

    def stalled_in(self, realm: RealmId, part: OwnedRange) -> list[Route]:
        """Return the leaders that own something of `part` and cannot commit."""
        return [route for route in self.stalled.get(realm, ()) if route.range.overlaps(part)]

    @property
    def stalled_count(self) -> int:
        """Return the number of leaders of all realms that cannot commit."""
        return sum(len(routes) for routes in self.stalled.values())

    @property
    def route_count(self) -> int:
        """Return the number of routes of all realms."""
        return sum(len(routes) for routes in self.realms.values())

    @property
    def gap_count(self) -> int:
        """Return the number of ranges of all realms that nobody claims."""
        return sum(len(gaps) for gaps in self.unclaimed.values())


def build_table(slices: Iterable[AgentSlice], before: RoutingTable, now_s: float) -> RoutingTable:
    """Merge the agents' slices into a table that follows `before`, from which gaps have their age."""
    realms: dict[RealmId, list[Route]] = {}
    stalled: dict[RealmId, list[Route]] = {}
    for each in slices:
        if each.realm is not None:
            realms.setdefault(each.realm, []).extend(route for route in each.routes if route.stall is None)
            stalled.setdefault(each.realm, []).extend(route for route in each.routes if route.stall is not None)
    contested = False
    for routes in realms.values():
        routes.sort(key=lambda route: (-route.starting, -route.committed, route.url))
        contested = contested or _overlap(routes)
    unclaimed = {realm: _gaps(routes, before.unclaimed.get(realm, ()), now_s) for realm, routes in realms.items()}
    return RoutingTable(_frozen(realms), unclaimed, contested, _frozen(stalled))


def _frozen(routes: Mapping[RealmId, list[Route]]) -> dict[RealmId, tuple[Route, ...]]:
    return {realm: tuple(found) for realm, found in routes.items()}


def _gaps(routes: Iterable[Route], known: Iterable[Gap], now_s: float) -> tuple[Gap, ...]:
    """Return what `routes` leave out, each with the time since when it is so; a gap that grew is a new one."""
    return tuple(
        Gap(gap, min((old.since_s for old in known if old.range.contains_range(gap)), default=now_s))
        for gap in uncovered(route.range for route in routes)
    )


def _overlap(routes: Iterable[Route]) -> bool:
    ordered = sorted(routes, key=lambda route: route.range.start)
    return any(later.range.start <= earlier.range.end for earlier, later in itertools.pairwise(ordered))
