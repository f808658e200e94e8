"""The demo's events go through Pub/Sub where its emulator is installed, and from the store otherwise."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from juicebox_hsm.adapters.pubsub.bus import EMULATOR_VARIABLE as PUBSUB_VARIABLE
from juicebox_hsm.client import Client, Configuration, HttpTransport, InvalidPin
from juicebox_hsm.errors import LocalError
from roles.tools.demo import pubsub as demo_pubsub
from roles.tools.demo.launch import launch
from roles.tools.demo.layout import TENANT, TENANT_LOG, DemoOptions
from tests.client.audit import Seen, read_log
from tests.client.audit_match import Logged
from tests.patience import HANGS_S

pytestmark = [pytest.mark.emulator, pytest.mark.processes]


async def test_events_through_pubsub(bigtable_emulator: str, pubsub_emulator: str, tmp_path: Path) -> None:
    """On Bigtable the demo publishes to Pub/Sub, and its tenant log serves what the users did, in order."""
    async with launch(DemoOptions(state_dir=tmp_path, pin_hashing="FastInsecure", store="bigtable")) as cluster:
        (log,) = cluster.of_role(TENANT_LOG)
        for running in [log, *cluster.of_role("agent")]:
            assert "--pubsub-project" in running.service.argv
        await log.wait_listening()
        (realm,) = cluster.realms
        configuration = Configuration.from_json(json.dumps(cluster.configuration))
        async with HttpTransport(ca_file=cluster.state.edge_ca) as transport:
            client = Client(configuration, {realm: cluster.token(realm, "mario")}, transport=transport)
            await client.register(b"1234", b"secret", b"", 5)
            with pytest.raises(InvalidPin):
                await client.recover(b"0000", b"")
            assert await client.recover(b"1234", b"") == b"secret"
            await client.delete()
        seen = Seen()
        token = cluster.state.audit_token(realm).read_text(encoding="utf-8").strip()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_log, log.service.url, token, seen)
            with trio.fail_after(HANGS_S):
                while seen.count < 5:  # noqa: ASYNC110 - another process delivers
                    await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
        user = hashlib.sha256(f"{TENANT}:mario".encode()).hexdigest()
        events: list[Logged] = seen.deliveries[user]
        assert [each.event for each in events] == [
            "registered", "guess_used", "guess_used", "share_recovered", "deleted",
        ]  # fmt: skip
        assert [each.guess_count for each in events] == [None, 1, 2, None, None]


def test_without_the_emulator(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked for, a missing emulator is an error; beside Bigtable it is said how to get it, and the store serves."""
    monkeypatch.delenv(PUBSUB_VARIABLE, raising=False)
    monkeypatch.setattr(demo_pubsub, "find_emulator", lambda: None)
    missing = pytest.raises(LocalError, match="apt-get install google-cloud-cli-pubsub-emulator")
    with missing, demo_pubsub.demo_bus("pubsub", "sqlite"):
        pass
    with demo_pubsub.demo_bus("", "bigtable") as bus:
        assert bus.flags == ()
    assert "apt-get install google-cloud-cli-pubsub-emulator" in capsys.readouterr().err
    with demo_pubsub.demo_bus("", "sqlite") as embedded:
        assert embedded.flags == ()


def test_ci_does_not_skip(tmp_path: Path) -> None:
    """Where CI says so a missing emulator fails the suite instead of skipping it, for either emulator."""
    script = tmp_path / "test_missing.py"
    script.write_text(
        "from tests.emulator.conftest import *\n"
        "from roles.tools.demo import pubsub as demo_pubsub\n"
        "import tests.emulator.conftest as suite\n"
        "suite.find_emulator = demo_pubsub.find_emulator = lambda: None\n"
        "def test_one(bigtable_emulator): pass\n"
        "def test_two(pubsub_emulator): pass\n"
    )
    outcomes = {"true": "2 errors", "1": "2 errors", "woodpecker": "2 errors", "": "2 skipped", "False": "2 skipped"}
    outcomes["0"] = "2 skipped"
    for ci, outcome in outcomes.items():
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(script)],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[2],
            env={"PATH": "/usr/bin:/bin", "CI": ci, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert outcome in result.stdout, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("store", ["sqlite", "bigtable"])
def test_audit_drill(bigtable_emulator: str, pubsub_emulator: str, store: str) -> None:
    """A thousand operations under chaos: the tenant log and the clients' history agree."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.client.audit",
            "--operations",
            "1000",
            "--duration",
            "60",
            "--stop-s",
            "5",
            "--seed",
            "3",
            "--store",
            store,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
