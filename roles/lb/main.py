"""`juicebox-hsm --role lb`: flags, and one process or several (load-balancer.md 1)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import click

from juicebox_hsm.adapters.edge.limits import EdgeLimits
from juicebox_hsm.adapters.observation.logging import configure, get_logger
from juicebox_hsm.adapters.observation.metric_names import LOAD_BALANCER
from juicebox_hsm.adapters.observation.tracing import ROOT_RATE
from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.adapters.process.file_limit import SERVICE_SHARE, fit_connections, raise_file_limit
from juicebox_hsm.adapters.process.supervision import run_service
from juicebox_hsm.errors import LocalError
from roles.cloud_options import SecretsOptions, secrets_options
from roles.durations import DurationType
from roles.lb.balancer import STOP_SLACK_S, LoadBalancerOptions, run
from roles.lb.workers import WorkerPlace, run_workers, worker_place
from roles.options import CommonOptions, role_options, shutdown_problem, workers_problem
from roles.shell import Kind, start

KIND: Final = Kind("lb", "load_balancer", LOAD_BALANCER, guards_memory=True)

_log = get_logger("lb")


def _durations(function: click.decorators.FC) -> click.decorators.FC:
    """Add the flags that are durations."""
    for flag, default, text in (
        ("--body-timeout", "10s", "Longest time for a request's body to arrive."),
        ("--header-timeout", "10s", "Longest time for a request's head to arrive."),
        ("--tls-handshake-timeout", "10s", "Longest time for a TLS handshake."),
        ("--idle-timeout", "60s", "Silent connections are closed after this."),
        ("--shutdown-notice-period", "30s", "Keep serving this long after a stop signal, with /livez saying so."),
        ("--shutdown-timeout", "60s", "Longest time for the whole shutdown, notice included."),
    ):
        option = click.option(flag, type=DurationType(), default=default, show_default=True, help=text)
        function = option(function)
    return function


_FILE: Final = click.Path(path_type=Path, dir_okay=False)


@click.command("lb")
@role_options("127.0.0.1:8081")
@click.option("--tls-key", required=True, type=_FILE, help="PEM private key of the edge (PKCS#8, PKCS#1 or SEC1).")
@click.option("--tls-cert", required=True, type=_FILE, help="PEM certificate chain of the edge, leaf first.")
@secrets_options
@click.option(
    "--record-id-key-version",
    type=click.IntRange(min=0),
    help="Version of the record id key; needed only while several are enabled.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Open client connections, per worker; at the limit the one idle longest is closed.",
)
@_durations
@click.option("--enable-rttest", is_flag=True, help="Serve POST /rttest, a round-trip probe.")
@click.option(
    "--workers",
    type=click.IntRange(min=1, max=64),
    default=1,
    show_default=True,
    help="Processes that share the port; worker N serves probes on the --http-listen port + N.",
)
@click.option(
    "--trace-rate",
    type=click.FloatRange(0.0, 1.0),
    default=ROOT_RATE,
    show_default=True,
    help="Share of requests traced, 0.0 to 1.0, where OTEL_EXPORTER_OTLP_ENDPOINT names a collector.",
)
def command(
    common: CommonOptions,
    tls_key: Path,
    tls_cert: Path,
    secrets: SecretsOptions,
    record_id_key_version: int | None,
    max_connections: int,
    shutdown_timeout: float,
    shutdown_notice_period: float,
    idle_timeout: float,
    tls_handshake_timeout: float,
    header_timeout: float,
    body_timeout: float,
    enable_rttest: bool,  # noqa: FBT001 - click passes flags by name
    workers: int,
    trace_rate: float,
) -> None:
    """Run a load balancer: the HTTPS edge that authenticates clients and finds their record's leader."""
    configure(common.log_level, in_background=True, service=common.name)
    if problem := shutdown_problem(shutdown_notice_period, shutdown_timeout):
        raise LocalError(problem)
    raise_file_limit()
    limits = EdgeLimits(
        connections_max=fit_connections(max_connections, SERVICE_SHARE),
        handshake_timeout_s=tls_handshake_timeout,
        header_timeout_s=header_timeout,
        body_timeout_s=body_timeout,
        idle_timeout_s=idle_timeout,
    )
    if limits.connections_max < max_connections:
        _log.warning("fewer connections than asked for: open files are limited", connections_max=limits.connections_max)
    options = LoadBalancerOptions(
        common,
        tls_key,
        tls_cert,
        secrets,
        record_id_key_version,
        shutdown_timeout,
        shutdown_notice_period,
        limits,
        enable_rttest,
        workers,
        trace_rate,
    )
    place = worker_place()
    if place is not None and place.is_orphan():
        _log.error("the parent of the workers is gone, not starting: the next one needs our ports")
        sys.exit(ExitCode.OK)
    if workers > 1 and place is None:
        if problem := workers_problem(workers, common.listen, common.http_listen):
            raise LocalError(problem)
        sys.exit(run_service(run_workers, workers, shutdown_timeout + STOP_SLACK_S))
    start(KIND, common.name, run, options, place or WorkerPlace(0))
