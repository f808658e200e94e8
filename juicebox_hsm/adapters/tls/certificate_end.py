"""When a certificate in service ends, and from when on somebody has to be told (operator-tools.md 2, 3).

Every service reads its certificates at start and at HUP only, so an end that nobody sees is an outage of everything
that was issued on the same day.
"""

from __future__ import annotations

import datetime as dt
from typing import Final, Protocol

DAYS_WARN: Final = 20  # operator-tools.md 3: time enough to issue a new one, with a holiday in between
MOMENT_MS_MAX: Final = 253_402_300_799_000  # the last second of the year 9999, the last one that a date can hold


class Gauges(Protocol):
    """Where gauges go."""

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge."""
        ...


def ending(end: dt.datetime | None, now: dt.datetime) -> str:
    """Return in words that a certificate ended or ends soon, "" while nobody needs to know or `end` is None."""
    if end is None:
        return ""
    days = remaining_days(end, now)
    if days <= 0:
        return f"ended on {end:%Y-%m-%d}"
    return f"ends on {end:%Y-%m-%d}, in {days:.0f} days" if days < DAYS_WARN else ""


def remaining_days(end: dt.datetime, now: dt.datetime) -> float:
    """Return the days until `end`, negative afterwards."""
    return (end - now) / dt.timedelta(days=1)


def report_cluster_end(metrics: Gauges, end: dt.datetime | None) -> None:
    """Set the gauge of a service's cluster certificate; there is none without TLS, lest an alert take 0 for an end."""
    if end is not None:
        metrics.gauge("cluster_tls.cert.remaining_days", remaining_days(end, dt.datetime.now(dt.UTC)))


def to_unix_ms(end: dt.datetime | None) -> int | None:
    """Return `end` as it travels: Unix time in ms."""
    return None if end is None else round(end.timestamp() * 1000)


def from_unix_ms(moment_ms: object) -> dt.datetime | None:
    """Return what `to_unix_ms` sent (UTC); None for anything that is no moment, since peers may send anything."""
    if not isinstance(moment_ms, int) or not 0 <= moment_ms <= MOMENT_MS_MAX:
        return None
    return dt.datetime.fromtimestamp(moment_ms / 1000, dt.UTC)
