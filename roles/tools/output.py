"""Text and JSON as the `cluster` commands print them: plain tables, stable field names (operator-tools.md 1, 2)."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final

import click

from juicebox_hsm.host.cluster.ranges import show_range
from juicebox_hsm.host.cluster.view import ClusterView, GroupView, Member, group_work, hsm_work, owned_range
from juicebox_hsm.ids import HsmId
from juicebox_hsm.wire.rpc import Direction, GroupInfo, TransferringInfo
from roles.durations import format_duration
from roles.survey.shown import led_by, short, tolerance

WIDTH_MAX: Final = 100_000  # columns a table may take where nobody's window limits it


def show_text(text: str) -> str:
    """Return text of others for one line of a terminal: what would move its cursor or change its colours is escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def print_json(document: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(document, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = ()) -> None:
    """Print a table with `+---+` borders; columns named in `right` are right-aligned.

    On a terminal too narrow for it each row becomes a block of lines `column: value` instead: nothing is ever cut off.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.ASCII2, header_style="")
    numeric = set(right)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in numeric else "left", no_wrap=True)
    cells = [[str(cell) for cell in row] for row in rows]
    for row in cells:
        table.add_row(*row)
    # as wide as it needs, whatever the terminal
    console = Console(width=WIDTH_MAX, highlight=False, color_system=None, markup=False)
    if sys.stdout.isatty() and console.measure(table).maximum > shutil.get_terminal_size().columns:
        _print_blocks(columns, cells)
    else:
        console.print(table)


def _print_blocks(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows one below the other, a blank line after each; empty cells are left out."""
    label_width = max(map(len, columns)) + 1
    for row in rows:
        for column, cell in zip(columns, row, strict=True):
            if cell:
                click.echo(f"  {f'{column}:' if column else '':{label_width}} {cell}")
        click.echo()


def range_json(group: GroupView | None, member: Member | None = None) -> dict[str, str] | None:
    """Return a range as two hex members, or None."""
    value = member.owned_range if member is not None else (None if group is None else group.owned_range)
    return None if value is None else {"start": value.start.hex(), "end": value.end.hex()}


def transfer_json(marker: TransferringInfo | None) -> dict[str, Any] | None:
    """Return a pending transfer."""
    if marker is None:
        return None
    return {
        "direction": marker.direction.value.lower(),
        "peer": marker.peer.hex(),
        "at": marker.at,
        "start": marker.range.start.hex(),
        "end": marker.range.end.hex(),
    }


def agents_json(view: ClusterView) -> dict[str, Any]:
    """Return the `agents --json` document."""
    agents = []
    for agent in view.agents:
        entry: dict[str, Any] = {"url": agent.url, "error": agent.error or None}
        status = agent.status
        if status is not None:
            hsm = None if status.hsm is None else view.hsms.get(HsmId(status.hsm.id))
            entry |= {"name": status.name, "build": status.build, "uptime_s": round(status.uptime_s, 1)}
            if status.outbox is not None:
                entry["outbox"] = {"backlog": status.outbox.backlog, "oldest_s": status.outbox.oldest_s}
            if hsm is not None:
                entry["hsm"] = {
                    "id": hsm.id.hex(),
                    "public_key": hsm.public_key.hex(),
                    "realm": None if hsm.realm is None else hsm.realm.hex(),
                    "work": hsm_work(view, hsm),
                    "groups": [info.id.hex() for info in hsm.groups],
                    "memberships": [
                        membership_json(view, group, member, info)
                        for info in hsm.groups
                        if (group := view.group(hsm.realm or b"", info.id)) is not None
                        and (member := group.member(hsm.id)) is not None
                    ],
                }
        agents.append(entry)
    return {"agents": agents}


def membership_json(view: ClusterView, group: GroupView, member: Member, info: GroupInfo) -> dict[str, Any]:
    """Return what one HSM says about one of its groups; its own fields of leading are None at a witness."""
    own = member.agent if member.agent is not None and member.agent.leading else None
    leader = info.leader
    return {
        "group": info.id.hex(),
        "role": info.role.name.value,
        "role_clock": info.role.at,
        "work": group_work(view, group, member),
        "committed": None if leader is None else leader.committed,
        "owned_range": range_json(None, member),
        "transferring": transfer_json(None if leader is None else leader.transferring),
        "configuration": [hsm.hex() for hsm in group.configuration],
        "captured": None if info.captured is None else {"index": info.captured[0], "entry_mac": info.captured[1].hex()},
        "last_appended": None if own is None or own.last_appended is None else own.last_appended[0],
        "append_queue_len": None if own is None else own.append_queue_len,
        "waiting_clients": None if own is None else own.waiting_clients,
        "requests_per_s": None if own is None else round(own.requests_per_s, 2),
    }


def member_json(group: GroupView, hsm: HsmId) -> dict[str, Any]:
    """Return one row of a group."""
    member = group.member(hsm)
    if member is None:
        return {"hsm": hsm.hex(), "error": "not found"}
    own = member.agent
    leader = group.leader
    lag = None
    if leader is not None and leader.captured_index is not None:
        lag = leader.captured_index - (member.captured_index or 0)
    return {
        "hsm": hsm.hex(),
        "agent": member.name,
        "url": member.url,
        "role": member.info.role.name.value,
        "role_clock": member.info.role.at,
        "captured": member.captured_index,
        "lag": lag,
        "committed": None if member.info.leader is None else member.info.leader.committed,
        "last_appended": own.last_appended[0] if own is not None and own.last_appended is not None else None,
        "append_queue_len": own.append_queue_len if own is not None else 0,
        "waiting_clients": own.waiting_clients if own is not None else 0,
        "requests_per_s": round(own.requests_per_s, 2) if own is not None else 0.0,
    }


def groups_json(view: ClusterView) -> dict[str, Any]:
    """Return the `groups --json` document."""
    realms = []
    for realm in view.realms:
        groups = []
        for group in view.groups_of(realm):
            leader = group.leader
            info = None if leader is None else leader.info.leader
            groups.append(
                {
                    "id": group.id.hex(),
                    "leader": None if leader is None else leader.hsm.hex(),
                    "owned_range": range_json(group),
                    "transferring": transfer_json(None if info is None else info.transferring),
                    "members": [member_json(group, hsm) for hsm in group.configuration],
                }
            )
        realms.append({"id": realm.hex(), "groups": groups})
    return {"realms": realms}


def print_agents(view: ClusterView) -> None:
    """Print one block per agent."""
    click.echo(f"found {len(view.agents)} agents in service discovery")
    for agent in view.agents:
        click.echo(f"\nagent: {agent.url}")
        if agent.status is None:
            click.echo(f"  error: {agent.error}")
            continue
        status = agent.status
        click.echo(f"  name: {status.name}  build: {status.build}  uptime: {format_duration(status.uptime_s)}")
        hsm = None if status.hsm is None else view.hsms.get(HsmId(status.hsm.id))
        if hsm is None:
            click.echo("  no HSM found")
            continue
        click.echo(f"  hsm: {hsm.id.hex()}  total workload: {hsm_work(view, hsm)}")
        click.echo(f"  public key: {hsm.public_key.hex()}")
        click.echo(f"  realm: {'no realm' if hsm.realm is None else hsm.realm.hex()}")
        if status.outbox is not None and status.outbox.backlog:
            click.echo(f"  outbox: {status.outbox.backlog} events, oldest {status.outbox.oldest_s:.1f} s")
        for info in hsm.groups:
            group = view.group(hsm.realm or b"", info.id)
            member = None if group is None else group.member(hsm.id)
            if group is not None and member is not None:
                _print_membership(view, group, member, info)


def _print_membership(view: ClusterView, group: GroupView, member: Member, info: GroupInfo) -> None:
    click.echo(
        f"  group: {info.id.hex()}  role: {info.role.name.value} at {info.role.at}  "
        f"workload: {group_work(view, group, member)}"
    )
    if info.leader is not None:
        click.echo(f"    committed: {info.leader.committed}  owns: {show_range(owned_range(info.leader.owned_range))}")
        marker = info.leader.transferring
        if marker is not None:
            way = "from" if marker.direction is Direction.IN else "to"
            click.echo(
                f"    transferring {show_range(owned_range(marker.range))} {way} {marker.peer.hex()} at {marker.at}"
            )
    members = ", ".join(f"{hsm.hex()}{' (self)' if hsm == member.hsm else ''}" for hsm in group.configuration)
    click.echo(f"    configuration: {members}")
    if info.captured is not None:
        click.echo(f"    captured: {info.captured[0]} {info.captured[1].hex()[:16]}...")
    own = member.agent
    if own is not None and own.leading:
        appended = "none" if own.last_appended is None else f"{own.last_appended[0]}"
        click.echo(
            f"    agent: {own.waiting_clients} waiting clients, append queue {own.append_queue_len}, "
            f"last appended {appended}, {own.requests_per_s:.1f} requests/s"
        )


def print_groups(view: ClusterView) -> None:
    """Print each realm's groups with a table of members, 80 columns wide with names of up to 12 characters."""
    columns = ["HSM", "Agent", "Role", "Captured", "Behind", "Queued", "Waiting"]
    for realm in view.realms:
        click.echo(f"realm: {realm.hex()}")
        for group in view.groups_of(realm):
            click.echo(f"group: {group.id.hex()}  owns: {show_range(group.owned_range)}")
            for line in _fares(group):
                click.echo(f"  {show_text(line)}")
            rows = []
            for hsm in group.configuration:
                row = member_json(group, hsm)
                if "error" in row:
                    rows.append([short(hsm), "no answer", *[""] * 5])
                    continue
                cells = [row[key] for key in ("captured", "lag", "append_queue_len", "waiting_clients")]
                rows.append([
                    short(hsm), show_text(row["agent"]), row["role"],
                    *("" if cell is None else f"{cell:,}" for cell in cells),
                ])  # fmt: skip
            print_table(columns, rows, right=range(3, 7))
    if view.realms:
        click.echo("Captured is an index; Behind and Queued are entries, Waiting clients.")


def _fares(group: GroupView) -> list[str]:
    """Return who leads a group, and how far it is."""
    leader = group.leader
    own = None if leader is None else leader.agent
    last = None if own is None or own.last_appended is None else own.last_appended[0]
    committed = None if leader is None or leader.info.leader is None else leader.info.leader.committed
    fares = f"{led_by(group)}, {tolerance(group)}"
    if committed is None:
        return [fares]
    appended = "" if last is None else f", appended {last:,}"
    return [fares, f"committed {committed:,}{appended}, {group.requests_per_s:,.1f} requests/s"]
