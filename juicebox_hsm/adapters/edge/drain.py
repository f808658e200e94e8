"""Life cycle of the client edge: live, notice, draining, stopped (load-balancer.md 4).

`DrainController` holds the two one-way switches and counts open connections. It starts no task: the role drives it
(`begin_notice`, `begin_drain`, `wait_zero`) and the edge obeys it.
"""

from __future__ import annotations

import enum

import trio

from juicebox_hsm.errors import check


class LifePhase(enum.Enum):
    """Where the edge is in its life."""

    LIVE = "live"
    NOTICE = "notice"
    DRAINING = "draining"
    STOPPED = "stopped"


class DrainController:
    """The two switches `notice` and `drain`, and the number of open connections."""

    def __init__(self) -> None:
        self.notice = trio.Event()
        self.drain = trio.Event()
        self._stopped = False
        self._connections = 0
        self._zero = trio.Event()

    @property
    def phase(self) -> LifePhase:
        """Return the current phase."""
        if self._stopped:
            return LifePhase.STOPPED
        if self.drain.is_set():
            return LifePhase.DRAINING
        return LifePhase.NOTICE if self.notice.is_set() else LifePhase.LIVE

    @property
    def connections(self) -> int:
        """Return the number of open connections."""
        return self._connections

    def begin_notice(self) -> None:
        """Announce the shutdown; everything is still served."""
        self.notice.set()

    def begin_drain(self) -> None:
        """Stop accepting and let every connection finish what it is doing."""
        self.notice.set()
        self.drain.set()

    def mark_stopped(self) -> None:
        """Record that nothing is served any more."""
        self._stopped = True

    def enter(self) -> None:
        """Count a connection."""
        self._connections += 1

    def leave(self) -> None:
        """Count a connection's end."""
        check(self._connections > 0, "no more connections end than began")
        self._connections -= 1
        if self._connections == 0:
            self._zero.set()

    async def wait_zero(self) -> None:
        """Return once no connection is open."""
        while self._connections:
            self._zero = trio.Event()
            await self._zero.wait()
