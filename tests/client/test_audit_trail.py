"""Real processes: who ordered what is in the store's trail, and what cannot be recorded is not done."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from juicebox_hsm.adapters.faults.switch import ENVIRONMENT, Faults
from juicebox_hsm.adapters.tls.certificates import issue
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import DemoOptions

pytestmark = pytest.mark.processes

FAULTS_SEEN_S = 0.3
"""Services look at their faults every 50 ms."""


async def _cluster(cluster: Cluster, identity: Path, *words: str) -> tuple[int, str, str]:
    """Run a `cluster` command with somebody's certificate; return exit code, output and errors."""
    line = [
        sys.executable, "-m", "roles", "cluster", *words, "--store", cluster.state.store_url,
        "--cluster-tls", str(identity),
    ]  # fmt: skip
    ended = await trio.run_process(line, capture_stdout=True, capture_stderr=True, check=False)
    return ended.returncode, ended.stdout.decode(), ended.stderr.decode()


async def _trail(cluster: Cluster, identity: Path) -> list[dict[str, Any]]:
    code, told, errors = await _cluster(cluster, identity, "audit", "--json")
    assert code == 0, errors
    changes: list[dict[str, Any]] = json.loads(told)["changes"]
    return changes


async def test_who_did_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    """Orders carry the certificate's name and their result; a service that cannot record refuses and does nothing."""
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    alice = tmp_path / "alice"
    options = DemoOptions(
        state_dir=tmp_path / "state", agents=3, store=store, pin_hashing="FastInsecure", tenant_log=False
    )
    async with launch(options) as cluster:
        issue(cluster.state.path / "ca" / "cluster", "operator", "alice", alice)
        founded = await _trail(cluster, alice)
        assert {"new-realm", "join-realm", "new-group", "transfer"} <= {change["action"] for change in founded}
        assert {(change["who"], change["result"]) for change in founded if change["action"] != "appoint"} == {
            ("operator/demo", "done")
        }
        view = await cluster.view()
        group = next(group for group in view.groups.values() if group.owned_range is not None)
        leader = group.leader
        assert leader is not None
        for words in (
            ("stepdown", "--type", "group", group.id.hex()),
            ("drain", leader.hsm.hex()),
            ("tenant", "set-capacity", "acme", "7"),
        ):
            code, _, errors = await _cluster(cluster, alice, *words)
            assert code == 0, errors
        later = await cluster.view()
        idle = next(hsm for hsm in later.hsms if not later.led_by(hsm))
        code, _, errors = await _cluster(cluster, alice, "stepdown", "--type", "hsm", idle.hex())
        assert code == 1, errors
        orders = [change for change in await _trail(cluster, alice) if change["who"] == "operator/alice"]
        results = {(change["action"], change["result"]) for change in orders}
        assert results == {("stepdown", "done"), ("drain", "done"), ("set-capacity", "done"), ("stepdown", "failed")}
        assert orders[0]["arguments"]["group"] == group.id.hex()
        assert orders[-1]["result"] == "failed"
        assert "NotLeader" in orders[-1]["detail"]

        (tmp_path / "manager1.json").write_text(Faults(store_refuses=True).to_json())
        time.sleep(FAULTS_SEEN_S)  # noqa: ASYNC251 - nothing else runs here
        code, _, errors = await _cluster(cluster, alice, "stepdown", "--type", "group", group.id.hex())
        assert code == 1
        assert "nothing was changed, for it cannot be recorded" in errors
        (tmp_path / "manager1.json").unlink()
