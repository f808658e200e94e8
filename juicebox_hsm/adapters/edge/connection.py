"""Book-keeping of open client connections: deadlines, idleness, eviction (load-balancer.md 3).

No await of the hot path has a timer of its own. A protocol loop only writes `Connection.deadline`; one sweeper task
looks at all connections every `SWEEP_S` and expires those that are late, so times are kept to within that.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final, Protocol

import trio

from juicebox_hsm.adapters.edge.limits import EVICTABLE_AFTER_S

SWEEP_S: Final = 0.25
"""Period of the sweeper; 10,000 connections cost about 1 ms each time."""


class Session(Protocol):
    """A protocol loop's answer to the edge. Neither method awaits."""

    def stop(self) -> None:
        """Finish what is in progress, accept nothing more, end."""
        ...

    def expire(self, now: float) -> None:
        """The connection's deadline has passed: end it, or set a later deadline."""
        ...


class Connection:
    """One accepted connection. `scope` may be cancelled only while nothing is processed for the client."""

    __slots__ = ("_table", "deadline", "protocol", "scope", "session", "stopping")

    def __init__(self, table: ConnectionTable, deadline: float) -> None:
        self._table = table
        self.deadline = deadline
        self.protocol = "none"
        self.scope = trio.CancelScope()
        self.session: Session | None = None
        self.stopping = False

    def set_idle(self, now: float) -> None:
        """Note that no request is in progress since `now`; the connection may be evicted."""
        idle = self._table.idle
        idle[self] = now
        idle.move_to_end(self)

    def set_busy(self) -> None:
        """Note that a request is in progress."""
        self._table.idle.pop(self, None)

    def expire(self, now: float) -> None:
        """End the connection, or let its protocol decide."""
        if self.session is None:
            self.deadline = math.inf
            self.scope.cancel()
        else:
            self.session.expire(now)

    def stop(self) -> None:
        """Ask the connection to finish and end; idempotent."""
        if self.stopping:
            return
        self.stopping = True
        if self.session is None:
            self.scope.cancel()
        else:
            self.session.stop()


class ConnectionTable:
    """All open connections; `idle` is ordered, longest idle first."""

    def __init__(self) -> None:
        self.open: set[Connection] = set()
        self.idle: OrderedDict[Connection, float] = OrderedDict()
        self._changed = trio.Event()

    def add(self, now: float, handshake_timeout_s: float) -> Connection:
        """Enter a new connection; until its first request it counts as idle."""
        connection = Connection(self, now + handshake_timeout_s)
        self.open.add(connection)
        connection.set_idle(now)
        return connection

    def remove(self, connection: Connection) -> None:
        """Forget a connection."""
        self.open.discard(connection)
        self.idle.pop(connection, None)
        self._changed.set()

    def evict(self, now: float) -> bool:
        """Stop the connection that is idle longest, if idle for `EVICTABLE_AFTER_S` or more; False if there is none."""
        for connection, since in self.idle.items():
            if now - since < EVICTABLE_AFTER_S:
                return False
            if not connection.stopping:
                connection.set_busy()
                connection.stop()
                return True
        return False

    async def wait_removed(self, timeout_s: float) -> None:
        """Return when a connection ends, or after `timeout_s`."""
        self._changed = trio.Event()
        with trio.move_on_after(timeout_s):
            await self._changed.wait()

    def sweep(self, now: float) -> None:
        """Expire every connection whose deadline has passed."""
        for connection in [each for each in self.open if each.deadline <= now]:
            connection.expire(now)

    def stop_all(self) -> None:
        """Ask every connection to finish."""
        for connection in list(self.open):
            connection.stop()
