"""Real processes: a realm that is started on an older store says why nobody serves."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from roles.tools.demo.launch import launch
from roles.tools.demo.layout import DemoOptions
from tests.client.looking import eventually, page_of, status_of

pytestmark = pytest.mark.processes

TOLD_S = 15.0
"""Agents look every 5 s, and a busy machine has the rest."""


async def test_an_older_store_is_named(tmp_path: Path) -> None:
    """Readiness and `status` give the reason: the log ends before what the HSMs captured."""
    options = DemoOptions(state_dir=tmp_path, agents=3, pin_hashing="FastInsecure", tenant_log=False)
    async with launch(options) as cluster:
        services = [*cluster.of_role("agent"), *cluster.of_role("manager")]
        names = [running.service.name for running in services]
        agent = cluster.of_role("agent")[0].service
        log = tmp_path / "store.db"

        async def told(text: str) -> bool:
            return text in await page_of(agent.http, "/readyz") and text in await status_of(cluster)

        for name in names:
            await cluster.process(name).kill()
        with closing(sqlite3.connect(log)) as db, db:
            db.execute("DELETE FROM log WHERE id = (SELECT max(id) FROM log)")
        for name in names:
            await cluster.restart(name)
        await eventually(lambda: told("an older or another store"), TOLD_S, "the older store is told")
