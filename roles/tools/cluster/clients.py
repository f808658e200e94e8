"""`cluster tenant|configuration|auth-token`: what tenants and clients get (operator-tools.md 2.4, 2.5)."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Final

import click

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.addresses import parse_url
from juicebox_hsm.host.admission import REQUESTS_PER_OPERATION
from juicebox_hsm.host.cluster.view import ClusterView
from juicebox_hsm.host.services import ServiceKind, TenantLimits
from juicebox_hsm.ids import RealmId, parse_id
from juicebox_hsm.tenant_keys import TENANT_RULE, is_tenant_name, is_test_tenant
from juicebox_hsm.wire.methods import TENANTS_RELOAD
from juicebox_hsm.wire.rpc import Empty, TenantsReloaded
from roles.cloud_options import SecretsOptions, secrets_options
from roles.lazy import LazyCommand, LazyGroup
from roles.survey.overview import why_silent
from roles.tools.cluster.show import read_view, with_session
from roles.tools.ids import resolve_id
from roles.tools.output import print_json, print_table
from roles.tools.session import (
    STATUS_TIMEOUT_S,
    Connection,
    Session,
    ToolFailure,
    run,
    with_connection,
)

PIN_HASHING_MODES: Final = ("Standard2019", "FastInsecure")
TOKEN_LIFETIME_S: Final = 600
NO_LIMIT: Final = "tenant {} has no limit of its own; the agents' default applies"


def _check_tenant(tenant: str) -> None:
    if not is_tenant_name(tenant):
        raise ToolFailure(f"{tenant[:40]!r} is not a tenant name: {TENANT_RULE}", ExitCode.USAGE)


async def reload_tenants(session: Session) -> list[tuple[str, str]]:
    """Ask every agent to read the tenants' limits now; return (URL, what it said), sorted."""
    import trio

    said: list[tuple[str, str]] = []

    async def ask(url: str) -> None:
        try:
            reply = await session.rpc.call(url, TENANTS_RELOAD, Empty(), timeout_s=STATUS_TIMEOUT_S)
        except RealmError as error:
            said.append((url, f"did not reload, it will within 5 s: {why_silent(error, url)}"))
            return
        if isinstance(reply, TenantsReloaded):
            said.append((url, f"reloaded tenant config for {reply.tenants} tenants"))
        else:
            said.append((url, "did not reload: it cannot read the store"))

    urls = [entry.url for entry in await session.store.discovery.list(ServiceKind.AGENT)]
    async with trio.open_nursery() as nursery:
        for url in urls:
            nursery.start_soon(ask, url)
    return sorted(said)


@click.command("set-capacity")
@click.argument("tenant")
@click.argument("ops", type=click.IntRange(0, 1_000_000_000))
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@with_connection
def set_capacity(connection: Connection, tenant: str, ops: int, *, dry_run: bool) -> None:
    """Let TENANT run OPS operations per second; 0 blocks it.

    An operation is up to 3 HTTP requests, so OPS 10 admits 30 requests/s. The agents' --default-rate-limit for
    tenants without a setting is in HTTP requests: 10 of those are about 3.3 operations.
    """
    _check_tenant(tenant)

    async def body(session: Session) -> None:
        if dry_run:
            click.echo(f"Would limit tenant {tenant} to {ops} operations/s")
            return
        async with session.recorded("set-capacity", tenant=tenant, operations_per_s=str(ops)):
            await session.store.tenants.put(tenant, TenantLimits(ops))
        for url, text in await reload_tenants(session):
            click.echo(f"agent {url} {text}")

    with_session(connection, body)


@click.command("unset")
@click.argument("tenant")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@with_connection
def unset(connection: Connection, tenant: str, *, dry_run: bool) -> None:
    """Remove a tenant's limit; the agents' default applies again. Exit 3 when it has none."""
    _check_tenant(tenant)

    async def body(session: Session) -> None:
        if tenant not in await session.store.tenants.list():
            raise ToolFailure(NO_LIMIT.format(tenant), ExitCode.ID)
        if dry_run:
            click.echo(f"Would remove the limit of tenant {tenant}")
            return
        async with session.recorded("unset-capacity", tenant=tenant):
            await session.store.tenants.remove(tenant)
        for url, text in await reload_tenants(session):
            click.echo(f"agent {url} {text}")

    with_session(connection, body)


def _read_limits(connection: Connection) -> dict[str, TenantLimits]:
    from juicebox_hsm.adapters.stores.opening import open_store

    async def main() -> dict[str, TenantLimits]:
        async with open_store(connection.store, must_exist=True) as store:
            return await store.tenants.list()

    return run(main)


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@with_connection
def list_tenants(connection: Connection, *, as_json: bool) -> None:
    """Show all tenants that have a limit."""
    limits = sorted(_read_limits(connection).items())
    if as_json:
        print_json(
            {"tenants": [{"tenant": name, "capacity_ops_per_s": found.capacity_ops_per_s} for name, found in limits]}
        )
        return
    print_table(["Tenant", "Operations/s"], [(name, found.capacity_ops_per_s) for name, found in limits], right=[1])


@click.command("get")
@click.argument("tenant")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@with_connection
def get_tenant(connection: Connection, tenant: str, *, as_json: bool) -> None:
    """Show one tenant's limit."""
    found = _read_limits(connection).get(tenant)
    if found is None:
        raise ToolFailure(NO_LIMIT.format(tenant), ExitCode.ID)
    if as_json:
        print_json({"tenant": tenant, "capacity_ops_per_s": found.capacity_ops_per_s})
    else:
        requests = found.capacity_ops_per_s * REQUESTS_PER_OPERATION
        click.echo(f"{tenant}: {found.capacity_ops_per_s} operations/s ({requests} requests/s)")


@click.group(
    cls=LazyGroup,
    lazy={
        "set-capacity": LazyCommand(__name__, "Set a tenant's operations per second.", "set_capacity"),
        "list": LazyCommand(__name__, "Show all limits.", "list_tenants"),
        "get": LazyCommand(__name__, "Show one limit.", "get_tenant"),
        "unset": LazyCommand(__name__, "Remove a limit.", "unset"),
    },
)
def tenant() -> None:
    """Set and show tenants' limits."""


def realms_of(view: ClusterView, address: str) -> list[dict[str, str]]:
    """Return the client's realm entries: every discovered realm behind one address. Pure."""
    entries = []
    for realm in view.realms:
        key = next(hsm.public_key for hsm in view.hsms.values() if hsm.realm == realm)
        entries.append({"id": realm.hex(), "address": address, "public_key": key.hex()})
    return entries


def client_configuration(
    realms: Sequence[dict[str, str]],
    *,
    register_threshold: int | None = None,
    recover_threshold: int | None = None,
    pin_hashing_mode: str = PIN_HASHING_MODES[0],
) -> dict[str, Any]:
    """Return a client configuration; thresholds default to the number of realms. Raises `ToolFailure`."""
    count = len(realms)
    register, recover = register_threshold or count, recover_threshold or count
    if not count:
        raise ToolFailure("no realm found; create one with `cluster new-realm`", ExitCode.ID)
    if len({entry["id"] for entry in realms}) != count:
        raise ToolFailure("a realm appears twice", ExitCode.USAGE)
    if not count // 2 < recover <= register <= count:
        raise ToolFailure(
            f"thresholds must satisfy n/2 < recover <= register <= n; got recover {recover}, register {register}, "
            f"n {count}",
            ExitCode.USAGE,
        )
    return {
        "realms": list(realms),
        "register_threshold": register,
        "recover_threshold": recover,
        "pin_hashing_mode": pin_hashing_mode,
    }


def _check_url(url: str) -> None:
    """Refuse what no client could call."""
    try:
        parse_url(url, ("https", "http"))
    except ValueError as error:
        raise ToolFailure(
            f"not an address of a realm: {error}; expected https://HOST[:PORT]/", ExitCode.USAGE
        ) from None


def _parse_added(text: str) -> dict[str, str]:
    """Parse ID=URL[,KEY]."""
    realm, separator, rest = text.partition("=")
    address, _, key = rest.partition(",")
    try:
        entry = {"id": parse_id(realm.lower()).hex(), "address": address}
        if key:
            entry["public_key"] = bytes.fromhex(key).hex()
    except ValueError:
        separator = ""
        entry = {}
    if not separator or not address or len(entry.get("public_key", "0" * 64)) != 64:
        raise ToolFailure(f"--add {text}: expected ID=URL or ID=URL,KEY with 32 and 64 hex digits", ExitCode.USAGE)
    return entry


@click.command()
@click.argument("lb_url")
@click.option(
    "--add", "added", multiple=True, metavar="ID=URL[,KEY]", help="Add a realm; without KEY a software realm."
)
@click.option("--register-threshold", type=click.IntRange(1), help="Realms a registration needs; default all.")
@click.option("--recover-threshold", type=click.IntRange(1), help="Realms a recovery needs; default all.")
@click.option(
    "--pin-hashing-mode",
    type=click.Choice(PIN_HASHING_MODES),
    default=PIN_HASHING_MODES[0],
    show_default=True,
    help="How clients stretch PINs; FastInsecure is for tests.",
)
@with_connection
def configuration(
    connection: Connection,
    lb_url: str,
    added: tuple[str, ...],
    register_threshold: int | None,
    recover_threshold: int | None,
    pin_hashing_mode: str,
) -> None:
    """Print the client configuration for all discovered realms behind LB_URL, which is not contacted."""
    for url in (lb_url, *(text.partition("=")[2].partition(",")[0] for text in added)):
        _check_url(url)
    entries = realms_of(read_view(connection), lb_url) + [_parse_added(text) for text in added]
    click.echo(
        json.dumps(
            client_configuration(
                entries,
                register_threshold=register_threshold,
                recover_threshold=recover_threshold,
                pin_hashing_mode=pin_hashing_mode,
            )
        )
    )


@click.command("auth-token")
@click.option("-t", "--tenant", "tenant_name", required=True, help="Tenant; must start with test-.")
@click.option("-u", "--user", required=True, help="User id.")
@click.option("-r", "--realm", required=True, help="Realm id or a prefix of it.")
@click.option(
    "-s",
    "--scope",
    type=click.Choice(["user", "audit"]),
    default="user",
    show_default=True,
    help="What the token admits to: the realm, or the tenant log.",
)
@with_connection
@secrets_options
def auth_token(
    connection: Connection, tenant_name: str, user: str, realm: str, scope: str, secrets: SecretsOptions
) -> None:
    """Mint a token for a test tenant with the latest version of its key; it lives 10 minutes."""
    from juicebox_hsm.tokens import Scope, create
    from roles.tools.tenant_key import latest_key

    if not is_test_tenant(tenant_name):
        raise ToolFailure(f"{tenant_name}: tokens are minted for tenants test-... only", ExitCode.USAGE)
    version, key = latest_key(secrets, connection.store_url or "", tenant_name)
    known = [] if len(realm) == 32 else read_view(connection).realms
    token = create(
        key,
        tenant=tenant_name,
        version=version,
        user=user,
        realm=RealmId(resolve_id(realm, known, "realm")),
        now_s=int(time.time()),
        lifetime_s=TOKEN_LIFETIME_S,
        scope=Scope(scope),
    )
    click.echo(token)
