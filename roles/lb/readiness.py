"""Why a balancer is not ready (load-balancer.md 5.3)."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Final

from juicebox_hsm.adapters.edge.drain import DrainController, LifePhase
from juicebox_hsm.adapters.tenants.secrets_file import REFRESH_S
from juicebox_hsm.adapters.tls.certificate_end import ending
from juicebox_hsm.ids import OwnedRange, RecordId
from roles.lb.guard import RealmGuard
from roles.lb.poller import Poller

REFRESHES_MISSED_MAX: Final = 10
"""Secrets older than so many refresh intervals make a balancer not ready."""


def _short(record: RecordId) -> str:
    """Shorten a record id for people: a run of more than 3 bytes 00 or ff at its end becomes `...`."""
    last = record[-1:]
    kept = record.rstrip(last) if last in {b"\x00", b"\xff"} else record
    return record.hex() if len(record) - len(kept) <= 3 else f"{(kept + last).hex()}..."


def _range(gap: OwnedRange) -> str:
    return f"[{_short(gap.start)}-{_short(gap.end)}]"


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
        refresh_s: float = REFRESH_S,
    ) -> None:
        self._drain = drain
        self._poller = poller
        self._guard = guard
        self._secrets_age_s = secrets_age_s
        self._cluster_end = cluster_end
        self._age_s_max = REFRESHES_MISSED_MAX * refresh_s

    def reasons(self) -> list[str]:
        """Return one reason per line, none when ready."""
        reasons: list[str] = []
        if self._drain.phase is not LifePhase.LIVE:
            reasons.append("shutting down")
        age_s = self._secrets_age_s()
        if age_s > self._age_s_max:
            reasons.append(f"secrets stale for {age_s:.0f}s")
        return reasons + self._unrouted()

    def warnings(self) -> list[str]:
        """Return what somebody has to see to although the balancer serves; each line begins with `warning: `."""
        told = ending(self._cluster_end(), dt.datetime.now(dt.UTC))
        return [f"warning: the cluster certificate {told}"] if told else []

    def _unrouted(self) -> list[str]:
        """Return why no realm is fully served, nothing as soon as one is."""
        table = self._poller.table
        if not table.realms:
            return ["no realms"]
        reasons: list[str] = []
        for realm in sorted(table.realms):
            found = [f"realm {realm.hex()}: no leader for {_range(gap)}" for gap in table.gaps(realm)]
            if realm in self._guard.realms.refused:
                found.append(f"realm {realm.hex()}: used with another record-id key")
            elif realm not in self._guard.realms.allowed:
                found.append(f"realm {realm.hex()}: record-id key not checked yet")
            if not found:
                return []
            reasons += found
        return reasons
