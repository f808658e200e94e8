"""The wheel and the source distribution hold what they should and nothing else (decision record 0001)."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


def _build(kind: str, source: Path, target: Path) -> Path:
    """Run one PEP 517 hook in `source`, offline, and return the file it made."""
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, kind, str(target)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return target / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def sdist_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack an sdist made from the tracked files only."""
    copy = tmp_path_factory.mktemp("copy")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in tracked.decode().split("\0"):
        source = ROOT / name
        if name and source.is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(source.read_bytes())
    out = tmp_path_factory.mktemp("sdist")
    with tarfile.open(_build("sdist", copy, out)) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # 3.11.3 and older have no such argument
        archive.extractall(out)
    return next(path for path in out.iterdir() if path.is_dir())


def test_sdist_builds_a_wheel_with_exactly_two_packages(sdist_tree: Path, tmp_path: Path) -> None:
    """The wheel made from the sdist has `juicebox_hsm` and `roles`, typed, with one stable-ABI extension."""
    wheel = _build("wheel", sdist_tree, tmp_path)
    assert "-cp311-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"juicebox_hsm", "roles"}
    for name in ("juicebox_hsm/py.typed", "roles/py.typed", "juicebox_hsm/merkle/_native.pyi"):
        assert name in names
    assert sum(name.endswith(".so") for name in names) == 1
    assert not any(name.endswith(".c") or "/tests/" in name for name in names)
