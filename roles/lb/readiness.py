"""Why a balancer is not ready (load-balancer.md 5.3)."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterable
from typing import Final

from juicebox_hsm.adapters.edge.drain import DrainController, LifePhase
from juicebox_hsm.adapters.tenants.secrets_file import REFRESH_S
from juicebox_hsm.adapters.tls.certificate_end import to_unix_ms
from juicebox_hsm.host.cluster.ranges import show_range
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.routing import RoutingTable
from juicebox_hsm.ids import RealmId, uncovered
from roles.clock import OwnClock
from roles.lb.guard import RealmGuard
from roles.lb.poller import Poller
from roles.words import certificate_ends, clock_off

REFRESHES_MISSED_MAX: Final = 10
"""Secrets older than so many refresh intervals make a balancer not ready."""


def warning_lines(warnings: Iterable[tuple[Code, str]]) -> list[str]:
    """Return warnings as `/readyz` shows them, a line each."""
    return [f"warning: {text}" for _, text in warnings]


def _unserved(table: RoutingTable, realm: RealmId) -> list[str]:
    """Return why parts of a realm are not served: their leaders cannot commit, or there are none."""
    stalled = [route for gap in table.gaps(realm) for route in table.stalled_in(realm, gap)]
    reasons = [
        f"group {route.group.hex()} ({show_range(route.range)}) cannot commit: "
        f"{route.stall.alive} of {route.stall.members} members answer its leader"
        for route in dict.fromkeys(stalled)
        if route.stall is not None
    ]
    known = [route.range for route in (*table.realms[realm], *stalled)]
    return [*reasons, *(f"no leader for {show_range(gap)}" for gap in uncovered(known))]


class Readiness:
    """Judges the balancer: live, at least one realm fully routed, fresh secrets.

    `cluster_end` tells when its cluster certificate ends (UTC), None without TLS.
    """

    def __init__(
        self,
        *,
        drain: DrainController,
        poller: Poller,
        guard: RealmGuard,
        secrets_age_s: Callable[[], float],
        cluster_end: Callable[[], dt.datetime | None],
        clock: OwnClock | None = None,
        refresh_s: float = REFRESH_S,
    ) -> None:
        self._drain = drain
        self._poller = poller
        self._guard = guard
        self._secrets_age_s = secrets_age_s
        self._cluster_end = cluster_end
        self._clock = clock
        self._age_s_max = REFRESHES_MISSED_MAX * refresh_s

    def reasons(self) -> list[str]:
        """Return one reason per line, none when ready."""
        reasons: list[str] = []
        if self._drain.phase is not LifePhase.LIVE:
            reasons.append("shutting down")
        age_s = self._secrets_age_s()
        if age_s > self._age_s_max:
            reasons.append(f"secrets stale for {age_s:.0f}s")
        if self._clock is not None and self._clock.outvoted_s:
            reasons.append(f"its clock is {clock_off(self._clock.outvoted_s)}: good tokens may be refused")
        return reasons + self._unrouted()

    def warnings(self) -> list[tuple[Code, str]]:
        """Return what somebody has to see to although the balancer serves."""
        told = certificate_ends(to_unix_ms(self._cluster_end()), round(time.time() * 1000))
        warnings = [(Code.CERTIFICATE, f"the cluster certificate {told}")] if told else []
        if self._clock is not None and self._clock.off_s:
            warnings.append((Code.CLOCK, f"its clock is {clock_off(self._clock.off_s)}"))
        return warnings

    def _unrouted(self) -> list[str]:
        """Return why no realm is fully served, nothing as soon as one is."""
        table = self._poller.table
        if not table.realms:
            return ["no realms"]
        reasons: list[str] = []
        for realm in sorted(table.realms):
            found = [f"realm {realm.hex()}: {why}" for why in _unserved(table, realm)]
            if realm in self._guard.realms.refused:
                found.append(f"realm {realm.hex()}: used with another record-id key")
            elif realm not in self._guard.realms.allowed:
                found.append(f"realm {realm.hex()}: record-id key not checked yet")
            if not found:
                return []
            reasons += found
        return reasons
