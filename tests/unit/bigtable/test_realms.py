"""The rules by which the service removes old cells keep what readers need (storage.md 4.6)."""

from __future__ import annotations

import random

from juicebox_hsm.adapters.bigtable.realms import DAY_S, _families

TODAY = 20_000
RETENTION_DAYS = 116


def _collect(days: list[int], now_s: int) -> list[int]:
    """Return the days of the cells that the rule of accounting leaves, newest first."""
    rule = _families("0123-users")["f"]["gc_rule"]["intersection"]["rules"]
    bounds = {name: bound for part in rule for name, bound in part.items()}
    oldest_s = now_s - bounds["max_age"]["seconds"]
    newest = sorted(days, reverse=True)
    return [day for at, day in enumerate(newest) if at < bounds["max_num_versions"] or day * DAY_S >= oldest_s]


def test_every_period_finds_its_newest_event() -> None:
    """With a cell on any days at all, the newest at or before each day of the last 116 stays."""
    rng = random.Random(3)
    for share in (0.01, 0.05, 0.5, 0.99, 1.0):
        days = [day for day in range(TODAY - 400, TODAY + 1) if rng.random() < share]
        left = _collect(days, TODAY * DAY_S + DAY_S - 1)
        for horizon in range(TODAY - RETENTION_DAYS, TODAY + 1):
            wanted = max((day for day in days if day <= horizon), default=None)
            assert max((day for day in left if day <= horizon), default=None) == wanted
        assert share < 0.9 or len(left) < len(days), "old ones do go"
