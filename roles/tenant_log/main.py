"""`juicebox-hsm tenant-log serve`: flags, listening, signals (operator-tools.md 6.3)."""

from __future__ import annotations

import datetime as dt
import logging as stdlib
import ssl
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import click
import trio
from hypercorn.trio import serve as serve_asgi

from juicebox_hsm import __version__
from juicebox_hsm.adapters.edge.tls import EdgeTls
from juicebox_hsm.adapters.observation.containment import ContainedConfig, GoodTargets
from juicebox_hsm.adapters.observation.logging import configure
from juicebox_hsm.adapters.observation.metric_names import TENANT_LOG
from juicebox_hsm.adapters.observation.probes import listen
from juicebox_hsm.adapters.process.file_limit import SERVICE_SHARE, fit_connections
from juicebox_hsm.adapters.process.supervision import report_crash
from juicebox_hsm.adapters.process.threads import in_thread_or_here
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.errors import LocalError, RealmError
from juicebox_hsm.host.addresses import Address
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.readiness import Plain, Readiness, Reason, Trouble, of_secrets, of_shown_certificate
from juicebox_hsm.ids import RealmId, parse_id
from juicebox_hsm.ports.errors import store_code
from roles.cloud_options import CloudOptions, SecretsOptions, open_secrets, pubsub_options, secrets_options, with_bus
from roles.options import ADDRESS, HOST, HTTP_PORT_OFFSET, SERVICE_NAME, ParsedType, config_option
from roles.shell import Kind, Shell, ready, start, stopping
from roles.store_options import store_option
from roles.tenant_log.service import WAIT_S, Realms, TenantLogService

KIND: Final = Kind("tenant-log", "tenant_log", TENANT_LOG, sends_traces=False, guards_memory=True)
KEEP_ALIVE_S: Final = 60  # own
READ_S: Final = 3 * WAIT_S  # own: a connection is read during a waiting call too, so longer than the wait
GRACE_S: Final = 3.0  # own: waiting calls are released at once; the rest is sending
BACKLOG: Final = 256
CONNECTIONS_MAX: Final = 1024  # own: every tenant keeps a few waiting calls

_FILE: Final = click.Path(path_type=Path, dir_okay=False)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the service is told."""

    store_url: str
    realms: tuple[RealmId, ...]
    listen: Address
    http_listen: Address
    secrets: SecretsOptions
    tls: tuple[Path, Path] | None
    name: str
    pubsub: CloudOptions


REALM_ID: Final = ParsedType("REALM", lambda text: RealmId(parse_id(text.lower())))


@click.command("serve")
@config_option
@store_option
@click.option(
    "--id", "realms", multiple=True, type=REALM_ID, envvar="REALM_ID",
    help="Realm to serve, repeatable; default all realms of the store. Tokens choose by their audience.",
)  # fmt: skip
@secrets_options
@click.option("--host", type=HOST, default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8080, show_default=True, type=click.IntRange(0, 65535), envvar="PORT", help="Port to listen on."
)
@click.option(
    "--http-listen", type=ADDRESS, help="Probes and metrics; default loopback, port + 1000; port 0 picks one."
)
@click.option("--tls-cert", type=_FILE, help="PEM certificate chain; without it, plain HTTP for a proxy in front.")
@click.option("--tls-key", type=_FILE, help="PEM private key of --tls-cert.")
@click.option(
    "--name", "-n", type=SERVICE_NAME, default="tenant-log", show_default=True, help="Name in logs and probes."
)
@click.option("--log-level", help="error, warning, info, debug or trace; default $LOGLEVEL or info.")
@pubsub_options
def command(
    store_url: str,
    realms: tuple[RealmId, ...],
    secrets: SecretsOptions,
    host: str,
    port: int,
    http_listen: Address | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    name: str,
    log_level: str | None,
    pubsub: CloudOptions,
) -> None:
    """Serve tenants their events: GET /, POST /tenant_log, POST /tenant_log/ack. Runs until SIGTERM or Ctrl-C."""
    try:
        configure(log_level, in_background=True, service=name)
        if (tls_cert is None) != (tls_key is None):
            raise LocalError("--tls-cert and --tls-key belong together")
        if http_listen is None:
            probes_port = port + HTTP_PORT_OFFSET if port else 0
            if probes_port > 65535:
                raise LocalError(f"--port {port} + {HTTP_PORT_OFFSET} is no port; give --http-listen")
            http_listen = Address("127.0.0.1", probes_port)
        tls = (tls_cert, tls_key) if tls_cert is not None and tls_key is not None else None
        options = ServeOptions(store_url, realms, Address(host, port), http_listen, secrets, tls, name, pubsub)
    except LocalError as error:
        sys.exit(report_crash(error))
    start(KIND, name, run, options)


async def run(shell: Shell, options: ServeOptions) -> None:
    """Start, serve until a stop signal, release waiting calls. Raises `LocalError` and `StoreUnavailable` at start."""
    async with (
        open_store(options.store_url, metrics=shell.metrics) as opened,
        with_bus(opened, options.store_url, options.pubsub, shell.metrics) as store,
        open_secrets(options.secrets, options.store_url, metrics=shell.metrics, log=shell.log) as secrets,
    ):
        shell.look_at(opened)
        if store.bus is None:
            raise LocalError(f"--store {options.store_url}: this store has no tenant event log")
        tls = None if options.tls is None else EdgeTls(options.tls[1], options.tls[0])
        if options.tls is not None:
            shell.warn_of_shared(options.tls[1])
        config = _server_config(tls)
        listener = listen(options.listen.host, options.listen.port, "--port")
        port = int(listener.getsockname()[1])
        config.bind = [f"fd://{listener.detach()}"]
        service = TenantLogService(
            store.bus,
            Realms(options.realms, store.realms.list_realms),
            secrets.token_key,
            now_s=time.time,
            metrics=shell.metrics,
            log=shell.log,
        )

        async def livez() -> tuple[bool, str]:
            return True, f"{options.name} {__version__}"

        async def readyz() -> Readiness:
            reasons: list[Reason] = [Plain(Code.STOPPING)] if shell.stop.is_set() else []
            try:
                await store.realms.list_realms()
            except RealmError as error:
                reasons.append(Trouble(store_code(error), str(error)))
            if tls is not None:
                reasons += of_shown_certificate(*tls.leaf.valid_ms, round(time.time() * 1000))
            return Readiness((*reasons, *of_secrets(secrets.age_s(), secrets.refresh_s)))

        async def until_stopped() -> None:
            await shell.stop.wait()
            stopping()
            service.stop()

        async with trio.open_nursery() as nursery:
            reloads: dict[str, Callable[[], Awaitable[None]]] = {"secrets": secrets.load}
            if tls is not None:
                reloads["certificate"] = partial(_reload, tls, shell)
            await shell.catch_signals(nursery, reloads)
            http_port = await shell.serve_probes(nursery, options.http_listen, livez=livez, readyz=readyz)
            nursery.start_soon(secrets.refresh_forever)
            shell.report(nursery, partial(tell_certificate_end, tls, shell))
            shell.started(
                "tenant log started", listen=f"{options.listen.host}:{port}", http_port=http_port,
                tls=options.tls is not None, realms=[realm.hex() for realm in options.realms] or "all of the store",
                version=__version__, store=store.description,
            )  # fmt: skip
            ready(f"tenant log on port {port}")
            await serve_asgi(GoodTargets(service.make_app()), config, shutdown_trigger=until_stopped)
            nursery.cancel_scope.cancel()
    shell.log.info("tenant log stopped")


def tell_certificate_end(tls: EdgeTls | None, shell: Shell) -> None:
    """Set the gauge of the certificate that auditors see; there is none without TLS."""
    if tls is not None:
        shell.metrics.gauge("tenant_log.tls_cert.remaining_days", tls.leaf.remaining_days(dt.datetime.now(dt.UTC)))


async def _reload(tls: EdgeTls, shell: Shell) -> None:
    leaf = await in_thread_or_here(tls.reload)
    shell.log.info("certificate reloaded", serial=leaf.serial, not_after=leaf.not_after.isoformat())


class _Config(ContainedConfig):
    """Hypercorn's settings; with `tls`, each handshake gets the certificate that is in service by then."""

    def __init__(self, tls: EdgeTls | None) -> None:
        super().__init__(fit_connections(CONNECTIONS_MAX, SERVICE_SHARE))
        self._tls = tls

    @property
    def ssl_enabled(self) -> bool:
        """Tell whether connections begin with a TLS handshake."""
        return self._tls is not None

    def create_ssl_context(self) -> ssl.SSLContext | None:
        """Return the context of all handshakes."""
        return None if self._tls is None else self._tls.following_context()


def _server_config(tls: EdgeTls | None) -> ContainedConfig:
    config = _Config(tls)
    config.accesslog = None
    config.errorlog = stdlib.getLogger("hypercorn.error")
    config.include_server_header = False
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.read_timeout = round(READ_S)
    config.graceful_timeout = GRACE_S
    config.backlog = BACKLOG
    return config
