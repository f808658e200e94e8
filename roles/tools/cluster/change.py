"""`cluster new-realm|join-realm|new-group|transfer` (operator-tools.md 2, manager.md 6, 7)."""

from __future__ import annotations

from typing import Final

import click

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.host.cluster.planning import Owner, plan
from juicebox_hsm.host.cluster.ranges import show_range
from juicebox_hsm.host.cluster.verdict import moving_of
from juicebox_hsm.host.cluster.view import ClusterView, wire_range
from juicebox_hsm.ids import GroupId, OwnedRange, RealmId, RecordId
from juicebox_hsm.wire.methods import TRANSFER
from juicebox_hsm.wire.rpc import Refusal, Refused, TransferPrepare
from roles.lazy import LazyCommand, LazyGroup
from roles.options import ParsedType
from roles.survey.overview import IDS_TIMEOUT_S, ask_agents, read_overview
from roles.tools.agents import agent_urls
from roles.tools.cluster.create import (
    check_join,
    check_new_group,
    check_new_realm,
    join_realm,
    new_group,
    new_realm,
)
from roles.tools.cluster.progress import progress_shown
from roles.tools.cluster.show import with_session
from roles.tools.ids import parse_record_id, resolve_id
from roles.tools.session import (
    STATUS_TIMEOUT_S,
    TRANSFER_TIMEOUT_S,
    Connection,
    Session,
    ToolFailure,
    call_manager,
    refused,
    with_connection,
)

TRANSFER_TEXTS = {
    Refusal.NO_SOURCE_LEADER: "nobody leads the source group",
    Refusal.NO_DESTINATION_LEADER: "nobody leads the destination group",
    Refusal.MANAGER_BUSY: "another transfer of this realm is under way; try again",
    Refusal.INVALID_GROUP: "source and destination must be two groups of the realm",
    Refusal.UNACCEPTABLE_RANGE: "the source cannot give this range, or the destination cannot take it: the range must "
    "be an end of what the source owns and touch what the destination owns",
    Refusal.OTHER_TRANSFER_PENDING: "one of the groups has another transfer pending; the manager finishes it",
    Refusal.NO_STORE: "the store cannot be reached",
    Refusal.TIMEOUT: "not finished in time; the manager goes on, look at `cluster groups`",
    Refusal.COMMIT_TIMEOUT: "a step was not committed in time; the manager goes on, look at `cluster groups`",
    Refusal.INVALID_NONCE: "the destination's leader kept changing",
}


RECORD_ID: Final = ParsedType("ID", parse_record_id)


@click.command("new-realm")
@click.argument("agent")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@with_connection
def new_realm_command(connection: Connection, agent: str, *, dry_run: bool) -> None:
    """Create a realm at AGENT (its name or URL), with a group of its HSM that owns every record id."""

    async def body(session: Session) -> None:
        (url,) = await agent_urls(session, [agent])
        if dry_run:
            await check_new_realm(session, url)
            click.echo(f"would create a realm at {url}")
            return
        realm, group = await new_realm(session, url)
        click.echo(f"Created realm {realm.hex()} with starting group {group.hex()}")

    with_session(connection, body)


@click.command("join-realm")
@click.option("--realm", required=True, help="Realm id or a prefix of it.")
@click.argument("agents", nargs=-1, required=True)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@with_connection
def join_realm_command(connection: Connection, realm: str, agents: tuple[str, ...], *, dry_run: bool) -> None:
    """Let the HSMs behind AGENTS (names or URLs) join a realm. They can never leave it."""

    async def body(session: Session) -> None:
        view = await read_overview(session.store, session.rpc)
        wanted = RealmId(resolve_id(realm, view.realms, "realm"))
        urls = await agent_urls(session, agents)
        if dry_run:
            await check_join(session, wanted, urls, view)
            click.echo(f"would join realm {wanted.hex()}: {', '.join(urls)}")
            return
        await join_realm(session, wanted, urls, view)
        click.echo("HSMs done joining realm")

    with_session(connection, body)


@click.command("new-group")
@click.option("--realm", required=True, help="Realm id or a prefix of it.")
@click.argument("agents", nargs=-1, required=True)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@with_connection
def new_group_command(connection: Connection, realm: str, agents: tuple[str, ...], *, dry_run: bool) -> None:
    """Create a group without a range over the HSMs behind AGENTS (names or URLs); the first one leads it."""

    async def body(session: Session) -> None:
        urls = await agent_urls(session, agents)
        view = await ask_agents(session.rpc, urls, STATUS_TIMEOUT_S)
        wanted = RealmId(resolve_id(realm, view.realms, "realm"))
        if len(agents) < 3 or len(agents) % 2 == 0:
            click.echo(
                f"warning: a group of {len(agents)} tolerates {(len(agents) - 1) // 2} lost members; "
                "an odd number from 3 on is best",
                err=True,
            )
        if dry_run:
            await check_new_group(session, wanted, urls)
            click.echo(f"would create a group in realm {wanted.hex()} over: {', '.join(urls)}")
            return
        group = await new_group(session, wanted, urls)
        click.echo(f"Created group {group.hex()}")

    with_session(connection, body)


async def transfer_range(
    session: Session, url: str | None, realm: RealmId, source: GroupId, destination: GroupId, wanted: OwnedRange
) -> None:
    """Ask a manager to move a range; returns when the destination serves it. Raises `ToolFailure`."""
    body = TransferPrepare(realm, source, destination, wire_range(wanted))
    reply = await call_manager(session, url, TRANSFER, body, timeout_s=TRANSFER_TIMEOUT_S)
    if isinstance(reply, Refused):
        raise refused(reply, TRANSFER_TEXTS, "transfer refused: ")


def check_transfer(
    view: ClusterView, realm: RealmId, source: GroupId, destination: GroupId, wanted: OwnedRange
) -> None:
    """Raise `ToolFailure` for what a manager would refuse, as far as `view` shows it. Pure."""
    giving, taking = view.group(realm, source), view.group(realm, destination)
    if (giving is None or taking is None) and all(agent.status is not None for agent in view.agents):
        problem = Refusal.INVALID_GROUP
    elif giving is None or giving.leader is None:
        problem = Refusal.NO_SOURCE_LEADER
    elif taking is None or taking.leader is None:
        problem = Refusal.NO_DESTINATION_LEADER
    elif moving_of(giving) or moving_of(taking):
        problem = Refusal.OTHER_TRANSFER_PENDING
    else:
        owned, before = giving.owned_range, taking.owned_range
        is_end = owned is not None and (owned == wanted or owned.split_at(wanted) is not None)
        if is_end and (before is None or before.join(wanted) is not None):
            return
        problem = Refusal.UNACCEPTABLE_RANGE
    raise refused(Refused(problem), TRANSFER_TEXTS, "transfer would be refused: ")


async def transfer_shown(
    session: Session, url: str | None, realm: RealmId, source: GroupId, destination: GroupId, wanted: OwnedRange
) -> None:
    """Move a range as `transfer_range` does, and show on a terminal how far it is.

    Raises `ToolFailure`, there in an exception group.
    """
    async with progress_shown(session, url, TransferPrepare(realm, source, destination, wire_range(wanted))):
        await transfer_range(session, url, realm, source, destination, wanted)


@click.command()
@click.option("--realm", required=True, help="Realm id or a prefix of it.")
@click.option("--source", required=True, help="Group that gives the range away.")
@click.option("--destination", required=True, help="Group that takes it.")
@click.option("--start", required=True, type=RECORD_ID, help="First record id of the range, in hex.")
@click.option("--end", required=True, type=RECORD_ID, help="Last record id of the range, inclusive.")
@click.option("-c", "--cluster", "manager", metavar="URL", help="Manager to ask; default any in discovery.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@with_connection
def transfer(
    connection: Connection,
    realm: str,
    source: str,
    destination: str,
    start: RecordId,
    end: RecordId,
    manager: str | None,
    *,
    dry_run: bool,
) -> None:
    """Move a range of record ids from one group to another, through a manager.

    A short record id ending in 00 or ff is padded with that byte: 7fff means 7fffff...
    """
    wanted = OwnedRange(start, end)
    if not wanted.is_valid:
        raise ToolFailure("--start must not be above --end", ExitCode.USAGE)

    async def body(session: Session) -> None:
        view = await read_overview(session.store, session.rpc, IDS_TIMEOUT_S)
        realm_id = RealmId(resolve_id(realm, view.realms, "realm"))
        groups = [group.id for group in view.groups_of(realm_id)]
        giving = GroupId(resolve_id(source, groups, "group"))
        taking = GroupId(resolve_id(destination, groups, "group"))
        if giving == taking:
            raise ToolFailure("--source and --destination are the same group", ExitCode.USAGE)
        if dry_run:
            check_transfer(view, realm_id, giving, taking, wanted)
            click.echo(f"would move {show_range(wanted)} from {giving.hex()} to {taking.hex()}")
            return
        await transfer_shown(session, manager, realm_id, giving, taking, wanted)
        click.echo("Ownership transfer completed successfully")

    with_session(connection, body)


@click.command("transfer")
@click.option("--realm", required=True, help="Realm id or a prefix of it.")
@click.option("--destination", required=True, help="Group that shall own exactly the range.")
@click.option("--start", required=True, type=RECORD_ID, help="First record id of the range, in hex.")
@click.option("--end", required=True, type=RECORD_ID, help="Last record id of the range, inclusive.")
@click.option("-c", "--cluster", "manager", metavar="URL", help="Manager to ask; default any in discovery.")
@click.option("--dry-run", is_flag=True, help="Print the steps, and do nothing.")
@with_connection
def planned_transfer(
    connection: Connection,
    realm: str,
    destination: str,
    start: RecordId,
    end: RecordId,
    manager: str | None,
    *,
    dry_run: bool,
) -> None:
    """Make a group own exactly a range, by as many two-group transfers as that takes."""
    wanted = OwnedRange(start, end)
    if not wanted.is_valid:
        raise ToolFailure("--start must not be above --end", ExitCode.USAGE)

    async def body(session: Session) -> None:
        view = await read_overview(session.store, session.rpc, IDS_TIMEOUT_S)
        realm_id = RealmId(resolve_id(realm, view.realms, "realm"))
        groups = view.groups_of(realm_id)
        taking = GroupId(resolve_id(destination, [group.id for group in groups], "group"))
        owners = [Owner(group.id, group.owned_range) for group in groups if group.owned_range is not None]
        if all(group.id != taking for group in groups) and all(agent.status is not None for agent in view.agents):
            raise ToolFailure(f"no item with that ID: group {taking.hex()}", ExitCode.ID)
        steps = plan(taking, owners, wanted)
        if not steps:
            click.echo("nothing to do!")
        for step in steps:
            click.echo(f"{show_range(step.range)} from {step.source.hex()} to {step.destination.hex()}")
            if not dry_run:
                await transfer_shown(session, manager, realm_id, step.source, step.destination, step.range)

    with_session(connection, body)


@click.group(
    cls=LazyGroup,
    lazy={
        "transfer": LazyCommand(__name__, "Make a group own exactly a range.", "planned_transfer"),
        "assimilate": LazyCommand("roles.tools.cluster.plan", "Take all HSMs into one realm.", "assimilate"),
    },
)
def experimental() -> None:
    """Commands whose flags and output may still change."""
