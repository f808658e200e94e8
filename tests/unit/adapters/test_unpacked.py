"""No program of ours leaves files in the temporary directory, however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PROGRAM_S


@pytest.mark.parametrize(
    "module", ["juicebox_hsm.client", "roles.agent.main", "roles.tools.hsm.command", "roles.tools.check.command"]
)
def test_imports_leave_nothing(module: str, tmp_path: Path) -> None:
    """A process that imported everything and is killed has left nothing; its cryptography still works."""
    program = (
        f"import {module}, os, rbcl\n"
        "assert len(rbcl.crypto_core_ristretto255_scalar_random()) == 32\n"
        "os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, timeout=PROGRAM_S, check=False)
    assert ended.returncode == -9
    assert list(tmp_path.iterdir()) == []
