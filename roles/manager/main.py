"""`juicebox-hsm --role manager`: wiring, start order, stop order (manager.md, operator-tools.md 10)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import click
import trio

from juicebox_hsm import __version__
from juicebox_hsm.adapters.faults.store import with_faults
from juicebox_hsm.adapters.observation import build_info
from juicebox_hsm.adapters.observation.logging import configure
from juicebox_hsm.adapters.observation.metric_names import MANAGER
from juicebox_hsm.adapters.observation.store_metrics import with_metrics
from juicebox_hsm.adapters.rpc import RpcPool, RpcServer, serve_rpc
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.adapters.tls.certificate_end import to_unix_ms
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.readiness import Plain, Readiness, Reason, Trouble, of_certificate
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ports.errors import store_code
from juicebox_hsm.wire.methods import MANAGER_METHODS
from juicebox_hsm.wire.rpc import PeerRole
from roles.audit import recorded_orders
from roles.durations import DurationType
from roles.manager.appointment import Appointer
from roles.manager.context import ManagerContext
from roles.manager.health import tell_health
from roles.manager.loops import run_loops
from roles.manager.service import ManagerService
from roles.manager.status_page import StatusPage
from roles.options import CommonOptions, role_options
from roles.shell import Entry, Kind, Shell, ready, start, stopping

KIND: Final = Kind("manager", "cluster_manager", MANAGER)
SHUTDOWN_S: Final = 10.0
DRAIN_S: Final = 8.0
REGISTER_RETRY_S: Final = 10.0


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
    configure(common.log_level, in_background=True, service=common.name)
    start(KIND, common.name, _run, common, interval_s, rebalance_interval_s)


async def _run(shell: Shell, common: CommonOptions, interval_s: float, rebalance_interval_s: float) -> None:
    """Open the store and run until a stop signal. Raises `StoreUnavailable` when the store cannot be opened."""
    shell.identify(common, PeerRole.MANAGER)
    async with open_store(common.store_url, metrics=shell.metrics) as opened:
        shell.look_at(opened)
        await opened.realms.create_shared()
        store = with_metrics(with_faults(opened, shell.faults), shell.metrics, shell.store_answers)
        async with trio.open_nursery() as nursery:
            await shell.catch_signals(nursery)
            traced = shell.traces is not None
            context = ManagerContext(
                store=store,
                rpc=RpcPool(nursery, shell.tls, build=__version__, metrics=shell.metrics, passes_trace=traced),
                name=common.name,
                now_ms=shell.faults.now_ms,
                meter=shell.metrics,
                log=shell.log,
                traces=shell.traces,
                faults=shell.faults,
                certificate_end=shell.certificate_end,
            )
            await _serve(shell, nursery, common, context, interval_s, rebalance_interval_s)
            nursery.cancel_scope.cancel()
    shell.log.info("manager stopped")


async def _serve(
    shell: Shell,
    nursery: trio.Nursery,
    common: CommonOptions,
    context: ManagerContext,
    interval_s: float,
    rebalance_interval_s: float,
) -> None:
    """Start everything in order, wait for a stop signal, and leave in order."""
    appointer = Appointer(context)
    loops = partial(run_loops, context, appointer, interval_s=interval_s, rebalance_interval_s=rebalance_interval_s)
    work: trio.CancelScope = await nursery.start(_in_scope, loops)  # ends after the last request was answered
    server: RpcServer = await nursery.start(
        partial(
            serve_rpc,
            (common.listen.host, common.listen.port),
            tls=shell.tls,
            methods=MANAGER_METHODS,
            handlers=recorded_orders(ManagerService(context, appointer, nursery).handlers(), context.recorder),
            build=__version__,
            metrics=shell.metrics,
            traces=shell.traces,
        )
    )
    url = f"{shell.scheme}://{common.advertise}"
    entry = shell.entry(context.store.discovery, ServiceKind.MANAGER, url)
    registered = trio.Event()
    registering: trio.CancelScope = await nursery.start(
        _in_scope, partial(entry.keep, REGISTER_RETRY_S, succeeded=registered.set)
    )

    async def livez() -> tuple[bool, str]:
        if registered.is_set():
            return True, f"ok\n{build_info.block(absent='(none)')}"
        return False, f"not yet registered with service discovery\nversion: {__version__}"

    async def readyz() -> Readiness:
        reasons: list[Reason] = []
        if shell.stop.is_set():
            reasons.append(Plain(Code.STOPPING))
        if not registered.is_set():
            reasons.append(Plain(Code.NOT_REGISTERED))
        try:
            await context.store.discovery.list(ServiceKind.MANAGER)
        except RealmError as error:
            reasons.append(Trouble(store_code(error), str(error)))
        warnings = of_certificate(to_unix_ms(shell.certificate_end()), context.now_ms())
        return Readiness(tuple(reasons), warnings)

    page = StatusPage(context, url)
    await shell.serve_probes(nursery, common.http_listen, livez=livez, readyz=readyz, app_hook=page.hook)
    shell.started("manager started", url=url, version=__version__, store=context.store.description)
    nursery.start_soon(_say_ready, registered, url)
    nursery.start_soon(tell_health, shell.metrics, page.evidence)
    shell.report(nursery)
    await shell.stop.wait()
    stopping(SHUTDOWN_S)
    await _leave(registering, entry, server)
    work.cancel()


async def _leave(registering: trio.CancelScope, entry: Entry, server: RpcServer) -> None:
    with trio.move_on_after(SHUTDOWN_S):
        registering.cancel()
        await entry.withdraw()
        await server.shutdown(DRAIN_S)


async def _say_ready(registered: trio.Event, url: str) -> None:
    await registered.wait()
    ready(f"manager at {url}")


async def _in_scope(work: Callable[[], Awaitable[None]], *, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
    """Run `work` in a scope of its own, which is reported."""
    with trio.CancelScope() as scope:
        task_status.started(scope)
        await work()
