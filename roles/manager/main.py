"""`juicebox-hsm --role manager`: wiring, start order, signals (manager.md, operator-tools.md 10)."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import click
import trio

from juicebox_hsm import __version__
from juicebox_hsm.adapters.faults.store import with_faults
from juicebox_hsm.adapters.faults.switch import FaultSwitch
from juicebox_hsm.adapters.observation import build_info
from juicebox_hsm.adapters.observation.dogstatsd import send_metrics
from juicebox_hsm.adapters.observation.logging import configure, get_logger, report_suppressed
from juicebox_hsm.adapters.observation.metric_names import MANAGER, declare
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.observation.probes import serve_probes
from juicebox_hsm.adapters.observation.store_metrics import with_metrics
from juicebox_hsm.adapters.observation.tracing import Traces, open_traces
from juicebox_hsm.adapters.process.supervision import (
    handle_signals,
    notify,
    run_service,
    watchdog_interval_s,
)
from juicebox_hsm.adapters.rpc import RpcPool, RpcServer, serve_rpc
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.adapters.tls.certificate_end import report_cluster_end
from juicebox_hsm.adapters.tls.cluster_tls import ClusterTls, certificate_end, cluster_reloads
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ports.store import Store
from juicebox_hsm.wire.rpc import MANAGER_METHODS, PeerRole
from roles.durations import DurationType
from roles.manager.appointment import Appointer
from roles.manager.context import ManagerContext
from roles.manager.loops import register, run_loops
from roles.manager.service import ManagerService
from roles.manager.status_page import StatusPage
from roles.options import CommonOptions, load_identity, role_options

SHUTDOWN_S: Final = 10.0
DRAIN_S: Final = 8.0
REPORT_S: Final = 1.0

_log = get_logger("manager")


@click.command("manager")
@role_options("127.0.0.1:8079")
@click.option(
    "--interval",
    "-i",
    "interval_s",
    type=DurationType(),
    default="2s",
    show_default=True,
    help="Pause between looks at leaders and at pending transfers.",
)
@click.option(
    "--rebalance-interval",
    "rebalance_interval_s",
    type=DurationType(),
    default="60s",
    show_default=True,
    help="Pause between rebalancing passes.",
)
def command(common: CommonOptions, interval_s: float, rebalance_interval_s: float) -> None:
    """Run a cluster manager: it appoints leaders, spreads them evenly and moves key ranges."""
    configure(common.log_level)
    traces = open_traces("cluster_manager", __version__)
    run_service(_run, common, interval_s, rebalance_interval_s, traces)


async def _run(common: CommonOptions, interval_s: float, rebalance_interval_s: float, traces: Traces | None) -> None:
    """Open the store and run until a stop signal. Raises `StoreUnavailable` when the store cannot be opened."""
    tls = load_identity(common, PeerRole.MANAGER)
    if common.advertise.is_loopback and not common.allow_loopback:
        _log.warning("advertising a loopback address: only this machine can reach it", address=str(common.advertise))
    metrics = Metrics()
    declare(metrics, MANAGER)
    async with open_store(common.store_url, metrics=metrics) as store:
        await store.realms.create_shared()
        faults = FaultSwitch.from_environment(common.name)
        manager = _Manager(common, with_faults(store, faults), tls, faults, metrics, traces)
        async with trio.open_nursery() as nursery:
            await manager.run(nursery, interval_s, rebalance_interval_s)
            nursery.cancel_scope.cancel()
    if traces is not None:
        await traces.close()
    _log.info("manager stopped")


class _Manager:
    """One running manager: what start-up, probes and shutdown share."""

    def __init__(
        self,
        common: CommonOptions,
        store: Store,
        tls: ClusterTls | None,
        faults: FaultSwitch,
        metrics: Metrics,
        traces: Traces | None,
    ) -> None:
        self.traces = traces
        self.faults = faults
        self.common = common
        self.tls = tls
        self.metrics = metrics
        self.store = with_metrics(store, self.metrics)
        self.registered = trio.Event()
        self.stop = trio.Event()
        self.url = f"{'tcp' if tls is None else 'tls'}://{common.advertise}"

    async def run(self, nursery: trio.Nursery, interval_s: float, rebalance_interval_s: float) -> None:
        """Start everything in order, wait for a stop signal, and leave in order."""
        await nursery.start(handle_signals, self._on_stop, cluster_reloads(self.tls))
        pool = RpcPool(nursery, self.tls, build=__version__, metrics=self.metrics, passes_trace=self.traces is not None)
        context = ManagerContext(
            store=self.store,
            rpc=pool,
            name=self.common.name,
            now_ms=self.faults.now_ms,
            meter=self.metrics,
            log=_log,
            traces=self.traces,
            faults=self.faults,
            certificate_end=partial(certificate_end, self.tls),
        )
        appointer = Appointer(context)
        work = await nursery.start(_work, context, appointer, interval_s, rebalance_interval_s)
        service = ManagerService(context, appointer, nursery)
        server: RpcServer = await nursery.start(
            partial(
                serve_rpc,
                (self.common.listen.host, self.common.listen.port),
                tls=self.tls,
                methods=MANAGER_METHODS,
                handlers=service.handlers(),
                build=__version__,
                metrics=self.metrics,
                traces=self.traces,
            )
        )
        registering = await nursery.start(_register, context, self.url, self.registered)
        await nursery.start(
            partial(
                serve_probes,
                (self.common.http_listen.host, self.common.http_listen.port),
                name=self.common.name,
                livez=self._livez,
                readyz=self._livez,
                metrics=self.metrics,
                app_hook=StatusPage(context, self.url).hook,
            )
        )
        _log.info("manager started", url=self.url, version=__version__, store=self.store.description)
        nursery.start_soon(self._say_ready)
        nursery.start_soon(self._report)
        nursery.start_soon(_feed_watchdog)
        nursery.start_soon(send_metrics, self.metrics, {"service": "cluster_manager", "version": build_info.tag()})
        await self.stop.wait()
        notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={round(SHUTDOWN_S * 1e6)}")
        with trio.move_on_after(SHUTDOWN_S):
            registering.cancel()
            await self._deregister()
            await server.shutdown(DRAIN_S)
        work.cancel()

    def _on_stop(self, signal_name: str) -> None:  # noqa: ARG002 - the log line is written by the caller
        self.stop.set()

    async def _livez(self) -> tuple[bool, str]:
        if self.registered.is_set():
            return True, f"ok\n{build_info.block(absent='(none)')}"
        return False, f"not yet registered with service discovery\nversion: {__version__}"

    async def _say_ready(self) -> None:
        await self.registered.wait()
        notify("READY=1", f"STATUS=manager at {self.url}")

    async def _report(self) -> None:
        """Report the uptime, the cluster certificate and held-back log lines every second."""
        began = trio.current_time()
        while True:
            self.metrics.timing("service.uptime.ns", (trio.current_time() - began) * 1e9)
            report_cluster_end(self.metrics, certificate_end(self.tls))
            report_suppressed()
            await trio.sleep(REPORT_S)

    async def _deregister(self) -> None:
        try:
            await self.store.discovery.deregister(ServiceKind.MANAGER, self.url)
        except RealmError as error:
            _log.warning("not deregistered, the entry will expire", error=str(error))


async def _feed_watchdog() -> None:
    """Tell systemd that the event loop turns."""
    interval_s = watchdog_interval_s()
    while interval_s is not None:
        notify("WATCHDOG=1")
        await trio.sleep(interval_s)


async def _work(
    context: ManagerContext,
    appointer: Appointer,
    interval_s: float,
    rebalance_interval_s: float,
    *,
    task_status: trio.TaskStatus[trio.CancelScope],
) -> None:
    """Run the loops in a scope of their own, which shutdown cancels after the last request was answered."""
    with trio.CancelScope() as scope:
        task_status.started(scope)
        await run_loops(context, appointer, interval_s=interval_s, rebalance_interval_s=rebalance_interval_s)


async def _register(
    context: ManagerContext, url: str, registered: trio.Event, *, task_status: trio.TaskStatus[Any]
) -> None:
    with trio.CancelScope() as scope:
        task_status.started(scope)
        await register(context, url, registered)
