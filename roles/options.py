"""Flags that several programs share (operator-tools.md 1, 11): one definition, one spelling.

A flag `--some-flag` of a role is also the setting `some-flag` (or `some_flag`) of `--config FILE` and the environment
variable JUICEBOX_HSM_SOME_FLAG. The command line counts before the environment, that before the file, that before the
default.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import click

from juicebox_hsm.adapters.process.passing_trouble import local_error
from juicebox_hsm.adapters.process.regular_file import open_regular
from juicebox_hsm.adapters.tls.cluster_tls import ClusterTls
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.addresses import Address, parse_address, parse_host, parse_name
from juicebox_hsm.wire.rpc import PeerRole
from roles.durations import format_seconds
from roles.store_options import store_option

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

HTTP_PORT_OFFSET: Final = 1000
ENVIRONMENT_PREFIX: Final = "JUICEBOX_HSM"
WORKER_VARIABLE: Final = f"{ENVIRONMENT_PREFIX}_LB_WORKER"
"""Where a balancer tells a copy of itself which worker it is; no flag, so nobody sets it by hand."""

CONFIG_BYTES_MAX: Final = 1 << 20  # own: a file of settings has a few hundred bytes


class ParsedType(click.ParamType[T]):
    """A flag that `parse` reads; what that raises as `ValueError` is a usage error."""

    def __init__(self, name: str, parse: Callable[[str], T]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> T:
        """Parse text, or fail as a usage error; anything else has been parsed before."""
        if not isinstance(value, str):
            return cast("T", value)
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


ADDRESS: Final = ParsedType("HOST:PORT", parse_address)
HOST: Final = ParsedType("HOST", parse_host)
SERVICE_NAME: Final = ParsedType("NAME", parse_name)


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


class BadSettings(click.UsageError):
    """A configuration file is wrong; `problems` are all of its mistakes, one line each."""

    def __init__(self, problems: Iterable[str], ctx: click.Context | None = None) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems), ctx)


def flag_of(parameter: click.Parameter) -> str:
    """Return how a parameter is written on the command line, without the leading dashes: `store`, `http-listen`."""
    names = [name.removeprefix("--") for name in parameter.opts if name.startswith("--")]
    return max(names, key=len) if names else (parameter.name or "")


def variable_of(parameter: click.Parameter) -> str:
    """Return the environment variable of a flag."""
    return f"{ENVIRONMENT_PREFIX}_{flag_of(parameter).replace('-', '_').upper()}"


def read_settings(path: Path, parameters: Iterable[click.Parameter]) -> tuple[dict[str, Any], list[str]]:
    """Read a role's configuration file: values by parameter name, and everything that is wrong with the file.

    A setting is called like its flag, with `-` or `_`. Relative paths are relative to the file's directory.
    """
    try:
        with open_regular(path) as file:
            content = file.read(CONFIG_BYTES_MAX)
        settings = tomllib.loads(content.decode())
    except OSError as error:
        return {}, [f"--config {path}: {error.strerror}"]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return {}, [f"--config {path}: not TOML: {error}"]
    known = {flag_of(parameter).replace("-", "_"): parameter for parameter in parameters}
    values: dict[str, Any] = {}
    problems = []
    for key, setting in settings.items():
        parameter = known.get(key.replace("-", "_"))
        if parameter is None or parameter.name in (None, "config", "help"):
            problems.append(f"--config {path}: unknown setting {key!r}; names are those of the flags")
            continue
        wrong = _wrong_kind(parameter, setting)
        if wrong:
            problems.append(f"--config {path}: {key} must be {wrong}, not {setting!r}")
        elif isinstance(parameter.type, click.Path):
            values[parameter.name] = str(path.parent / setting)
        else:
            values[parameter.name] = setting
    return values, problems


def _wrong_kind(parameter: click.Parameter, setting: object) -> str:
    """Return what kind of TOML value the flag takes if this is another, "" if it is right."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return "" if isinstance(setting, bool) else "true or false"
    if isinstance(parameter.type, type(click.INT)):
        return "" if isinstance(setting, int) and not isinstance(setting, bool) else "a whole number"
    if isinstance(parameter.type, type(click.FLOAT)):
        return "" if isinstance(setting, int | float) and not isinstance(setting, bool) else "a number"
    return "" if isinstance(setting, str) else "text in quotes"


def _read_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:  # noqa: ARG001 - click
    """Take defaults for flags from a TOML file. Raises `BadSettings`, after the good settings were taken.

    A file that is not there is no bad setting: raises `LocalError`, `NotYet` while it may still come.
    """
    if value is None:
        return None
    try:
        open_regular(value).close()
    except OSError as error:
        raise local_error(f"--config {value}: {error.strerror}", error) from None
    values, problems = read_settings(value, ctx.command.params)
    ctx.default_map = {**(ctx.default_map or {}), **values}
    if problems:
        raise BadSettings(problems, ctx)
    return value


def config_option(function: F) -> F:
    """Add --config FILE, whose settings are the defaults of the command's other flags."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="TOML file with defaults for the flags (names as here, with - or _; paths relative to the file).",
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


_COMMON: Final = (
    "store_url", "cluster_tls", "insecure_rpc", "listen", "http_listen", "name", "advertise", "allow_loopback",
    "log_level",
)  # fmt: skip


def role_options(default_listen: str) -> Callable[[F], F]:
    """Add the flags every role takes; the function receives them as `common: CommonOptions`."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapper(**values: Any) -> Any:
            role = click.get_current_context().command.name or "service"
            try:
                common = take_common(role, values)
            except ValueError as error:
                raise click.UsageError(str(error)) from None
            check_identity(common)
            return function(common=common, **values)

        decorated: Any = wrapper
        for option in reversed(_role_flags(default_listen)):
            decorated = option(decorated)
        decorated = cluster_tls_options(store_option(config_option(decorated)))
        for parameter in decorated.__click_params__:
            # click's own rule names the variable after the parameter, which need not be called like its flag
            parameter.envvar = [variable_of(parameter), *([parameter.envvar] if parameter.envvar else [])]
            parameter.allow_from_autoenv = False
        return cast("F", decorated)

    return decorate


def take_common(role: str, values: MutableMapping[str, Any]) -> CommonOptions:
    """Remove the common flags from `values` and return them with what they default to.

    Raises ValueError when there is no port for the probes.
    """
    taken: Mapping[str, Any] = {name: values.pop(name) for name in _COMMON}
    listen: Address = taken["listen"]
    return CommonOptions(
        store_url=taken["store_url"],
        cluster_tls=taken["cluster_tls"],
        insecure_rpc=taken["insecure_rpc"],
        listen=listen,
        http_listen=taken["http_listen"] or Address("127.0.0.1", _http_port(listen)),
        name=taken["name"] or f"{role}{listen}",
        advertise=taken["advertise"] or listen,
        allow_loopback=taken["allow_loopback"],
        log_level=taken["log_level"],
    )


def _http_port(listen: Address) -> int:
    """Return the default probe port: the RPC or edge port + 1000; 0 (ephemeral) stays 0."""
    if listen.port == 0:
        return 0
    port = listen.port + HTTP_PORT_OFFSET
    if port > 65535:
        raise ValueError(f"--listen port {listen.port} + {HTTP_PORT_OFFSET} is no port; give --http-listen")
    return port


def _role_flags(default_listen: str) -> list[Callable[[Any], Any]]:
    return [
        click.option(
            "--listen",
            "-l",
            type=ADDRESS,
            default=default_listen,
            show_default=True,
            help="Where the service listens.",
        ),
        click.option(
            "--http-listen",
            type=ADDRESS,
            help="Probes and metrics (/livez, /readyz, /metrics); default loopback, listen port + 1000.",
        ),
        click.option("--name", "-n", type=SERVICE_NAME, help="Name in logs and status; default ROLE + listen address."),
        click.option("--advertise", type=ADDRESS, help="Address others reach this service at; default --listen."),
        click.option("--allow-loopback", is_flag=True, help="Do not warn about advertising a loopback address."),
        click.option("--log-level", help="error, warning, info, debug or trace; default $LOGLEVEL or info."),
    ]


def identity_problems(common: CommonOptions, *, misread: Collection[str] = ()) -> list[str]:
    """Return why these identities and addresses cannot work, one line each.

    Nothing is said to be missing that is named in `misread`: parameters that were given, and were wrong.
    """
    problems = []
    if common.cluster_tls is None and not common.insecure_rpc and "cluster_tls" not in misread:
        problems.append(
            "--cluster-tls DIR is required: the cluster certificate of this service; "
            "issue one with `juicebox-hsm cluster ca issue`"
        )
    if common.insecure_rpc and not (common.listen.is_loopback and common.advertise.is_loopback):
        problems.append(f"--insecure-rpc works on loopback addresses only, not {common.listen}; use --cluster-tls")
    if common.advertise.is_unspecified:
        problems.append(f"--advertise {common.advertise}: others cannot reach this address; give --advertise HOST:PORT")
    return problems


def workers_problem(workers: int, listen: Address, http_listen: Address) -> str:
    """Return why so many workers cannot share these addresses, "" when they can."""
    if workers == 1 or (listen.port and http_listen.port):
        return ""
    return "--workers needs fixed ports in --listen and --http-listen"


def shutdown_problem(notice_s: float, timeout_s: float) -> str:
    """Return why these two do not go together, "" when they do: the notice is part of the shutdown."""
    if notice_s <= timeout_s:
        return ""
    return (
        f"--shutdown-notice-period {format_seconds(notice_s)} is above --shutdown-timeout {format_seconds(timeout_s)}, "
        "which includes it"
    )


def load_identity(common: CommonOptions, role: PeerRole) -> ClusterTls | None:
    """Read the service's cluster certificate, None with --insecure-rpc; raises `LocalError` naming the file."""
    if common.insecure_rpc or common.cluster_tls is None:
        return None
    try:
        return ClusterTls.load(common.cluster_tls, role)
    except LocalError as error:
        raise type(error)(f"--cluster-tls {error}") from None


def check_identity(common: CommonOptions) -> None:
    """Refuse identities and addresses that cannot work; raises `LocalError`."""
    problems = identity_problems(common)
    if problems:
        raise LocalError("; ".join(problems))
