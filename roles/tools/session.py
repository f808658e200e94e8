"""What every `cluster` command shares: flags, exit codes, a session with store and agents (operator-tools.md 1)."""

from __future__ import annotations

import datetime as dt
import functools
import os
import random
import ssl
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import click

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.errors import LocalError, NoStore, RealmError
from juicebox_hsm.ports.rpc import RpcCaller
from juicebox_hsm.wire.methods import MANAGER_STATUS, Method, Reply, Request
from juicebox_hsm.wire.rpc import Empty, PeerRole, Refusal, Refused, RpcCode
from roles.options import ENVIRONMENT_PREFIX
from roles.store_options import NAMES as BIGTABLE_NAMES
from roles.store_options import STORE_HELP, VARIABLES, bigtable_flags, store_url_of
from roles.tools.recording import recorded

T = TypeVar("T")

STATUS_TIMEOUT_S: Final = 5.0  # to be answered at all (operator-tools.md 1)
COMMAND_TIMEOUT_S: Final = 30.0  # own: for the work itself, asked of a service that just answered: hand-overs, commits
TRANSFER_TIMEOUT_S: Final = 150.0
_CONFIG_KEYS: Final = frozenset({"store", "cluster_tls", "insecure_rpc"})
_TRUE: Final = frozenset({"1", "true", "t", "yes", "y", "on"})
_NOT_FOUND: Final = frozenset({Refusal.INVALID_REALM, Refusal.INVALID_GROUP, Refusal.INVALID_HSM})
_SHARED: Final = "roles.tools.cluster.command.shared"


class ToolFailure(click.ClickException):
    """One line for the operator, and the exit code that goes with it."""

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.exit_code = int(code)  # type: ignore[misc]  # click's own subclasses do the same

    def show(self, file: Any = None) -> None:
        """Print the line to stderr."""
        click.echo(f"juicebox-hsm: {self.format_message()}", file=file, err=file is None)


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach the cluster, as the flags and the configuration file say."""

    store_url: str | None = None
    cluster_tls: Path | None = None
    insecure_rpc: bool = False

    @property
    def store(self) -> str:
        """Return the store's URL, or fail as a usage error."""
        if self.store_url is None:
            raise ToolFailure("--store URL is required (or --config FILE that names it)", ExitCode.USAGE)
        return self.store_url


def read_config(path: Path) -> dict[str, Any]:
    """Read cluster.toml: `store`, `cluster_tls`, `insecure_rpc`. Raises `ToolFailure` naming file and key."""
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ToolFailure(f"--config {path}: {error.strerror}", ExitCode.USAGE) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ToolFailure(f"--config {path}: not TOML: {error}", ExitCode.USAGE) from None
    settings = {key.replace("-", "_"): value for key, value in settings.items()}
    for key in settings:
        if key not in _CONFIG_KEYS:
            raise ToolFailure(
                f"--config {path}: unknown setting {key!r}; known are {', '.join(sorted(_CONFIG_KEYS))}",
                ExitCode.USAGE,
            )
    for key in ("store", "cluster_tls"):
        if key in settings and not isinstance(settings[key], str):
            raise ToolFailure(f"--config {path}: {key} must be text", ExitCode.USAGE)
    return settings


@dataclass(frozen=True, slots=True)
class _Given:
    """What was said so far, by source; within a source the subcommand counts before its group."""

    flags: Connection = Connection()
    file: Connection = Connection()

    def connection(self) -> Connection:
        """Return flags before environment before file."""
        found = Connection()
        for source in (self.file, _from_environment(), self.flags):
            found = _over(found, source)
        return found


def _over(below: Connection, above: Connection) -> Connection:
    return Connection(
        store_url=above.store_url or below.store_url,
        cluster_tls=above.cluster_tls or below.cluster_tls,
        insecure_rpc=above.insecure_rpc or below.insecure_rpc,
    )


def _from_environment() -> Connection:
    """Read the variables of store and identity: ours, and JB_GCP_PROJECT and JB_BIGTABLE (operator-tools.md 11)."""
    directory = os.environ.get(f"{ENVIRONMENT_PREFIX}_CLUSTER_TLS")
    insecure = os.environ.get(f"{ENVIRONMENT_PREFIX}_INSECURE_RPC", "").strip().lower()
    return Connection(
        store_url=store_url_of(
            os.environ.get(f"{ENVIRONMENT_PREFIX}_STORE") or None,
            {name: os.environ.get(variable) for name, variable in VARIABLES.items()},
        ),
        cluster_tls=Path(directory) if directory else None,
        insecure_rpc=insecure in _TRUE,
    )


def _merge(before: _Given, values: dict[str, Any]) -> _Given:
    """Take the connection flags out of `values`."""
    variable = os.environ.get(f"{ENVIRONMENT_PREFIX}_CONFIG")
    config: Path | None = values.pop("config") or (Path(variable) if variable and before == _Given() else None)
    file = Connection()
    if config is not None:
        settings = read_config(config)
        directory = settings.get("cluster_tls")
        file = Connection(
            store_url=settings.get("store"),
            # an absolute path stays itself
            cluster_tls=None if directory is None else config.parent / directory,
            insecure_rpc=bool(settings.get("insecure_rpc")),
        )
    given = {name: values.pop(name) for name in BIGTABLE_NAMES}
    try:
        store_url = store_url_of(values.pop("store_url"), given)
    except ValueError as error:
        raise ToolFailure(str(error), ExitCode.USAGE) from None
    flags = Connection(store_url, values.pop("cluster_tls"), values.pop("insecure_rpc"))
    return _Given(_over(before.flags, flags), _over(before.file, file))


def _flags(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        (
            *bigtable_flags(hidden=True),
            click.option("--store", "store_url", metavar="URL", help=STORE_HELP),
            click.option(
                "--cluster-tls",
                type=click.Path(path_type=Path, file_okay=False),
                help="Directory with an operator certificate: ca.pem, cert.pem, key.pem.",
            ),
            click.option(
                "--insecure-rpc", is_flag=True, help="Plain TCP to services on loopback addresses; for tests."
            ),
            click.option(
                "--config",
                type=click.Path(path_type=Path, dir_okay=False),
                help="cluster.toml with `store` and `cluster_tls`.",
            ),
        )
    ):
        # the environment is read once for group and subcommand together, so that it never hides a flag of the group
        function = option(function)
    for parameter in function.__click_params__[-4 - len(BIGTABLE_NAMES) :]:  # type: ignore[attr-defined]  # click keeps them there
        parameter.allow_from_autoenv = False
    return function


def remember_connection(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a group take the connection flags before the subcommand."""

    @functools.wraps(function)
    def wrapper(**values: Any) -> Any:
        context = click.get_current_context()
        context.meta[_SHARED] = _merge(context.meta.get(_SHARED, _Given()), values)
        return function(**values)

    return _flags(wrapper)


def with_connection(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command take the connection flags; it receives `connection`."""

    @functools.wraps(function)
    def wrapper(**values: Any) -> Any:
        given = _merge(click.get_current_context().meta.get(_SHARED, _Given()), values)
        return function(connection=given.connection(), **values)

    return _flags(wrapper)


@dataclass(frozen=True, slots=True)
class Session:
    """An opened store and a pool of streams to agents and managers.

    `who` is role and name of our certificate, "" without one; `certificate_end` is when it ends.
    """

    store: Any
    rpc: RpcCaller
    certificate_end: dt.datetime | None = None
    who: str = ""

    @staticmethod
    def now_ms() -> int:
        """Return Unix time in ms."""
        return time.time_ns() // 1_000_000

    def recorded(self, action: str, **arguments: str) -> AbstractAsyncContextManager[None]:
        """Record in the audit trail a change that the body makes; see `recording.recorded`."""
        return recorded(self.store.audit, self.who, self.now_ms, action, **arguments)


@asynccontextmanager
async def open_session(connection: Connection) -> AsyncIterator[Session]:
    """Open the store and a pool with the operator's certificate."""
    import trio

    from juicebox_hsm.adapters.rpc import RpcPool
    from juicebox_hsm.adapters.stores.opening import open_store

    tls = load_cluster_tls(connection)
    async with open_store(connection.store, must_exist=True) as store, trio.open_nursery() as nursery:
        try:
            yield Session(store, RpcPool(nursery, tls), None if tls is None else tls.not_after, who_of(tls))
        finally:
            nursery.cancel_scope.cancel()


def who_of(tls: Any) -> str:
    """Return role and name of a cluster identity as services see them, "" without one."""
    return "" if tls is None else f"{tls.identity.role.value}/{tls.identity.name}"


def operator_of(connection: Connection) -> str:
    """Return `who_of` the operator's certificate, for commands that work without one, too. Fails as loading it does."""
    return "" if connection.cluster_tls is None else who_of(load_cluster_tls(connection))


def load_cluster_tls(connection: Connection) -> Any:
    """Load the operator's certificate; None with --insecure-rpc. Fails: exit 2 without one, 4 naming the file."""
    if connection.insecure_rpc:
        return None
    if connection.cluster_tls is None:
        raise ToolFailure(
            "--cluster-tls DIR is required: an operator certificate; "
            "issue one with `juicebox-hsm cluster ca issue --role operator`",
            ExitCode.USAGE,
        )
    from juicebox_hsm.adapters.tls.cluster_tls import ClusterTls
    from juicebox_hsm.adapters.tls.wording import reason_of

    try:
        return ClusterTls.load(connection.cluster_tls, PeerRole.OPERATOR)
    except (LocalError, OSError, ssl.SSLError) as error:
        raise ToolFailure(f"--cluster-tls {connection.cluster_tls}: {reason_of(error)}", ExitCode.UNREACHABLE) from None


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Run a command's async body; errors leave as they would without nurseries around them."""
    import trio

    try:
        return trio.run(main)
    except (BaseExceptionGroup, RealmError) as error:
        problem = first_leaf(error)
    raise for_operator(problem) from None


def first_leaf(error: BaseException) -> BaseException:
    """Return the most telling exception in nested groups: a broken invariant or bug before a failed operation."""
    leaves = [error]
    while any(isinstance(leaf, BaseExceptionGroup) for leaf in leaves):
        leaves = [
            inner for leaf in leaves for inner in (leaf.exceptions if isinstance(leaf, BaseExceptionGroup) else [leaf])
        ]
    expected = (RealmError, click.ClickException, click.exceptions.Exit)
    return next((leaf for leaf in leaves if not isinstance(leaf, expected)), leaves[0])


def for_operator(problem: BaseException) -> BaseException:
    """Return an expected failure as one line with its exit code; anything else as it is."""
    if isinstance(problem, NoStore):
        return ToolFailure(str(problem), ExitCode.ID)
    if isinstance(problem, LocalError):
        return ToolFailure(str(problem))
    if isinstance(problem, RealmError):
        return ToolFailure(str(problem) or type(problem).__name__, ExitCode.UNREACHABLE)
    return problem


async def call_manager(
    session: Session, url: str | None, method: Method[Request, Reply], body: Request, *, timeout_s: float
) -> Reply:
    """Call a manager: the given one, else those in discovery in random order until one answers.

    A manager must say its status within 5 s; only then is it asked to work, which may take `timeout_s`.
    """
    from juicebox_hsm.adapters.rpc import RpcFailed, RpcUnreachable
    from juicebox_hsm.host.services import ServiceKind
    from roles.survey.overview import why_silent

    if url is not None:
        urls = [url]
    else:
        urls = [entry.url for entry in await session.store.discovery.list(ServiceKind.MANAGER)]
        random.SystemRandom().shuffle(urls)
    if not urls:
        raise ToolFailure(
            "no cluster manager in discovery; start one (juicebox-hsm --role manager) or name one with -c URL",
            ExitCode.UNREACHABLE,
        )
    problems = []
    for candidate in urls:
        try:
            await _greet(session, candidate)
            return await session.rpc.call(candidate, method, body, timeout_s=timeout_s)
        except RpcFailed as error:
            if error.code is not RpcCode.SHUTTING_DOWN:
                raise ToolFailure(
                    f"manager {candidate}: {why_silent(error, candidate)}", _code_of(error.code)
                ) from None
            problems.append(f"{candidate}: shutting down")
        except RpcUnreachable as error:
            problems.append(str(error))
    raise ToolFailure(f"no manager answered: {'; '.join(problems)}", ExitCode.UNREACHABLE)


async def _greet(session: Session, url: str) -> None:
    """Ask a manager for its status. Raises `RpcUnreachable` when it says nothing in time, and what `call` raises."""
    from juicebox_hsm.adapters.rpc import RpcFailed, RpcUnreachable

    try:
        await session.rpc.call(url, MANAGER_STATUS, Empty(), timeout_s=STATUS_TIMEOUT_S)
    except RpcFailed as error:
        if error.code is not RpcCode.DEADLINE_EXCEEDED:
            raise
        raise RpcUnreachable(f"{url}: no answer within {STATUS_TIMEOUT_S:.0f} s", maybe_delivered=False) from None


def _code_of(code: RpcCode) -> ExitCode:
    return ExitCode.UNREACHABLE if code in (RpcCode.FORBIDDEN, RpcCode.DEADLINE_EXCEEDED) else ExitCode.FAILED


def refusal_text(reply: Refused, texts: Mapping[Refusal, str]) -> str:
    """Return what a refusal means, with its detail."""
    said = texts.get(reply.outcome, reply.outcome.value)
    return f"{said}: {reply.detail}" if reply.detail else said


def refused(reply: Refused, texts: Mapping[Refusal, str], before: str = "") -> ToolFailure:
    """Return a manager's refusal as a failure: exit 3 when it knows no such realm, group or HSM, else 1."""
    code = ExitCode.ID if reply.outcome in _NOT_FOUND else ExitCode.FAILED
    return ToolFailure(f"{before}{refusal_text(reply, texts)}", code)


def end(code: ExitCode) -> NoReturn:
    """End the command with this exit code after its output is complete."""
    sys.stdout.flush()
    raise click.exceptions.Exit(int(code))
