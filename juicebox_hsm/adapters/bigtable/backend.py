"""Open a Bigtable instance as a `ports.Store` (storage.md 9; operator-tools.md 10).

`bigtable:PROJECT/INSTANCE`, optionally with `?emulator=HOST:PORT`, `&app-profile=ID`, and the time-outs of requests and
connections: `&timeout=20s`, `&connect-timeout=20s`, `&keepalive-interval=4s`, `&keepalive-timeout=3s` and
`&keepalive-while-idle=off`, which the command line makes of its `--bigtable-...` flags. Without an explicit emulator
the variable BIGTABLE_EMULATOR_HOST counts, as for Google's own clients.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final
from urllib.parse import parse_qsl

import trio

from juicebox_hsm.adapters.bigtable import EMULATOR_VARIABLE
from juicebox_hsm.adapters.bigtable.accounting import BigtableAccounting
from juicebox_hsm.adapters.bigtable.audit import BigtableAudit
from juicebox_hsm.adapters.bigtable.auth import ApplicationDefault, Authorization, NoAuthorization
from juicebox_hsm.adapters.bigtable.channel import DEFAULT_CHANNEL_TUNING, ChannelTransport, ChannelTuning
from juicebox_hsm.adapters.bigtable.cluster import (
    BigtableDiscovery,
    BigtableLeases,
    BigtableSettings,
    BigtableTenants,
)
from juicebox_hsm.adapters.bigtable.deletion import DELAY_S, DeferredDeletion
from juicebox_hsm.adapters.bigtable.driver import Driver, Transport
from juicebox_hsm.adapters.bigtable.log import BigtableLog
from juicebox_hsm.adapters.bigtable.log_reads import LogReads
from juicebox_hsm.adapters.bigtable.nodes import TreeNodes
from juicebox_hsm.adapters.bigtable.outbox import BigtableOutbox
from juicebox_hsm.adapters.bigtable.published import BigtablePublished
from juicebox_hsm.adapters.bigtable.realms import BigtableRealms
from juicebox_hsm.adapters.bigtable.retry import BIGTABLE_RETRY
from juicebox_hsm.adapters.bigtable.settled import Settled
from juicebox_hsm.adapters.bigtable.stats import BigtableStats
from juicebox_hsm.adapters.bigtable.table import CALL_S, Endpoint
from juicebox_hsm.adapters.bigtable.warming import warm_channel
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.stores.embedded_bus import EmbeddedBus
from juicebox_hsm.adapters.stores.node_tuning import DEFAULT_NODE_TUNING, NodeTuning
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.addresses import parse_address as parse_host_and_port
from juicebox_hsm.host.retry import RetryProfile
from juicebox_hsm.ports.store import Store

DATA_TARGET: Final = "bigtable.googleapis.com:443"
ADMIN_TARGET: Final = "bigtableadmin.googleapis.com:443"
CLOSING_S: Final = 8.0
"""How long closing waits for deferred deletions (5 s after their append) and the last settled indexes."""

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.:_-]{0,62}")
_SECONDS: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|ms)")
_PROFILE: Final = re.compile(r"[A-Za-z0-9_.-]{1,50}")


@dataclass(frozen=True, slots=True)
class Address:
    """Which instance, and how to reach it; `emulator` is HOST:PORT or "" for the service.

    `call_s` is the longest time of a request, None for the default.
    """

    project: str
    instance: str
    emulator: str = ""
    profile: str = ""
    call_s: float | None = None
    channel: ChannelTuning = DEFAULT_CHANNEL_TUNING

    @property
    def path(self) -> str:
        """Return the instance's resource name."""
        return f"projects/{self.project}/instances/{self.instance}"

    @property
    def description(self) -> str:
        """Return the store's name for logs."""
        return f"bigtable:{self.project}/{self.instance}" + (f" (emulator {self.emulator})" if self.emulator else "")


@dataclass(frozen=True, slots=True)
class Tuning:
    """What tests change: delays, deadlines, and a wrapper around the transport that loses answers."""

    deletion_delay_s: float = DELAY_S
    call_s: float = CALL_S
    retry: RetryProfile = BIGTABLE_RETRY
    wrap: Callable[[Transport], Transport] | None = None


DEFAULT_TUNING: Final = Tuning()


def parse_address(rest: str, variable: str | None) -> Address:
    """Parse what follows `bigtable:`. Raises `LocalError` in one line that says what is expected."""
    path, question, query = rest.partition("?")
    project, slash, instance = path.partition("/")
    settings = dict(parse_qsl(query, keep_blank_values=True))
    emulator = settings.pop("emulator", variable or "")
    profile = settings.pop("app-profile", "")
    call_s, channel = _parse_times(settings)
    is_named = slash and _NAME.fullmatch(project) and _NAME.fullmatch(instance)
    if not is_named or settings or (question and not query):
        raise LocalError(
            f"not a store: 'bigtable:{rest}'; expected bigtable:PROJECT/INSTANCE, optionally with ?emulator=HOST:PORT"
            " or ?app-profile=ID"
        )
    if emulator:
        try:
            parse_host_and_port(emulator)
        except ValueError as error:
            raise LocalError(f"the Bigtable emulator's address: {error}") from None
    if profile and not _PROFILE.fullmatch(profile):
        raise LocalError(f"not an application profile: {profile!r}")
    return Address(project, instance, emulator, profile, call_s, channel)


def _parse_times(settings: dict[str, str]) -> tuple[float | None, ChannelTuning]:
    """Take the time-outs out of `settings`; raises `LocalError` naming the one that is wrong."""

    def seconds(key: str) -> float | None:
        text = settings.pop(key, "")
        found = _SECONDS.fullmatch(text)
        if text and (found is None or not float(found[1])):
            raise LocalError(f"not a time for Bigtable: {key}={text}; expected a number and s or ms, like 20s")
        return None if found is None else float(found[1]) / (1000 if found[2] == "ms" else 1)

    given = {
        "connect_timeout_s": seconds("connect-timeout"),
        "keepalive_interval_s": seconds("keepalive-interval"),
        "keepalive_timeout_s": seconds("keepalive-timeout"),
    }
    idle = settings.pop("keepalive-while-idle", "on")
    if idle not in {"on", "off"}:
        raise LocalError(f"keepalive-while-idle={idle}: expected on or off")
    channel = ChannelTuning(
        **{key: value for key, value in given.items() if value is not None}, keepalive_while_idle=idle == "on"
    )
    return seconds("timeout"), channel


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance that was reached: its endpoint for data, the transport to the admin API, and what it is called."""

    endpoint: Endpoint
    admin: ChannelTransport
    data: ChannelTransport
    authorization: Authorization
    description: str
    metrics: Metrics

    def keep(self, nursery: trio.Nursery) -> None:
        """Start what keeps tokens and channels fresh, until the nursery is cancelled."""
        nursery.start_soon(self.authorization.keep_fresh)
        nursery.start_soon(self.data.keep_rotating, partial(warm_channel, self.endpoint))
        nursery.start_soon(self.admin.keep_rotating, ChannelTransport.connect)


@asynccontextmanager
async def reach(rest: str, tuning: Tuning = DEFAULT_TUNING, metrics: Metrics | None = None) -> AsyncIterator[Instance]:
    """Open channels to the instance that `rest` (behind `bigtable:`) names.

    Raises `LocalError` for what the operator must mend and `StoreUnavailable` if nothing answers within some seconds.
    """
    address = parse_address(rest, os.environ.get(EMULATOR_VARIABLE))
    call_s = tuning.call_s if address.call_s is None else address.call_s
    metrics = Metrics() if metrics is None else metrics
    authorization: Authorization = (
        NoAuthorization() if address.emulator else await ApplicationDefault.find(metrics=metrics)
    )
    driver = Driver()
    await driver.start()
    try:
        insecure = bool(address.emulator)
        data, admin = (
            ChannelTransport(driver, address.emulator or target, insecure=insecure, tuning=address.channel)
            for target in (DATA_TARGET, ADMIN_TARGET)
        )
        await data.open()
        await admin.open()
        try:
            transport = data if tuning.wrap is None else tuning.wrap(data)
            endpoint = Endpoint(transport, authorization, address.path, address.profile, call_s, tuning.retry)
            yield Instance(endpoint, admin, data, authorization, address.description, metrics)
        finally:
            with trio.CancelScope(shield=True):
                await data.close()
                await admin.close()
    finally:
        await driver.stop()


@asynccontextmanager
async def open_bigtable(
    rest: str,
    *,
    node_tuning: NodeTuning = DEFAULT_NODE_TUNING,
    tuning: Tuning = DEFAULT_TUNING,
    metrics: Metrics | None = None,
) -> AsyncIterator[Store]:
    """Open the instance that `rest` (behind `bigtable:`) names.

    Raises `LocalError` for what the operator must mend and `StoreUnavailable` if nothing answers within some seconds.
    Leaving runs deferred deletions, at most 8 s; no operation may be started after that.
    """
    async with reach(rest, tuning, metrics) as instance, _opened(instance, node_tuning, tuning) as store:
        yield store


@asynccontextmanager
async def _opened(instance: Instance, node_tuning: NodeTuning, tuning: Tuning) -> AsyncIterator[Store]:
    """Build the ports over open channels, with the tasks they need."""
    endpoint = instance.endpoint
    nodes = TreeNodes(endpoint, node_tuning)
    deletion = nodes.deletion = DeferredDeletion(nodes, tuning.deletion_delay_s)
    settled = Settled(endpoint)
    realms = BigtableRealms(endpoint, instance.admin)
    endpoint.self_test = realms.self_test
    await endpoint.prove()
    failure: BaseException | None = None
    deleting = trio.CancelScope(shield=True)  # goes on while the body is being cancelled, until `_finish` is done
    async with trio.open_nursery() as nursery:
        instance.keep(nursery)
        nursery.start_soon(settled.run)
        nursery.start_soon(_delete, deletion, deleting)
        try:
            yield Store(
                log=BigtableLog(LogReads(endpoint), nodes, deletion, instance.metrics),
                nodes=nodes,
                outbox=BigtableOutbox(endpoint, settled),
                accounting=BigtableAccounting(endpoint),
                discovery=BigtableDiscovery(endpoint),
                leases=BigtableLeases(endpoint),
                settings=BigtableSettings(endpoint),
                tenants=BigtableTenants(endpoint),
                realms=realms,
                audit=BigtableAudit(endpoint),
                description=instance.description,
                stats=BigtableStats(endpoint),
                bus=EmbeddedBus(BigtablePublished(endpoint)),
            )
        except (trio.Cancelled, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 - raised again below, outside the nursery that would wrap it
            failure = error
        finally:
            await _finish(deletion, settled)
            deleting.cancel()
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _delete(deletion: DeferredDeletion, scope: trio.CancelScope) -> None:
    with scope:
        await deletion.run()


async def _finish(deletion: DeferredDeletion, settled: Settled) -> None:
    """Carry out what was put off, within limits."""
    with trio.move_on_after(CLOSING_S) as limit:
        limit.shield = True
        await settled.flush_all()
        deletion.close()
        await deletion.drained()
