"""`juicebox-hsm bench client`: how many operations a running realm serves, and how fast (operator-tools.md 7).

Shares the machine with the servers when those run here, so it does as little as it can: tokens are minted before the
clock starts, connections are shared, and nothing is printed while it measures. Noise sessions are never reused.
"""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import trio

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.client import Client, ClientError, HttpTransport, InvalidAuth
from juicebox_hsm.ids import RealmId
from roles.durations import DurationType
from roles.tools.session import ToolFailure, end, run
from roles.tools.target import ENVIRONMENT, Target, target_from_client_json, target_from_flags

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

OPERATIONS: Final = ("register", "recover", "delete", "auth-error")
NUM_GUESSES: Final = 2
INFO: Final = b"bench"
ERRORS_SHOWN_MAX: Final = 5


@dataclass(frozen=True, slots=True)
class Load:
    """How much to ask. `connections` 0 opens new ones for every operation; `report_s` is the time between reports."""

    count: int
    concurrency: int
    connections: int
    user_prefix: str
    user_start: int
    report_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Result:
    """What one operation measured; times in milliseconds, of operations that succeeded."""

    op: str
    count: int
    errors: int
    per_second: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    concurrency: int
    connections: int | str
    min_ms: float
    mean_ms: float
    p95_ms: float
    max_ms: float
    elapsed_s: float


def percentile(ordered: list[float], share: float) -> float:
    """Return the nearest-rank percentile of ascending values; 0 for none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def summarize(op: str, load: Load, times_ns: list[int], errors: int, elapsed_s: float) -> Result:
    """Return the figures of one operation; `per_second` counts successes. Pure."""
    ordered = sorted(taken / 1e6 for taken in times_ns)
    return Result(
        op=op,
        count=load.count,
        errors=errors,
        per_second=round(len(ordered) / elapsed_s, 2) if elapsed_s > 0 else 0.0,
        p50_ms=round(percentile(ordered, 0.50), 3),
        p90_ms=round(percentile(ordered, 0.90), 3),
        p99_ms=round(percentile(ordered, 0.99), 3),
        concurrency=load.concurrency,
        connections=load.connections or "new",
        min_ms=round(ordered[0], 3) if ordered else 0.0,
        mean_ms=round(sum(ordered) / len(ordered), 3) if ordered else 0.0,
        p95_ms=round(percentile(ordered, 0.95), 3),
        max_ms=round(ordered[-1], 3) if ordered else 0.0,
        elapsed_s=round(elapsed_s, 3),
    )


async def run_operation(op: str, client: Client, number: int) -> None:
    """Run one operation for user `number`. Raises `ClientError`, or `ToolFailure` for a wrong secret."""
    pin, secret = b"pin%d" % number, b"secret of user %d" % number
    if op == "register":
        await client.register(pin, secret, INFO, NUM_GUESSES)
    elif op == "recover":
        if await client.recover(pin, INFO) != secret:
            raise ToolFailure(f"user {number}: the recovered secret is not the registered one")
    elif op == "delete":
        await client.delete()
    else:
        try:
            await client.recover(pin, INFO)
        except InvalidAuth:
            return
        raise ToolFailure(f"user {number}: a bad token was accepted")


@asynccontextmanager
async def transport_for(target: Target, load: Load, shared: HttpTransport | None) -> AsyncIterator[HttpTransport]:
    """Yield the shared connections, or new ones that are closed afterwards."""
    if shared is not None:
        yield shared
        return
    async with HttpTransport(ca_file=target.ca_file, connections_per_host_max=load.concurrency) as own:
        yield own


async def measure(op: str, target: Target, load: Load, tokens: list[dict[RealmId, str]]) -> tuple[Result, list[str]]:
    """Run one operation for all users, `concurrency` at a time; return figures and the first errors."""
    times_ns: list[int] = []
    problems: list[str] = []
    errors = 0
    shared = None
    if load.connections:
        shared = HttpTransport(ca_file=target.ca_file, connections_per_host_max=load.connections)
    numbers = iter(range(load.count))

    async def worker(mine: Iterator[int]) -> None:
        nonlocal errors
        for index in mine:
            begun_ns = time.perf_counter_ns()
            try:
                async with transport_for(target, load, shared) as transport:
                    client = Client(target.configuration, tokens[index], transport=transport)
                    await run_operation(op, client, load.user_start + index)
            except (ClientError, ToolFailure) as error:
                errors += 1
                if len(problems) < ERRORS_SHOWN_MAX:
                    problems.append(f"{op} of user {load.user_start + index}: {type(error).__name__}: {error}")
            else:
                times_ns.append(time.perf_counter_ns() - begun_ns)

    gc.collect()
    gc.freeze()  # what was imported and minted is not looked at again while the clock runs
    begun = time.perf_counter()
    async with trio.open_nursery() as reporting:
        if load.report_s < math.inf:
            reporting.start_soon(_report, op, load, times_ns)
        async with trio.open_nursery() as nursery:
            for _ in range(load.concurrency):
                nursery.start_soon(worker, numbers)
        reporting.cancel_scope.cancel()
    elapsed_s = time.perf_counter() - begun
    if shared is not None:
        await shared.aclose()
    return summarize(op, load, times_ns, errors, elapsed_s), problems


async def _report(op: str, load: Load, times_ns: list[int]) -> None:
    """Say on stderr how far a long step is, until cancelled."""
    before = 0
    while True:
        await trio.sleep(load.report_s)
        done = len(times_ns)
        rate = (done - before) / load.report_s
        click.echo(f"{op}: {done:,} of {load.count:,} done, {rate:.1f}/s lately", err=True)
        before = done


def mint(target: Target, load: Load, *, bad: bool = False) -> list[dict[RealmId, str]]:
    """Mint every user's tokens before the clock starts."""
    users = [f"{load.user_prefix}{load.user_start + index}" for index in range(load.count)]
    realms = [realm.id for realm in target.configuration.realms]
    tokens = [{realm: target.token(user, realm) for realm in realms} for user in users]
    if bad:
        return [{realm: token[:-6] + "AAAAAA" for realm, token in found.items()} for found in tokens]
    return tokens


async def run_plan(target: Target, load: Load, plan: list[str]) -> list[Result]:
    """Register once to see that all works, then run each step of the plan."""
    trial = Load(1, 1, 1, f"{load.user_prefix}trial", load.user_start)
    _, problems = await measure("register", target, trial, mint(target, trial))
    if problems:
        raise ToolFailure(f"the trial registration failed: {problems[0]}")
    results = []
    good = mint(target, load)
    for op in plan:
        tokens = mint(target, load, bad=True) if op == "auth-error" else good
        result, problems = await measure(op, target, load, tokens)
        for problem in problems:
            click.echo(f"juicebox-hsm: {problem}", err=True)
        results.append(result)
    return results


def print_results(results: list[Result]) -> None:
    """Print one row for each operation."""
    from roles.tools.output import print_table

    columns = ["Op", "Count", "Errors", "Elapsed s", "Op/s", "min ms", "mean", "p50", "p90", "p95", "p99", "max"]
    rows = [
        (
            result.op, result.count, result.errors, f"{result.elapsed_s:.2f}", f"{result.per_second:.1f}",
            *(f"{value:.1f}" for value in (
                result.min_ms, result.mean_ms, result.p50_ms, result.p90_ms, result.p95_ms, result.p99_ms,
                result.max_ms,
            )),
        )
        for result in results
    ]  # fmt: skip
    print_table(columns, rows, right=range(1, len(columns)))


class ConnectionsType(click.ParamType[int]):
    """A number of connections, or `new`, which is 0."""

    name = "N|new"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse, or fail as a usage error."""
        if value == "new":
            return 0
        try:
            number = int(value)
        except ValueError:
            number = -1
        if not 0 <= number <= 4096:
            self.fail(f"{value!r} is neither a number up to 4096 nor `new`", param, ctx)
        return number


def _parse_plan(text: str) -> list[str]:
    plan = [op.strip() for op in text.split(",") if op.strip()]
    for op in plan:
        if op not in OPERATIONS:
            raise ToolFailure(f"--plan: unknown operation {op!r}; use {', '.join(OPERATIONS)}", ExitCode.USAGE)
    if not plan:
        raise ToolFailure("--plan: name at least one operation", ExitCode.USAGE)
    return plan


@click.command()
@click.option("--configuration", help="Client configuration as JSON or @FILE; default from JUICEBOX_CLIENT_JSON.")
@click.option("--secrets-file", type=click.Path(path_type=Path, dir_okay=False), help="Signing key of the tenant.")
@click.option("--tenant", default="test-acme", show_default=True, help="Tenant, with --secrets-file.")
@click.option("--tls-certificate", type=click.Path(path_type=Path, dir_okay=False), help="PEM roots to trust.")
@click.option("--plan", "plan_text", default="register,recover,delete", show_default=True, help="Operations in order.")
@click.option("--count", type=click.IntRange(1, 10_000_000), default=100, show_default=True, help="Users per step.")
@click.option("--concurrency", type=click.IntRange(1, 4096), default=3, show_default=True, help="Operations at once.")
@click.option(
    "--connections",
    "--conn-pool",
    type=ConnectionsType(),
    help="Shared HTTP connections, or `new`: new ones for every operation. Default: as many as --concurrency.",
)
@click.option("--user-prefix", default="mario", show_default=True, help="Users are called this and a number.")
@click.option("--user-start", type=click.IntRange(0), default=0, show_default=True, help="Number of the first user.")
@click.option(
    "--reporting-interval",
    "report_s",
    type=DurationType(),
    default="10m",
    show_default=True,
    help="Time between lines that say how far a long step is.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Also write a result file.")
def command(
    configuration: str | None,
    secrets_file: Path | None,
    tenant: str,
    tls_certificate: Path | None,
    plan_text: str,
    count: int,
    concurrency: int,
    connections: int | None,
    user_prefix: str,
    user_start: int,
    report_s: float,
    json_file: Path | None,
) -> None:
    """Register, recover and delete many users against a running realm and print times. Exit 1 on any error."""
    plan = _parse_plan(plan_text)
    if configuration is not None:
        target = target_from_flags(configuration, secrets_file, tenant, tls_certificate)
    elif ENVIRONMENT in os.environ:
        target = target_from_client_json(Path(os.environ[ENVIRONMENT]))
    else:
        raise ToolFailure(f"set {ENVIRONMENT} (see `juicebox-hsm demo`) or give --configuration", ExitCode.USAGE)
    load = Load(
        count, concurrency, concurrency if connections is None else connections, user_prefix, user_start, report_s
    )
    results = run(lambda: run_plan(target, load, plan))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n", encoding="utf-8")
    print_results(results)
    if any(result.errors for result in results):
        end(ExitCode.FAILED)
