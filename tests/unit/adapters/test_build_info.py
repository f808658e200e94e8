"""What a program says of its own build."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from juicebox_hsm import __version__
from juicebox_hsm.adapters.observation import build_info
from roles.cli import cli
from roles.lb.routes import livez_text


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    build_info.commit.cache_clear()
    yield
    build_info.commit.cache_clear()


def test_without_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not known is left out, or shown as such; a damaged file is none."""
    monkeypatch.setattr(build_info, "FILE", tmp_path / "build.json")
    assert "git" not in build_info.block()
    assert "git hash: (none)\ngit tag: (none)\ngit branch: (none)" in build_info.block(absent="(none)")
    for text in ("{", "[]", '{"hash": 5}'):
        build_info.commit.cache_clear()
        build_info.FILE.write_text(text)
        assert build_info.commit() == {}


def test_with_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--version` and the balancer's probe show the commit; strangers are not told the libraries."""
    monkeypatch.setattr(build_info, "FILE", tmp_path / "build.json")
    build_info.FILE.write_text(json.dumps({"hash": "abc123", "branch": "main", "user": "x"}))
    said = CliRunner().invoke(cli, ["--version"]).output
    assert f"juicebox-hsm {__version__}\nversion: {__version__}\ngit hash: abc123\ngit branch: main\npython: " in said
    assert "git tag" not in said
    assert "cryptography: " in said
    public = livez_text("lb1")
    assert public.startswith(f"Juicebox load balancer: {__version__}\nname: lb1\nversion: {__version__}\n")
    assert "git hash: abc123\ngit tag: (none)" in public
    assert "cryptography" not in public
