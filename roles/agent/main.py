"""`juicebox-hsm --role agent`: settings, start order, signals, crash policy (agent.md 4, 13; operator-tools.md 10).

An agent that cannot be sure of its own state dies: whatever leaves a task leaves the root nursery, is reported as one
line, and ends the process without the graceful path. The supervisor restarts it; peers keep the groups available.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Final

import click
import trio

from juicebox_hsm import __version__
from juicebox_hsm.adapters.faults.nvram import with_nvram_faults
from juicebox_hsm.adapters.faults.store import with_faults
from juicebox_hsm.adapters.faults.switch import FaultSwitch
from juicebox_hsm.adapters.hsm_directory.hsm_host import InProcessHsm, open_hsm_dir
from juicebox_hsm.adapters.observation import build_info
from juicebox_hsm.adapters.observation.dogstatsd import send_metrics
from juicebox_hsm.adapters.observation.logging import configure, get_logger, report_suppressed
from juicebox_hsm.adapters.observation.metric_names import AGENT, declare
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.observation.probes import serve_probes
from juicebox_hsm.adapters.observation.store_metrics import CacheGauges, with_metrics
from juicebox_hsm.adapters.observation.tracing import Traces, open_traces
from juicebox_hsm.adapters.process.memory_guard import forbid_dumps
from juicebox_hsm.adapters.process.supervision import (
    StartPhase,
    handle_signals,
    notify,
    run_service,
    watchdog_interval_s,
)
from juicebox_hsm.adapters.rpc import RpcPool, RpcServer, serve_rpc
from juicebox_hsm.adapters.stores.node_tuning import CACHE_NODES, LARGE_READ_PERMITS, LARGE_READ_RANGES, NodeTuning
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.adapters.tls.certificate_end import report_cluster_end
from juicebox_hsm.adapters.tls.cluster_tls import ClusterTls, certificate_end, cluster_reloads
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.events import EVENT_KEPT_MS
from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.hsm.platform import Platform
from juicebox_hsm.ports.store import Store
from juicebox_hsm.wire.rpc import AGENT_METHODS, PeerRole
from roles.agent.context import Agent, AgentConfig
from roles.agent.leader import hand_over, lead
from roles.agent.registration import deregister, livez, readyz, register
from roles.agent.service import FATAL, AgentService, hsm_status
from roles.cloud_options import CloudOptions, pubsub_options, with_bus
from roles.durations import DurationRange
from roles.options import CommonOptions, load_identity, role_options

REPORT_S: Final = 1.0
RETENTION_MAX_S: Final = 31 * 86_400.0
"""The longest that Pub/Sub keeps messages."""
RPC_DRAIN_S: Final = 2.0
LEAVE_S: Final = 3.0
"""For what comes after the hand-over: settled indexes, lease, registration, RPC."""


@dataclasses.dataclass(frozen=True, slots=True)
class AgentOptions:
    """What only an agent is told. `default_rate_limit` is in requests per second."""

    common: CommonOptions
    hsm_dir: Path
    nodes: NodeTuning
    default_rate_limit: int
    event_kept_s: int
    pubsub: CloudOptions


@click.command("agent")
@role_options("127.0.0.1:8082")
@click.option(
    "--hsm-dir",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="HSM directory (sealed keys, NVRAM), made by `juicebox-hsm hsm init`.",
)
@click.option(
    "--merkle-cache-size",
    type=click.IntRange(min=1),
    default=CACHE_NODES,
    show_default=True,
    help="Tree nodes kept in memory.",
)
@click.option(
    "--merkle-large-read-permits",
    type=click.IntRange(min=1),
    default=LARGE_READ_PERMITS,
    show_default=True,
    help="Large reads of tree nodes at once, with a bigtable: store; the next waits 3s and is then refused as busy.",
)
@click.option(
    "--merkle-large-read-limit",
    type=click.IntRange(min=1),
    default=LARGE_READ_RANGES,
    show_default=True,
    help="Key ranges from which on a read of tree nodes is large.",
)
@click.option(
    "--default-rate-limit",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Requests per second of a tenant without configuration.",
)
@click.option(
    "--event-retention",
    type=DurationRange(EVENT_KEPT_MS / 1000, RETENTION_MAX_S, "events are kept for at least 7d and at most 31d"),
    default="7d",
    show_default=True,
    help="How long tenants' events stay after they were published, 7d to 31d; the same for all agents of a realm.",
)
@pubsub_options
def command(
    common: CommonOptions,
    hsm_dir: Path,
    merkle_cache_size: int,
    merkle_large_read_permits: int,
    merkle_large_read_limit: int,
    default_rate_limit: int,
    event_retention: float,
    pubsub: CloudOptions,
) -> None:
    """Run an agent: the process in front of one HSM, which runs inside it."""
    configure(common.log_level)
    forbid_dumps()
    nodes = NodeTuning(merkle_cache_size, merkle_large_read_permits, merkle_large_read_limit)
    options = AgentOptions(common, hsm_dir, nodes, default_rate_limit, int(event_retention), pubsub)
    phase = StartPhase()
    traces = open_traces("agent", __version__)
    run_service(run_agent, options, phase, traces, phase=phase)


async def run_agent(options: AgentOptions, phase: StartPhase, traces: Traces | None = None) -> None:
    """Open HSM and store, serve until told to stop, leave in order."""
    common = options.common
    metrics = Metrics()
    declare(metrics, AGENT)
    tls = load_identity(common, PeerRole.AGENT)
    platform = await trio.to_thread.run_sync(open_hsm_dir, options.hsm_dir)
    try:
        faults = FaultSwitch.from_environment(common.name)
        hsm = await trio.to_thread.run_sync(_start_hsm, with_nvram_faults(platform, faults))
        async with (
            open_store(common.store_url, node_tuning=options.nodes, metrics=metrics) as opened,
            with_bus(opened, common.store_url, options.pubsub, metrics, kept_s=options.event_kept_s) as store,
        ):
            await _serve(options, phase, tls, hsm, with_faults(store, faults), faults, metrics, traces)
    finally:
        platform.close()
        if traces is not None:
            await traces.close()


def _start_hsm(platform: Platform) -> Hsm:
    return Hsm(platform)


async def _serve(
    options: AgentOptions,
    phase: StartPhase,
    tls: ClusterTls | None,
    hsm: Hsm,
    store: Store,
    faults: FaultSwitch,
    metrics: Metrics,
    traces: Traces | None,
) -> None:
    common = options.common
    log = get_logger("agent")
    scheme = "tcp" if tls is None else "tls"
    if common.advertise.is_loopback and not common.allow_loopback:
        log.warning("advertising a loopback address: only this machine can reach it", address=str(common.advertise))
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(handle_signals, lambda _signal: stop.set(), cluster_reloads(tls))
        pool = RpcPool(nursery, tls, build=__version__, metrics=metrics)
        config = AgentConfig(
            name=common.name,
            url=f"{scheme}://{common.advertise}",
            build=__version__,
            default_rate=options.default_rate_limit,
            event_kept_ms=options.event_kept_s * 1000,
            now_ms=faults.now_ms,
            certificate_end=partial(certificate_end, tls),
        )
        hsm_transport = InProcessHsm(hsm, metrics)
        agent = Agent(config, hsm_transport, with_metrics(store, metrics), pool, metrics, log, nursery, lead)
        service = AgentService(agent)
        await service.learn()
        server: RpcServer = await nursery.start(_serve_rpc, common, tls, service, metrics, traces)
        if common.advertise.port == 0:
            advertise = dataclasses.replace(common.advertise, port=server.port)
            agent.config = dataclasses.replace(config, url=f"{scheme}://{advertise}")
        http_port: int = await nursery.start(_serve_probes, common, agent, metrics)
        service.start()
        nursery.start_soon(_report, agent, CacheGauges(store, metrics, trio.current_time()))
        nursery.start_soon(send_metrics, metrics, {"service": "agent", "version": build_info.tag()})
        with trio.CancelScope() as registering:
            # A store that is down must not keep us from stopping.
            nursery.start_soon(_cancel_on, stop, registering)
            await nursery.start(register, agent)
        phase.started = True
        log.info("agent started", url=agent.config.url, http_port=http_port, hsm=_hex(agent), store=store.description)
        notify("READY=1", f"STATUS=agent at {agent.config.url}, HSM {_hex(agent)}")
        nursery.start_soon(_feed_watchdog, agent)
        await stop.wait()
        patience_us = round((agent.timings.shutdown_s + LEAVE_S) * 1e6)
        notify("STOPPING=1", "STATUS=handing leadership over", f"EXTEND_TIMEOUT_USEC={patience_us}")
        agent.stopping = True
        with trio.move_on_after(agent.timings.shutdown_s):
            await _leave(agent, service, server)
        nursery.cancel_scope.cancel()
    log.info("agent stopped")


async def _cancel_on(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


def _hex(agent: Agent) -> str:
    return "" if agent.hsm_id is None else agent.hsm_id.hex()


async def _serve_rpc(
    common: CommonOptions,
    tls: ClusterTls | None,
    service: AgentService,
    metrics: Metrics,
    traces: Traces | None,
    *,
    task_status: trio.TaskStatus[RpcServer] = trio.TASK_STATUS_IGNORED,
) -> None:
    await serve_rpc(
        (common.listen.host, common.listen.port),
        tls=tls,
        methods=AGENT_METHODS,
        handlers=service.handlers(),
        build=__version__,
        metrics=metrics,
        fatal=FATAL,
        traces=traces,
        task_status=task_status,
    )


async def _serve_probes(
    common: CommonOptions,
    agent: Agent,
    metrics: Metrics,
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    async def live() -> tuple[bool, str]:
        return await livez(agent)

    async def ready() -> tuple[bool, str]:
        return await readyz(agent)

    await serve_probes(
        (common.http_listen.host, common.http_listen.port),
        name=common.name,
        livez=live,
        readyz=ready,
        metrics=metrics,
        task_status=task_status,
    )


async def _report(agent: Agent, cache: CacheGauges) -> None:
    """Report the uptime, the cluster certificate, the node cache and held-back log lines every second."""
    while True:
        await trio.sleep(REPORT_S)
        agent.metrics.timing("service.uptime.ns", round((trio.current_time() - agent.started_at) * 1e9))
        report_cluster_end(agent.metrics, agent.config.certificate_end())
        cache.sample(trio.current_time())
        report_suppressed()


async def _feed_watchdog(agent: Agent) -> None:
    """Tell systemd we are alive, as long as the HSM answers."""
    interval_s = watchdog_interval_s()
    while interval_s is not None:
        if await hsm_status(agent) is not None:
            notify("WATCHDOG=1")
        await trio.sleep(interval_s)


async def _leave(agent: Agent, service: AgentService, server: RpcServer) -> None:
    """Hand leadership over, settle, give the lease back, deregister, close; RPC is served until the end."""
    with trio.move_on_after(max(0.0, agent.timings.shutdown_s - LEAVE_S)):
        await hand_over(agent)
    try:
        await service.dispatcher.release()
    except RealmError as error:
        agent.log.warning("dispatcher lease not given back", error=str(error))
    await deregister(agent)
    await server.shutdown(RPC_DRAIN_S)
