"""The planted faults of tests/mutants fit the code as it is, so that scripts/mutants plants what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PATCHES = sorted((ROOT / "tests" / "mutants").glob("*.patch"))
_FILE = re.compile(r"^\+\+\+ b/(\S+)$", re.MULTILINE)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_a_mutant_applies(patch: Path, tmp_path: Path) -> None:
    """A patch says what it breaks and who should see it, applies to the tree, and leaves valid Python."""
    text = patch.read_text(encoding="utf-8")
    head = text.split("\n---", 1)[0]
    assert re.search(r"^Fault: .+$", head, re.MULTILINE)
    assert re.search(r"^Rule: .+$", head, re.MULTILINE)
    touched = _FILE.findall(text)
    assert touched
    for name in touched:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    done = subprocess.run(
        ["git", "apply", str(patch)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in touched:
        planted = (tmp_path / name).read_text(encoding="utf-8")
        assert planted != (ROOT / name).read_text(encoding="utf-8")
        compile(planted, name, "exec")
