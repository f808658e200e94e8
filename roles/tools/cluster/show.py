"""`cluster agents|groups|partitions`: what the agents say, as text or JSON (operator-tools.md 2)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import click

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.host.cluster.ranges import show_record_id
from juicebox_hsm.host.cluster.view import ClusterView, GroupView
from roles.survey.overview import read_overview
from roles.tools.ids import resolve_id
from roles.tools.output import (
    agents_json,
    groups_json,
    print_agents,
    print_groups,
    print_json,
    print_table,
    range_json,
)
from roles.tools.session import Connection, Session, end, open_session, run, with_connection

T = TypeVar("T")


def read_view(connection: Connection) -> ClusterView:
    """Ask all discovered agents once."""

    async def body(session: Session) -> ClusterView:
        return await read_overview(session.store, session.rpc)

    return with_session(connection, body)


def with_session(connection: Connection, body: Callable[[Session], Awaitable[T]]) -> T:
    """Run `body` with an opened session."""

    async def main() -> T:
        async with open_session(connection) as session:
            return await body(session)

    return run(main)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@with_connection
def agents(connection: Connection, *, as_json: bool) -> None:
    """Show every agent in discovery with its HSM, realm and groups. Exit 5 when one does not answer."""
    view = read_view(connection)
    if as_json:
        print_json(agents_json(view))
    else:
        print_agents(view)
    if any(agent.status is None for agent in view.agents):
        end(ExitCode.FINDINGS)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@with_connection
def groups(connection: Connection, *, as_json: bool) -> None:
    """Show every group: owned range, and a row for each configured member."""
    view = read_view(connection)
    if as_json:
        print_json(groups_json(view))
    else:
        print_groups(view)


@click.command()
@click.argument("realm", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@with_connection
def partitions(connection: Connection, realm: str | None, *, as_json: bool) -> None:
    """Show which group owns which range, by start, for REALM (an id or a prefix) or for all."""
    view = read_view(connection)
    realms = view.realms if realm is None else [resolve_id(realm, view.realms, "realm")]
    document = []
    for wanted in realms:
        owning = sorted(
            (group for group in view.groups_of(wanted) if group.owned_range is not None),
            key=lambda group: group.owned_range.start if group.owned_range else b"",
        )
        rows = [(group.id.hex(), group.owned_range, _committed(group)) for group in owning]
        document.append(
            {
                "realm": wanted.hex(),
                "partitions": [
                    {"group": group.id.hex(), **(range_json(group) or {}), "committed": _committed(group)}
                    for group in owning
                ],
            }
        )
        if not as_json:
            click.echo(f"realm: {wanted.hex()}")
            cells = [
                (name, show_record_id(owned.start), show_record_id(owned.end), committed)
                for name, owned, committed in rows
                if owned is not None
            ]
            print_table(["Group ID", "Start", "End", "Commit Index"], cells, right=[3])
    if as_json:
        print_json({"realms": document})


def _committed(group: GroupView) -> int | None:
    leader = group.leader
    return None if leader is None or leader.info.leader is None else leader.info.leader.committed
