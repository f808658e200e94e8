"""`juicebox-hsm check`: run real operations against a realm and report (operator-tools.md 3).

For monitoring: each run registers, recovers, compares and deletes as a few test users, and every five minutes looks at
the realms' certificates. The result goes to stdout, to DogStatsD if DD_AGENT_HOST names an agent, and to the exit code.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click
import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from juicebox_hsm import __version__
from juicebox_hsm.adapters.observation import build_info
from juicebox_hsm.adapters.observation.dogstatsd import agent_address, drain, send_once, service_check
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.observation.tracing import Traces, open_traces
from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.client import PinHashingMode
from juicebox_hsm.tenant_keys import is_test_tenant
from roles.cloud_options import SecretsOptions, optional_secrets_options
from roles.durations import DurationType
from roles.tools.check.run import PER_S, Certificates, Checker, Report, Settings
from roles.tools.session import ToolFailure, end, run
from roles.tools.target import ENVIRONMENT, Target, target_from_client_json, target_with_key
from roles.tools.tenant_key import latest_key

SERVICE_CHECK: Final = "healthcheck.register_recover"
USERS_MAX: Final = 100_000


@contextmanager
def roots(files: Sequence[Path]) -> Iterator[Path | None]:
    """Yield one PEM file with all these certificates, DER or PEM; None when there are none."""
    if not files:
        yield None
        return
    found: list[bytes] = []
    for path in files:
        try:
            data = path.read_bytes()
            is_pem = b"-----BEGIN" in data
            loaded = x509.load_pem_x509_certificates(data) if is_pem else [x509.load_der_x509_certificate(data)]
        except OSError as error:
            raise ToolFailure(f"--tls-certificate {path}: {error.strerror}") from None
        except ValueError:
            raise ToolFailure(f"--tls-certificate {path}: neither DER nor PEM", ExitCode.USAGE) from None
        found += [certificate.public_bytes(Encoding.PEM) for certificate in loaded]
    with tempfile.NamedTemporaryFile(suffix=".pem") as bundle:
        bundle.write(b"".join(found))
        bundle.flush()
        yield Path(bundle.name)


def _target(configuration: str | None, secrets: SecretsOptions | None, tenant: str, ca: Path | None) -> Target:
    """Return whom to check, from flags or from the demo's file; PINs are stretched the fast way."""
    if configuration is not None:
        if not is_test_tenant(tenant):
            raise ToolFailure(f"--tenant {tenant}: only tenants test-... are used for checks", ExitCode.USAGE)
        if secrets is None:
            raise ToolFailure(
                "--configuration needs --secrets-file FILE with the tenant's signing key, or --secrets-manager-project",
                ExitCode.USAGE,
            )
        source = secrets
        target = target_with_key(configuration, tenant, ca, lambda: latest_key(source, "", tenant))
    elif ENVIRONMENT in os.environ:
        target = target_from_client_json(Path(os.environ[ENVIRONMENT]))
        target = target if ca is None else replace(target, ca_file=ca)
    else:
        raise ToolFailure(f"give --configuration JSON (or set {ENVIRONMENT})", ExitCode.USAGE)
    if target.configuration.pin_hashing_mode is not PinHashingMode.FAST_INSECURE:
        click.echo("warning: PINs of the test users are stretched with FastInsecure, not as configured", err=True)
        fast = replace(target.configuration, pin_hashing_mode=PinHashingMode.FAST_INSECURE)
        target = replace(target, configuration=fast)
    return target


def report_json(report: Report) -> dict[str, Any]:
    """Return the `--json` document of one run."""
    return {
        "ok": report.ok,
        "error": report.error or None,
        "errors": report.errors,
        "elapsed_ms": round(report.elapsed_s * 1000, 1),
        "steps": {
            step.name: {
                "count": step.count,
                "min_ms": round(step.min_ms, 2),
                "mean_ms": round(step.mean_ms, 2),
                "max_ms": round(step.max_ms, 2),
            }
            for step in report.steps
        },
        "certificates": [
            {"url": found.url, "remaining_days": found.remaining_days, "error": found.error or None}
            for found in report.certificates
        ],
    }


def _print(report: Report, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report_json(report)))
    else:
        said = "ok" if report.ok else f"FAILED: {report.error}"
        steps = ", ".join(f"{step.name} {step.mean_ms:.0f} ms (max {step.max_ms:.0f})" for step in report.steps)
        click.echo(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {said}; {steps or 'no step finished'}")
    sys.stdout.flush()


def _send(report: Report, metrics: Metrics, environment_name: str) -> None:
    """Report to DogStatsD: the service check and what was measured."""
    tags = {"service": "service_checker", "version": build_info.tag(), "env": environment_name}
    packets = [*drain(metrics, tags), service_check(SERVICE_CHECK, tags, ok=report.ok, message=report.error)]
    send_once(packets)


async def _loop(
    checker: Checker, certificates: Certificates, *, interval_s: float | None, show: Any, traces: Traces | None
) -> Report:
    """Run once, or every `interval_s` from start to start until a stop signal; return the last report."""
    last: list[Report] = []

    async def runs(scope: trio.CancelScope) -> None:
        while True:
            begun = trio.current_time()
            last[:] = [await checker.run(certificates)]
            show(last[0])
            if interval_s is None:
                break
            await trio.sleep(max(0.0, begun + interval_s - trio.current_time()))
        scope.cancel()

    async def stop(scope: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for _ in signals:
                scope.cancel()

    async with trio.open_nursery() as nursery:
        await nursery.start(stop, nursery.cancel_scope)
        nursery.start_soon(runs, nursery.cancel_scope)
    if traces is not None:
        await traces.close()
    if not last:
        raise ToolFailure("stopped before the first run was finished")
    return last[0]


@click.command()
@click.option("--configuration", help=f"Client configuration as JSON or @FILE; default from {ENVIRONMENT}.")
@optional_secrets_options
@click.option("--tenant", default="test-juiceboxmonitor", show_default=True, help="Tenant; must start with test-.")
@click.option("--user", default="Mario", show_default=True, help="Users are called this and a number.")
@click.option("--count", type=click.IntRange(1, USERS_MAX), default=5, show_default=True, help="Users per run.")
@click.option("--concurrency", type=click.IntRange(1, 1024), default=1, show_default=True, help="Users at once.")
@click.option(
    "--tls-certificate",
    "certificates",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Root to trust instead of the system's, DER or PEM; repeatable.",
)
@click.option("--env", "environment_name", default="dev", show_default=True, help="Tag of the reports.")
@click.option("--timeout", type=DurationType(), default="10s", show_default=True, help="Longest time of a run.")
@click.option(
    "--http-timeout", type=DurationType(), default="5s", show_default=True, help="Longest time of one request."
)
@click.option(
    "--rate",
    type=click.FloatRange(0.1, 10_000.0),
    default=PER_S,
    show_default=True,
    help="Requests a second to each realm, at most. Agents let in 10 of a tenant without a limit of its own.",
)
@click.option("--forever", is_flag=True, help="Run again and again, until a stop signal.")
@click.option(
    "--interval", type=DurationType(), default="30s", show_default=True, help="With --forever: from start to start."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a run.")
def command(
    configuration: str | None,
    secrets: SecretsOptions | None,
    tenant: str,
    user: str,
    count: int,
    concurrency: int,
    certificates: tuple[Path, ...],
    environment_name: str,
    timeout: float,
    http_timeout: float,
    rate: float,
    interval: float,
    *,
    forever: bool,
    as_json: bool,
) -> None:
    """Register, recover, compare and delete as a few test users; exit 1 when anything failed in the last run.

    Each user gets 2 guesses, and what a failed one may have left is deleted. All users are tried; the first error is
    the result. Certificates of the realms are looked at first and then every 5 minutes: 5 days or less before their end
    the check fails. The tenant's key is read once.
    """
    agent_address(os.environ)  # refused before the first run rather than after it
    metrics = Metrics()
    metrics.enable_samples()
    with roots(certificates) as ca:
        settings = Settings(user, count, concurrency, timeout, http_timeout, rate)
        if settings.shortest_s > timeout:
            takes = f"--count {count} at --rate {rate:g} takes {settings.shortest_s:.1f} s"
            raise ToolFailure(f"{takes}, longer than --timeout {timeout:g}s", ExitCode.USAGE)

        def show(report: Report) -> None:
            _print(report, as_json=as_json)
            _send(report, metrics, environment_name)

        def log(line: str) -> None:
            click.echo(line, err=True)

        traces = open_traces("service_checker", __version__)
        checker = Checker(_target(configuration, secrets, tenant, ca), settings, metrics, log, traces)
        looker = Certificates([realm.address for realm in checker.target.configuration.realms], log, metrics)
        report = run(lambda: _loop(checker, looker, interval_s=interval if forever else None, show=show, traces=traces))
    if not report.ok:
        end(ExitCode.FAILED)
