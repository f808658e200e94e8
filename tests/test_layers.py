"""The layers of the whole tree, checked on its source text (ARCHITECTURE.md, ADR 0027)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "juicebox_hsm"

# The core, in the order of its DAG: pure, and a package may import itself and those before it.
CORE = (
    "errors", "ids", "wire", "crypto", "merkle", "consensus", "hsm", "tenant_keys", "tokens", "history", "host",
)  # fmt: skip
SERVICES = ("agent", "lb", "manager", "tenant_log")
SERVICE_ROW = tuple(f"roles.{name}" for name in SERVICES)
LAYERS: tuple[tuple[str, ...], ...] = (
    *((f"juicebox_hsm.{name}",) for name in (*CORE, "ports", "adapters", "client")),
    # flags, words and tables that services and tools share
    ("roles.durations",), ("roles.lazy",), ("roles.commands",), ("roles.store_options",), ("roles.options",),
    ("roles.cloud_options",), ("roles.words",), ("roles.clock",), ("roles.survey",),
    ("roles.audit",),
    ("roles.shell",),
    SERVICE_ROW,
    ("roles.tools",),
    ("roles.cli",), ("roles.__main__",),
)  # fmt: skip
"""The order of everything: a module may import its own layer and those before it. Names in one row never meet."""

TOOL_USES = {"demo": {"cluster"}, "chaos": {"demo"}, "bench": {"demo"}, "simulate": {"cluster", "chaos"}}
"""Tools that are built on another one: the harness makes its realm as an operator would; others run in the harness."""

WIRES_SERVICES = "roles.tools.simulate."
"""The one tool that knows services' insides: it wires them to a simulated world, as their `main` does to a real one."""

FORBIDDEN_IN_CORE = {
    "trio", "asyncio", "socket", "ssl", "os", "time", "random", "secrets", "threading", "subprocess", "logging",
    "structlog", "pathlib", "datetime", "http", "urllib", "select", "signal", "shutil", "tempfile", "uuid",
}  # fmt: skip


def _name_of(path: Path) -> str:
    """Return the module that a file is."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _modules() -> dict[str, Path]:
    """Return every module of both packages."""
    return {_name_of(path): path for top in ("juicebox_hsm", "roles") for path in (ROOT / top).rglob("*.py")}


@cache
def _imports(path: Path) -> frozenset[str]:
    """Return the absolute names a module imports, wherever in the file, for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(found)


@cache
def _edges() -> dict[str, frozenset[str]]:
    """Return which of our modules each of them imports; what is taken out of a package's own file counts as that."""
    modules = _modules()
    edges = {}
    for module, path in modules.items():
        wanted: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                wanted.update(name if name in modules else node.module for name in full)
        edges[module] = frozenset((wanted & modules.keys()) - {module})
    return edges


def _layer_of(module: str) -> tuple[int, str]:
    """Return the place of a module in `LAYERS`, and the name that is listed there."""
    for place, names in enumerate(LAYERS):
        for name in names:
            if module == name or module.startswith(f"{name}."):
                return place, name
    raise AssertionError(f"{module} has no layer: give it a place in LAYERS")


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
        assert top not in FORBIDDEN_IN_CORE or name.startswith("urllib.parse"), f"{path} imports {name}"
        if top == "juicebox_hsm" and rest and rest != "__version__":
            assert rest.split(".")[0] in allowed, f"{path} imports {name}, which comes later in the DAG"
        assert top not in {"roles", "tests"}, f"{path} imports {name}"


def test_library_never_imports_roles() -> None:
    """The arrow points one way: roles import the library."""
    for path in LIBRARY.rglob("*.py"):
        assert not any(name.split(".")[0] in {"roles", "tests"} for name in _imports(path)), path


def _layers_broken() -> Iterator[tuple[str, str]]:
    for importer, imported in _edges().items():
        if importer in {"juicebox_hsm", "roles"}:
            continue
        place, own = _layer_of(importer)
        for name in imported - {"juicebox_hsm", "roles"}:
            other_place, other = _layer_of(name)
            inside = own == "roles.tools" and other in SERVICE_ROW and not importer.startswith(WIRES_SERVICES)
            if inside or other_place > place or (other_place == place and other != own):
                yield importer, name


def test_layers_are_in_order_up_to_the_command_line() -> None:
    """A module imports only its layer and those below; no service imports another, no tool a service's inside."""
    assert sorted(_layers_broken()) == []


def _tool_of(module: str) -> str | None:
    """Return the tool whose folder a module lies in, None for what all tools share."""
    parts = module.split(".")
    is_folder = len(parts) > 2 and (ROOT / "roles" / "tools" / parts[2]).is_dir()
    return parts[2] if parts[:2] == ["roles", "tools"] and is_folder else None


def test_tools_share_only_what_stands_beside_them() -> None:
    """A tool takes nothing from another's folder, but for those built on one, and never another's command."""
    for importer, imported in _edges().items():
        own = _tool_of(importer)
        if not importer.startswith("roles.tools"):
            continue
        for name in imported:
            other = _tool_of(name)
            if other is None or other == own:
                continue
            assert own is not None, f"{importer}, which tools share, imports {name} of one of them"
            assert other in TOOL_USES.get(own, set()), f"{importer} imports {name}"
            assert not name.endswith(".command"), f"{importer} imports {name}"


def test_tools_do_not_name_a_services_inside() -> None:
    """The order cannot be got round by a module's name in a string: services are found by the table of commands."""
    inside = re.compile(rf"roles\.({'|'.join(SERVICES)})\b")
    for module, path in _modules().items():
        tree = ast.parse(path.read_text())
        by_name = any(isinstance(node, ast.Attribute) and node.attr == "import_module" for node in ast.walk(tree))
        assert not by_name or module == "roles.lazy", f"{module} imports by name"
        if module.startswith("roles.tools"):
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    assert not inside.search(node.value), f"{path}:{node.lineno}"


def _circles() -> list[set[str]]:
    """Return the strongly connected components of more than one module: Tarjan's algorithm, without recursion."""
    edges = _edges()
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    open_stack: list[str] = []
    circles = []
    for root in edges:
        work = [] if root in index else [(root, iter(sorted(edges[root])))]
        while work:
            module, following = work[-1]
            if module not in index:
                index[module] = low[module] = len(index)
                open_stack.append(module)
            for name in following:
                if name not in index:
                    work.append((name, iter(sorted(edges[name]))))
                    break
                if name in open_stack:
                    low[module] = min(low[module], index[name])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[module])
                if low[module] == index[module]:
                    at = open_stack.index(module)
                    circles += [set(open_stack[at:])] if len(open_stack) - at > 1 else []
                    del open_stack[at:]
    return circles


def test_no_circles_between_modules() -> None:
    """No module can be reached from itself, imports for type checkers included: one can be read after the other."""
    assert _circles() == []


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


def test_threads_come_from_one_place() -> None:
    """Trio's own way to a worker thread ends a service on a system that has no thread left; ours does not."""
    for folder in ("juicebox_hsm", "roles"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "threads.py":
                assert "to_thread.run_sync" not in path.read_text(), path


def test_urls_are_parsed_in_one_place() -> None:
    """Python's own parser and resolver raise what their callers do not expect; one module knows all of it."""
    for folder in ("juicebox_hsm", "roles"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert path.name == "addresses.py" or not re.search(r"\burl(split|parse)\b", text), path
            assert path.name == "dialing.py" or "open_tcp_stream" not in text, path


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
