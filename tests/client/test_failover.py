"""Leaders are killed under clients on Bigtable: every answer is right, and the realm goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.client.failover import Plan, measure

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("store", [pytest.param("bigtable", marks=pytest.mark.emulator)], indirect=True)
async def test_clients_outlive_killed_leaders(tmp_path: Path, store: str) -> None:
    """After each kill -9 of the leader a recover succeeds, and none gave a wrong secret or a lasting error."""
    plan = Plan(agents=3, users=4, kills=2, pause_s=1, client="own", store=store)
    gaps, tally = await measure(plan, tmp_path)
    assert tally.wrong == []
    assert len(gaps) == 2
    assert None not in gaps, "the realm came back"
    assert tally.outcomes["success"] > 0
