"""Gather what a verdict on the cluster is made from: all services, asked at once (operator-tools.md 2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.certificates import moment_ms
from juicebox_hsm.host.clocks import Reading
from juicebox_hsm.host.cluster.settings import DRAIN_PREFIX, PAUSED, drained_hsms
from juicebox_hsm.host.cluster.verdict import BalancerReport, Evidence, ManagerReport
from juicebox_hsm.host.cluster.view import ClusterView, GroupKey
from juicebox_hsm.host.services import ServiceAddress, ServiceKind
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.ports.rpc import RpcCaller
from juicebox_hsm.ports.store import Store
from juicebox_hsm.wire.methods import MANAGER_STATUS
from juicebox_hsm.wire.rpc import Empty, ManagerStatus
from roles.survey.balancers import probe_balancers
from roles.survey.overview import STATUS_TIMEOUT_S, ask_agents, clock_of, why_silent


async def gather(
    store: Store,
    rpc: RpcCaller,
    now_ms: int,
    *,
    timeout_s: float = STATUS_TIMEOUT_S,
    own_certificate_end_ms: int | None = None,
    own_clock: Reading | None = None,
) -> Evidence:
    """Ask every service in discovery, all at once, each for at most `timeout_s`. Raises `StoreUnavailable`."""
    services = await store.discovery.list()
    drained = drained_hsms(await store.settings.list(DRAIN_PREFIX))
    paused = await store.settings.get(PAUSED) is not None
    views: list[ClusterView] = []
    managers: list[ManagerReport] = []
    balancers: list[BalancerReport] = []

    async def look_at_agents() -> None:
        views.append(await ask_agents(rpc, _urls(services, ServiceKind.AGENT), timeout_s))

    async def look_at_balancers() -> None:
        balancers.extend(await probe_balancers(_urls(services, ServiceKind.LOAD_BALANCER), timeout_s))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look_at_agents)
        nursery.start_soon(look_at_balancers)
        for url in _urls(services, ServiceKind.MANAGER):
            nursery.start_soon(partial(_ask_manager, rpc, url, timeout_s, managers))
    return Evidence(
        view=views[0],
        managers=tuple(sorted(managers, key=lambda report: report.url)),
        balancers=tuple(balancers),
        now_ms=now_ms,
        drained=drained,
        rebalancing_paused=paused,
        own_certificate_end_ms=own_certificate_end_ms,
        own_clock=own_clock,
    )


def _urls(services: Iterable[ServiceAddress], kind: ServiceKind) -> list[str]:
    return [service.url for service in services if service.kind is kind]


async def _ask_manager(rpc: RpcCaller, url: str, timeout_s: float, reports: list[ManagerReport]) -> None:
    asked = trio.current_time()
    try:
        reply = await rpc.call(url, MANAGER_STATUS, Empty(), timeout_s=timeout_s)
    except RealmError as error:
        reports.append(ManagerReport(url, error=why_silent(error, url)))
        return
    reports.append(replace(read_manager_status(url, reply), clock=clock_of(reply.now_ms, asked)))


def read_manager_status(url: str, status: ManagerStatus) -> ManagerReport:
    """Translate a manager's reply."""
    pending: dict[GroupKey, float] = {}
    for seen in status.pending:
        key = (RealmId(seen.realm), GroupId(seen.group))
        pending[key] = max(seen.age_s, pending.get(key, 0.0))
    return ManagerReport(
        url,
        version=status.version,
        pending=pending,
        certificate_end_ms=moment_ms(status.certificate_end_ms),
        name=status.name,
        uptime_s=status.uptime_s,
    )
