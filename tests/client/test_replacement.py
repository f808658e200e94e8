"""A machine dies with its HSM: one command replaces it, clients keep their guesses, and the realm is healthy after."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from juicebox_hsm.client import Client, Configuration, HttpTransport, InvalidPin
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import DemoOptions, prepare

pytestmark = pytest.mark.processes

PIN, INFO, SECRET = b"1234", b"replacement", b"kept"
HEALTHY_S = 30.0
TOOL_S = 400.0
"""A leader takes up to a minute before it ends a group, and as long again before it forgets (agent.md 14a)."""


async def cluster_tool(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `juicebox-hsm cluster ...` as an operator types it."""
    flags = ("--store", cluster.state.store_url, "--cluster-tls", str(cluster.state.operator))
    command = [sys.executable, "-m", "roles", "cluster", *flags, *arguments]
    return await trio.to_thread.run_sync(
        partial(subprocess.run, command, capture_output=True, text=True, timeout=TOOL_S)
    )


async def test_a_lost_hsm_is_replaced_by_one_command(tmp_path: Path) -> None:
    """A member's machine is lost and a new HSM takes its place: `replace`, run twice, then `status` finds nothing."""
    options = DemoOptions(state_dir=tmp_path, agents=3, managers=2, pin_hashing="FastInsecure", tenant_log=False)
    async with (
        launch(options, on_exit=lambda _: None) as cluster,
        HttpTransport(ca_file=cluster.state.edge_ca) as transport,
    ):
        [realm] = cluster.realms
        token = cluster.token(realm, "alice")
        configuration = Configuration.from_json(cluster.configuration)
        client = Client(configuration, lambda _realm: token, transport=transport)
        await client.register(PIN, SECRET, INFO, 3)
        with pytest.raises(InvalidPin) as wrong:
            await client.recover(b"9999", INFO)
        assert wrong.value.guesses_remaining == 2

        lost = cluster.process("agent3")
        dead = lost.hsm
        await lost.kill()
        shutil.rmtree(cluster.state.hsm("agent3"))
        prepare(cluster.state, [lost.service])  # another HSM with the realm's keys, at the same address
        await cluster.restart("agent3")

        told = await cluster_tool(cluster, "replace", dead[:8], lost.service.url, "--dry-run")
        assert told.returncode == 0, told.stderr
        assert told.stdout.startswith("would join the HSM behind")
        done = await cluster_tool(cluster, "replace", dead[:8], lost.service.url)
        assert done.returncode == 0, (done.stdout, done.stderr)
        assert f"Replaced {dead}" in done.stdout
        again = await cluster_tool(cluster, "replace", dead, lost.service.url)
        assert (again.returncode, again.stdout) == (0, "nothing to do!\n"), again.stderr

        with pytest.raises(InvalidPin) as wrong:
            await client.recover(b"9999", INFO)
        assert wrong.value.guesses_remaining == 1, "the guess from before was kept"
        assert await client.recover(PIN, INFO) == SECRET
        status = await cluster_tool(cluster, "status")
        with trio.move_on_after(HEALTHY_S):
            while status.returncode != 0:
                await trio.sleep(0.5)
                status = await cluster_tool(cluster, "status")
        assert status.returncode == 0, status.stdout
        assert dead not in status.stdout
