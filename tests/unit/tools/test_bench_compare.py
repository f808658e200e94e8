"""Comparing measurements: what counts as worse, and what the command says and exits with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from roles.cli import cli
from roles.tools.bench.compare import compare


def _result(op: str = "recover", **changes: Any) -> dict[str, Any]:
    figures = {
        "op": op, "count": 100, "errors": 0, "per_second": 200.0, "p50_ms": 10.0, "p90_ms": 20.0, "p99_ms": 40.0,
        "concurrency": 3, "connections": 3,
    }  # fmt: skip
    return {**figures, **changes}


@pytest.mark.parametrize(
    ("changes", "worse"),
    [
        ({}, []),
        ({"per_second": 181.0, "p50_ms": 10.9}, []),
        ({"per_second": 179.0}, ["per_second"]),
        ({"p50_ms": 11.1}, ["p50_ms"]),
        ({"p99_ms": 400.0}, []),
        ({"errors": 1}, ["errors"]),
        ({"per_second": 900.0, "p50_ms": 1.0}, []),
    ],
)
def test_what_is_worse(changes: dict[str, Any], worse: list[str]) -> None:
    """Rate and median beyond the tolerance, and new errors; a longer tail alone is noise."""
    found = compare([_result()], [_result(**changes), _result("delete")], 10.0)
    assert [change.figure for change in found if change.worse] == worse
    assert {change.op for change in found} == {"recover"}, "an operation that is not in both is left out"


def _run(tmp_path: Path, before: object, after: object, *more: str) -> Result:
    for name, content in (("before.json", before), ("after.json", after)):
        (tmp_path / name).write_text(json.dumps(content))
    return CliRunner().invoke(cli, ["bench", "compare", f"{tmp_path}/before.json", f"{tmp_path}/after.json", *more])


def test_the_command(tmp_path: Path) -> None:
    """Exit 0 within the tolerance and 5 beyond it, which is named; other settings are pointed out."""
    slower = _result(per_second=150.0, concurrency=9)
    assert _run(tmp_path, [_result()], [_result()]).exit_code == 0
    ended = _run(tmp_path, [_result()], [slower])
    assert ended.exit_code == 5
    assert "-25.0 %" in ended.stdout
    assert ended.stdout.count("WORSE") == 1
    assert "other concurrency" in ended.stderr
    assert _run(tmp_path, [_result()], [slower], "--tolerance", "30").exit_code == 0


def test_files_that_are_none(tmp_path: Path) -> None:
    """A file of something else is named in one line."""
    wrong: object
    for wrong in ({}, [1], [{"op": "x"}], "text"):
        ended = _run(tmp_path, [_result()], wrong)
        assert ended.exit_code in {1, 2}
        assert "after.json" in ended.output
    assert _run(tmp_path, [_result()], [_result("delete")]).exit_code == 2
