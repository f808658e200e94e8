"""`juicebox-hsm bench hsm`: a whole realm from nothing, and what it serves (operator-tools.md 7).

The realm is that of `demo`: real processes, TLS and durable files, so the figures are end to end. It shares the
machine with the client.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Final

import click
import trio

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.errors import LocalError
from roles.tools.bench.client import Load, Result, print_results, run_plan
from roles.tools.demo.layout import DemoOptions
from roles.tools.session import ToolFailure, end, run
from roles.tools.target import target_from_client_json

CONNECTIONS: Final = 10
MANAGERS: Final = 2
_STOPS: Final = (signal.SIGINT, signal.SIGTERM)
PLAN: Final = ("register", "recover", "delete")


@click.command()
@click.option("--num-agents", type=click.IntRange(1, 9), default=5, show_default=True, help="Agents, each with an HSM.")
@click.option("--groups", type=click.IntRange(1, 8), default=3, show_default=True, help="Groups over all HSMs.")
@click.option("--count", type=click.IntRange(1, 10_000_000), default=100, show_default=True, help="Users per step.")
@click.option("--concurrency", type=click.IntRange(1, 4096), default=3, show_default=True, help="Operations at once.")
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the realm there; a second run continues with it. Default: a temporary directory.",
)
@click.option("--keep-alive", is_flag=True, help="Leave the realm running until Ctrl-C.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Also write a result file.")
def command(
    num_agents: int,
    groups: int,
    count: int,
    concurrency: int,
    state: Path | None,
    json_file: Path | None,
    *,
    keep_alive: bool,
) -> None:
    """Start a realm here, balance it, then register, recover and delete users. Exit 1 on any error.

    One balancer, two managers; clients stretch PINs with FastInsecure, so that the realm is what is measured.
    """
    directory = state or Path(tempfile.mkdtemp(prefix="juicebox-bench-"))
    load = Load(count, concurrency, CONNECTIONS, "mario", 0)
    try:
        options = DemoOptions(
            state_dir=directory,
            agents=num_agents,
            groups=groups,
            managers=MANAGERS,
            pin_hashing="FastInsecure",
            tenant_log=False,
        )
        results = run(lambda: _measure(options, load, json_file, keep_alive=keep_alive))
    except LocalError as error:
        raise ToolFailure(str(error), ExitCode.USAGE) from None
    finally:
        if state is None:
            shutil.rmtree(directory, ignore_errors=True)
    if any(result.errors for result in results):
        end(ExitCode.FAILED)


async def _measure(options: DemoOptions, load: Load, json_file: Path | None, *, keep_alive: bool) -> list[Result]:
    from roles.tools.demo.launch import launch

    async with launch(options) as cluster:
        balance = [sys.executable, "-m", "roles", "cluster", "rebalance", "--full"]
        done = await trio.run_process(
            [*balance, "--config", str(cluster.state.cluster_toml)],
            capture_stdout=True, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        if done.returncode:
            raise ToolFailure(f"not balanced: {done.stdout.decode(errors='replace').strip()}")
        results = await run_plan(target_from_client_json(cluster.state.client_json), load, list(PLAN))
        if json_file is not None:
            text = json.dumps([asdict(result) for result in results], indent=2) + "\n"
            await trio.Path(json_file).write_text(text, encoding="utf-8")
        print_results(results)
        if keep_alive:
            click.echo(f"realm in {options.state_dir}, running until Ctrl-C", err=True)
            with trio.open_signal_receiver(*_STOPS) as signals:
                async for _ in signals:
                    break
    return results
