"""What every service does as a process, whatever it serves: one way for all four (operator-tools.md 10).

`start` turns a command into a running service: traces, Trio, one exit code for whatever ends it. A `Shell` is what the
running service and its surroundings know of each other: signals, cluster certificate, entry in discovery, probes, the
report of every second, the supervisor. A service calls the parts in the order in which it starts, and leaves in the
order in which it stops; nothing here knows what is served.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Concatenate, Final, ParamSpec

import trio
from quart_trio import QuartTrio

from juicebox_hsm import __version__
from juicebox_hsm.adapters.faults.switch import FaultSwitch
from juicebox_hsm.adapters.observation import build_info
from juicebox_hsm.adapters.observation.dogstatsd import agent_address, send_metrics
from juicebox_hsm.adapters.observation.families import Family
from juicebox_hsm.adapters.observation.logging import get_logger, lines_dropped, report_suppressed
from juicebox_hsm.adapters.observation.metric_names import ANY_SERVICE
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.observation.probes import Judge, Probe, judge_in_time, serve_probes
from juicebox_hsm.adapters.observation.reason_gauges import ReasonGauges
from juicebox_hsm.adapters.observation.store_metrics import Answers
from juicebox_hsm.adapters.observation.tracing import Traces, open_traces
from juicebox_hsm.adapters.process.file_limit import raise_file_limit
from juicebox_hsm.adapters.process.memory_guard import forbid_dumps
from juicebox_hsm.adapters.process.regular_file import others_read
from juicebox_hsm.adapters.process.supervision import (
    Reloads,
    StartPhase,
    handle_signals,
    notify,
    run_service,
    watchdog_interval_s,
)
from juicebox_hsm.adapters.tls.certificate_end import report_cluster_end
from juicebox_hsm.adapters.tls.cluster_tls import KEY_FILE, ClusterTls, certificate_end, cluster_reloads
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.addresses import Address
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ports.discovery import Discovery
from juicebox_hsm.ports.observation import Log
from juicebox_hsm.ports.store import Store
from juicebox_hsm.wire.rpc import PeerRole
from roles.options import CommonOptions, load_identity
from roles.words import readiness_text

REPORT_S: Final = 1.0
READINESS_S: Final = 2.0
"""Between two looks at our own readiness for the metrics, each of which may take as long (own)."""
REGISTER_S: Final = 60.0
"""Between two renewals of an entry in discovery; who is not seen to renew for 21 min is forgotten (manager.md 1.1)."""

MISSING_S: Final = 2.0
"""Between two looks whether our entry is still there: a service that others cannot find is as good as down (own)."""

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Kind:
    """What a kind of service is called and shows.

    `logger` names it in log lines, `tag` in metrics and traces; `series` are the metrics that exist from the start.
    `sends_traces` services take part in traces; those with `guards_memory` hold keys, which stay
    out of core files and debuggers.
    """

    logger: str
    tag: str
    series: tuple[Family, ...]
    sends_traces: bool = True
    guards_memory: bool = False


def start(
    kind: Kind, name: str, main: Callable[Concatenate[Shell, P], Awaitable[None]], *args: P.args, **kwargs: P.kwargs
) -> None:
    """Run `main(shell, ...)` as the service called `name`, to its end; ends the process unless it stopped in order.

    Raises `LocalError` when metrics or traces are to be sent where nobody can be.
    """
    agent_address(os.environ)
    raise_file_limit()
    guarded = forbid_dumps() if kind.guards_memory else None
    traces = open_traces(kind.tag, __version__) if kind.sends_traces else None
    phase = StartPhase()

    async def run() -> None:
        try:
            shell = Shell(kind, name, traces, phase)
            if guarded is not None:
                shell.metrics.gauge("memory.guarded", guarded)
            await main(shell, *args, **kwargs)
        finally:
            if traces is not None:
                await traces.close()

    run_service(run, phase=phase)


class Shell:
    """What one running service and its surroundings know of each other. Create it inside Trio.

    `stop` is set by the first stop signal, `hurry` by the second.
    """

    def __init__(self, kind: Kind, name: str, traces: Traces | None, phase: StartPhase) -> None:
        self.kind = kind
        self.name = name
        self.traces = traces
        self.log = get_logger(kind.logger)
        self.metrics = Metrics()
        self.metrics.declare((*ANY_SERVICE, *kind.series))
        self._lines_dropped = self.metrics.counter("log.lines_dropped")
        self.store_answers = Answers()
        self.faults = FaultSwitch.from_environment(name)
        self.tls: ClusterTls | None = None
        self.stop = trio.Event()
        self.hurry = trio.Event()
        self._phase = phase
        self._began = trio.current_time()

    def identify(self, common: CommonOptions, role: PeerRole) -> None:
        """Read the cluster certificate, and warn of an address that nobody else can reach. Raises `LocalError`."""
        self.tls = load_identity(common, role)
        if common.cluster_tls is not None:
            self.warn_of_shared(common.cluster_tls / KEY_FILE)
        if common.advertise.is_loopback and not common.allow_loopback:
            self.log.warning(
                "advertising a loopback address: only this machine can reach it", address=str(common.advertise)
            )

    def warn_of_shared(self, key: Path) -> None:
        """Warn of a private key that every user of this machine can read."""
        try:
            shared = others_read(key)
        except OSError:  # gone since it was read: the reload will say so
            return
        if shared:
            self.log.warning("private key is readable by others; restrict it to this user", path=str(key))

    @property
    def scheme(self) -> str:
        """Return the scheme of our RPC address."""
        return "tcp" if self.tls is None else "tls"

    @property
    def certificate_end(self) -> Callable[[], dt.datetime | None]:
        """Return what tells the end of the cluster certificate in service (UTC), None without TLS."""
        return partial(certificate_end, self.tls)

    async def catch_signals(self, nursery: trio.Nursery, reloads: Reloads | None = None) -> None:
        """Catch signals from here on; SIGHUP reloads `reloads` and the cluster certificate."""
        await nursery.start(handle_signals, self._on_stop, {**(reloads or {}), **cluster_reloads(self.tls)})

    def stop_at_once(self) -> None:
        """Stop as if told twice."""
        self.stop.set()
        self.hurry.set()

    def _on_stop(self, _signal: str) -> None:
        if self.stop.is_set():
            self.hurry.set()
        self.stop.set()

    async def serve_probes(
        self,
        nursery: trio.Nursery,
        bind: Address,
        *,
        livez: Probe,
        readyz: Judge,
        app_hook: Callable[[QuartTrio], None] | None = None,
    ) -> int:
        """Serve probes and metrics on `bind`; return the port. Raises `LocalError` when it cannot listen."""
        port: int = await nursery.start(
            partial(
                serve_probes,
                (bind.host, bind.port),
                name=self.name,
                livez=livez,
                readyz=readyz,
                show=readiness_text,
                metrics=self.metrics,
                app_hook=app_hook,
            )
        )
        nursery.start_soon(self.tell_readiness, readyz)
        return port

    async def tell_readiness(self, readyz: Judge) -> None:
        """Judge as `/readyz` does, for ever, and tell it as metrics, whether or not anybody asks."""
        reasons = ReasonGauges(self.metrics, "service.reason")
        while True:
            found = await judge_in_time(readyz)
            self.metrics.gauge("service.ready", found.is_ready)
            reasons.show(reason.code for reason in (*found.reasons, *found.warnings))
            await trio.sleep(READINESS_S)

    def report(
        self,
        nursery: trio.Nursery,
        sample: Callable[[], None] | None = None,
        *,
        is_alive: Callable[[], Awaitable[bool]] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Begin to report: every second the metrics of any service and what `sample` adds; to the supervisor, life.

        The watchdog is fed while `is_alive`, which has to answer in time; `tags` go with metrics that are sent.
        """
        nursery.start_soon(self._report, sample)
        nursery.start_soon(_feed_watchdog, is_alive)
        own = {"service": self.kind.tag, "version": build_info.tag()}
        nursery.start_soon(send_metrics, self.metrics, {**own, **(tags or {})})

    async def _report(self, sample: Callable[[], None] | None) -> None:
        while True:
            self.metrics.timing("service.uptime.ns", round((trio.current_time() - self._began) * 1e9))
            self._lines_dropped.add(lines_dropped() - self._lines_dropped.value)
            report_cluster_end(self.metrics, certificate_end(self.tls))
            self.store_answers.tell_age(self.metrics)
            if sample is not None:
                sample()
            report_suppressed()
            await trio.sleep(REPORT_S)

    def look_at(self, store: Store) -> None:
        """Say that the store was not there before: its path may be mistyped, or its disk not mounted."""
        if store.is_new:
            self.log.warning("there was no store; made a new, empty one", store=store.description)

    def entry(self, discovery: Discovery, kind: ServiceKind, url: str) -> Entry:
        """Return our entry in discovery, not yet made."""
        return Entry(discovery, kind, url, self.faults.now_ms, self.log)

    def started(self, event: str, **fields: object) -> None:
        """Log that the start is over: from here on, trouble with others is no longer a failed start."""
        self._phase.started = True
        self.log.info(event, **fields)


def ready(status: str) -> None:
    """Tell the supervisor that the service serves."""
    notify("READY=1", f"STATUS={status}")


def stopping(patience_s: float | None = None, status: str = "") -> None:
    """Tell the supervisor that the service stops, and how long that may take at most."""
    lines = [f"STATUS={status}"] if status else []
    lines += [] if patience_s is None else [f"EXTEND_TIMEOUT_USEC={round(patience_s * 1e6)}"]
    notify("STOPPING=1", *lines)


async def _feed_watchdog(is_alive: Callable[[], Awaitable[bool]] | None) -> None:
    """Tell systemd that the event loop turns and what `is_alive` looks at answers."""
    interval_s = watchdog_interval_s()
    while interval_s is not None:
        if is_alive is None or await is_alive():
            notify("WATCHDOG=1")
        await trio.sleep(interval_s)


@dataclass(frozen=True, slots=True)
class Entry:
    """A service's entry in discovery. Trouble with it never ends a service: an entry that is missing is made again."""

    discovery: Discovery
    kind: ServiceKind
    url: str
    now_ms: Callable[[], int]
    log: Log

    async def keep(
        self,
        retry_s: float,
        *,
        succeeded: Callable[[], None] | None = None,
        failed: Callable[[RealmError], None] | None = None,
        renew_s: float = REGISTER_S,
    ) -> None:
        """Make the entry and renew it until cancelled; tells each success and failure, the latter by a log line."""
        while True:
            try:
                await self.discovery.register(self.kind, self.url, self.now_ms())
            except RealmError as error:
                (failed or self._say_failed)(error)
                await trio.sleep(retry_s)
            else:
                if succeeded is not None:
                    succeeded()
                await self._last(renew_s)

    async def _last(self, renew_s: float) -> None:
        """Return when the entry has to be written again: after `renew_s`, or when somebody has removed it."""
        due = trio.current_time() + renew_s
        while (left_s := due - trio.current_time()) > 0:
            await trio.sleep(min(MISSING_S, left_s))
            try:
                found = await self.discovery.list(self.kind)
            except RealmError:
                continue  # who needs discovery for something else says so
            if all(entry.url != self.url for entry in found):
                self.log.warning("our entry in discovery was removed, registering again", url=self.url)
                return

    async def withdraw(self) -> None:
        """Delete the entry; the caller bounds the wait."""
        try:
            await self.discovery.deregister(self.kind, self.url)
        except RealmError as error:
            self.log.warning("not deregistered, others go on looking for this service for a while", error=str(error))

    def _say_failed(self, error: RealmError) -> None:
        self.log.warning("registration failed", error=str(error))
