"""`juicebox-hsm --role lb`: flags, start order, signals, shutdown (load-balancer.md 1, 2.1, 4)."""

from __future__ import annotations

import dataclasses
import datetime as dt
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import click
import trio

from juicebox_hsm import __version__
from juicebox_hsm.adapters.edge.drain import DrainController
from juicebox_hsm.adapters.edge.limits import EdgeLimits, fit_connections
from juicebox_hsm.adapters.edge.server import Edge, open_edge_listener
from juicebox_hsm.adapters.edge.tls import EdgeTls
from juicebox_hsm.adapters.faults.store import with_faults
from juicebox_hsm.adapters.faults.switch import FaultSwitch
from juicebox_hsm.adapters.observation import build_info
from juicebox_hsm.adapters.observation.dogstatsd import send_metrics
from juicebox_hsm.adapters.observation.logging import configure, get_logger, report_suppressed
from juicebox_hsm.adapters.observation.metric_names import LOAD_BALANCER, declare
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.observation.probes import serve_probes
from juicebox_hsm.adapters.observation.store_metrics import with_metrics
from juicebox_hsm.adapters.observation.tracing import ROOT_RATE, Traces, open_traces
from juicebox_hsm.adapters.process.supervision import (
    handle_signals,
    notify,
    run_service,
    watchdog_interval_s,
)
from juicebox_hsm.adapters.rpc import RpcPool
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.adapters.tenants.secrets_file import HeldSecrets
from juicebox_hsm.adapters.tls.certificate_end import report_cluster_end
from juicebox_hsm.adapters.tls.cluster_tls import ClusterTls, certificate_end, cluster_reloads
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.errors import LocalError, RealmError
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ports.store import Store
from juicebox_hsm.tenant_keys import RECORD_ID_KEY_NAME, record_id_key, record_id_key_fingerprint
from juicebox_hsm.tokens import RejectionReason
from juicebox_hsm.wire.rpc import PeerRole
from roles.cloud_options import SecretsOptions, open_secrets, secrets_options
from roles.durations import DurationType, format_seconds
from roles.lb.forward import Forwarder
from roles.lb.guard import RealmGuard
from roles.lb.poller import Poller
from roles.lb.readiness import Readiness
from roles.lb.routes import SHUTTING_DOWN, Routes, livez_text
from roles.lb.service import ClientService
from roles.lb.workers import WorkerPlace, run_workers, worker_place
from roles.options import Address, CommonOptions, load_identity, role_options

FIRST_TABLE_S: Final = 5.0
"""Longest wait at start for the first routing table (load-balancer.md 1)."""

REGISTER_S: Final = 600.0
REGISTER_RETRY_S: Final = 1.0
DEREGISTER_S: Final = 1.0
REPORT_S: Final = 1.0
STOP_SLACK_S: Final = 5.0
"""Added to the shutdown time-out when systemd is asked for patience."""

_log = get_logger("lb")


@dataclasses.dataclass(frozen=True, slots=True)
class LoadBalancerOptions:
    """What only a load balancer is told. Times in seconds."""

    common: CommonOptions
    tls_key: Path
    tls_cert: Path
    secrets: SecretsOptions
    record_id_key_version: int | None
    shutdown_timeout_s: float
    shutdown_notice_s: float
    limits: EdgeLimits
    enable_rttest: bool
    workers: int
    trace_rate: float


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


def shutdown_problem(notice_s: float, timeout_s: float) -> str:
    """Return why these two do not go together, "" when they do: the notice is part of the shutdown."""
    if notice_s <= timeout_s:
        return ""
    return (
        f"--shutdown-notice-period {format_seconds(notice_s)} is above --shutdown-timeout {format_seconds(timeout_s)}, "
        "which includes it"
    )


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
    configure(common.log_level)
    if problem := shutdown_problem(shutdown_notice_period, shutdown_timeout):
        raise LocalError(problem)
    limits = EdgeLimits(
        connections_max=fit_connections(max_connections),
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
    if workers > 1 and place is None:
        if common.listen.port == 0 or common.http_listen.port == 0:
            raise LocalError("--workers needs fixed ports in --listen and --http-listen")
        sys.exit(run_service(run_workers, workers, shutdown_timeout + STOP_SLACK_S))
    traces = open_traces("load_balancer", __version__)
    run_service(run, options, place or WorkerPlace(0), traces)


async def run(options: LoadBalancerOptions, place: WorkerPlace, traces: Traces | None = None) -> None:
    """Start in the order of load-balancer.md 1, serve, drain. Raises `LocalError` and `StoreUnavailable` at start."""
    common = options.common
    metrics = Metrics()
    declare(metrics, LOAD_BALANCER)
    for reason in RejectionReason:
        metrics.counter("load_balancer.auth.failures", reason=reason.value)
    edge_tls = EdgeTls(options.tls_key, options.tls_cert)
    cluster_tls = load_identity(common, PeerRole.LOAD_BALANCER)
    if common.advertise.is_loopback and not common.allow_loopback:
        _log.warning("advertising a loopback address: only this machine can reach it", address=str(common.advertise))
    async with (
        open_store(common.store_url, metrics=metrics) as store,
        open_secrets(options.secrets, common.store_url, metrics=metrics, log=_log) as secrets,
    ):
        await store.realms.create_shared()
        record_key = record_id_key(secrets.versions(RECORD_ID_KEY_NAME), options.record_id_key_version)
        listener = open_edge_listener(common.listen.host, common.listen.port, share_port=options.workers > 1)
        balancer = LoadBalancer(options, place, store, edge_tls, cluster_tls, secrets, record_key, metrics, traces)
        async with trio.open_nursery() as nursery:
            await balancer.run(nursery, listener)
            nursery.cancel_scope.cancel()
    if traces is not None:
        await traces.close()
    _log.info("load balancer stopped")


class LoadBalancer:
    """One running balancer: what start-up, probes, signals and shutdown share."""

    def __init__(
        self,
        options: LoadBalancerOptions,
        place: WorkerPlace,
        store: Store,
        edge_tls: EdgeTls,
        cluster_tls: ClusterTls | None,
        secrets: HeldSecrets,
        record_key: Secret,
        metrics: Metrics,
        traces: Traces | None,
    ) -> None:
        self._options = options
        self._traces = traces
        self._place = place
        self._faults = FaultSwitch.from_environment(options.common.name)
        self._store = with_metrics(with_faults(store, self._faults), metrics)
        self._edge_tls = edge_tls
        self._cluster_tls = cluster_tls
        self._secrets = secrets
        self._record_key = record_key
        self._metrics = metrics
        self._drain = DrainController()
        self._stop = trio.Event()
        self._hurry = trio.Event()

    async def run(self, nursery: trio.Nursery, listener: trio.SocketListener) -> None:
        """Serve on `listener` until a stop signal and the drain after it."""
        options, common = self._options, self._options.common
        reloads = {"edge certificate": self._reload_edge, **cluster_reloads(self._cluster_tls)}
        await nursery.start(handle_signals, self._on_stop, reloads)
        rpc = RpcPool(
            nursery,
            self._cluster_tls,
            build=__version__,
            metrics=self._metrics,
            passes_trace=self._traces is not None,
        )
        poller = Poller(
            rpc,
            self._store.discovery,
            now_ms=self._faults.now_ms,
            rng=random.Random(),  # noqa: S311 - jitter of polls
            metrics=self._metrics,
            log=_log,
            traces=self._traces,
        )
        guard = RealmGuard(record_id_key_fingerprint(self._record_key), self._store.settings, poller, _log)
        service = ClientService(
            keys=self._secrets.token_key,
            record_key=self._record_key,
            forwarder=Forwarder(rpc, poller, self._metrics),
            guard=guard,
            now_s=self._faults.now_s,
            metrics=self._metrics,
            log=_log,
            traces=self._traces,
            trace_rate=options.trace_rate,
        )
        readiness = Readiness(
            drain=self._drain,
            poller=poller,
            guard=guard,
            secrets_age_s=self._secrets.age_s,
            cluster_end=partial(certificate_end, self._cluster_tls),
            refresh_s=self._secrets.refresh_s,
        )
        routes = Routes(
            service.answer,
            drain=self._drain,
            name=common.name,
            readiness=readiness.reasons,
            warnings=readiness.warnings,
            enable_rttest=options.enable_rttest,
        )
        edge = Edge(
            routes.answer,
            self._edge_tls,
            limits=options.limits,
            drain=self._drain,
            metrics=self._metrics,
            log=_log,
        )
        await nursery.start(poller.run, FIRST_TABLE_S)
        with trio.move_on_after(FIRST_TABLE_S):
            await guard.look()
        nursery.start_soon(guard.run)
        nursery.start_soon(self._secrets.refresh_forever)
        http_port: int = await nursery.start(partial(self._probes, readiness))
        served = trio.Event()
        nursery.start_soon(self._serve, edge, listener, served)
        address = _with_port(common.advertise, listener)
        async with self._registered(f"https://{address}", nursery):
            nursery.start_soon(self._report)
            nursery.start_soon(self._feed_watchdog)
            nursery.start_soon(send_metrics, self._metrics, self._tags())
            _log.info(
                "Load balancer started",
                url=f"https://{address}",
                listen=str(_with_port(common.listen, listener)),
                http_port=http_port,
                version=__version__,
                store=self._store.description,
                certificate=self._edge_tls.leaf.subject,
            )
            notify("READY=1", f"STATUS=load balancer at https://{address}")
            await self._stop.wait()
            await self._shut_down(served)

    async def _serve(self, edge: Edge, listener: trio.SocketListener, served: trio.Event) -> None:
        await edge.serve([listener])
        served.set()

    async def _shut_down(self, served: trio.Event) -> None:
        """Notice, then drain, all within the shutdown time-out; a second signal ends it at once."""
        options = self._options
        patience_us = round((options.shutdown_timeout_s + STOP_SLACK_S) * 1e6)
        notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={patience_us}")
        self._drain.begin_notice()
        _log.info("shutting down", notice_s=options.shutdown_notice_s, timeout_s=options.shutdown_timeout_s)
        with trio.move_on_after(options.shutdown_timeout_s) as deadline:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._cancel_on_hurry, nursery.cancel_scope)
                await trio.sleep(options.shutdown_notice_s)
                self._drain.begin_drain()
                await served.wait()
                nursery.cancel_scope.cancel()
        if not served.is_set():
            reason = "time-out" if deadline.cancelled_caught else "second signal"
            _log.warning("ending with open connections", connections=self._drain.connections, reason=reason)
        self._drain.mark_stopped()

    async def _cancel_on_hurry(self, scope: trio.CancelScope) -> None:
        await self._hurry.wait()
        scope.cancel()

    def _on_stop(self, signal_name: str) -> None:  # noqa: ARG002 - the log line is written by the caller
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _reload_edge(self) -> None:
        leaf = await trio.to_thread.run_sync(self._edge_tls.reload)
        not_after = leaf.not_after.isoformat()
        _log.info("edge certificate reloaded", subject=leaf.subject, serial=leaf.serial, not_after=not_after)

    async def _probes(
        self, readiness: Readiness, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
    ) -> None:
        async def livez() -> tuple[bool, str]:
            return True, SHUTTING_DOWN if self._drain.notice.is_set() else livez_text(self._options.common.name)

        async def readyz() -> tuple[bool, str]:
            reasons = readiness.reasons()
            return not reasons, "\n".join([*(reasons or ["ready"]), *readiness.warnings()])

        bind = self._options.common.http_listen
        port = bind.port + self._place.number if bind.port else 0
        await serve_probes(
            (bind.host, port),
            name=self._options.common.name,
            livez=livez,
            readyz=readyz,
            metrics=self._metrics,
            task_status=task_status,
        )

    @asynccontextmanager
    async def _registered(self, url: str, nursery: trio.Nursery) -> AsyncIterator[None]:
        """Keep us in discovery while the block runs; trouble with it is only logged. One worker does it for all."""
        if self._place.number > 0:
            yield
            return
        registering = trio.CancelScope()
        nursery.start_soon(self._register, url, registering)
        yield
        registering.cancel()
        with trio.move_on_after(DEREGISTER_S):
            try:
                await self._store.discovery.deregister(ServiceKind.LOAD_BALANCER, url)
            except RealmError as error:
                _log.warning("not deregistered, the entry will expire", error=str(error))

    async def _register(self, url: str, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                pause_s = REGISTER_S
                try:
                    await self._store.discovery.register(ServiceKind.LOAD_BALANCER, url, self._faults.now_ms())
                except RealmError as error:
                    _log.warning("cannot register in discovery", error=str(error))
                    pause_s = REGISTER_RETRY_S
                await trio.sleep(pause_s)

    async def _report(self) -> None:
        """Every second: uptime, age of secrets, days left of certificates, held-back log lines; a worker's parent."""
        began = trio.current_time()
        while True:
            self._metrics.timing("service.uptime.ns", (trio.current_time() - began) * 1e9)
            self._metrics.gauge("secrets.age_seconds", self._secrets.age_s())
            days = self._edge_tls.leaf.remaining_days(dt.datetime.now(dt.UTC))
            self._metrics.gauge("load_balancer.tls_cert.remaining_days", days)
            report_cluster_end(self._metrics, certificate_end(self._cluster_tls))
            report_suppressed()
            if self._place.is_orphan() and not self._hurry.is_set():
                _log.error("the parent of the workers is gone, ending at once: the next one needs our ports")
                self._stop.set()
                self._hurry.set()
            await trio.sleep(REPORT_S)

    def _tags(self) -> dict[str, str]:
        """Return the tags of all metrics; workers tell themselves apart, or each would overwrite the others' gauges."""
        tags = {"service": "load_balancer", "version": build_info.tag()}
        return tags if self._options.workers == 1 else {**tags, "worker": f"{self._place.number}"}

    async def _feed_watchdog(self) -> None:
        interval_s = watchdog_interval_s()
        while interval_s is not None:
            notify("WATCHDOG=1")
            await trio.sleep(interval_s)


def _with_port(address: Address, listener: trio.SocketListener) -> Address:
    """Return the address with the port that was picked, if port 0 was asked for."""
    return address if address.port else dataclasses.replace(address, port=listener.socket.getsockname()[1])
