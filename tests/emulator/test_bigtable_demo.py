"""The demo runs on the Bigtable emulator that it starts itself, and says in one line what it needs otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from juicebox_hsm.adapters.bigtable import EMULATOR_VARIABLE
from roles.tools.demo.emulator import Emulator, demo_store
from tests.patience import PROGRAM_S

pytestmark = [pytest.mark.emulator, pytest.mark.processes]


def _demo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != EMULATOR_VARIABLE}
    return subprocess.run(
        [sys.executable, "-m", "roles", "demo", "--store", "bigtable", "--agents", "1", *arguments],
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        check=False,
        stdin=subprocess.DEVNULL,
        env=inherited | environment,
    )


def test_the_demo_on_its_own_emulator(bigtable_emulator: str, tmp_path: Path) -> None:
    """A realm on the emulator registers and recovers; its directory is then refused, as the store is gone."""
    state = str(tmp_path / "state")
    result = _demo("--pin-hashing", "FastInsecure", "--state-dir", state)
    assert result.returncode == 0, result.stderr
    assert "First recover" in result.stdout
    assert "bigtable:demo/" in (tmp_path / "state" / "cluster.toml").read_text()
    again = _demo("--state-dir", state)
    assert again.returncode == 1
    assert "new --state-dir" in again.stderr
    assert "Traceback" not in again.stderr


def test_without_an_emulator(tmp_path: Path) -> None:
    """Where the emulator is not installed the demo says in one line how to get it."""
    script = (
        "import roles.tools.demo.emulator as e; e.SDK_ROOTS = (); e.PROGRAM = 'no-such-program'; "
        "from roles.cli import main; import sys; sys.argv = ['x', 'demo', '--store', 'bigtable']; main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != EMULATOR_VARIABLE}
    environment["PATH"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PROGRAM_S, check=False, env=environment
    )
    assert result.returncode == 1
    assert "apt-get install google-cloud-cli-bigtable-emulator" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_environment_names_an_emulator(
    bigtable_emulator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An emulator that runs already is used, not started or stopped, and a directory keeps its store there."""
    monkeypatch.setenv(EMULATOR_VARIABLE, bigtable_emulator)
    with demo_store("bigtable", tmp_path) as first, demo_store("bigtable", tmp_path) as second:
        assert first == second
        assert first.pid == 0
        assert first.url.endswith(f"?emulator={bigtable_emulator}")
    with demo_store("sqlite", tmp_path) as embedded:
        assert embedded.url == ""


def test_emulators_choose_their_ports(bigtable_emulator: str) -> None:
    """Two emulators run side by side and are gone when stopped."""
    one, two = Emulator(), Emulator()
    assert one.address != two.address
    for emulator in (one, two):
        emulator.stop()
        with pytest.raises(ProcessLookupError):
            os.kill(emulator.pid, 0)
