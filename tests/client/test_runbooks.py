"""The operator guide's runbooks: each is executed as printed, on a real realm that is in the state it is for."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio

from juicebox_hsm.adapters.faults.switch import ENVIRONMENT
from juicebox_hsm.adapters.pubsub.bus import EMULATOR_VARIABLE
from juicebox_hsm.adapters.tls.certificates import issue
from juicebox_hsm.client import ClientError
from juicebox_hsm.wire.rpc import PeerRole
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import DemoOptions
from roles.tools.demo.processes import OrphanGuard, RunningService
from roles.tools.demo.pubsub import PubSubEmulator, find_emulator
from tests.client.bad_day import cluster_states, store_states, trouble_states
from tests.client.bad_day.day import Day
from tests.client.bad_day.listening import INFO, PIN, SECRET, User, registered, run_tool
from tests.client.looking import eventually, page_of, status_of
from tests.client.test_operator_guide import GUIDE, HANGS_S, ROOT
from tests.patience import PROGRAM_S
from tests.unit.sqlite.test_writer import held_by_another

pytestmark = [pytest.mark.processes, pytest.mark.time_limit(600)]

UNITS: Final = {"juicebox-lb": "lb", "juicebox-manager": "manager"}
"""Units to roles; the unit of an agent names one."""
HASTY: Final = ("--pubsub-timeout", "2s")
_SHIM: Final = """#!/bin/sh
# stands for a command of the machine: hands it to the test, and waits until it is done
echo "{name} $*" > "{asked}.new" && mv "{asked}.new" "{asked}"
while [ -e "{asked}" ]; do sleep 0.05; done
"""


def runbook(title: str) -> str:
    """Return the commands under a heading of the guide."""
    sections = {part.split("\n", 1)[0]: part for part in re.split(r"^### ", GUIDE, flags=re.MULTILINE)}
    blocks = re.findall(r"```sh\n(.*?)```", sections[title].split("\n## ")[0], re.DOTALL)
    assert blocks, title
    return "set -eu\n" + "".join(blocks)


class Machine:
    """The machine that a runbook's commands run on: `systemctl` and `chronyc` act on the demo's processes."""

    def __init__(self, day: Day, set_clock_right: Callable[[], Awaitable[None]]) -> None:
        self.day = day
        self._directory = day.directory / "bin"
        self._asked = day.directory / "asked"
        self._set_clock_right = set_clock_right
        self._directory.mkdir()
        self._write("juicebox-hsm", f'#!/bin/sh\nexec {sys.executable} -m roles "$@"\n')
        for name in ("systemctl", "chronyc"):
            self._write(name, _SHIM.format(name=name, asked=self._asked))

    def _write(self, name: str, text: str) -> None:
        (self._directory / name).write_text(text)
        (self._directory / name).chmod(0o755)

    async def run(self, title: str, values: Mapping[str, str]) -> str:
        """Execute a runbook with these values; returns what it printed. Fails unless it ends well."""
        environment = {
            **os.environ, **values, "PATH": f"{self._directory}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)
        }  # fmt: skip
        run = partial(
            subprocess.run, ["bash", "-c", runbook(title)], cwd=self.day.cluster.state.path, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=HANGS_S,
        )  # fmt: skip
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve)
            done = await trio.to_thread.run_sync(run)
            nursery.cancel_scope.cancel()
        assert done.returncode == 0, done.stdout
        return str(done.stdout)

    async def _serve(self) -> None:
        """Do what the shims were called for."""
        while True:
            if self._asked.exists():
                await self._do(self._asked.read_text().split())
                self._asked.unlink()
            await trio.sleep(0.05)

    async def _do(self, words: list[str]) -> None:
        match words:
            case ["chronyc", "makestep"]:
                await self._set_clock_right()
            case ["systemctl", "stop", *units]:
                for running in self._processes(units):
                    await running.kill()
            case ["systemctl", "start", *units]:
                for running in self._processes(units):
                    if not running.is_running:
                        await self.day.cluster.restart(running.service.name)
            case ["systemctl", "reload", *units]:
                for running in self._processes(units):
                    running.send(signal.SIGHUP)
            case _:
                raise AssertionError(f"no such command here: {words}")

    def _processes(self, units: list[str]) -> list[RunningService]:
        found = []
        for unit in units:
            if unit in UNITS:
                found += self.day.cluster.of_role(UNITS[unit])
            else:
                found.append(self.day.cluster.process(f"agent{unit.removeprefix('juicebox-agent@')}"))
        return found


@asynccontextmanager
async def realm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, groups: int = 1, bus: PubSubEmulator | None = None
) -> AsyncIterator[tuple[Machine, User]]:
    """Run a realm whose state a test causes, with a registered user; two managers, as status advises."""
    (tmp_path / "faults").mkdir()
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "faults"))
    options = DemoOptions(
        tmp_path / "state", agents=3, groups=groups, load_balancers=2, managers=2, pin_hashing="FastInsecure",
        tenant_log=False, bus="" if bus is None else "pubsub", extra_flags={} if bus is None else {"agent": HASTY},
    )  # fmt: skip
    with closing(OrphanGuard()) as guard:
        async with launch(options, on_exit=lambda _: None) as cluster, registered(cluster) as user:
            day = Day(cluster, tmp_path, tmp_path / "faults", guard)
            yield Machine(day, partial(cluster_states.set_clock_right, day)), user


async def is_served(user: User) -> bool:
    """Tell whether the user's secret can be had: the realm is back, with its guesses."""
    for _ in range(10):
        try:
            return await user.client.recover(PIN, INFO) == SECRET
        except ClientError:
            await trio.sleep(0.5)
    return False


def agents(cluster: Cluster) -> str:
    """Return the units of all agents."""
    return " ".join(f"juicebox-agent@{number + 1}" for number in range(len(cluster.of_role("agent"))))


async def says(machine: Machine, text: str) -> None:
    """Check that `cluster status` names the state before the runbook is opened."""
    await eventually(partial(_is_said, machine, text), PROGRAM_S, text)


async def _is_said(machine: Machine, text: str) -> bool:
    return text in await status_of(machine.day.cluster)


async def test_the_majority_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three agents are gone; started again, they serve."""
    async with realm(tmp_path, monkeypatch) as (machine, user):
        cluster = machine.day.cluster
        for name in ("agent2", "agent3"):
            await cluster.process(name).kill()
        await says(machine, "fewer than a majority")
        await machine.run("The majority is lost", {"AGENTS": "juicebox-agent@2 juicebox-agent@3"})
        assert await is_served(user)


async def test_the_store_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's files are gone; the backup that no HSM went beyond brings every guess and secret back."""
    async with realm(tmp_path, monkeypatch) as (machine, user):
        cluster, state = machine.day.cluster, machine.day.cluster.state
        await run_tool("store", "backup", str(tmp_path / "backup.db"), "--store", state.store_url)
        for part in store_states.PARTS:
            (state.path / f"store.db{part}").unlink(missing_ok=True)
        await eventually(partial(_all_say, machine, "removed or replaced"), PROGRAM_S, "the lost store is told")
        told = await machine.run(
            "The store is lost, damaged or old",
            {
                "AGENTS": agents(cluster),
                "STORE": str(state.path / "store.db"),
                "KEPT": str(tmp_path / "kept"),
                "BACKUP": str(tmp_path / "backup.db"),
                "HSM_DIRS": " ".join(f"--hsm-dir {state.hsm(p.service.name)}" for p in cluster.of_role("agent")),
            },
        )
        assert "the HSMs can go on from there" in told
        assert await is_served(user)


async def _all_say(machine: Machine, text: str) -> bool:
    pages = [await page_of(running.service.http, "/readyz") for running in machine.day.cluster.of_role("agent")]
    return all(text in page for page in pages)


async def test_a_certificate_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent's certificate ends in five days; the new one is in service without a restart."""
    async with realm(tmp_path, monkeypatch) as (machine, user):
        cluster, state = machine.day.cluster, machine.day.cluster.state
        agent, ca = cluster.process("agent2"), state.path / "ca" / "cluster"
        issue(ca, PeerRole.AGENT, "agent2", state.tls("agent2"), days=5)
        agent.send(signal.SIGHUP)
        await says(machine, "its cluster certificate ends on")
        values = {"CA": str(ca), "NAME": "agent2", "AGENT": "2", "CLUSTER_TLS": str(state.tls("agent2"))}
        before = agent.pid
        await machine.run("A certificate ends", values)
        assert agent.pid == before
        assert await is_served(user)


async def test_a_clock_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One clock is 25 minutes ahead; set right, nobody is named any more."""
    async with realm(tmp_path, monkeypatch) as (machine, user):
        await cluster_states.set_clock(machine.day)
        await says(machine, "its clock is 1,500 s ahead")
        await machine.run("A clock is wrong", {})
        assert await is_served(user)


async def test_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be written until what lay about is removed; nothing is started again."""
    async with realm(tmp_path, monkeypatch) as (machine, user):
        state, rubbish = machine.day.cluster.state, tmp_path / "rubbish"
        rubbish.touch()
        await trouble_states.fill_disk(machine.day)

        async def make_room() -> None:
            while rubbish.exists():  # noqa: ASYNC110 - another process removes it
                await trio.sleep(0.1)
            await trouble_states.empty_disk(machine.day)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(user.call_for_ever)
            await says(machine, "the store fails its leader")
            nursery.start_soon(make_room)
            await machine.run("The disk is full", {"STORE": str(state.path / "store.db"), "RUBBISH": str(rubbish)})
            nursery.cancel_scope.cancel()
        assert await is_served(user)


async def test_a_move_is_stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All managers died in the middle of a move; started again, they finish it, and the key space is owned once."""
    async with realm(tmp_path, monkeypatch, groups=2) as (machine, user):
        await trouble_states.cut_move(machine.day)
        await says(machine, "is pending since index")
        await machine.run("A move is stuck", {})
        assert await is_served(user)


async def test_a_process_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process holds the store's lock; whoever is ended is the one that was named."""
    async with realm(tmp_path, monkeypatch) as (machine, user):
        store = machine.day.cluster.state.path / "store.db"
        with held_by_another(store) as pid:
            await eventually(
                partial(_any_says, machine, f"is locked by process {pid}"), PROGRAM_S, "the holder is told"
            )
            await machine.run("A process does not go on", {"PID": str(pid), "AGENT": "1"})
        assert await is_served(user)


async def _any_says(machine: Machine, text: str) -> bool:
    pages = [await page_of(running.service.http, "/readyz") for running in machine.day.cluster.processes]
    return any(text in page for page in pages)


@pytest.mark.skipif(find_emulator() is None, reason="no Pub/Sub emulator here")
async def test_the_bus_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients are served, agents say that events wait, and that ends when the bus goes on."""
    bus = PubSubEmulator()
    try:
        bus.wait_started()
        monkeypatch.setenv(EMULATOR_VARIABLE, bus.address)
        async with realm(tmp_path, monkeypatch, bus=bus) as (machine, user):
            bus.signal(signal.SIGSTOP)
            assert await is_served(user)
            await eventually(partial(_any_says, machine, "events are not published"), PROGRAM_S, "the bus is told")
            assert await is_served(user)
            bus.signal(signal.SIGCONT)
            agent = machine.day.cluster.process("agent1").service
            await machine.run("The bus stands still", {"PROBES": agent.http})
            assert await is_served(user)
    finally:
        bus.stop()


def test_every_runbook_is_executed() -> None:
    """A heading with commands has a test here; what replaces an HSM has one of its own (`test_replacement`)."""
    sections = re.split(r"^### ", GUIDE, flags=re.MULTILINE)
    titles = {part.split("\n", 1)[0] for part in sections if "```sh\n" in part}
    assert titles == set(re.findall(r'machine.run\(\s*"([^"]+)"', Path(__file__).read_text()))
