"""Tables lose nothing: at a window's width, in a narrower one, and in a pipe."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio
from msgspec import structs

from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.host.cluster.view import AgentView, build_view
from juicebox_hsm.host.services import ServiceKind, TenantLimits
from juicebox_hsm.ids import FULL_RANGE
from roles.tools.output import print_groups
from tests.host.cluster.agents import FakeAgent, FakeGroup, group, hsm
from tests.patience import PROGRAM_S
from tests.terminal import run_on_terminal, words_of

LEASE = f"group-{'0f' * 16}-{'1e' * 16}"
OWNER = f"manager1 on a-machine-with-a-long-name.example.org {'7d' * 16}"
URL = f"tls://{'an-agent-with-a-long-name.' * 4}example.org:18091"
DURATION = re.compile(r"[\d.]+(ms|s|m)")
TENANT = "test-" + "a" * 90


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store whose records are wider than a window."""
    path = tmp_path_factory.mktemp("tables")
    url = f"sqlite:{path / 'store.db'}"

    async def fill() -> None:
        async with open_store(url) as opened:
            now_ms = time.time_ns() // 1_000_000
            await opened.realms.create_shared()
            await opened.leases.obtain(LEASE, OWNER, now_ms - 3_600_000, 1_000)
            await opened.discovery.register(ServiceKind.AGENT, URL, now_ms)
            await opened.tenants.put(TENANT, TenantLimits(1_000_000_000))

    trio.run(fill)
    (path / "manager.toml").write_text(f'name = "{OWNER}"\n')
    for number, name in enumerate(("before", "after"), start=1):
        entry = {"op": "recover", "count": 10, "errors": 0, "per_second": 123456789.25 * number, "p50_ms": 12345678.5,
                 "p90_ms": 12345678.5, "p99_ms": 12345678.5, "concurrency": 1, "connections": "new"}  # fmt: skip
        (path / f"{name}.json").write_text(json.dumps([entry]))
    return url


def _piped(arguments: list[str]) -> str:
    command = [sys.executable, "-m", "roles", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_S, check=False).stdout


COMMANDS = [
    # what prints a table without a cluster, and words that it must show whole; STORE and PLACE stand for paths
    ("cluster leases --store STORE", [LEASE, *OWNER.split(), "expired"]),
    ("cluster discovery list --store STORE", ["agent", URL]),
    ("cluster tenant list --store STORE", [TENANT, "1000000000"]),
    ("config show --role manager --store STORE --config PLACE/manager.toml", ["STORE", *OWNER.split()]),
    ("bench compare PLACE/before.json PLACE/after.json", ["recover"]),
]


@pytest.mark.parametrize(("command", "words"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_a_window_shows_what_a_pipe_gets(store: str, command: str, words: list[str]) -> None:
    """In a window of 80 columns every cell of the piped table is there, whole, however wide it is."""
    place = str(Path(store.removeprefix("sqlite:")).parent)
    arguments = command.replace("STORE", store).replace("PLACE", place).split()
    _, shown = run_on_terminal(arguments)
    piped = words_of(_piped(arguments))
    assert {word.replace("STORE", store) for word in words} <= set(piped)
    missing = set(piped) - set(words_of(shown))
    assert not {word for word in missing if not DURATION.fullmatch(word)}


def test_a_table_that_fits_stays_a_table(store: str) -> None:
    """Blocks are for narrow windows only; one that is wide enough shows the table, in borders."""
    _, wide = run_on_terminal(["cluster", "leases", "--store", store], columns=400)
    assert wide.startswith("+-")
    _, narrow = run_on_terminal(["cluster", "leases", "--store", store])
    assert "+-" not in narrow
    assert f"Lease:   {LEASE}" in narrow


def test_groups_fit_a_window(capsys: pytest.CaptureFixture[str]) -> None:
    """Members with names of up to 12 characters and millions of entries are a table of at most 80 columns."""
    agents = [FakeAgent(f"tls://agent-{number}-hall", hsm(number)) for number in range(1, 6)]
    for agent in agents:
        agent.groups = {group(1): FakeGroup([one.hsm for one in agents], captured=123_456_789, requests_per_s=1234.5)}
    agents[0].lead(group(1), FULL_RANGE)
    agents[1].groups[group(1)].captured = 123_000_000
    told = [AgentView(agent.url, structs.replace(agent.status(), name=agent.url[6:])) for agent in agents[:4]]
    print_groups(build_view(told))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    text = "\n".join(lines)
    for said in ("agent-4-hall", "123,456,789", "456,789", "tolerates 1 more loss", "led by agent-1-hall"):
        assert said in text, said
    assert "no answer" in text
