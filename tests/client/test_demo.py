"""The demo as users run it: real processes, TLS and files, from the first start to a restart after a power cut."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner

from juicebox_hsm.adapters.hsm_directory.hsm_host import init_hsm_dir
from juicebox_hsm.adapters.tls.certificates import issue
from juicebox_hsm.client import Client, Configuration, HttpTransport, InvalidPin
from juicebox_hsm.errors import LocalError
from juicebox_hsm.wire.methods import MANAGER_STATUS
from juicebox_hsm.wire.rpc import Empty, ManagerStatus, PeerRole
from roles.cli import cli
from roles.survey.overview import ask_agents
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import PORTS, DemoOptions, StateDir, services
from roles.tools.demo.processes import OrphanGuard, RunningService
from tests.patience import HANGS_S, PROGRAM_S
from tests.terminal import read_all, run_on_terminal, words_of

pytestmark = pytest.mark.processes

DEMO = [sys.executable, "-m", "roles", "demo", "--pin-hashing", "FastInsecure"]
INFO = b"info"
RECOVER_WITHIN_S = 8.0
SELDOM: dict[str, tuple[str, ...]] = {"manager": ("--interval", "1h")}
"""Managers whose looks at the leaders are twice as far apart each time, from a tenth of a second on."""


def _demo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DEMO, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _cluster(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "roles", "cluster", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_S, check=False)


@asynccontextmanager
async def _client(cluster: Cluster, user: str) -> AsyncIterator[Client]:
    tokens = {realm: cluster.token(realm, user) for realm in cluster.realms}
    async with HttpTransport(ca_file=cluster.state.edge_ca) as transport:
        yield Client(Configuration.from_json(cluster.configuration), tokens, transport=transport)


@asynccontextmanager
async def _outsider(cluster: Cluster) -> AsyncIterator[RunningService]:
    """Run a fourth agent, with the realm's keys and an HSM that is in no realm yet."""
    state = cluster.state
    service = next(found for found in services(replace(cluster.options, agents=4), state) if found.name == "agent4")
    issue(state.path / "ca" / "cluster", PeerRole.AGENT, service.name, state.tls(service.name))
    init_hsm_dir(state.keys(0), state.hsm(service.name))
    guard = OrphanGuard()
    running = RunningService(service, state.log(service.name), guard)
    running.start()
    try:
        await running.wait_listening()
        yield running
    finally:
        with trio.CancelScope(shield=True):
            await running.kill()
        running.close()
        guard.close()


async def _guesses_left(client: Client) -> int:
    """Spend one guess on a wrong PIN; return how many are left."""
    try:
        await client.recover(b"wrong", INFO)
    except InvalidPin as error:
        return error.guesses_remaining
    raise AssertionError("a wrong PIN recovered the secret")


def _certificates(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*.pem")}


async def test_a_state_directory_has_one_demo(tmp_path: Path) -> None:
    """A second demo on a directory in use says by whom, and the realm that runs there does not notice."""
    async with launch(DemoOptions(state_dir=tmp_path, agents=1, pin_hashing="FastInsecure")) as cluster:
        before = _certificates(tmp_path)
        written = cluster.state.processes_json.read_bytes()
        second = await trio.to_thread.run_sync(_demo, "--state-dir", tmp_path)
        assert second.returncode == 1, second.stderr
        assert f"is in use by process {os.getpid()}" in second.stderr
        assert _certificates(tmp_path) == before
        assert cluster.state.processes_json.read_bytes() == written
        assert len(await cluster.session.store.discovery.list()) >= 3
        async with _client(cluster, "alice") as client:
            await client.register(b"1234", b"secret", INFO, 5)
            assert await client.recover(b"1234", INFO) == b"secret"


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    """A demo that finds a stranger on an agent's port says that the address is in use, not what the stranger showed."""
    with socket.socket() as stranger:
        while True:
            base = random.choice(PORTS)
            options = DemoOptions(state_dir=tmp_path, agents=1, port_base=base)
            try:
                found = services(options, StateDir(tmp_path))
                port = next(service.port for service in found if service.role == "agent")
                stranger.bind(("127.0.0.1", port))
                break
            except (OSError, LocalError):
                continue
        stranger.listen()
        result = _demo("--state-dir", tmp_path, "--agents", "1", "--port-base", str(base))
    assert result.returncode == 1, result.stderr
    assert f"agent1: address 127.0.0.1:{port} is in use" in result.stderr


def test_shows_a_registration_and_stops(tmp_path: Path) -> None:
    """Without a command and without a terminal: register, recover, say so, stop everything, exit 0."""
    result = _demo("--state-dir", tmp_path / "state")
    assert result.returncode == 0, result.stderr
    assert "First recover" in result.stdout
    assert "refused, 4 guesses left" in result.stdout
    processes = json.loads((tmp_path / "state" / "processes.json").read_text())
    assert {entry["role"] for entry in processes} == {"agent", "manager", "lb", "tenant-log"}
    assert "in another terminal" not in result.stdout, "there is nothing left to look at"
    assert not any(_lives(entry["pid"]) for entry in processes)


def test_what_it_says_to_type_works_elsewhere(tmp_path: Path) -> None:
    """On a terminal it stays, and the status command it prints exits 0 in another directory, without our PATH."""
    master, slave = os.openpty()
    command = [*DEMO, "--state-dir", str(tmp_path / "a state")]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    try:
        said = ""
        while "Running until Ctrl-C." not in said:
            said += os.read(master, 65536).decode()
        (line,) = [line.strip() for line in said.splitlines() if "cluster status" in line]
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
        deadline, told = time.monotonic() + HANGS_S, ""
        while not told.endswith("healthy\n"):  # a busy machine may have it in trouble for a moment
            assert time.monotonic() < deadline, told
            ended = subprocess.run(
                ["/bin/sh", "-c", line], cwd="/", env=environment, capture_output=True, text=True, timeout=PROGRAM_S,
                check=False,
            )  # fmt: skip
            told = ended.stdout + ended.stderr
        assert ended.returncode == 0
    finally:
        process.send_signal(signal.SIGINT)
        read_all(master)
        os.close(master)
        process.wait(PROGRAM_S)


def test_command_gets_the_configuration_and_decides_the_status(tmp_path: Path) -> None:
    """A command sees client.json and a cluster it can operate and measure; its status is the demo's."""
    state = tmp_path / "state"
    script = (
        "set -e; "
        f"{sys.executable} -m roles bench client --count 20 --concurrency 4 --json {tmp_path}/bench.json; "
        f"{sys.executable} -m roles cluster status --json --config {state}/cluster.toml > {tmp_path}/status.json; "
        f'test "$(command -v python)" = "{Path(sys.executable).parent}/python"; '
        f"python -m roles check --count 2 --json > {tmp_path}/check.json; "
        f"{sys.executable} -m roles cluster groups --config {state}/cluster.toml > {tmp_path}/groups.txt; "
        f"{sys.executable} -m roles cluster partitions --json --config {state}/cluster.toml > {tmp_path}/parts.json; "
        f"{sys.executable} -m roles cluster new-realm tls://127.0.0.1:1 --config {state}/cluster.toml || "
        f'test $? = 4; test -f "$JUICEBOX_CLIENT_JSON"; exit 7'
    )
    result = _demo("--state-dir", state, "--managers", "2", "--", "/bin/sh", "-c", script)
    assert result.returncode == 7, result.stdout + result.stderr
    measured = json.loads((tmp_path / "bench.json").read_text())
    assert [entry["op"] for entry in measured] == ["register", "recover", "delete"]
    assert all(entry["errors"] == 0 and entry["per_second"] > 0 for entry in measured)
    assert json.loads((tmp_path / "status.json").read_text())["ok"] is True
    checked = json.loads((tmp_path / "check.json").read_text())
    assert checked["ok"] is True
    assert {name: step["count"] for name, step in checked["steps"].items()} == dict.fromkeys(
        ("register", "recover", "delete"), 2
    )
    assert "Leader" in (tmp_path / "groups.txt").read_text()
    parts = json.loads((tmp_path / "parts.json").read_text())["realms"][0]["partitions"]
    assert [(part["start"], part["end"]) for part in parts] == [("00" * 32, "ff" * 32)]
    document = json.loads((state / "client.json").read_text())
    assert document["tokens"].keys() == {realm["id"] for realm in document["configuration"]["realms"]}
    assert document["signer"]["tenant"] == "test-acme"
    assert Path(document["ca"]).read_text().startswith("-----BEGIN CERTIFICATE")


async def test_survives_a_power_cut(tmp_path: Path) -> None:
    """Everything killed at once: the next run has the same realm, the secret, and the guesses already spent."""
    options = DemoOptions(state_dir=tmp_path, pin_hashing="FastInsecure")
    async with launch(options, on_exit=lambda _: None) as cluster:
        realms, addresses = cluster.realms, cluster.configuration["realms"]
        async with _client(cluster, "mario") as client:
            await client.register(b"pin", b"secret", INFO, 4)
            assert await _guesses_left(client) == 3
        for running in cluster.processes:
            running.send(signal.SIGKILL)
        for running in cluster.processes:
            await running.wait()
    async with launch(options) as cluster:
        assert cluster.realms == realms
        assert cluster.configuration["realms"] == addresses, "clients find it where it was"
        async with _client(cluster, "mario") as client:
            assert await _guesses_left(client) == 2
            assert await client.recover(b"pin", INFO) == b"secret"
            assert await _guesses_left(client) == 3


async def test_three_agents_lose_their_leader(tmp_path: Path) -> None:
    """A group of three: the leader is killed and a recover succeeds soon after; the killed one comes back.

    The manager does not look for itself meanwhile, so it is the members' hints that bring the new leader.
    """
    options = DemoOptions(state_dir=tmp_path, agents=3, pin_hashing="FastInsecure", extra_flags=SELDOM)
    async with launch(options, on_exit=lambda _: None) as cluster, _client(cluster, "mario") as client:
        await client.register(b"pin", b"secret", INFO, 2)
        view = await cluster.view()
        serving = next(group for group in view.groups.values() if group.owned_range is not None)
        assert len(serving.configuration) == 3
        assert serving.leader is not None
        name = serving.leader.name
        looked_at_ms = await _looks_are_far_apart(cluster)
        await cluster.process(name).kill()
        await _recover_within(client, RECOVER_WITHIN_S)
        assert await _leaders_looked_at_ms(cluster) == looked_at_ms
        await cluster.restart(name)
        await cluster.wait_ready()
        assert await client.recover(b"pin", INFO) == b"secret"


async def _leaders_looked_at_ms(cluster: Cluster) -> int:
    """Return when the manager last looked at all leaders, 0 before it did."""
    manager = cluster.process("manager1").service
    status = await cluster.session.rpc.call(manager.url, MANAGER_STATUS, Empty(), timeout_s=5)
    assert isinstance(status, ManagerStatus)
    return next((run.at_ms for run in status.loops if run.name == "leaders"), 0)


async def _looks_are_far_apart(cluster: Cluster) -> int:
    """Wait for a look after which the next one cannot fall into `RECOVER_WITHIN_S`; return when it was."""
    with trio.fail_after(HANGS_S):
        seen = await _leaders_looked_at_ms(cluster)
        while True:
            latest = await _leaders_looked_at_ms(cluster)
            if seen and latest - seen > RECOVER_WITHIN_S / 2 * 1000:
                return latest
            seen = latest
            await trio.sleep(0.1)


async def _recover_within(client: Client, limit_s: float) -> None:
    """Recover, trying again while the realm is unavailable."""
    from juicebox_hsm.client import Transient

    with trio.fail_after(limit_s):
        while True:
            try:
                assert await client.recover(b"pin", INFO) == b"secret"
            except Transient:
                await trio.sleep(0.05)
            else:
                return


async def test_operators_hand_over_without_errors(tmp_path: Path) -> None:
    """Hand-overs by HSM and by group under traffic: the leader changes each time and no client sees an error."""
    options = DemoOptions(state_dir=tmp_path, agents=3, managers=2, pin_hashing="FastInsecure")
    async with launch(options) as cluster, trio.open_nursery() as nursery:
        recovered = 0

        async def traffic(user: str) -> None:
            nonlocal recovered
            async with _client(cluster, user) as client:
                await client.register(b"pin", b"secret", INFO, 2)
                while True:
                    assert await client.recover(b"pin", INFO) == b"secret"
                    recovered += 1

        for number in range(3):
            nursery.start_soon(traffic, f"user{number}")
        await trio.sleep(0.2)
        config = str(cluster.state.cluster_toml)
        for turn in range(3):
            view = await cluster.wait_leaders()
            serving = next(group for group in view.groups.values() if group.owned_range is not None)
            assert serving.leader is not None
            subject = serving.leader.hsm if turn % 2 == 0 else serving.id
            done = await trio.to_thread.run_sync(_cluster, "stepdown", subject.hex()[:9], "--config", config)
            assert done.returncode == 0, done.stderr
            after = (await cluster.wait_leaders()).groups[serving.key]
            assert after.leader is not None
            assert after.leader.hsm != serving.leader.hsm
        before = recovered
        await trio.sleep(0.3)
        assert recovered > before
        nursery.cancel_scope.cancel()


def test_a_killed_demo_leaves_nothing_running(tmp_path: Path) -> None:
    """SIGKILL to the demo itself: its services stop too."""
    state = tmp_path / "state"
    demo = subprocess.Popen([*DEMO, "--state-dir", str(state), "--", "/bin/sleep", "60"])
    try:
        deadline = time.monotonic() + HANGS_S
        while not (state / "client.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        processes = json.loads((state / "processes.json").read_text())
    finally:
        demo.kill()
        demo.wait()
    deadline = time.monotonic() + HANGS_S
    while any(_lives(entry["pid"]) for entry in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [entry["name"] for entry in processes if _lives(entry["pid"])]


def test_a_role_that_cannot_start_is_reported(tmp_path: Path) -> None:
    """A service that exits during start ends the demo with its last log lines."""
    state = tmp_path / "state"
    assert _demo("--state-dir", state, "--", "/bin/true").returncode == 0
    (state / "secrets.json").chmod(0o600)
    (state / "edge" / "cert.pem").unlink()
    broken = json.loads((state / "secrets.json").read_text())
    del broken["record-id-randomization"]
    (state / "secrets.json").write_text(json.dumps(broken))
    result = _demo("--state-dir", state, "--", "/bin/true")
    assert result.returncode == 1
    assert "lb1 exited with status" in result.stderr
    assert "record-id-randomization" in result.stderr


async def test_operators_commands_on_a_real_cluster(tmp_path: Path) -> None:
    """Drain, rebalance, limits, ranges and tokens, as typed: each does what it says and exits as documented."""
    options = DemoOptions(state_dir=tmp_path, agents=3, groups=2, managers=2, pin_hashing="FastInsecure")
    async with launch(options) as cluster:
        config = ("--config", str(cluster.state.cluster_toml))

        async def operate(*arguments: str, expect: int = 0) -> str:
            done = await trio.to_thread.run_sync(partial(_cluster, *arguments, *config))
            assert done.returncode == expect, (arguments, done.stdout, done.stderr)
            return done.stdout

        view = await cluster.view()
        realm = cluster.realms[0]
        serving = [group for group in view.groups_of(realm) if group.owned_range is not None]
        assert len(serving) == 2
        leaders = [group.leader for group in serving]
        assert leaders[0] is not None
        assert leaders[1] is not None

        drained = leaders[0]
        # agent1 also leads the group of one that the realm began with, which nobody else can take over
        stays = drained.name == "agent1"
        assert ("still leads" in await operate("drain", drained.url)) == stays
        for group in (await cluster.wait_leaders()).groups_of(realm):
            if len(group.configuration) == 3:
                assert group.leader is not None
                assert group.leader.hsm != drained.hsm
        assert "work" in await operate("rebalance", "--dry-run")
        await operate("undrain", drained.hsm.hex()[:7])
        await operate("undrain", drained.hsm.hex()[:7], expect=3)
        await operate("undrain", drained.hsm.hex(), expect=3)
        assert (await operate("rebalance", "--full")).endswith("Already balanced.\n")

        reloaded = await operate("tenant", "set-capacity", "acme", "5")
        assert reloaded.count("reloaded tenant config for 2 tenants") == 3
        listed = json.loads(await operate("discovery", "list", "--json"))["services"]
        assert [entry["kind"] for entry in listed] == ["agent"] * 3 + ["manager", "manager", "lb"]
        printed = json.loads(
            await operate("configuration", cluster.configuration["realms"][0]["address"], "--pin-hashing-mode",
                          "FastInsecure")
        )  # fmt: skip
        assert printed == cluster.configuration
        token = await operate(
            "auth-token", "-t", "test-acme", "-u", "luigi", "-r", realm.hex()[:5],
            "--secrets-file", str(cluster.state.secrets_file),
        )  # fmt: skip
        assert token.count(".") == 2

        low, high = sorted(serving, key=lambda group: group.owned_range.start if group.owned_range else b"")
        moving = ("--realm", realm.hex(), "--source", high.id.hex()[:9], "--destination", low.id.hex()[:9])
        assert "would move" in await operate("transfer", *moving, "--start", "8000", "--end", "bfff", "--dry-run")
        await operate("transfer", *moving, "--start", "9000", "--end", "9fff", expect=1)
        await operate("transfer", *moving, "--start", "8000", "--end", "bfff")
        parts = json.loads(await operate("partitions", realm.hex()[:6], "--json"))["realms"][0]["partitions"]
        assert [part["start"][:2] for part in parts] == ["00", "c0"]
        assert "healthy" in await operate("status")
        await _dry_runs_exit_as_the_real_ones(cluster, low.id.hex(), high.id.hex())
        members = words_of(await operate("groups"))
        shown = await trio.to_thread.run_sync(run_on_terminal, ["cluster", "groups", *config])
        in_window = set(words_of(shown[1]))
        assert {*members} - in_window <= {word for word in members if word.isdigit()}, "counters move, nothing else"
        for group in serving:
            assert group.id.hex() in in_window
            assert all(hsm.hex()[:8] in in_window for hsm in group.configuration)
        whole = ("--realm", realm.hex(), "--destination", low.id.hex(), "--start", "00", "--end", "ff")
        assert (await operate("experimental", "transfer", *whole)).startswith("[0xc000...-0xff...] from")
        assert await operate("experimental", "transfer", *whole) == "nothing to do!\n"

        planned = json.loads(await operate("plan", "--groups", "3", "--json"))["commands"]
        assert [command.split()[2] for command in planned] == ["new-group", "transfer", "transfer", "rebalance"]
        applied = await operate("plan", "--groups", "3", "--apply")
        assert applied.endswith("3 groups share the key space\n")
        assert await operate("plan", "--groups", "3", "--apply") == "nothing to do!\n"
        parts = json.loads(await operate("partitions", realm.hex(), "--json"))["realms"][0]["partitions"]
        assert [part["start"][:10] for part in parts] == ["0000000000", "5555555500", "aaaaaaaa00"]
        assert "would" not in await operate("experimental", "assimilate", "--group-size", "3", "--dry-run")
        assert json.loads(await operate("table-stats", "merkle", realm.hex()[:4], "--json"))["roots"] == 3
        assert len(json.loads(await operate("table-stats", "log", realm.hex(), "--json"))["groups"]) == 4
        assert (await operate("user-summary")).startswith("start,end,realm,tenant,users")

        async with _outsider(cluster) as outside:
            url = outside.service.url
            joining = (url, leaders[0].url, leaders[1].url)
            await operate("new-group", "--realm", realm.hex()[:7], *joining, expect=1)
            assert "would join" in await operate("join-realm", "--realm", realm.hex(), url, "--dry-run")
            for _ in range(2):  # joining again is no error
                assert await operate("join-realm", "--realm", realm.hex()[:7], url) == "HSMs done joining realm\n"
            created = await operate("new-group", "--realm", realm.hex()[:7], *joining)
            assert created.startswith("Created group ")
            view = await ask_agents(cluster.session.rpc, [url], 5.0)
            [fresh] = [group for group in view.groups_of(realm) if group.id.hex() == created.split()[-1]]
            assert fresh.leader is not None
            assert fresh.leader.url == url, "the first one leads"
            assert len(fresh.configuration) == 3

        await cluster.process("agent3").kill()
        assert "agent" in await operate("status", expect=5)
        assert "error:" in await operate("agents", expect=5)


async def _dry_runs_exit_as_the_real_ones(cluster: Cluster, low: str, high: str) -> None:
    """Orders that a running cluster refuses: the same exit code with and without --dry-run; 3 for unknown ids."""
    config = ("--config", str(cluster.state.cluster_toml))
    realm, agent = cluster.realms[0].hex(), cluster.process("agent1").service.url
    missing, half = "0f" * 16, ("--start", "8000", "--end", "bfff")
    for code, *command in (
        (3, "transfer", "--realm", realm, "--source", missing, "--destination", "1e" * 16, *half),
        (3, "transfer", "--realm", missing, "--source", low, "--destination", high, *half),
        (2, "transfer", "--realm", realm, "--source", low, "--destination", low, *half),
        (1, "transfer", "--realm", realm, "--source", low, "--destination", high, "--start", "2000", "--end", "30ff"),
        (3, "experimental", "transfer", "--realm", realm, "--destination", missing, *half),
        (3, "drain", missing),
        (3, "stepdown", missing),
        (1, "new-realm", agent),
        (4, "new-realm", "tls://127.0.0.1:1"),
        (3, "join-realm", "--realm", missing, agent),
        (4, "join-realm", "--realm", realm, "tls://127.0.0.1:1"),
        (1, "new-group", "--realm", realm, agent, agent),
        (3, "tenant", "unset", "nobody"),
    ):  # fmt: skip
        for words in (command, [*command, "--dry-run"]):
            result = await trio.to_thread.run_sync(CliRunner().invoke, cli, ["cluster", *words, *config])
            assert result.exit_code == code, (words, result.output)
    assert not await cluster.session.store.settings.list("drain/"), "a drain that was refused leaves no mark"
