"""The mean time of requests over the last minute."""

from __future__ import annotations

import pytest

from juicebox_hsm.host.latency import LatencyMeter


def test_mean_of_a_minute() -> None:
    """What ended within 60 s counts, each alike; without any there is no mean."""
    meter = LatencyMeter()
    assert meter.mean_ms(1_000.0) is None
    for now_s, took_s in ((1_000.0, 0.010), (1_000.5, 0.030), (1_030.0, 0.080)):
        meter.add(now_s, took_s)
    assert meter.mean_ms(1_030.0) == pytest.approx(40.0)
    assert meter.mean_ms(1_070.0) == pytest.approx(80.0)
    assert meter.mean_ms(1_100.0) is None
