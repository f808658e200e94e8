"""`cluster agents|groups|status|partitions`: what the agents say, as text or JSON (operator-tools.md 2)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import click

from juicebox_hsm.cluster_view import ClusterView, GroupView
from juicebox_hsm.ids import OwnedRange
from juicebox_hsm.ports import ServiceKind
from roles.manager.overview import read_overview
from roles.manager.planning import gaps
from roles.tools.cluster_ids import resolve_id, show_range, show_record_id
from roles.tools.cluster_output import (
    agents_json,
    groups_json,
    print_agents,
    print_groups,
    print_json,
    print_table,
    range_json,
)
from roles.tools.cluster_session import Connection, ExitCode, Session, end, open_session, run, with_connection

T = TypeVar("T")

OUTBOX_ROWS_WARN: Final = 100_000
OUTBOX_AGE_WARN_S: Final = 60.0


def read_view(connection: Connection) -> ClusterView:
    """Ask all discovered agents once."""

    async def body(session: Session) -> ClusterView:
        return await read_overview(session.store, session.rpc, session.now_ms())

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


def findings(view: ClusterView, managers: int) -> list[str]:
    """Return what is wrong with the cluster, one line each. Pure."""
    lines = [f"agent {agent.url} does not answer: {agent.error}" for agent in view.agents if agent.status is None]
    lines += [
        f"agent {agent.url} has no HSM"
        for agent in view.agents
        if agent.status is not None and agent.status.hsm is None
    ]
    if not managers:
        lines.append("no cluster manager in discovery: nobody appoints leaders")
    builds = sorted({agent.status.build for agent in view.agents if agent.status is not None})
    if len(builds) > 1:
        lines.append(f"agents run different versions: {', '.join(builds)}")
    for agent in view.agents:
        outbox = None if agent.status is None else agent.status.outbox
        if outbox is not None and (outbox.backlog > OUTBOX_ROWS_WARN or outbox.oldest_s > OUTBOX_AGE_WARN_S):
            lines.append(f"agent {agent.url}: {outbox.backlog} unpublished events, the oldest {outbox.oldest_s:.0f} s")
    for realm in view.realms:
        owned: list[OwnedRange] = []
        for group in view.groups_of(realm):
            lines += _group_findings(group)
            if group.owned_range is not None:
                owned.append(group.owned_range)
        lines += [f"realm {realm.hex()}: nobody serves {show_range(gap)}" for gap in gaps(owned)]
    return lines


def _group_findings(group: GroupView) -> list[str]:
    lines = []
    name = f"realm {group.realm.hex()} group {group.id.hex()}"
    missing = [hsm.hex() for hsm in group.configuration if group.member(hsm) is None]
    if 2 * len(group.members) <= len(group.configuration):
        lines.append(f"{name}: fewer than a majority of members answer; down: {', '.join(missing)}")
    elif missing:
        lines.append(f"{name}: members down: {', '.join(missing)}")
    leader = group.leader
    if leader is None:
        lines.append(f"{name}: nobody leads")
    elif leader.info.leader is not None and leader.info.leader.transferring is not None:
        marker = leader.info.leader.transferring
        way = "from" if marker.direction == "In" else "to"
        lines.append(f"{name}: transfer {way} {marker.peer.hex()} is pending since index {marker.at}")
    return lines


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@with_connection
def status(connection: Connection, *, as_json: bool) -> None:
    """Judge the cluster's health; one line for each problem, exit 5 when there is any."""

    async def body(session: Session) -> tuple[ClusterView, int, int]:
        services = await session.store.discovery.list(session.now_ms())
        view = await read_overview(session.store, session.rpc, session.now_ms())
        kinds = [service.kind for service in services]
        return view, kinds.count(ServiceKind.MANAGER), kinds.count(ServiceKind.LOAD_BALANCER)

    view, managers, balancers = with_session(connection, body)
    problems = findings(view, managers)
    if not balancers:
        problems.append("no load balancer in discovery: clients cannot reach the realm")
    if as_json:
        print_json(
            {
                "ok": not problems,
                "problems": problems,
                "agents": len(view.agents),
                "managers": managers,
                "load_balancers": balancers,
                "realms": len(view.realms),
                "groups": len(view.groups),
            }
        )
    else:
        click.echo(
            f"{len(view.realms)} realms, {len(view.groups)} groups, {len(view.hsms)} HSMs, {len(view.agents)} agents, "
            f"{managers} managers, {balancers} load balancers"
        )
        for problem in problems:
            click.echo(f"PROBLEM: {problem}")
        click.echo("trouble" if problems else "healthy")
    if problems:
        end(ExitCode.FINDINGS)
