"""What a balancer judges its readiness by (load-balancer.md 5.3); the rules are `juicebox_hsm.host.readiness`."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable

from juicebox_hsm.adapters.edge.drain import DrainController, LifePhase
from juicebox_hsm.adapters.tenants.secrets_file import REFRESH_S
from juicebox_hsm.adapters.tls.certificate_end import to_unix_ms
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.readiness import (
    OwnClockOff,
    Plain,
    Readiness,
    Reason,
    of_certificate,
    of_routes,
    of_secrets,
    of_shown_certificate,
)
from roles.clock import OwnClock
from roles.lb.guard import RealmGuard
from roles.lb.poller import Poller


class BalancerReadiness:
    """Ready is who is live, serves a realm in full, has fresh secrets, a valid certificate, and a clock that agrees.

    `cluster_end` tells when its cluster certificate ends (UTC), None without TLS; `edge_valid_ms` from when until when
    (Unix ms) clients may accept its edge certificate.
    """

    def __init__(
        self,
        *,
        drain: DrainController,
        poller: Poller,
        guard: RealmGuard,
        secrets_age_s: Callable[[], float],
        cluster_end: Callable[[], dt.datetime | None],
        edge_valid_ms: Callable[[], tuple[int, int]],
        clock: OwnClock | None = None,
        refresh_s: float = REFRESH_S,
    ) -> None:
        self._drain = drain
        self._poller = poller
        self._guard = guard
        self._secrets_age_s = secrets_age_s
        self._cluster_end = cluster_end
        self._edge_valid_ms = edge_valid_ms
        self._clock = clock
        self._refresh_s = refresh_s

    def judge(self) -> Readiness:
        """Return why the balancer is not ready, and what somebody has to see to although it serves."""
        reasons: list[Reason] = [] if self._drain.phase is LifePhase.LIVE else [Plain(Code.STOPPING)]
        now_ms = round(time.time() * 1000)
        reasons += of_secrets(self._secrets_age_s(), self._refresh_s)
        reasons += of_shown_certificate(*self._edge_valid_ms(), now_ms)
        if self._clock is not None and self._clock.outvoted_s:
            reasons.append(OwnClockOff(self._clock.outvoted_s, refuses=True))
        reasons += of_routes(self._poller.table, self._guard.realms)
        warnings = of_certificate(to_unix_ms(self._cluster_end()), now_ms)
        if self._clock is not None and self._clock.off_s:
            warnings = (*warnings, OwnClockOff(self._clock.off_s))
        return Readiness(tuple(reasons), warnings)
