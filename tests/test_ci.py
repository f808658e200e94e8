"""Continuous integration runs what it says it runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_missing_programs_are_said_and_the_tests_run_all_the_same(tmp_path: Path) -> None:
    """Where nothing can be installed a line each says how to get what is missing, and the tests run with CI set."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    for name in ("setup", "test"):
        _program(tmp_path / "scripts" / name, f'echo "{name} CI=$CI"')
    for name in ("ruff", "mypy"):
        _program(tmp_path / ".venv" / "bin" / name, ":")
    _program(tmp_path / ".venv" / "bin" / "python", "exit 1")
    _program(tmp_path / "bin" / "id", "echo 0")
    _program(tmp_path / "bin" / "apt-get", 'echo "apt-get $*"; [ "$1" = update ]')
    result = subprocess.run(
        [tmp_path / ".ci" / "run"],
        capture_output=True,
        text=True,
        check=False,
        env={
            "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
            "CHROMIUM": "no-such-browser",
            "PROMETHEUS": "no-such-server",
        },
    )
    assert result.returncode == 0, result.stderr
    assert "setup CI=true" in result.stdout
    assert result.stdout.endswith("test CI=true\n")
    said = result.stderr.splitlines()
    assert [line.partition(":")[0] for line in said] == [
        "no browser, which the tests of the status page need",
        "no Prometheus, which the tests of alerts need",
        "no Bigtable emulator",
        "no Pub/Sub emulator",
    ]
    assert all("apt-get install" in line for line in said)
