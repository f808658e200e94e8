"""`juicebox-hsm chaos`: load a real realm, break it in every way, and check that guesses were counted exactly."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import SystemRandom
from typing import TYPE_CHECKING, Final

import click
import trio

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from roles.tools.chaos.plan import Action, Kind, Shape, make_plan
from roles.tools.chaos.report import Report
from roles.tools.session import ToolFailure, end, run
from roles.tools.target import TOKEN_LIFETIME_S

if TYPE_CHECKING:
    from juicebox_hsm.client import HttpTransport
    from roles.tools.chaos.faults import Chaos
    from roles.tools.chaos.load import History, User
    from roles.tools.chaos.proxy import Network
    from roles.tools.demo.launch import Cluster
    from roles.tools.demo.layout import DemoOptions
    from roles.tools.demo.processes import RunningService

HEALED_S: Final = 60.0
"""How long a realm may take to serve again once everything is healed and started."""

TOKEN_AGE_S: Final = 3600
"""How long ago users' tokens were issued: a balancer whose clock jumps back must not find them too new."""

EXIT_INTERNAL: Final = 70


@dataclass(frozen=True, slots=True)
class Settings:
    """What one run is told. `pause_s` is a user's mean pause between calls."""

    seed: int
    duration_s: float
    shape: Shape
    users: int
    pause_s: float
    state_dir: Path
    plan: list[Action]
    verbose: bool
    store: str = "sqlite"


@click.command()
@click.option("--seed", type=int, help="What happens and when; printed, so that a run can be repeated. Default: any.")
@click.option("--duration", type=click.FloatRange(5, 86_400), default=60, show_default=True, help="Seconds of load.")
@click.option("--agents", type=click.IntRange(1, 9), default=3, show_default=True, help="Agents, each with an HSM.")
@click.option("--groups", type=click.IntRange(1, 8), default=1, show_default=True, help="Groups of the realm.")
@click.option("--managers", type=click.IntRange(1, 4), default=2, show_default=True, help="Managers.")
@click.option("--load-balancers", type=click.IntRange(1, 4), default=2, show_default=True, help="Load balancers.")
@click.option(
    "--store", type=click.Choice(["sqlite", "bigtable"]), default="sqlite", show_default=True,
    help="Store; bigtable is Google's emulator.",
)  # fmt: skip
@click.option("--users", type=click.IntRange(1, 1000), default=16, show_default=True, help="Users that call at once.")
@click.option(
    "--pause", "pause_ms", type=click.IntRange(0), default=60, show_default=True, help="Between calls, in ms."
)
@click.option(
    "--only", "--actions", "only", help="Comma-separated kinds of trouble; default all. See the plan for their names."
)
@click.option("--plan-only", is_flag=True, help="Print the plan and do nothing.")
@click.option("--state-dir", type=click.Path(path_type=Path, file_okay=False), help="Keep everything here.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the report there.")
@click.option("--quiet", is_flag=True, help="Do not tell what happens while it happens.")
def command(
    seed: int | None,
    duration: float,
    agents: int,
    groups: int,
    managers: int,
    load_balancers: int,
    store: str,
    users: int,
    pause_ms: int,
    only: str | None,
    state_dir: Path | None,
    json_file: Path | None,
    *,
    plan_only: bool,
    quiet: bool,
) -> None:
    """Run a realm here, disturb it as a seed says, and check the history of every client call.

    Exit status 0: every answer is explained by an order of requests that counts each guess once. 5: violations.
    """
    if seed is None:
        seed = SystemRandom().randrange(1_000_000)
    shape = Shape(agents, managers, load_balancers, groups)
    plan = make_plan(seed, duration, shape, _kinds(only))
    click.echo(f"seed {seed}, {duration:g} s, {shape}, {users} users; the plan:")
    for action in plan:
        click.echo(f"  #{action.number:<3} {action}")
    if plan_only:
        return
    directory = state_dir or Path(tempfile.mkdtemp(prefix="juicebox-chaos-"))
    settings = Settings(seed, duration, shape, users, pause_ms / 1000, directory, plan, not quiet, store)
    keep = state_dir is not None
    try:
        report = run(lambda: run_chaos(settings))
        keep = keep or bool(report.violations)
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)
    for violation in report.violations:
        click.echo(f"\nVIOLATION: {violation}")
    click.echo("\n" + "\n".join(report.lines()))
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    if report.violations:
        click.echo(f"  logs and store: {directory}")
        end(ExitCode.FINDINGS)


def _kinds(only: str | None) -> list[Kind]:
    try:
        return [Kind(name.strip()) for name in (only or "").split(",") if name.strip()]
    except ValueError as error:
        raise ToolFailure(f"--only: {error}; kinds: {', '.join(kind.value for kind in Kind)}", ExitCode.USAGE) from None


async def run_chaos(settings: Settings) -> Report:
    """Run one plan under load and return what was found. Raises `ToolFailure` if the realm does not come up."""
    from juicebox_hsm.adapters.faults.switch import ENVIRONMENT
    from juicebox_hsm.client import HttpTransport
    from roles.tools.chaos.load import History
    from roles.tools.chaos.proxy import Network

    faults_dir = settings.state_dir / "faults"
    faults_dir.mkdir(parents=True, exist_ok=True)
    os.environ[ENVIRONMENT] = str(faults_dir.resolve())  # for the services: each reads its own file there
    network = Network(lambda: _pids(settings.state_dir))
    history = History()
    events: list[str] = []
    started = trio.current_time()

    def say(text: str) -> None:
        events.append(f"{trio.current_time() - started:.1f} s  {text}")
        if settings.verbose:
            click.echo(f"  {events[-1]}")

    try:
        async with (
            _realm(settings, network, faults_dir, say) as (cluster, chaos),
            HttpTransport(ca_file=cluster.state.edge_ca, connections_per_host_max=2 * settings.users + 8) as transport,
        ):
            users = _users(settings, cluster, transport, history)
            started = trio.current_time()
            gaps = await _load(settings, users, chaos, history)
            recovered_s = await _settle(cluster, users, chaos, history, say)
    finally:
        del os.environ[ENVIRONMENT]
    return _report(settings, chaos, history, events, gaps, recovered_s)


def _report(
    settings: Settings,
    chaos: Chaos,
    history: History,
    events: list[str],
    gaps: list[tuple[float, float]],
    recovered_s: float,
) -> Report:
    from juicebox_hsm.history import check_history

    violations = list(history.violations)
    violations += [f"broken invariant: {text}" for text in chaos.exits if f"status {EXIT_INTERNAL}" in text]
    violations += [str(found) for found in check_history(history.calls, chaos.barriers)]
    return Report(
        seed=settings.seed,
        duration_s=settings.duration_s,
        shape=asdict(settings.shape),
        users=settings.users,
        plan=[str(action) for action in settings.plan],
        events=events,
        counts=dict(history.counts),
        calls=len(history.calls),
        gaps=[(round(start, 3), round(length, 3)) for start, length in gaps],
        recovered_s=round(recovered_s, 3),
        barriers=len(chaos.barriers),
        skipped=chaos.skipped,
        exits=chaos.exits,
        violations=violations,
    )


@asynccontextmanager
async def _realm(
    settings: Settings, network: Network, faults_dir: Path, say: Callable[[str], None]
) -> AsyncIterator[tuple[Cluster, Chaos]]:
    """Run the realm behind the network of the harness, with what it takes to disturb it."""
    from juicebox_hsm.adapters.rpc import RpcPool
    from juicebox_hsm.adapters.tls.certificates import issue
    from juicebox_hsm.adapters.tls.cluster_tls import ClusterTls
    from juicebox_hsm.wire.rpc import PeerRole
    from roles.tools.chaos.faults import Chaos
    from roles.tools.demo.launch import launch

    ready: list[Chaos] = []
    async with trio.open_nursery() as nursery:

        def on_exit(running: RunningService) -> None:
            if ready and ready[0].note_exit(running):
                nursery.start_soon(ready[0].revive, running)

        options = await _behind_network(settings, network, nursery)
        async with launch(options, on_exit=on_exit) as cluster:
            pools = {}
            for role in (PeerRole.MANAGER, PeerRole.AGENT):
                certificate = cluster.state.tls(f"chaos-{role.value}")
                issue(cluster.state.path / "ca" / "cluster", role, "chaos", certificate)
                pools[role] = RpcPool(nursery, ClusterTls.load(certificate))
            chaos = Chaos(cluster, network, pools, faults_dir, settings.seed, say)
            ready.append(chaos)
            try:
                yield cluster, chaos
            finally:
                ready.clear()
                chaos.heal()
        nursery.cancel_scope.cancel()


async def _behind_network(settings: Settings, network: Network, nursery: trio.Nursery) -> DemoOptions:
    """Start a forwarder for each agent and manager; return the options of services that advertise them."""
    from roles.tools.demo.layout import HOST, DemoOptions

    shape = settings.shape
    names = [*shape.agent_names, *shape.manager_names]
    port_base = _free_ports(2 * (len(names) + shape.load_balancers))
    flags: dict[str, tuple[str, ...]] = {}
    for index, name in enumerate(names):
        [listener] = await trio.open_tcp_listeners(0, host=HOST)
        await nursery.start(network.forward, name, listener, port_base + 2 * index)
        flags[name] = ("--advertise", f"{HOST}:{listener.socket.getsockname()[1]}")
    return DemoOptions(
        state_dir=settings.state_dir,
        agents=shape.agents,
        groups=shape.groups,
        managers=shape.managers,
        load_balancers=shape.load_balancers,
        port_base=port_base,
        pin_hashing="FastInsecure",
        store=settings.store,
        tenant_log=False,
        extra_flags=flags,
    )


def _free_ports(count: int) -> int:
    """Return the first of `count` ports that nothing listens on."""
    from roles.tools.demo.layout import PORTS
    from roles.tools.demo.processes import is_listening

    chooser = SystemRandom()
    for _ in range(100):
        base = chooser.randrange(PORTS.start, PORTS.stop - count)
        if not any(is_listening(port) for port in range(base, base + count)):
            return base
    raise ToolFailure("no free ports found")


async def _load(settings: Settings, users: list[User], chaos: Chaos, history: History) -> list[tuple[float, float]]:
    """Run the users while the plan is carried out; return the longest times without an answer."""
    begun = trio.current_time()
    over = begun + settings.duration_s
    async with trio.open_nursery() as nursery:
        for user in users:
            nursery.start_soon(user.run, lambda: trio.current_time() >= over, settings.pause_s)
        await chaos.run(settings.plan, begun)
    return history.gaps(begun, over)


async def _settle(
    cluster: Cluster, users: list[User], chaos: Chaos, history: History, say: Callable[[str], None]
) -> float:
    """Heal and restart everything, wait for the realm, look at every record; return how long the realm took."""
    chaos.heal()
    begun = trio.current_time()
    await chaos.restart_all(0.0)
    took_s = HEALED_S
    with trio.move_on_after(HEALED_S):
        await cluster.wait_ready()
        took_s = trio.current_time() - begun
    if took_s >= HEALED_S:
        history.violations.append(f"the healed realm was not whole and led within {HEALED_S:.0f} s")
    say(f"healed: every group led and the key space covered after {took_s:.2f} s; last checks")
    async with trio.open_nursery() as nursery:
        for user in users:
            nursery.start_soon(user.final_check)
    return took_s


def _users(settings: Settings, cluster: Cluster, transport: HttpTransport, history: History) -> list[User]:
    """Make the users, spread over the balancers, with tokens that a wrong clock does not spoil."""
    from juicebox_hsm.client import Configuration
    from juicebox_hsm.tokens import create
    from roles.tools.chaos.load import User
    from roles.tools.demo.layout import KEY_VERSION, TENANT, signing_key

    key = signing_key(cluster.state)
    issued_s = int(time.time()) - TOKEN_AGE_S
    balancers = cluster.of_role("lb")
    users = []
    for number in range(settings.users):
        name = f"user{number + 1}"
        address = f"{balancers[number % len(balancers)].service.url}/"
        realms = [{**realm, "address": address} for realm in cluster.configuration["realms"]]
        tokens = {
            realm: create(
                key,
                tenant=TENANT,
                version=KEY_VERSION,
                user=name,
                realm=realm,
                now_s=issued_s,
                lifetime_s=TOKEN_LIFETIME_S,
            )
            for realm in cluster.realms
        }
        configuration = Configuration.from_json({**cluster.configuration, "realms": realms})
        users.append(User(name, settings.seed, configuration, tokens, transport, history))
    return users


def _pids(state_dir: Path) -> dict[int, str]:
    """Return the running processes by name, as the launcher's list says."""
    try:
        entries = json.loads((state_dir / "processes.json").read_text(encoding="utf-8"))
    except OSError:
        return {}  # not written yet
    return {int(entry["pid"]): str(entry["name"]) for entry in entries}
