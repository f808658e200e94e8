"""`juicebox-hsm demo`: run a real realm on this machine and register and recover a secret against it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import click
import trio

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.errors import LocalError
from roles.tools.session import ToolFailure, run

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from roles.tools.demo.launch import Cluster
    from roles.tools.demo.layout import DemoOptions

T = TypeVar("T")

CLIENT_JSON_VARIABLE: Final = "JUICEBOX_CLIENT_JSON"
PIN: Final = b"2468"
SECRET: Final = b"the launch code is a walnut"
INFO: Final = b"demo"
NUM_GUESSES: Final = 5
SIGNAL_STATUS: Final = 128


@click.command()
@click.option("--realms", type=int, default=1, show_default=True, help="Realms, each with its own keys.")
@click.option("--agents", type=int, default=3, show_default=True, help="Agents, each with an HSM, per realm.")
@click.option("--groups", type=int, default=1, show_default=True, help="Groups that share the key space of a realm.")
@click.option(
    "--load-balancers", type=int, default=1, show_default=True, help="Load balancers, each serves all realms."
)
@click.option("--managers", type=int, default=2, show_default=True, help="Managers of the cluster.")
@click.option(
    "--store",
    type=click.Choice(["sqlite", "bigtable"]),
    default="sqlite",
    show_default=True,
    help="bigtable starts Google's emulator, or uses the one BIGTABLE_EMULATOR_HOST names.",
)
@click.option(
    "--bus",
    type=click.Choice(["embedded", "pubsub"]),
    help="Where events are published: the store itself, or Pub/Sub's emulator, started or named by"
    " PUBSUB_EMULATOR_HOST. Default: pubsub with --store bigtable where it is installed.",
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where everything lies; a second run there continues. Default: a new temporary directory.",
)
@click.option("--port-base", type=int, help="Number the ports from here. Default: free ones.")
@click.option(
    "--pin-hashing",
    type=click.Choice(["Standard2019", "FastInsecure"]),
    default="Standard2019",
    show_default=True,
    help="How hard clients stretch PINs; FastInsecure is for measuring the realm.",
)
@click.option("--keep", is_flag=True, help="Leave a temporary state directory behind.")
@click.option("--restart", is_flag=True, help="Start a service again when it exits.")
@click.option("--tenant-log/--no-tenant-log", default=True, show_default=True, help="Serve tenants' event logs, too.")
@click.option("--rate-limit", type=int, default=100_000, show_default=True, help="Operations/s of tenant test-acme.")
@click.argument("command_line", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND ARGS...]")
def command(
    realms: int,
    agents: int,
    groups: int,
    load_balancers: int,
    managers: int,
    store: str,
    bus: str | None,
    state_dir: Path | None,
    port_base: int | None,
    pin_hashing: str,
    rate_limit: int,
    command_line: tuple[str, ...],
    *,
    keep: bool,
    restart: bool,
    tenant_log: bool,
) -> None:
    """Run a real realm here: real processes, TLS between all of them, and files.

    With COMMAND: run it with JUICEBOX_CLIENT_JSON naming the clients' configuration, exit with its status and stop
    everything. Without: register and recover a secret, say what happened, and stay until Ctrl-C on a terminal.
    """
    from roles.tools.demo.layout import DemoOptions

    begun = time.monotonic()
    directory = state_dir or Path(tempfile.mkdtemp(prefix="juicebox-demo-"))
    try:
        options = DemoOptions(
            state_dir=directory,
            realms=realms,
            agents=agents,
            groups=groups,
            load_balancers=load_balancers,
            managers=managers,
            port_base=port_base,
            pin_hashing=pin_hashing,
            rate_limit=rate_limit,
            store=store,
            bus=bus or "",
            restart=restart,
            tenant_log=tenant_log,
        )
        status = run(lambda: _demo(options, command_line, begun))
    except LocalError as error:
        raise ToolFailure(str(error), ExitCode.USAGE) from None
    finally:
        if state_dir is None and not keep:
            shutil.rmtree(directory, ignore_errors=True)
        elif state_dir is None:
            click.echo(f"state kept in {directory}", err=True)
    sys.exit(status)


async def _demo(options: DemoOptions, command_line: tuple[str, ...], begun: float) -> int:
    """Launch, then run the command or show a registration; return the exit status."""
    from roles.tools.demo.launch import launch

    status: list[int] = []
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            await nursery.start(_stop_on_signal, scope, status)
            async with launch(options) as cluster:
                if command_line:
                    status.append(await _run_command(cluster.state.client_json, command_line))
                else:
                    await _show(cluster, begun)
                    status.append(0)
            nursery.cancel_scope.cancel()
    return status[0] if status else int(ExitCode.FAILED)


async def _stop_on_signal(
    scope: trio.CancelScope, status: list[int], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Stop everything on Ctrl-C or SIGTERM; the exit status says which."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            if not status:
                status.append(0 if number == signal.SIGINT and sys.stdout.isatty() else SIGNAL_STATUS + number)
            scope.cancel()


async def _run_command(client_json: Path, command_line: tuple[str, ...]) -> int:
    """Run COMMAND with our terminal and return its status, as a shell would.

    The interpreter's directory leads its PATH: scripts written for the demo use its Python and `juicebox-hsm`.
    """
    search = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    environment = {**os.environ, CLIENT_JSON_VARIABLE: str(client_json), "PATH": search}
    try:
        process = subprocess.Popen(command_line, env=environment)  # noqa: ASYNC220, S603 -- brief; what the user asked for
    except OSError as error:
        raise ToolFailure(f"cannot run {command_line[0]}: {error.strerror}", ExitCode.USAGE) from None
    descriptor = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)
        if process.poll() is None:
            process.terminate()
    status = process.wait()
    return SIGNAL_STATUS - status if status < 0 else status


async def _show(cluster: Cluster, begun: float) -> None:
    """Register and recover with our own client, and say what happened."""
    from juicebox_hsm.client import Client, Configuration, HttpTransport, InvalidPin
    from roles.tools.demo.launch import DEMO_USER

    configuration = Configuration.from_json(cluster.configuration)
    tokens = {realm: cluster.token(realm, DEMO_USER) for realm in cluster.realms}
    click.echo(f"A realm is up after {time.monotonic() - begun:.1f} s:")
    for running in cluster.processes:
        belongs = f"  HSM {running.hsm[:8]}...  realm {running.realm[:8]}..." if running.hsm else ""
        click.echo(f"  {running.service.name:<11} {running.service.address:<17} process {running.pid}{belongs}")
    async with (
        HttpTransport(ca_file=cluster.state.edge_ca) as transport,
        Client(configuration, tokens, transport=transport) as client,
    ):
        click.echo(f"\nRegistering a secret under PIN {PIN.decode()} with {NUM_GUESSES} guesses ...")
        await _timed("registered", client.register(PIN, SECRET, INFO, NUM_GUESSES))
        click.echo("Guessing PIN 0000 ...")
        try:
            await client.recover(b"0000", INFO)
        except InvalidPin as error:
            click.echo(f"  refused, {error.guesses_remaining} guesses left")
        click.echo(f"Recovering with PIN {PIN.decode()} ...")
        recovered = await _timed("recovered", client.recover(PIN, INFO))
        if recovered != SECRET:
            raise ToolFailure("the recovered secret is not the one that was registered")
        click.echo(f"  the secret: {SECRET.decode()!r}; all guesses are available again")
    click.echo(f"\nFirst recover {time.monotonic() - begun:.1f} s after the start.")
    if not sys.stdout.isatty():
        click.echo("Stopped again. On a terminal it stays until Ctrl-C, and says how to look at it.")
        return
    _say_how_to_look(cluster)
    await trio.sleep_forever()


def _say_how_to_look(cluster: Cluster) -> None:
    """Say what to type in another terminal, wherever that one is."""
    from roles.tools.demo.layout import TENANT_LOG

    program, state = _program(), cluster.state
    click.echo("While it runs, in another terminal:")
    click.echo(f"  {program} cluster status --config {_whole(state.cluster_toml)}")
    for running in cluster.of_role(TENANT_LOG):
        token_file = _whole(state.audit_token(cluster.realms[0]))
        click.echo(f"  {program} tenant-log tail --page 10 --url {running.service.url} --token-file {token_file}")
    for running in cluster.of_role("manager"):
        click.echo(f"  the status page of {running.service.name}: http://{running.service.http}/")
    click.echo(f"  for clients: export {CLIENT_JSON_VARIABLE}={_whole(state.client_json)}")
    click.echo("\nRunning until Ctrl-C.")


def _whole(path: Path) -> str:
    return shlex.quote(str(path.resolve()))


def _program() -> str:
    """Return how another terminal, in another directory and without this one's PATH, runs this program."""
    found = shutil.which(sys.argv[0])
    if found is None or Path(found).name != "juicebox-hsm":
        return f"{shlex.quote(sys.executable)} -m roles"
    return shlex.quote(str(Path(found).absolute()))


async def _timed(what: str, operation: Awaitable[T]) -> T:
    """Await one client operation and print how long it took."""
    begun = time.monotonic()
    result = await operation
    click.echo(f"  {what} in {(time.monotonic() - begun) * 1000:.0f} ms")
    return result
