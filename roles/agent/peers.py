"""Who else is there: the discovery watcher and the map from HSM ids to agents' addresses (agent.md 4, 8).

One task polls discovery every second, and compares our clock with what the others said. Whenever discovery changes,
every 10 s, and soon after a call to a member failed, the agents are asked for their status;
`juicebox_hsm.host.liveness.Reachable` says which of them count as reachable.
"""

from __future__ import annotations

from typing import Final

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.copies import Elsewhere, Place
from juicebox_hsm.host.liveness import Reachable
from juicebox_hsm.host.services import ServiceAddress, ServiceKind
from juicebox_hsm.ids import HsmId
from juicebox_hsm.wire.methods import AGENT_STATUS
from juicebox_hsm.wire.rpc import AgentStatus, Empty
from roles.agent.oneshot import Signal
from roles.agent.outside import Outside

SUSPECT_PAUSE_S: Final = 0.5
"""At least this long between refreshes that failed calls ask for."""


class Peers:
    """Addresses of managers and of the other agents."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside
        self._reachable = Reachable()
        self._elsewhere = Elsewhere()
        self._seen: tuple[ServiceAddress, ...] | None = None
        self._wake = Signal()
        self.agent_urls: tuple[str, ...] = ()
        self.manager_urls: tuple[str, ...] = ()

    def url_of(self, member: HsmId) -> str | None:
        """Return where the agent of `member` is, if it answered lately; None for our own HSM."""
        return self._reachable.url_of(member)

    @property
    def copies(self) -> tuple[str, ...]:
        """Return at which other addresses our own HSM answers; it should be none."""
        return self._elsewhere.urls

    def suspect(self) -> None:
        """A call failed: look again soon."""
        self._wake.set()

    async def run(self) -> None:
        """Poll discovery and statuses for ever."""
        timings = self._outside.timings
        refresh_at = looked_at = trio.current_time()
        while True:
            changed = await self._read_discovery()
            if changed or self.copies or trio.current_time() >= refresh_at:
                looked_at = trio.current_time()
                await self._read_statuses()
                refresh_at = trio.current_time() + timings.peer_refresh_s
            self._outside.clock.look()  # at every turn: what others said is kept, and our own clock may have jumped
            if await self._wake.wait_at_most(timings.discovery_poll_s):
                await trio.sleep_until(looked_at + min(SUSPECT_PAUSE_S, timings.discovery_poll_s))
                refresh_at = trio.current_time()

    async def _read_discovery(self) -> bool:
        """Re-read the registrations; tell whether they changed."""
        try:
            addresses = tuple(await self._outside.store.discovery.list())
        except RealmError as error:
            self._outside.note_trouble(Code.DISCOVERY, error)
            return False
        self._outside.clear_trouble(Code.DISCOVERY)
        if addresses == self._seen:
            return False
        self._seen = addresses
        own = self._outside.config.url
        self.agent_urls = tuple(a.url for a in addresses if a.kind is ServiceKind.AGENT and a.url != own)
        self.manager_urls = tuple(a.url for a in addresses if a.kind is ServiceKind.MANAGER)
        return True

    async def _read_statuses(self) -> None:
        """Ask every other agent for its HSM's id."""
        places: list[Place] = []

        async def ask(url: str) -> None:
            status = await self.status(url)
            if status is not None and status.hsm is not None:
                places.append(Place(url, HsmId(status.hsm.id), status.instance))

        async with trio.open_nursery() as nursery:
            for url in self.agent_urls:
                nursery.start_soon(ask, url)
        self._look_for_copies(places)
        if self._reachable.asked({place.hsm: place.url for place in sorted(places)}, self.agent_urls):
            self._wake.set()

    def _look_for_copies(self, places: list[Place]) -> None:
        """Find out whether our own HSM answers at another address, too; log when that begins and when it ends."""
        outside, hsm = self._outside, self._outside.hsm_id
        if hsm is None:
            return
        before = self.copies
        self._elsewhere.asked(Place(outside.config.url, hsm, outside.config.instance), places, self.agent_urls)
        if self.copies and not before:
            outside.log.error("our HSM also runs elsewhere: one is a copy", hsm=hsm.hex(), at=list(self.copies))
        elif before and not self.copies:
            outside.log.info("our HSM runs here only, again", hsm=hsm.hex())

    async def status(self, url: str) -> AgentStatus | None:
        """Return an agent's status, None when it does not answer in 2 s."""
        outside, asked = self._outside, trio.current_time()
        try:
            status = await outside.rpc.call(url, AGENT_STATUS, Empty(), timeout_s=outside.timings.peer_status_s)
        except RealmError:
            return None
        outside.clock.heard(url, status.now_ms, asked)
        return status
