"""One balancer: start order, probes, registration, shutdown (load-balancer.md 1, 2.1, 4)."""

from __future__ import annotations

import dataclasses
import datetime as dt
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from juicebox_hsm import __version__
from juicebox_hsm.adapters.edge.drain import DrainController
from juicebox_hsm.adapters.edge.limits import EdgeLimits
from juicebox_hsm.adapters.edge.server import Edge, open_edge_listener
from juicebox_hsm.adapters.edge.tls import EdgeTls
from juicebox_hsm.adapters.faults.store import with_faults
from juicebox_hsm.adapters.observation.store_metrics import with_metrics
from juicebox_hsm.adapters.process.threads import in_thread_or_here
from juicebox_hsm.adapters.rpc import RpcPool
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.adapters.tenants.secrets_file import HeldSecrets
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.host.addresses import Address
from juicebox_hsm.host.readiness import Readiness
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ports.store import Store
from juicebox_hsm.tenant_keys import RECORD_ID_KEY_NAME, record_id_key, record_id_key_fingerprint
from juicebox_hsm.tokens import RejectionReason
from juicebox_hsm.wire.rpc import PeerRole
from roles.clock import OwnClock
from roles.cloud_options import SecretsOptions, open_secrets
from roles.lb.forward import Forwarder
from roles.lb.guard import RealmGuard
from roles.lb.poller import Poller
from roles.lb.readiness import BalancerReadiness
from roles.lb.routes import SHUTTING_DOWN, Routes, livez_text
from roles.lb.service import ClientService
from roles.lb.workers import WorkerPlace
from roles.options import CommonOptions
from roles.shell import Entry, Shell, ready, stopping

FIRST_TABLE_S: Final = 5.0
"""Longest wait at start for the first routing table (load-balancer.md 1)."""

REGISTER_RETRY_S: Final = 1.0
DEREGISTER_S: Final = 1.0
STOP_SLACK_S: Final = 5.0
"""Added to the shutdown time-out when systemd is asked for patience."""


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


async def run(shell: Shell, options: LoadBalancerOptions, place: WorkerPlace) -> None:
    """Start in the order of load-balancer.md 1, serve, drain. Raises `LocalError` and `StoreUnavailable` at start."""
    common, metrics = options.common, shell.metrics
    for reason in RejectionReason:
        metrics.counter("load_balancer.auth.failures", reason=reason.value)
    edge_tls = EdgeTls(options.tls_key, options.tls_cert)
    shell.warn_of_shared(options.tls_key)
    shell.identify(common, PeerRole.LOAD_BALANCER)
    async with (
        open_store(common.store_url, metrics=metrics) as opened,
        open_secrets(options.secrets, common.store_url, metrics=metrics, log=shell.log) as secrets,
    ):
        shell.look_at(opened)
        await opened.realms.create_shared()
        store = with_metrics(with_faults(opened, shell.faults), metrics, shell.store_answers)
        record_key = record_id_key(secrets.versions(RECORD_ID_KEY_NAME), options.record_id_key_version)
        listener = open_edge_listener(common.listen.host, common.listen.port, share_port=options.workers > 1)
        async with trio.open_nursery() as nursery:
            balancer = LoadBalancer(shell, nursery, options, place, store, edge_tls, secrets, record_key)
            await balancer.run(listener)
            nursery.cancel_scope.cancel()
    shell.log.info("load balancer stopped")


class LoadBalancer:
    """One running balancer: what start-up, probes, signals and shutdown share."""

    def __init__(
        self,
        shell: Shell,
        nursery: trio.Nursery,
        options: LoadBalancerOptions,
        place: WorkerPlace,
        store: Store,
        edge_tls: EdgeTls,
        secrets: HeldSecrets,
        record_key: Secret,
    ) -> None:
        self._shell = shell
        self._nursery = nursery
        self._options = options
        self._place = place
        self._store = store
        self._edge_tls = edge_tls
        self._secrets = secrets
        self._drain = DrainController()
        self._rpc = RpcPool(
            nursery, shell.tls, build=__version__, metrics=shell.metrics, passes_trace=shell.traces is not None
        )
        self._clock = OwnClock(shell.faults.now_ms, shell.metrics, shell.log)
        self._poller = Poller(
            self._rpc,
            store.discovery,
            rng=random.Random(),  # noqa: S311 - jitter of polls
            metrics=shell.metrics,
            log=shell.log,
            traces=shell.traces,
            clock=self._clock,
        )
        self._record_key = record_key
        self._guard = RealmGuard(record_id_key_fingerprint(record_key), store.settings, self._poller, shell.log)
        self._readiness = BalancerReadiness(
            drain=self._drain,
            poller=self._poller,
            guard=self._guard,
            secrets_age_s=secrets.age_s,
            cluster_end=shell.certificate_end,
            edge_valid_ms=lambda: self._edge_tls.leaf.valid_ms,
            clock=self._clock,
            refresh_s=secrets.refresh_s,
        )

    async def run(self, listener: trio.SocketListener) -> None:
        """Serve on `listener` until a stop signal and the drain after it."""
        shell, nursery, common = self._shell, self._nursery, self._options.common
        await shell.catch_signals(nursery, {"edge certificate": self._reload_edge})
        await nursery.start(self._poller.run, FIRST_TABLE_S)
        with trio.move_on_after(FIRST_TABLE_S):
            await self._guard.look()
        nursery.start_soon(self._guard.run)
        nursery.start_soon(self._secrets.refresh_forever)
        bind = common.http_listen
        if bind.port:
            bind = dataclasses.replace(bind, port=bind.port + self._place.number)
        http_port = await shell.serve_probes(nursery, bind, livez=self._livez, readyz=self._readyz)
        served = trio.Event()
        nursery.start_soon(self._serve, listener, served)
        url = f"https://{_with_port(common.advertise, listener)}"
        async with self._registered(shell.entry(self._store.discovery, ServiceKind.LOAD_BALANCER, url)):
            # workers tell themselves apart, or each would overwrite the others' gauges
            tags = {} if self._options.workers == 1 else {"worker": f"{self._place.number}"}
            shell.report(nursery, self._sample, tags=tags)
            shell.started(
                "Load balancer started",
                url=url,
                listen=str(_with_port(common.listen, listener)),
                http_port=http_port,
                version=__version__,
                store=self._store.description,
                certificate=self._edge_tls.leaf.subject,
            )
            ready(f"load balancer at {url}")
            await shell.stop.wait()
            await self._shut_down(served)

    def _routes(self) -> Routes:
        shell = self._shell
        service = ClientService(
            keys=self._secrets.token_key,
            record_key=self._record_key,
            forwarder=Forwarder(self._rpc, self._poller, shell.metrics),
            guard=self._guard,
            now_s=shell.faults.now_s,
            metrics=shell.metrics,
            log=shell.log,
            traces=shell.traces,
            trace_rate=self._options.trace_rate,
        )
        return Routes(
            service.answer,
            drain=self._drain,
            name=shell.name,
            readiness=self._readiness.judge,
            enable_rttest=self._options.enable_rttest,
        )

    async def _serve(self, listener: trio.SocketListener, served: trio.Event) -> None:
        edge = Edge(
            self._routes().answer,
            self._edge_tls,
            limits=self._options.limits,
            drain=self._drain,
            metrics=self._shell.metrics,
            log=self._shell.log,
        )
        await edge.serve([listener])
        served.set()

    async def _shut_down(self, served: trio.Event) -> None:
        """Notice, then drain, all within the shutdown time-out; a second signal ends it at once."""
        options = self._options
        stopping(options.shutdown_timeout_s + STOP_SLACK_S)
        self._drain.begin_notice()
        self._shell.log.info("shutting down", notice_s=options.shutdown_notice_s, timeout_s=options.shutdown_timeout_s)
        with trio.move_on_after(options.shutdown_timeout_s) as deadline:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._cancel_on_hurry, nursery.cancel_scope)
                await trio.sleep(options.shutdown_notice_s)
                self._drain.begin_drain()
                await served.wait()
                nursery.cancel_scope.cancel()
        if not served.is_set():
            reason = "time-out" if deadline.cancelled_caught else "second signal"
            self._shell.log.warning("ending with open connections", connections=self._drain.connections, reason=reason)
        self._drain.mark_stopped()

    async def _cancel_on_hurry(self, scope: trio.CancelScope) -> None:
        await self._shell.hurry.wait()
        scope.cancel()

    async def _reload_edge(self) -> None:
        leaf = await in_thread_or_here(self._edge_tls.reload)
        not_after = leaf.not_after.isoformat()
        self._shell.log.info("edge certificate reloaded", subject=leaf.subject, serial=leaf.serial, not_after=not_after)

    async def _livez(self) -> tuple[bool, str]:
        return True, SHUTTING_DOWN if self._drain.notice.is_set() else livez_text(self._shell.name)

    async def _readyz(self) -> Readiness:
        return self._readiness.judge()

    @asynccontextmanager
    async def _registered(self, entry: Entry) -> AsyncIterator[None]:
        """Keep us in discovery while the block runs; trouble with it is only logged. One worker does it for all."""
        if self._place.number > 0:
            yield
            return
        registering = trio.CancelScope()
        self._nursery.start_soon(_keep, entry, registering)
        yield
        registering.cancel()
        with trio.move_on_after(DEREGISTER_S):
            await entry.withdraw()

    def _sample(self) -> None:
        """Report the age of the secrets and the end of the edge's certificate; look after a worker's parent."""
        metrics = self._shell.metrics
        self._clock.look()
        metrics.gauge("secrets.age_seconds", self._secrets.age_s())
        days = self._edge_tls.leaf.remaining_days(dt.datetime.now(dt.UTC))
        metrics.gauge("load_balancer.tls_cert.remaining_days", days)
        if self._place.is_orphan() and not self._shell.hurry.is_set():
            self._shell.log.error("the parent of the workers is gone, ending at once: the next one needs our ports")
            self._shell.stop_at_once()


async def _keep(entry: Entry, scope: trio.CancelScope) -> None:
    with scope:
        await entry.keep(REGISTER_RETRY_S)


def _with_port(address: Address, listener: trio.SocketListener) -> Address:
    """Return the address with the port that was picked, if port 0 was asked for."""
    return address if address.port else dataclasses.replace(address, port=listener.socket.getsockname()[1])
