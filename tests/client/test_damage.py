"""Damage in the store on a real demo: it is told at once, where and what to do, and nobody waits for it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import apsw
import pytest
import trio

from juicebox_hsm.client import Client, ClientError, Configuration, HttpTransport
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import DemoOptions
from tests.patience import PROGRAM_S

pytestmark = pytest.mark.processes
INFO = b"info"
TOLD_WITHIN_S = 10.0
"""Nothing dangerous is silent for longer; a client waited 16 to 25 s before there was a rule."""


def _damage_roots(store: Path) -> int:
    """Flip a bit in each stored root node; returns how many there are."""
    with apsw.Connection(str(store)) as connection:
        rows = list(connection.execute("SELECT realm, hash, node FROM roots"))
        for realm, node_hash, node in rows:
            broken = node[:-1] + bytes([node[-1] ^ 1])
            connection.execute("UPDATE roots SET node = ? WHERE realm = ? AND hash = ?", (broken, realm, node_hash))
    return len(rows)


def _cluster(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    flags = ("--config", str(cluster.state.path / "cluster.toml"))
    return subprocess.run(
        [sys.executable, "-m", "roles", *words, *flags], capture_output=True, text=True, check=False, timeout=PROGRAM_S
    )


async def test_a_damaged_root_is_told(tmp_path: Path) -> None:
    """Clients are refused soon, the leader is not ready, and log and status name the group and `store check`."""
    async with launch(DemoOptions(state_dir=tmp_path, agents=3, pin_hashing="FastInsecure")) as cluster:
        tokens = {realm: cluster.token(realm, "alice") for realm in cluster.realms}
        async with HttpTransport(ca_file=cluster.state.edge_ca) as transport:
            client = Client(Configuration.from_json(cluster.configuration), tokens, transport=transport)
            await client.register(b"1234", b"secret", INFO, 5)
            assert _damage_roots(tmp_path / "store.db") >= 1
            for agent in cluster.of_role("agent"):  # what they remember of the tree hides what became of the store
                await agent.kill()
            for agent in cluster.of_role("agent"):
                await cluster.restart(agent.service.name)
            await cluster.wait_leaders()
            seen = 0
            deadline = trio.current_time() + PROGRAM_S
            while trio.current_time() < deadline and "damaged or missing" not in _logs(cluster):
                begun = time.monotonic()
                with pytest.raises(ClientError):
                    await client.recover(b"1234", INFO)
                seen = max(seen, int(time.monotonic() - begun))
            assert "damaged or missing" in _logs(cluster)
            status = await trio.to_thread.run_sync(_cluster, cluster, "cluster", "status")
            assert status.returncode == 5
            assert "the tree node at depth 0" in status.stdout
            assert "is damaged or missing; run `store check`" in status.stdout
        ready = [await trio.to_thread.run_sync(_ready, running.service.http) for running in cluster.of_role("agent")]
        assert any("store check" in said for said in ready), ready


def _ready(address: str) -> str:
    from urllib.error import HTTPError
    from urllib.request import urlopen

    try:
        with urlopen(f"http://{address}/readyz", timeout=PROGRAM_S) as answer:
            return str(answer.read())
    except HTTPError as error:
        return error.read().decode()


def _logs(cluster: Cluster) -> str:
    return "".join(running.last_lines() for running in cluster.of_role("agent"))
