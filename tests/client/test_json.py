"""`docs/json.md` is the contract of programs that read our JSON: held against what a real cluster prints."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner

from juicebox_hsm.host.codes import Code
from roles.cli import cli
from roles.tools.bench.client import Result
from roles.tools.chaos.report import Report
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import DemoOptions

pytestmark = pytest.mark.processes

PAGE = Path(__file__).parents[2] / "docs" / "json.md"
VARYING = {
    "steps": "STEP",
    "settings": "FLAG",
    "shape": "NAME",
    "counts": "NAME",
    "arguments": "ARGUMENT",
}  # objects whose members vary


def _documented() -> dict[str, set[str]]:
    """Return heading -> fields, from the first column of the first table below it."""
    found: dict[str, set[str]] = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        heading, _, body = section.partition("\n")
        table = body.partition("| field |")[2].partition("\n\n")[0]
        cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
        if cells:
            found[heading] = {field for cell in cells for field in re.findall(r"`([^`]+)`", cell)}
    return found


def _fields(value: Any, path: str = "") -> Iterator[str]:
    """Return the paths of all leaves of a document; a value that is missing or empty stands for what may be inside."""
    if isinstance(value, dict) and value:
        varying = VARYING.get(path.rpartition(".")[2])
        for name, inner in value.items():
            step = varying or name
            yield from _fields(inner, f"{path}.{step}" if path else step)
    elif isinstance(value, list):
        if not value:
            yield f"{path}[]"
        for inner in value:
            yield from _fields(inner, f"{path}[]")
    else:
        yield path


def _compare(documented: set[str], documents: list[Any]) -> None:
    """Hold all of a command's documents against its section."""
    real = {field for document in documents for field in _fields(document)}
    parents = {field for field in real if any(known.startswith((f"{field}.", f"{field}[")) for known in documented)}
    assert real - documented - parents == set(), "printed and not documented"
    unseen = {known for known in documented - real if not any(known.startswith(parent) for parent in parents)}
    assert unseen == set(), "documented and not printed"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """Three agents with two groups and some users."""
    options = DemoOptions(state_dir=tmp_path / "demo", agents=3, groups=2, managers=2, pin_hashing="FastInsecure")
    async with launch(options) as running:
        yield running


async def test_the_page_describes_what_a_cluster_prints(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field that is printed is on the page, and every field on the page is printed."""
    monkeypatch.setenv("JUICEBOX_CLIENT_JSON", str(cluster.state.client_json))
    state, realm = cluster.state, cluster.realms[0].hex()
    connection = ("--config", str(state.cluster_toml))

    async def document(command: str, *arguments: str) -> Any:
        words = [*command.split(), *arguments, "--json"]
        result = await trio.to_thread.run_sync(partial(CliRunner().invoke, cli, words))
        assert result.stdout, result.output
        return json.loads(result.stdout)

    command_line = [sys.executable, "-m", "roles", "check", "--count", "2", "--json"]  # it wants a main thread
    checked = json.loads((await trio.run_process(command_line, capture_stdout=True)).stdout)
    assert checked["ok"] is True
    await cluster.session.store.leases.obtain("group-x", "somebody", cluster.session.now_ms(), 60_000)
    asked: dict[str, list[tuple[str, ...]]] = {
        **{f"cluster {name}": [connection] for name in ("status", "agents", "groups", "partitions", "leases", "audit",
                                                        "discovery list", "tenant list", "user-summary")},
        "cluster tenant get": [("test-acme", *connection)],
        "cluster plan": [("--groups", "3", *connection)],
        **{f"cluster table-stats {name}": [(realm, *connection)] for name in ("log", "merkle", "users")},
        "config show": [("--role", "manager")],
        "hsm info": [("--dir", str(state.hsm("agent1")))],
        "store check": [("--store", state.store_url)],
        "tokens random": [("-a", "EdDSA")],
    }  # fmt: skip
    printed: dict[str, list[Any]] = {"check": [checked]}
    for command, calls in asked.items():
        printed[command] = [await document(command, *arguments) for arguments in calls]
    await cluster.process("agent3").kill()
    for command in ("cluster agents", "cluster groups", "cluster status"):
        printed[command].append(await document(command, *connection))
    documented = _documented()
    for command, documents in printed.items():
        _compare(documented[command], documents)
    assert documented.keys() - printed.keys() == {"bench client", "chaos"}


def test_the_page_describes_the_files_of_measurements() -> None:
    """Benchmarks and chaos runs write their results' fields; the page has all of them."""
    result = Result("recover", 1, 0, 1.0, 1.0, 1.0, 1.0, 1, "new", 1.0, 1.0, 1.0, 1.0, 1.0)
    _compare(_documented()["bench client"], [[asdict(result)]])
    names = {field.name for field in fields(Report)}
    assert names == {field.partition(".")[0].removesuffix("[]") for field in _documented()["chaos"]}


def test_the_page_has_every_reason() -> None:
    """Programs look reasons up on the page: those of the verdict and of services are there, and no others."""
    tables = [part.partition("\n\n")[0] for part in PAGE.read_text().split("| code | reason |")[1:]]
    cells = [line.split("|")[1] for table in tables for line in table.splitlines() if line.startswith("| `")]
    codes = [code for cell in cells for code in re.findall(r"`([^`]+)`", cell)]
    assert sorted(codes) == sorted({code.word for code in Code})
