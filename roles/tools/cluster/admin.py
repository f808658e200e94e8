"""`cluster leases|discovery|ca`: the cluster's own records and certificates (operator-tools.md 2)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import click

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.wire.rpc import PeerRole
from roles.durations import format_duration
from roles.lazy import LazyCommand, LazyGroup
from roles.tools.output import print_json, print_table
from roles.tools.recording import recorded
from roles.tools.session import (
    Connection,
    ToolFailure,
    operator_of,
    run,
    with_connection,
)

_KIND_NAMES = {
    ServiceKind.AGENT: "agent",
    ServiceKind.MANAGER: "manager",
    ServiceKind.LOAD_BALANCER: "lb",
}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@with_connection
def leases(connection: Connection, *, as_json: bool) -> None:
    """Show the management leases: who is changing which group or realm."""
    from juicebox_hsm.adapters.stores.opening import open_store
    from juicebox_hsm.host.services import Lease

    async def main() -> list[Lease]:
        async with open_store(connection.store, must_exist=True) as store:
            return await store.leases.list()

    found, now_ms = run(main), _now_ms()
    if as_json:
        print_json(
            {
                "leases": [
                    {"name": lease.name, "owner": lease.owner, "expires_in_ms": lease.expires_ms - now_ms}
                    for lease in found
                ]
            }
        )
        return
    rows = [
        (lease.name, lease.owner, f"in {left} ms" if (left := lease.expires_ms - now_ms) >= 0 else "expired")
        for lease in found
    ]
    print_table(["Lease", "Owner", "Expires"], rows)


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@with_connection
def discovery_list(connection: Connection, *, as_json: bool) -> None:
    """Show the registered services and when they last registered."""
    from juicebox_hsm.adapters.stores.opening import open_store
    from juicebox_hsm.host.services import ServiceAddress

    async def main() -> list[ServiceAddress]:
        async with open_store(connection.store, must_exist=True) as store:
            return await store.discovery.list()

    found, now_ms = run(main), _now_ms()
    if as_json:
        print_json(
            {
                "services": [
                    {"kind": _KIND_NAMES[entry.kind], "url": entry.url, "registered_ms": entry.registered_ms}
                    for entry in found
                ]
            }
        )
        return
    rows = [
        (_KIND_NAMES[entry.kind], entry.url, f"{format_duration((now_ms - entry.registered_ms) / 1000)} ago")
        for entry in found
    ]
    print_table(["Kind", "URL", "Registered"], rows)


@click.command("remove")
@click.argument("url")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@with_connection
def discovery_remove(connection: Connection, url: str, *, dry_run: bool) -> None:
    """Remove a registration, for instance of a service that is gone for good. A living one registers again."""
    from juicebox_hsm.adapters.stores.opening import open_store

    who = operator_of(connection)

    async def main() -> int:
        async with open_store(connection.store, must_exist=True) as store:
            entries = [entry for entry in await store.discovery.list() if entry.url == url]
            for entry in () if dry_run else entries:
                async with recorded(
                    store.audit, who, _now_ms, "discovery-remove", kind=_KIND_NAMES[entry.kind], url=url
                ):
                    await store.discovery.deregister(entry.kind, entry.url)
            return len(entries)

    if not run(main):
        raise ToolFailure(f"{url} is not registered; `cluster discovery list` shows what is", ExitCode.ID)
    click.echo(f"Would remove {url}" if dry_run else f"Removed {url}")


@click.group(
    cls=LazyGroup,
    lazy={
        "list": LazyCommand(__name__, "Show the registered services.", "discovery_list"),
        "remove": LazyCommand(__name__, "Remove a registration.", "discovery_remove"),
    },
)
def discovery() -> None:
    """List or remove service registrations."""


@click.command("init")
@click.option(
    "--dir", "directory", required=True, type=click.Path(path_type=Path, file_okay=False), help="Directory to create."
)
@click.option("--edge", is_flag=True, help="Make the CA of the load balancers' edge instead; clients trust it.")
def ca_init(directory: Path, *, edge: bool) -> None:
    """Make a certificate authority for the cluster, valid 10 years. Keep its key off the services' machines.

    What is done with it is recorded in its directory: `cluster audit --ca DIR`.
    """
    from juicebox_hsm.adapters.tls.certificates import CaKind, init_ca, make_directory

    make_directory(directory)
    kind = CaKind.EDGE if edge else CaKind.CLUSTER
    _recorded_by_ca(directory, "ca-init", lambda: init_ca(directory, kind=kind), kind=kind.name.lower())
    click.echo(f"Created {directory / 'ca.pem'} and {directory / 'ca-key.pem'}")


@click.command("issue")
@click.option(
    "--dir", "directory", required=True, type=click.Path(path_type=Path, file_okay=False), help="Directory of the CA."
)
@click.option(
    "--role", required=True, type=click.Choice([role.value for role in PeerRole]), help="What the holder may do."
)
@click.option("--name", required=True, help="Name of the holder, for people.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Directory for --cluster-tls."
)
@click.option("--days", type=click.IntRange(1, 3650), default=90, show_default=True, help="How long it is valid.")
def ca_issue(directory: Path, role: str, name: str, out: Path, days: int) -> None:
    """Issue a cluster certificate: ca.pem, cert.pem and key.pem in the directory OUT."""
    from juicebox_hsm.adapters.tls.certificates import issue

    if not directory.is_dir():  # there is nothing to record in; this says what to do
        issue(directory, role, name, out, days)
    named = {"role": role, "name": name, "days": str(days), "out": str(out)}
    _recorded_by_ca(directory, "ca-issue", lambda: issue(directory, role, name, out, days), **named)
    click.echo(f"Issued a certificate for role {role}, {days} days, in {out}")


def _recorded_by_ca(directory: Path, action: str, work: Callable[[], None], **arguments: str) -> None:
    """Do something with a CA, and record it in the CA's own directory: it is kept where no store is."""
    from juicebox_hsm.adapters.process.threads import in_thread_or_here
    from juicebox_hsm.adapters.tls.ca_trail import CaTrail

    async def main() -> None:
        async with recorded(CaTrail(directory), "", _now_ms, action, **arguments):
            await in_thread_or_here(work)

    run(main)


@click.group(
    cls=LazyGroup,
    lazy={
        "init": LazyCommand(__name__, "Make a certificate authority.", "ca_init"),
        "issue": LazyCommand(__name__, "Issue a certificate.", "ca_issue"),
    },
)
def ca() -> None:
    """Make the cluster's certificate authority and certificates."""
