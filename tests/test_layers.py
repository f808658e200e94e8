"""The layering of the library, checked on its source text (ARCHITECTURE.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "juicebox_hsm"

# The core, in the order of its DAG: a package may import itself and those before it.
CORE = ("errors", "ids", "wire", "crypto", "merkle", "consensus", "hsm", "tenant_keys", "tokens", "host")
FORBIDDEN_IN_CORE = {
    "trio", "asyncio", "socket", "ssl", "os", "time", "random", "secrets", "threading", "subprocess", "logging",
    "structlog", "pathlib", "datetime", "http", "urllib", "select", "signal", "shutil", "tempfile", "uuid",
}  # fmt: skip


def _imports(path: Path) -> set[str]:
    """Return the absolute names a module imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def _core_files() -> list[tuple[int, Path]]:
    files = []
    for position, name in enumerate(CORE):
        single = LIBRARY / f"{name}.py"
        files += [(position, single)] if single.exists() else [(position, p) for p in (LIBRARY / name).rglob("*.py")]
    return files


@pytest.mark.parametrize(("position", "path"), _core_files(), ids=lambda value: getattr(value, "stem", None))
def test_core_is_pure_and_ordered(position: int, path: Path) -> None:
    """Core modules do no I/O and import only what stands before them in the DAG."""
    allowed = CORE[: position + 1]
    for name in _imports(path):
        top, _, rest = name.partition(".")
        assert top not in FORBIDDEN_IN_CORE, f"{path} imports {name}"
        if top == "juicebox_hsm" and rest and rest != "__version__":
            assert rest.split(".")[0] in allowed, f"{path} imports {name}, which comes later in the DAG"
        assert top not in {"roles", "tests"}, f"{path} imports {name}"


def test_library_never_imports_roles() -> None:
    """The arrow points one way: roles import the library."""
    for path in LIBRARY.rglob("*.py"):
        assert not any(name.split(".")[0] in {"roles", "tests"} for name in _imports(path)), path


def test_no_bare_assert_outside_tests() -> None:
    """`python -O` removes asserts; production code uses `errors.check`, which stays."""
    for folder in ("juicebox_hsm", "roles", "native"):
        for path in (ROOT / folder).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text()))
            assert not any(isinstance(node, ast.Assert) for node in nodes), path


def test_no_bare_except() -> None:
    """A bare except would swallow cancellation and broken invariants."""
    for folder in ("juicebox_hsm", "roles"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{path}:{node.lineno}"


def test_modules_stay_small() -> None:
    """A module over 500 lines must say why in its first paragraph ("long because")."""
    for folder in ("juicebox_hsm", "roles"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            if text.count("\n") > 500:
                assert "long because" in (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].lower(), path


def test_every_test_says_what_it_protects() -> None:
    """Each test function has a docstring that names its property."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name}"


def test_no_foreign_paths_in_the_project() -> None:
    """Nothing in the project names a file outside it or a package registry's host."""
    words = ("/" + "work/", "/" + "tmp/team", "pypi" + ".org", "registry.npmjs" + ".org")
    for path in ROOT.rglob("*"):
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".c", ".h", ".mjs", ".json", ""}:
            parts = set(path.relative_to(ROOT).parts)
            if parts & {".git", ".venv", "node_modules", "build", ".hypothesis", ".mypy_cache", ".ruff_cache"}:
                continue
            if any(part.endswith(".egg-info") for part in parts):
                continue
            text = path.read_text(errors="replace")
            assert not any(word in text for word in words), path
