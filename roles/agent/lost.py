"""Lost leaders: a member that stops hearing its leader tells the managers at once (agent.md 7, manager.md 3.2).

Hints only save time: managers check before they act, and their own 2 s loop stays. A hint goes out when the stream of
the leader's agent closes, after 1 s of silence, when this agent left leadership without being asked, and when it has
heard no leader 250 ms after it registered; and again every second until a leader speaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.wire.rpc import MANAGER_METHODS, LeaderLost
from roles.agent.state import GroupState

if TYPE_CHECKING:
    from roles.agent.context import Agent

HINT_TIMEOUT_S = 0.5
TICK_S = 0.1


class Connection(Protocol):
    """What is used of the RPC caller: its stream's identity and end."""

    @property
    def connection_id(self) -> int:
        """A number per stream."""
        ...

    @property
    def closed(self) -> trio.Event:
        """Set when the stream is gone."""
        ...


@dataclass(slots=True)
class _Heard:
    """When and from whom a group's leader was last heard; `starting` is the highest ever seen."""

    starting: int
    at: float
    connection: Connection | None
    hint_at: float | None = None
    """When the next hint is due while the leader counts as lost."""


class LeaderWatch:
    """Hears leaders and raises the alarm."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._heard: dict[tuple[RealmId, GroupId], _Heard] = {}
        self._registered_at: float | None = None

    def heard(self, group: GroupState, starting: int, connection: Connection | None) -> None:
        """Note a `replicate` call of the leadership that began at `starting`."""
        key = (group.realm, group.group)
        known = self._heard.get(key)
        now = trio.current_time()
        if known is None:
            self._heard[key] = _Heard(starting, now, connection)
        elif starting >= known.starting:
            known.starting, known.at, known.connection, known.hint_at = starting, now, connection, None
        else:
            return
        self._agent.lost_hints.pop(key, None)

    async def run(self) -> None:
        """Look at every group ten times a second and send the hints that are due."""
        while True:
            await trio.sleep(TICK_S)
            if not self._agent.registered or self._agent.stopping:
                continue
            now = trio.current_time()
            if self._registered_at is None:
                self._registered_at = now
            for group in self._agent.groups:
                starting = self._due(group, now)
                if starting is not None:
                    await self._hint(group, starting)

    def _due(self, group: GroupState, now: float) -> int | None:
        """Return the lost leadership's `starting` if a hint is due now; pure but for the next due time."""
        timings = self._agent.timings
        key = (group.realm, group.group)
        heard = self._heard.get(key)
        if group.leader is not None:
            if heard is not None:
                heard.hint_at = None
            return None
        left = self._agent.lost_hints.get(key)
        if heard is None:
            registered = self._registered_at if self._registered_at is not None else now
            first = now if left is not None else registered + timings.leader_hint_first_s
            heard = self._heard[key] = _Heard(left or 0, registered, None, hint_at=first)
        if heard.hint_at is None:
            closed = heard.connection is not None and heard.connection.closed.is_set()
            silent = now - heard.at >= timings.silence_s
            if left is not None and heard.starting > left and not closed and not silent:
                # deposed by a leader that speaks: nothing is lost
                self._agent.lost_hints.pop(key, None)
                return None
            if not (closed or silent or left is not None):
                return None
            heard.hint_at = now
        if now < heard.hint_at:
            return None
        heard.hint_at = now + timings.leader_hint_again_s
        return max(heard.starting, left or 0)

    async def _hint(self, group: GroupState, starting: int) -> None:
        agent = self._agent
        agent.metrics.count("agent.leader_lost")
        agent.log.info("no leader heard", group=group.group.hex(), starting=starting)
        body = LeaderLost(group.realm, group.group, starting)
        for url in agent.peers.manager_urls:
            agent.nursery.start_soon(self._tell, url, body)

    async def _tell(self, url: str, body: LeaderLost) -> None:
        try:
            await self._agent.rpc.call(url, MANAGER_METHODS["leader_lost"], body, timeout_s=HINT_TIMEOUT_S)
        except RealmError:
            self._agent.metrics.count("agent.leader_lost.undelivered")
