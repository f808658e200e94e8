"""The command that measures the tree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from roles.tools.bench.tree import bench_tree, run


def test_figures_are_shown_and_written(tmp_path: Path) -> None:
    """Updates and inserts appear in the table and in the result file, with their counts."""
    target = tmp_path / "tree.json"
    arguments = ["--leaves", "30", "--count", "3", "--value-bytes", "20", "--json", str(target)]
    done = CliRunner().invoke(bench_tree, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "30 leaves" in done.output
    rows = json.loads(target.read_text(encoding="ascii"))
    assert [row["op"] for row in rows] == ["tree-update-c", "tree-insert-c"]
    for row in rows:
        assert (row["count"], row["errors"], row["leaves"]) == (3, 0, 30)
        assert row["per_second"] > 0
        assert row["p50_ms"] <= row["p99_ms"]


def test_one_operation_is_enough(tmp_path: Path) -> None:
    """A single operation has percentiles too."""
    done = CliRunner().invoke(bench_tree, ["--leaves", "1", "--count", "1"], catch_exceptions=False)
    assert done.exit_code == 0


@pytest.mark.parametrize("depth", [1, 100, 255])
def test_depth(depth: int) -> None:
    """With --depth every measured path has at least that many nodes."""
    assert all(result.path_nodes >= depth for result in run(20, 5, 8, 1, depth))
