"""ARCHITECTURE.md's life of a request names real functions, each called by the one it stands under."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Final

import pytest

ROOT = Path(__file__).parent.parent
FUNCTIONS_MAX: Final = 25
_LINE = re.compile(
    r"^(?P<indent> *)1\. `(?P<module>[\w.]+):(?P<name>[\w.]+)`(?:, (?:its|started by) `(?P<alias>\w+)`)?"
)


def listed() -> list[tuple[int, str, str, str]]:
    """Return (depth, module, qualified name, the name its caller knows it by) of each line."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.split("## Life of a request", 1)[1].split("\n## ", 1)[0]
    found = []
    for line in section.splitlines():
        match = _LINE.match(line)
        if match is not None:
            name = match["name"]
            found.append((len(match["indent"]) // 4, match["module"], name, match["alias"] or name.split(".")[-1]))
    return found


def source_of(module: str, name: str) -> ast.AST:
    """Return a function's syntax tree; raises `AssertionError` if there is none."""
    body: list[ast.stmt] = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")).body
    node: ast.AST | None = None
    for part in name.split("."):
        node = next((each for each in body if getattr(each, "name", None) == part), None)
        assert node is not None, f"{module} has no {name}"
        body = getattr(node, "body", [])
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return node


def names_in(node: ast.AST) -> set[str]:
    """Return the names a function uses, plain or as attributes."""
    names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    return names | {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}


def test_a_request_passes_few_functions() -> None:
    """A newcomer can follow a request in one sitting."""
    assert 20 <= len(listed()) <= FUNCTIONS_MAX


@pytest.mark.parametrize("at", range(len(listed())))
def test_each_function_is_called_by_the_one_it_stands_under(at: int) -> None:
    """The list is made of calls, not of a story."""
    depth, module, name, alias = listed()[at]
    source_of(module, name)
    if depth:
        _, calling_module, caller, _ = next(line for line in reversed(listed()[:at]) if line[0] < depth)
        assert alias in names_in(source_of(calling_module, caller)), f"{caller} does not call {name}"
