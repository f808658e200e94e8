"""The operator guide does what it says: its commands build a realm, and its tables name every flag."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from roles.options import read_settings

ROOT = Path(__file__).parent.parent.parent
HANGS_S = 1_200.0
"""For a script that hangs, not for a slow machine."""
GUIDE = (ROOT / "docs" / "operator-guide.md").read_text()


@pytest.mark.parametrize("role", ["agent", "lb", "manager"])
def test_every_flag_is_in_the_tables(role: str) -> None:
    """Each flag of a role stands in the guide with its default."""
    command = importlib.import_module(f"roles.{role}.main").command
    sections = re.split(r"^### ", GUIDE, flags=re.MULTILINE)
    tables = "".join(part for part in sections if part.startswith(("Every role", role)))
    for option in command.params:
        if not isinstance(option, click.Option) or option.name == "help":
            continue
        flag = max(option.opts, key=len)
        row = next((line for line in tables.splitlines() if line.startswith(f"| `{flag}` |")), None)
        assert row is not None, f"{role} {flag}"
        if option.required:
            assert "| required |" in row, row
        elif isinstance(option.default, int | str) and not isinstance(option.default, bool):
            assert f"`{option.default}`" in row, row


def test_tables_name_no_flag_that_is_gone() -> None:
    """A flag in the guide exists in some role."""
    known = {
        max(option.opts, key=len)
        for role in ("agent", "lb", "manager")
        for option in importlib.import_module(f"roles.{role}.main").command.params
        if isinstance(option, click.Option)
    }
    assert set(re.findall(r"^\| `(--[a-z-]+)` \|", GUIDE, re.MULTILINE)) <= known


def test_the_configuration_file_is_one(tmp_path: Path) -> None:
    """The settings shown are settings of the role, of the right kind."""
    (text,) = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    file = tmp_path / "agent.toml"
    file.write_text(text)
    values, problems = read_settings(file, importlib.import_module("roles.agent.main").command.params)
    assert problems == []
    assert {"store_url", "cluster_tls", "hsm_dir"} <= set(values)


@pytest.mark.processes
@pytest.mark.time_limit(1_800)
def test_the_commands_build_the_recommended_realm(tmp_path: Path) -> None:
    """The guide's set-up, executed as printed: five HSMs, three groups, the key space owned once."""
    (script,) = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    wrapper = bin_directory / "juicebox-hsm"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -m roles "$@"\n')
    wrapper.chmod(0o755)
    work = tmp_path / "realm"
    work.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{bin_directory}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    # its own process group, so that the services it leaves running can be stopped
    script_run = subprocess.Popen(
        ["bash", "-ec", script],
        cwd=work,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = script_run.communicate(timeout=HANGS_S)
        logs = "".join(path.read_text()[-800:] for path in work.glob("*.log"))
        assert script_run.returncode == 0, errors + logs
        configuration = json.loads(output.strip().splitlines()[-1])
        assert len(configuration["realms"]) == 1
        show = [str(wrapper), "cluster", "partitions", "--config", "cluster.toml", "--json"]
        shown = subprocess.run(
            show, cwd=work, env=environment, capture_output=True, text=True, timeout=HANGS_S, check=True
        )
        assert shown.stdout.count('"start"') == 3, shown.stdout
    finally:
        os.killpg(script_run.pid, signal.SIGKILL)
