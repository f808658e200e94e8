"""Flags that several programs share (operator-tools.md 1, decision record 0003): one definition, one spelling."""

from __future__ import annotations

import functools
import ipaddress
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import click

from juicebox_hsm.errors import LocalError

F = TypeVar("F", bound=Callable[..., Any])

HTTP_PORT_OFFSET: Final = 1000


@dataclass(frozen=True, slots=True)
class Address:
    """A host and port; IPv6 hosts without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return HOST:PORT with brackets around an IPv6 host."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Tell whether the host is a loopback address or `localhost`."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def is_unspecified(self) -> bool:
        """Tell whether the host is 0.0.0.0 or ::."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False


def parse_address(text: str) -> Address:
    """Parse HOST:PORT or [V6]:PORT; raises ValueError with the reason."""
    host, separator, port_text = text.rpartition(":")
    if not separator or not host:
        raise ValueError(f"{text!r} is not HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r}: write an IPv6 address as [ADDRESS]:PORT")
    if not port_text.isascii() or not port_text.isdigit() or int(port_text) > 65535:
        raise ValueError(f"{text!r}: the port must be a number from 0 to 65535")
    return Address(host, int(port_text))


class AddressType(click.ParamType[Address]):
    """A HOST:PORT flag."""

    name = "HOST:PORT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Address:
        """Parse, or fail as a usage error."""
        if isinstance(value, Address):
            return value
        try:
            return parse_address(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@dataclass(frozen=True, slots=True)
class CommonOptions:
    """What every role is told: where it listens, its store and its cluster identity."""

    store_url: str
    cluster_tls: Path | None
    insecure_rpc: bool
    listen: Address
    http_listen: Address
    name: str
    advertise: Address
    allow_loopback: bool
    log_level: str | None


def _read_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Take defaults for flags from a TOML file: `cluster_tls = "..."` or `cluster-tls = "..."`."""
    if value is None:
        return None
    try:
        settings = tomllib.loads(value.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.BadParameter(f"{value}: {error.strerror}", ctx, param) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{value}: not TOML: {error}", ctx, param) from None
    known = {name for parameter in ctx.command.params for name in [parameter.name] if name}
    defaults: dict[str, Any] = {}
    for key, setting in settings.items():
        name = key.replace("-", "_")
        if name not in known:
            raise click.BadParameter(f"{value}: unknown setting {key!r}; names are those of the flags", ctx, param)
        defaults[name] = setting
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return value


def config_option(function: F) -> F:
    """Add --config FILE, whose settings are the defaults of the command's other flags."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="TOML file with defaults for the flags (names as here, with - or _).",
    )(function)


def store_option(function: F) -> F:
    """Add --store URL."""
    return click.option(
        "--store",
        "store_url",
        required=True,
        metavar="URL",
        help="Store: sqlite:PATH or bigtable:PROJECT/INSTANCE.",
    )(function)


def cluster_tls_options(function: F) -> F:
    """Add --cluster-tls DIR and --insecure-rpc."""
    function = click.option(
        "--cluster-tls",
        type=click.Path(path_type=Path, file_okay=False),
        help="Directory with ca.pem, cert.pem and key.pem of this program's cluster certificate.",
    )(function)
    return click.option(
        "--insecure-rpc",
        is_flag=True,
        help="Plain TCP between services, loopback addresses only; for tests.",
    )(function)


def role_options(default_listen: str) -> Callable[[F], F]:
    """Add the flags every role takes; the function receives them as `common: CommonOptions`."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapper(
            *,
            store_url: str,
            cluster_tls: Path | None,
            insecure_rpc: bool,
            listen: Address,
            http_listen: Address | None,
            name: str | None,
            advertise: Address | None,
            allow_loopback: bool,
            log_level: str | None,
            **rest: Any,
        ) -> Any:
            role = click.get_current_context().command.name or "service"
            common = CommonOptions(
                store_url=store_url,
                cluster_tls=cluster_tls,
                insecure_rpc=insecure_rpc,
                listen=listen,
                http_listen=http_listen or Address("127.0.0.1", _http_port(listen)),
                name=name or f"{role}{listen}",
                advertise=advertise or listen,
                allow_loopback=allow_loopback,
                log_level=log_level,
            )
            check_identity(common)
            return function(common=common, **rest)

        decorated: Any = wrapper
        for option in reversed(_role_flags(default_listen)):
            decorated = option(decorated)
        return cast("F", cluster_tls_options(store_option(config_option(decorated))))

    return decorate


def _http_port(listen: Address) -> int:
    """Return the default probe port: the RPC or edge port + 1000; 0 (ephemeral) stays 0."""
    if listen.port == 0:
        return 0
    port = listen.port + HTTP_PORT_OFFSET
    if port > 65535:
        raise click.UsageError(f"--listen port {listen.port} + {HTTP_PORT_OFFSET} is no port; give --http-listen")
    return port


def _role_flags(default_listen: str) -> list[Callable[[Any], Any]]:
    return [
        click.option(
            "--listen",
            "-l",
            type=AddressType(),
            default=default_listen,
            show_default=True,
            help="Where the service listens.",
        ),
        click.option(
            "--http-listen",
            type=AddressType(),
            help="Probes and metrics (/livez, /readyz, /metrics); default loopback, listen port + 1000.",
        ),
        click.option("--name", "-n", help="Name in logs and status; default ROLE + listen address."),
        click.option("--advertise", type=AddressType(), help="Address others reach this service at; default --listen."),
        click.option("--allow-loopback", is_flag=True, help="Do not warn about advertising a loopback address."),
        click.option("--log-level", help="error, warning, info, debug or trace; default $LOGLEVEL or info."),
    ]


def check_identity(common: CommonOptions) -> None:
    """Refuse identities and addresses that cannot work; raises `LocalError`."""
    if common.cluster_tls is None and not common.insecure_rpc:
        raise LocalError(
            "--cluster-tls DIR is required: the cluster certificate of this service; "
            "issue one with `juicebox-hsm cluster ca issue`"
        )
    if common.insecure_rpc and not (common.listen.is_loopback and common.advertise.is_loopback):
        raise LocalError(f"--insecure-rpc works on loopback addresses only, not {common.listen}; use --cluster-tls")
    if common.advertise.is_unspecified:
        raise LocalError(
            f"--advertise {common.advertise}: others cannot reach this address; give --advertise HOST:PORT"
        )
