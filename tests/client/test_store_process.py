"""Check, back up and restore a running realm's store: no damage imagined, no guess rewound."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from juicebox_hsm.client import Client, ClientError, Configuration, HttpTransport, InvalidPin
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import DemoOptions, StateDir

pytestmark = pytest.mark.processes

INFO = b"info"


async def _store(*arguments: str | Path, expect: int = 0) -> str:
    command = [sys.executable, "-m", "roles", "store", *map(str, arguments)]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    assert isinstance(done, subprocess.CompletedProcess)
    assert done.returncode == expect, done.stdout.decode() + done.stderr.decode()
    return str(done.stdout.decode())


@asynccontextmanager
async def _client(cluster: Cluster, user: str) -> AsyncIterator[Client]:
    tokens = {realm: cluster.token(realm, user) for realm in cluster.realms}
    async with HttpTransport(ca_file=cluster.state.edge_ca) as transport:
        yield Client(Configuration.from_json(cluster.configuration), tokens, transport=transport)


async def _guesses_left(client: Client) -> int:
    """Spend one guess on a wrong PIN; return how many are left."""
    try:
        await client.recover(b"wrong", INFO)
    except InvalidPin as error:
        return error.guesses_remaining
    raise AssertionError("a wrong PIN recovered the secret")


def _move_hsms(state: StateDir) -> None:
    """Move every HSM's directory to the next agent's place: another process, another port, another path."""
    state.hsm("agent3").rename(state.path / "hsm" / "moving")
    state.hsm("agent2").rename(state.hsm("agent3"))
    state.hsm("agent1").rename(state.hsm("agent2"))
    (state.path / "hsm" / "moving").rename(state.hsm("agent1"))


async def test_backup_drill(tmp_path: Path) -> None:
    """A backup under load is whole; once HSMs went further it is refused by name; one after the stop restores.

    And then the realm serves on, with HSM directories that moved to other agents: every guess that was spent is still
    spent.
    """
    options = DemoOptions(state_dir=tmp_path / "state", agents=3, groups=2, pin_hashing="FastInsecure")
    state = StateDir(tmp_path / "state")
    hsm_dirs = [argument for name in ("agent1", "agent2", "agent3") for argument in ("--hsm-dir", state.hsm(name))]
    early, late = tmp_path / "early.backup", tmp_path / "late.backup"
    async with launch(options) as cluster, _client(cluster, "mario") as mario:
        store = ("--store", cluster.state.store_url)
        await mario.register(b"pin", b"secret", INFO, 6)
        assert await _guesses_left(mario) == 5
        async with trio.open_nursery() as nursery:

            async def load(user: str) -> None:
                async with _client(cluster, user) as client:
                    while True:
                        try:
                            await client.register(b"pin", b"secret", INFO, 3)
                            await client.recover(b"pin", INFO)
                        except ClientError:
                            await trio.sleep(0.05)

            for number in range(8):
                nursery.start_soon(load, f"user{number}")
            await trio.sleep(0.5)
            await _store("backup", early, *store)
            checked = json.loads(await _store("check", *store, *hsm_dirs[:2], "--json"))
            nursery.cancel_scope.cancel()
        assert checked["findings"] == []
        assert checked["verified_macs"] == checked["entries"] > 0
        assert await _guesses_left(mario) == 4
        hsm_of = {agent.service.name: agent.hsm for agent in cluster.of_role("agent")}
        running = [argument for agent in cluster.of_role("agent") for argument in ("--agent", agent.service.url)]
        new = f"sqlite:{tmp_path / 'new.db'}"
        asked = await _store(
            "restore", early, "--store", new, *running, "--cluster-tls", cluster.state.operator, expect=1
        )
        assert "captured index" in asked
        await _store("restore", early, "--store", new, *hsm_dirs, expect=1)
    assert "no findings" in await _store("check", "--store", f"sqlite:{early}", *hsm_dirs[:2], "--backup")
    beyond = await _store("check", "--store", f"sqlite:{early}", *hsm_dirs[:2], expect=5)
    assert "captured index" in beyond, "without saying so it is a store whose end was cut off"
    await _store("backup", late, *store)

    refused = (await _store("restore", early, "--store", new, *hsm_dirs, expect=1)).splitlines()
    assert len({line.split("HSM ")[1][:32] for line in refused}) == 3, "each of three HSMs went further"
    assert all("captured index" in line and "the backup's log ends at" in line for line in refused)
    assert "was not asked" in await _store("restore", late, "--store", new, *hsm_dirs[:4], expect=1)

    old = state.path / "store.db"
    old.rename(tmp_path / "lost.db")
    _move_hsms(state)
    await _store("restore", late, *store, *hsm_dirs)
    assert "no findings" in await _store("check", *store, *hsm_dirs[:2])
    async with launch(options) as cluster, _client(cluster, "mario") as mario:
        moved = {agent.service.name: agent.hsm for agent in cluster.of_role("agent")}
        assert moved == {"agent1": hsm_of["agent3"], "agent2": hsm_of["agent1"], "agent3": hsm_of["agent2"]}
        assert await _guesses_left(mario) == 3
        assert await mario.recover(b"pin", INFO) == b"secret"
    assert "no findings" in await _store("check", *store, *hsm_dirs[:2])
