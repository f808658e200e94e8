"""Tell when a certificate in service ends: as a gauge, and to those who ask for a status (operator-tools.md 3)."""

from __future__ import annotations

import datetime as dt

from juicebox_hsm.host.certificates import remaining_days
from juicebox_hsm.ports.observation import Meter


def report_cluster_end(metrics: Meter, end: dt.datetime | None) -> None:
    """Set the gauge of a service's cluster certificate; there is none without TLS, lest an alert take 0 for an end."""
    if end is not None:
        metrics.gauge(
            "cluster_tls.cert.remaining_days", remaining_days(_unix_ms(end), _unix_ms(dt.datetime.now(dt.UTC)))
        )


def no_certificate() -> dt.datetime | None:
    """Return that there is no certificate whose end could be told."""
    return None


def to_unix_ms(end: dt.datetime | None) -> int | None:
    """Return `end` as it travels: Unix time in ms."""
    return None if end is None else _unix_ms(end)


def _unix_ms(moment: dt.datetime) -> int:
    return round(moment.timestamp() * 1000)
