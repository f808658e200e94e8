"""The short form of the drill with wrong clocks: one agent, one balancer, then all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.client.clocks import drill

pytestmark = pytest.mark.processes


async def test_a_wrong_clock_is_named_and_clients_see_nothing(tmp_path: Path) -> None:
    """A clock 25 minutes ahead harms nobody and is named; when all jump by an hour nothing happens at all."""
    assert await drill(tmp_path, names=["agent1", "lb1"], users=2, ways=(1,)) == []
