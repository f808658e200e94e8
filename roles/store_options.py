"""The flags that name the store: --store, and those of existing Bigtable realms for the same (operator-tools.md 1).

`--bigtable-project P --bigtable-instance I` is `--store bigtable:P/I`; the others become settings behind its `?`, so
that everything below the command line knows one URL.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Final, TypeVar, cast
from urllib.parse import quote

import click

from juicebox_hsm.host.addresses import emulator_of
from roles.durations import DurationType, format_seconds

F = TypeVar("F", bound=Callable[..., Any])

PROJECT: Final = "prj"
INSTANCE: Final = "instance"
STORE_HELP: Final = "Store: sqlite:PATH or bigtable:PROJECT/INSTANCE."
SERVICE_HOST: Final = "bigtable.googleapis.com"

VARIABLES: Final = {"bigtable_project": "JB_GCP_PROJECT", "bigtable_instance": "JB_BIGTABLE"}
"""Environment variables of existing realms, beside ours."""

_SETTINGS: Final = {
    "bigtable_timeout": "timeout",
    "bigtable_connect_timeout": "connect-timeout",
    "bigtable_http_keepalive_interval": "keepalive-interval",
    "bigtable_http_keepalive_timeout": "keepalive-timeout",
}
NAMES: Final = (
    "bigtable_project",
    "bigtable_instance",
    "bigtable_url",
    *_SETTINGS,
    "bigtable_http_keepalive_while_idle",
)


def bigtable_flags(*, hidden: bool = False) -> list[Callable[[Any], Any]]:
    """Return the decorators of the `--bigtable-...` flags; hidden ones leave the environment to their command."""
    duration = functools.partial(click.option, type=DurationType(), hidden=hidden)
    return [
        click.option(
            "--bigtable-project",
            hidden=hidden,
            envvar=None if hidden else VARIABLES["bigtable_project"],
            help=f"With --bigtable-instance: --store bigtable:PROJECT/INSTANCE. Default {PROJECT}.",
        ),
        click.option(
            "--bigtable-instance",
            hidden=hidden,
            envvar=None if hidden else VARIABLES["bigtable_instance"],
            help=f"Instance of the project. Default {INSTANCE}.",
        ),
        click.option("--bigtable-url", hidden=hidden, help="Emulator: http://HOST:PORT. Default: Google's service."),
        duration("--bigtable-timeout", help="Longest time of one request to Bigtable. Default 20s."),
        duration("--bigtable-connect-timeout", help="Longest time to connect to Bigtable. Default 20s."),
        duration("--bigtable-http-keepalive-interval", help="Pause between pings to Bigtable. Default 4s."),
        duration("--bigtable-http-keepalive-timeout", help="Longest wait for the answer to a ping. Default 3s."),
        click.option(
            "--bigtable-http-keepalive-while-idle/--no-bigtable-http-keepalive-while-idle",
            default=True,
            hidden=hidden,
            help="Ping Bigtable without requests under way, too.",
        ),
    ]


def store_url_of(store_url: str | None, given: Mapping[str, Any]) -> str | None:
    """Return the store's URL from --store and the `--bigtable-...` flags, None when nothing names a store.

    `given` has the values by `NAMES`. Raises ValueError for flags that contradict each other.
    """
    project, instance, address = (given.get(name) for name in NAMES[:3])
    settings = {
        key: format_seconds(value) for name, key in _SETTINGS.items() if isinstance(value := given.get(name), float)
    }
    if given.get("bigtable_http_keepalive_while_idle") is False:
        settings["keepalive-while-idle"] = "off"
    if address:
        try:
            emulator = emulator_of(address, SERVICE_HOST)
        except ValueError as error:
            raise ValueError(f"--bigtable-url {error}") from None
        if emulator:
            settings["emulator"] = emulator
    if store_url is None:
        if not (project or instance or address):
            return None
        store_url = f"bigtable:{project or PROJECT}/{instance or INSTANCE}"
    if not store_url.startswith("bigtable:") or not settings:
        return store_url
    more = "&".join(f"{key}={quote(value, safe=':[]')}" for key, value in settings.items())
    return f"{store_url}{'&' if '?' in store_url else '?'}{more}"


def take_store(values: MutableMapping[str, Any]) -> str:
    """Remove the `--bigtable-...` flags from `values` and return the store's URL. Raises ValueError without one."""
    url = store_url_of(values["store_url"], {name: values.pop(name, None) for name in NAMES})
    if url is None:
        raise ValueError(f"--store is required: {STORE_HELP.rstrip('.')}")
    return url


def store_option(function: F) -> F:
    """Add --store URL and the `--bigtable-...` flags; the function receives `store_url`."""

    @functools.wraps(function)
    def wrapper(**values: Any) -> Any:
        try:
            values["store_url"] = take_store(values)
        except ValueError as error:
            raise click.UsageError(str(error), click.get_current_context()) from None
        return function(**values)

    decorated: Any = wrapper
    for option in reversed(bigtable_flags()):
        decorated = option(decorated)
    return cast("F", click.option("--store", "store_url", metavar="URL", help=STORE_HELP)(decorated))
