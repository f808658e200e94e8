"""The short form of the rolling restart: three agents, one group, our client."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.client.rolling import drill

pytestmark = pytest.mark.processes


async def test_a_rolling_restart_fails_no_call(tmp_path: Path) -> None:
    """Every agent, manager and balancer is restarted in turn under traffic: all end in order and no client sees it."""
    tally = await drill(tmp_path, agents=3, groups=1, users=3, rounds=1, official=False, pause_s=0.1)
    assert tally.failures == []
    assert len(tally.restarts_s) == 3 + 2 + 2
    assert tally.calls >= 50
