"""The README's program runs as printed, against a demo realm."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PROGRAM_S

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.processes


def test_the_python_example_runs(tmp_path: Path) -> None:
    """The Python block of README.md registers and recovers when the demo runs it as a command."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    program = tmp_path / "example.py"
    program.write_text(blocks[0])
    demo = [sys.executable, "-m", "roles", "demo", "--agents", "1", "--state-dir", str(tmp_path / "state")]
    done = subprocess.run(
        [*demo, "--", sys.executable, str(program)], capture_output=True, text=True, timeout=PROGRAM_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "b'my secret'" in done.stdout


def test_the_two_commands_exist() -> None:
    """The commands the README opens with are there and executable."""
    for name in ("demo", "test"):
        script = ROOT / "scripts" / name
        assert script.stat().st_mode & 0o111, script
        assert f"./scripts/{name}" in (ROOT / "README.md").read_text()
