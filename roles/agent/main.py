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
from juicebox_hsm.adapters.hsm_directory.hsm_host import InProcessHsm, open_hsm_dir
from juicebox_hsm.adapters.observation.logging import configure
from juicebox_hsm.adapters.observation.metric_names import AGENT
from juicebox_hsm.adapters.observation.store_metrics import CacheGauges, with_metrics
from juicebox_hsm.adapters.process.threads import in_thread_or_here
from juicebox_hsm.adapters.rpc import RpcPool, RpcServer, serve_rpc
from juicebox_hsm.adapters.stores.node_tuning import CACHE_NODES, LARGE_READ_PERMITS, LARGE_READ_RANGES, NodeTuning
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.events import EVENT_KEPT_MS
from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.ports.store import Store
from juicebox_hsm.wire.methods import AGENT_METHODS
from juicebox_hsm.wire.rpc import PeerRole
from roles.agent import stalls
from roles.agent.another_store import watch_log_tails
from roles.agent.context import Agent
from roles.agent.leader import hand_over, lead
from roles.agent.outside import AgentConfig
from roles.agent.registration import livez, readyz, register, withdraw
from roles.agent.service import FATAL, AgentService, hsm_status
from roles.audit import Recorder, recorded_orders
from roles.cloud_options import CloudOptions, pubsub_options, with_bus
from roles.durations import DurationRange
from roles.options import CommonOptions, role_options
from roles.shell import Kind, Shell, ready, start, stopping

KIND: Final = Kind("agent", "agent", AGENT, guards_memory=True)
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
    configure(common.log_level, in_background=True, service=common.name)
    nodes = NodeTuning(merkle_cache_size, merkle_large_read_permits, merkle_large_read_limit)
    options = AgentOptions(common, hsm_dir, nodes, default_rate_limit, int(event_retention), pubsub)
    start(KIND, common.name, run_agent, options)


async def run_agent(shell: Shell, options: AgentOptions) -> None:
    """Open HSM and store, serve until told to stop, leave in order."""
    url, metrics = options.common.store_url, shell.metrics
    shell.identify(options.common, PeerRole.AGENT)
    platform = await in_thread_or_here(open_hsm_dir, options.hsm_dir)
    try:
        hsm = await in_thread_or_here(Hsm, with_nvram_faults(platform, shell.faults))
        async with (
            open_store(url, node_tuning=options.nodes, metrics=metrics) as opened,
            with_bus(opened, url, options.pubsub, metrics, kept_s=options.event_kept_s) as store,
            trio.open_nursery() as nursery,
        ):
            shell.look_at(store)
            await _serve(shell, nursery, options, hsm, with_faults(store, shell.faults))
            nursery.cancel_scope.cancel()
        shell.log.info("agent stopped")
    finally:
        platform.close()


async def _serve(shell: Shell, nursery: trio.Nursery, options: AgentOptions, hsm: Hsm, store: Store) -> None:
    """Start everything in order, wait for a stop signal, and leave in order."""
    common = options.common
    await shell.catch_signals(nursery)
    agent = _make_agent(shell, nursery, options, hsm, store)
    service = AgentService(agent)
    await service.learn()
    server: RpcServer = await nursery.start(
        partial(
            serve_rpc,
            (common.listen.host, common.listen.port),
            tls=shell.tls,
            methods=AGENT_METHODS,
            handlers=recorded_orders(
                service.handlers(), Recorder(store.audit, agent.config.name, agent.config.now_ms, shell.log)
            ),
            build=__version__,
            metrics=shell.metrics,
            fatal=FATAL,
            traces=shell.traces,
        )
    )
    if common.advertise.port == 0:
        advertise = dataclasses.replace(common.advertise, port=server.port)
        agent.config = dataclasses.replace(agent.config, url=f"{shell.scheme}://{advertise}")
    http_port = await shell.serve_probes(
        nursery, common.http_listen, livez=partial(livez, agent), readyz=partial(readyz, agent)
    )
    service.start()
    nursery.start_soon(watch_log_tails, agent)
    cache = CacheGauges(store, shell.metrics, trio.current_time())

    def sample() -> None:
        cache.sample(trio.current_time())
        shell.metrics.gauge("agent.hsm.copies", len(agent.peers.copies))
        stalls.sample(agent.groups, shell.metrics, trio.current_time())

    shell.report(
        nursery,
        sample,
        is_alive=partial(_hsm_answers, agent),
    )
    with trio.CancelScope() as registering:
        # A store that is down must not keep us from stopping.
        nursery.start_soon(_cancel_on, shell.stop, registering)
        await nursery.start(register, agent)
    url, hsm_id = agent.config.url, "" if agent.hsm_id is None else agent.hsm_id.hex()
    shell.started("agent started", url=url, http_port=http_port, hsm=hsm_id, store=store.description)
    ready(f"agent at {url}, HSM {hsm_id}")
    await shell.stop.wait()
    stopping(agent.timings.shutdown_s + LEAVE_S, "handing leadership over")
    agent.stopping = True
    with trio.move_on_after(agent.timings.shutdown_s):
        await _leave(agent, service, server)


def _make_agent(shell: Shell, nursery: trio.Nursery, options: AgentOptions, hsm: Hsm, store: Store) -> Agent:
    config = AgentConfig(
        name=shell.name,
        url=f"{shell.scheme}://{options.common.advertise}",
        build=__version__,
        default_rate=options.default_rate_limit,
        event_kept_ms=options.event_kept_s * 1000,
        now_ms=shell.faults.now_ms,
        certificate_end=shell.certificate_end,
    )
    metrics = shell.metrics
    pool = RpcPool(nursery, shell.tls, build=__version__, metrics=metrics)
    measured = with_metrics(store, metrics, shell.store_answers)
    return Agent(config, InProcessHsm(hsm, metrics), measured, pool, metrics, shell.log, nursery, lead, shell.traces)


async def _cancel_on(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def _hsm_answers(agent: Agent) -> bool:
    return await hsm_status(agent) is not None


async def _leave(agent: Agent, service: AgentService, server: RpcServer) -> None:
    """Hand leadership over, settle, give the lease back, deregister, close; RPC is served until the end."""
    with trio.move_on_after(max(0.0, agent.timings.shutdown_s - LEAVE_S)):
        await hand_over(agent)
    try:
        await service.dispatcher.release()
    except RealmError as error:
        agent.log.warning("dispatcher lease not given back", error=str(error))
    await withdraw(agent)
    await server.shutdown(RPC_DRAIN_S)
