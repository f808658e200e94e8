"""Lost leaders: a member that stops hearing its leader tells the managers at once (agent.md 7, manager.md 3.2).

Hints only save time: managers check before they act, and their own 2 s loop stays. A hint goes out when no leadership
that may still write speaks any more, because the stream of its agent closed or after 1 s of silence, when this agent
left leadership without being asked, and when it has heard no leader 250 ms after it registered; and again every second
until a leader speaks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.group import GroupState
from juicebox_hsm.host.leadership.machine import Claim
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.wire.methods import LEADER_LOST
from juicebox_hsm.wire.rpc import LeaderLost

if TYPE_CHECKING:
    from roles.agent.context import Agent

HINT_TIMEOUT_S = 0.5
TICK_S = 0.1
LEADERSHIPS_MAX = 9
"""Leaderships heard at once; a group has no more members, so what goes beyond is made up."""


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
    """What a member heard of its group's leaders, ranked by the last index they say they wrote (record 0018).

    Appends are conditional, so a leadership that ends below what another one wrote can never write again: it is
    deposed, and what it says counts for nothing. Those that end at the same index are all able to write the next one,
    wherever they began.
    """

    end: int = 0
    """The highest index any leadership said it wrote, or began after."""
    spoke: dict[int, tuple[float, Connection | None]] = field(default_factory=dict)
    """`starting` -> when and on which stream, of those that end there and spoke since the newest of them began."""
    hint_at: float | None = None
    """When the next hint is due while the leader counts as lost."""

    def note(self, claim: Claim, now: float, connection: Connection | None) -> bool:
        """Note that a leadership spoke; False when it is deposed."""
        known = claim.starting in self.spoke
        if claim.last < self.end and not known:
            return False
        if claim.last > self.end or all(claim.starting > other for other in self.spoke):
            self.end = claim.last
            self.spoke.clear()
        elif not known and len(self.spoke) >= LEADERSHIPS_MAX:
            return False
        self.spoke[claim.starting] = (now, connection)
        return True

    def claims(self) -> list[Claim]:
        """Return the leaderships that are not deposed."""
        return [Claim(self.end, starting) for starting in self.spoke]

    def is_speaking(self, starting: int, now: float, silence_s: float) -> bool:
        """Tell whether this leadership is neither silent nor cut off from us."""
        at, connection = self.spoke[starting]
        return now - at < silence_s and not (connection is not None and connection.closed.is_set())


class LeaderWatch:
    """Hears leaders and raises the alarm."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._heard: dict[tuple[RealmId, GroupId], _Heard] = {}
        self._registered_at: float | None = None

    def heard(self, group: GroupState, claim: Claim, connection: Connection | None) -> None:
        """Note a `replicate` call of a leadership."""
        key = (group.realm, group.group)
        left = self._agent.lost_hints.get(key)
        if left is not None and claim.last < left.last:
            return
        known = self._heard.setdefault(key, _Heard())
        if known.note(claim, trio.current_time(), connection):
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
        """Return the lost leadership's `starting` if a hint is due now.

        Sets the next due time, and forgets a leadership of our own once another one speaks.
        """
        timings = self._agent.timings
        key = (group.realm, group.group)
        heard = self._heard.setdefault(key, _Heard())
        left = self._agent.lost_hints.get(key)
        # what we heard before a leadership of our own counts only if it ranks above that one
        claims = [claim for claim in heard.claims() if left is None or claim > left]
        if group.leader is not None or any(heard.is_speaking(c.starting, now, timings.silence_s) for c in claims):
            heard.hint_at = None
            self._agent.lost_hints.pop(key, None)
            return None
        lost = max([*heard.claims(), *([] if left is None else [left])], default=None)
        if heard.hint_at is None:
            registered = self._registered_at if self._registered_at is not None else now
            heard.hint_at = now if lost is not None else registered + timings.leader_hint_first_s
        if now < heard.hint_at:
            return None
        heard.hint_at = now + timings.leader_hint_again_s
        return 0 if lost is None else lost.starting

    async def _hint(self, group: GroupState, starting: int) -> None:
        agent = self._agent
        agent.metrics.count("agent.leader_lost")
        agent.log.info("no leader heard", realm=group.realm.hex(), group=group.group.hex(), starting=starting)
        body = LeaderLost(group.realm, group.group, starting)
        for url in agent.peers.manager_urls:
            agent.nursery.start_soon(self._tell, url, body)

    async def _tell(self, url: str, body: LeaderLost) -> None:
        try:
            await self._agent.rpc.call(url, LEADER_LOST, body, timeout_s=HINT_TIMEOUT_S)
        except RealmError:
            self._agent.metrics.count("agent.leader_lost.undelivered")
