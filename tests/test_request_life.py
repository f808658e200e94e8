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


STEPS_MADE: Final = {
    "append": ("roles.agent.driver", "Driver.made"),
    "token": ("roles.lb.service", "ClientService._outcome"),
    "forward": ("roles.lb.service", "ClientService._outcome"),
}
"""Steps that are begun for a function of the list by another: where it has the means."""


def bold() -> list[tuple[str, str, str]]:
    """Return (module, function, word) for each bold word of the list."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.split("The same by function.", 1)[1].split("\n## ", 1)[0]
    lines = [(match, line) for line in section.splitlines() if (match := _LINE.match(line)) is not None]
    return [
        (match["module"], match["name"], word) for match, line in lines for word in re.findall(r"\*\*(.+?)\*\*", line)
    ]


def test_a_trace_has_the_words_of_the_list() -> None:
    """A word means the same place in a trace and in the list: each is begun there, and no other word is."""
    begun: set[str] = set()
    for path in [*(ROOT / "roles" / "agent").glob("*.py"), *(ROOT / "roles" / "lb").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in {"enter", "edge"}
            ):
                begun |= {
                    each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)
                }
    listed_words = {word for _, _, word in bold()}
    assert listed_words - {"app"} == begun, "`app` is the method's name, which the RPC server has"
    for module, name, word in bold():
        if word != "app":
            source = source_of(*STEPS_MADE.get(word, (module, name)))
            texts = {each.value for each in ast.walk(source) if isinstance(each, ast.Constant)}
            assert word in texts, f"{name} does not begin {word}"
