"""The flags of Google's other services: Pub/Sub for tenants' events, Secret Manager for secrets.

(operator-tools.md 6.2; load-balancer.md 1, 7.) Without them events stay in the store and secrets in a file.
"""

from __future__ import annotations

import functools
import re
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import click

from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.tenants.secrets_file import HeldSecrets, SecretsFile
from juicebox_hsm.errors import LocalError
from juicebox_hsm.ports.observation import Log
from juicebox_hsm.ports.store import Store
from roles.durations import DurationType

if TYPE_CHECKING:
    from juicebox_hsm.adapters.google.calls import Access

F = TypeVar("F", bound=Callable[..., Any])

PUBSUB: Final = "pubsub"
SECRETS: Final = "secrets-manager"
_PROJECT: Final = re.compile(r"[a-z0-9][a-z0-9.:_-]{0,62}")
_TIMES: Final = {
    "timeout": (20.0, "Longest time of one request to {}."),
    "connect-timeout": (20.0, "Longest time to connect to {}."),
    "http-keepalive-interval": (4.0, "Pause between pings to {}."),
    "http-keepalive-timeout": (3.0, "Longest wait for the answer of {} to a ping."),
}


@dataclass(frozen=True, slots=True)
class CloudOptions:
    """What one service is told; `project` None when no flag names one. Times in seconds."""

    project: str | None
    url: str | None
    timeout_s: float
    connect_timeout_s: float
    keepalive_interval_s: float
    keepalive_timeout_s: float
    keepalive_while_idle: bool

    @property
    def is_given(self) -> bool:
        """Tell whether the service is asked for."""
        return bool(self.project or self.url)

    def access(self, store_url: str, host: str, flag: str) -> Access:
        """Return how to reach the service; the project is the store's where no flag names one. Raises `LocalError`."""
        from juicebox_hsm.adapters.bigtable.channel import ChannelTuning
        from juicebox_hsm.adapters.google.calls import Access, parse_url

        project = self.project or store_project(store_url)
        if project is None:
            raise LocalError(f"--{flag}-project is required: a store that is not on Bigtable names no project")
        if not _PROJECT.fullmatch(project):
            raise LocalError(f"--{flag}-project {project}: not the name of a project")
        tuning = ChannelTuning(
            self.connect_timeout_s, self.keepalive_interval_s, self.keepalive_timeout_s, self.keepalive_while_idle
        )
        emulator = parse_url(self.url, host, f"--{flag}-url") if self.url else ""
        return Access(project, emulator, self.timeout_s, tuning)


def store_project(store_url: str) -> str | None:
    """Return the project of `bigtable:PROJECT/INSTANCE`, None for other stores."""
    scheme, _, rest = store_url.partition(":")
    return rest.partition("/")[0] or None if scheme == "bigtable" else None


def pubsub_problem(values: Mapping[str, Any], store_url: str) -> str:
    """Return why the `--pubsub-...` flags among `values` cannot work, "" when they can or none is given."""
    pubsub = take_cloud(PUBSUB, dict(values))
    if not pubsub.is_given:
        return ""
    from juicebox_hsm.adapters.pubsub.bus import HOST

    try:
        pubsub.access(store_url, HOST, PUBSUB)
    except LocalError as error:
        return str(error)
    return ""


def _flags(prefix: str, service: str, project_help: str) -> list[Callable[[Any], Any]]:
    words = prefix.replace("-", "_")
    flags = [
        click.option(f"--{prefix}-project", help=project_help),
        click.option(f"--{prefix}-url", help=f"{service} elsewhere, without TLS: http://HOST:PORT."),
    ]
    for name, (default, text) in _TIMES.items():
        flags.append(
            click.option(
                f"--{prefix}-{name}",
                f"{words}_{name.replace('-', '_')}",
                type=DurationType(),
                default=f"{default:g}s",
                show_default=True,
                help=text.format(service),
            )
        )
    flags.append(
        click.option(
            f"--{prefix}-http-keepalive-while-idle/--no-{prefix}-http-keepalive-while-idle",
            default=True,
            help=f"Ping {service} without requests under way, too.",
        )
    )
    return flags


def take_cloud(prefix: str, values: MutableMapping[str, Any]) -> CloudOptions:
    """Remove the flags of one service from `values` and return them."""
    words = prefix.replace("-", "_")
    times = [float(values.pop(f"{words}_{name.replace('-', '_')}", default)) for name, (default, _) in _TIMES.items()]
    timeout_s, connect_s, interval_s, wait_s = times
    return CloudOptions(
        values.pop(f"{words}_project", None),
        values.pop(f"{words}_url", None),
        timeout_s,
        connect_s,
        interval_s,
        wait_s,
        bool(values.pop(f"{words}_http_keepalive_while_idle", True)),
    )


def _decorate(function: F, parameter: str, prefix: str, flags: list[Callable[[Any], Any]]) -> F:
    @functools.wraps(function)
    def wrapper(**values: Any) -> Any:
        values[parameter] = take_cloud(prefix, values)
        return function(**values)

    decorated: Any = wrapper
    for option in reversed(flags):
        decorated = option(decorated)
    return cast("F", decorated)


def pubsub_options(function: F) -> F:
    """Add the `--pubsub-...` flags; the function receives `pubsub: CloudOptions`."""
    project_help = (
        "Publish events to Pub/Sub in this project; without it and --pubsub-url the store serves them itself."
    )
    return _decorate(function, "pubsub", PUBSUB, _flags(PUBSUB, "Pub/Sub", project_help))


def secrets_options(function: F) -> F:
    """Add --secrets-file, --raw-secrets and the `--secrets-manager-...` flags; the function receives `secrets`."""
    return _take_secrets(function, is_needed=True)


def optional_secrets_options(function: F) -> F:
    """Add the same flags to a command that can do without; then `secrets` is None."""
    return _take_secrets(function, is_needed=False)


def _take_secrets(function: F, *, is_needed: bool) -> F:
    project_help = (
        "Read the keys from Secret Manager of this project. Default without --secrets-file: the store's project."
    )

    @functools.wraps(function)
    def wrapper(**values: Any) -> Any:
        cloud = take_cloud(SECRETS, values)
        secrets = SecretsOptions(values.pop("secrets_file"), cloud, raw=values.pop("raw_secrets"))
        if not is_needed and not secrets.is_given:
            return function(**values, secrets=None)
        problem = secrets.problem(_store_url(values))
        if problem:
            raise click.UsageError(problem, click.get_current_context())
        return function(**values, secrets=secrets)

    decorated: Any = wrapper
    for option in reversed(
        [
            click.option(
                "--secrets-file",
                type=click.Path(path_type=Path, dir_okay=False),
                help="File of the record id key and the tenants' keys. Without it, Secret Manager.",
            ),
            *_flags(SECRETS, "Secret Manager", project_help),
            click.option(
                "--raw-secrets",
                is_flag=True,
                help="Take tenants' keys that are not JSON for raw HMAC keys, with a warning each; for migration.",
            ),
        ]
    ):
        decorated = option(decorated)
    return cast("F", decorated)


def _store_url(values: Mapping[str, Any]) -> str:
    """Return the store among a command's values: of a role, of an operator command, or by itself."""
    holder = values.get("common", values.get("connection"))
    url = values.get("store_url") if holder is None else holder.store_url
    return url or ""


@dataclass(frozen=True, slots=True)
class SecretsOptions:
    """Where secrets are: a file, or Secret Manager."""

    file: Path | None
    cloud: CloudOptions
    raw: bool = False

    @property
    def is_given(self) -> bool:
        """Tell whether any flag names a source."""
        return self.file is not None or self.cloud.is_given or self.raw

    def problem(self, store_url: str) -> str:
        """Return why these flags name no source of secrets, "" when they do."""
        return secrets_problem(self.file, self.cloud.project, self.cloud.url, store_url, raw=self.raw)


def secrets_problem(file: Path | None, project: str | None, url: str | None, store_url: str, *, raw: bool) -> str:
    """Return why flags name no source of secrets, "" when they do."""
    if file is not None:
        if project or url:
            return "--secrets-file and --secrets-manager-project exclude each other"
        return "--raw-secrets is for Secret Manager, not for --secrets-file" if raw else ""
    if project or store_project(store_url):
        return ""
    return "--secrets-file FILE is required, or --secrets-manager-project for secrets in the cloud"


@asynccontextmanager
async def with_bus(
    store: Store, store_url: str, pubsub: CloudOptions, metrics: Metrics, *, kept_s: int | None = None
) -> AsyncIterator[Store]:
    """Give the store the bus that the flags name: Pub/Sub, or the one of the store itself.

    `kept_s` is for how long Pub/Sub shall keep events, None for who only reads them.
    """
    if not pubsub.is_given:
        yield store
        return
    # Google's libraries take a third of a second to import; only who uses them pays.
    from juicebox_hsm.adapters.pubsub.bus import HOST, open_pubsub

    async with open_pubsub(pubsub.access(store_url, HOST, PUBSUB), metrics, kept_s=kept_s) as bus:
        yield replace(store, bus=bus)


@asynccontextmanager
async def open_secrets(
    options: SecretsOptions, store_url: str, *, metrics: Metrics, log: Log
) -> AsyncIterator[HeldSecrets]:
    """Read all secrets from where the flags say. Raises `LocalError`, and `StoreUnavailable` for the cloud."""
    if options.file is not None:
        held = SecretsFile(options.file, metrics=metrics, log=log)
        await held.load()
        yield held
        return
    from juicebox_hsm.adapters.google.secret_manager import HOST, open_secret_manager

    access = options.cloud.access(store_url, HOST, SECRETS)
    async with open_secret_manager(access, raw=options.raw, metrics=metrics, log=log) as cloud:
        await cloud.load()
        yield cloud
