"""`cluster plan` and `cluster experimental assimilate`: lay a realm out over its HSMs (operator-tools.md 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click
import trio

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.consensus.types import GROUP_MEMBERS_MAX, GROUPS_PER_HSM_MAX
from juicebox_hsm.host.cluster.layout import (
    PROGRAM,
    Layout,
    advice,
    choose_hsms,
    commands,
    make_layout,
    owners_of,
    windows,
)
from juicebox_hsm.host.cluster.planning import spread
from juicebox_hsm.host.cluster.ranges import show_range
from juicebox_hsm.host.cluster.replacement import propose
from juicebox_hsm.host.cluster.view import ClusterView
from juicebox_hsm.ids import HsmId, RealmId
from juicebox_hsm.wire.methods import REBALANCE
from juicebox_hsm.wire.rpc import Empty, Refused
from roles.survey.overview import read_overview
from roles.tools.cluster.change import transfer_shown
from roles.tools.cluster.create import join_realm, new_group, new_realm
from roles.tools.cluster.leaders import MOVES_MAX, manager_option
from roles.tools.cluster.replace import replace_hsms
from roles.tools.cluster.show import with_session
from roles.tools.ids import resolve_id
from roles.tools.output import print_json
from roles.tools.session import (
    COMMAND_TIMEOUT_S,
    Connection,
    Session,
    ToolFailure,
    call_manager,
    with_connection,
)

LEADERS_S = 20.0
POLL_S = 0.1

realm_option = click.option(
    "--realm", "realm_text", help="Realm id or a prefix of it; default the only one, or a new one if there is none."
)


def _choose_realm(view: ClusterView, text: str | None) -> RealmId | None:
    if text is not None:
        return RealmId(resolve_id(text, view.realms, "realm"))
    if len(view.realms) > 1:
        names = ", ".join(realm.hex() for realm in view.realms)
        raise ToolFailure(f"there are several realms, give --realm: {names}", ExitCode.ID)
    return view.realms[0] if view.realms else None


async def _led(session: Session, realm: RealmId) -> ClusterView:
    """Wait until all groups of a realm have a leader: only leaders know who owns what."""
    with trio.move_on_after(LEADERS_S):
        while True:
            view = await read_overview(session.store, session.rpc)
            groups = view.groups_of(realm)
            if groups and all(group.leader is not None or group.has_ended for group in groups):
                return view
            await trio.sleep(POLL_S)
    raise ToolFailure(
        f"a group of realm {realm.hex()} has no leader; look at `cluster status`, then run this again",
        ExitCode.UNREACHABLE,
    )


async def apply_layout(session: Session, manager: str | None, layout: Layout) -> RealmId:
    """Make what is missing and say so, line by line. Run again after a failure, it goes on where it stopped."""
    realm = layout.realm
    if realm is None:
        realm, group = await new_realm(session, layout.first)
        click.echo(f"Created realm {realm.hex()} with starting group {group.hex()}")
    if layout.joining:
        view = await read_overview(session.store, session.rpc)
        await join_realm(session, realm, layout.joining, view)
        click.echo(f"{len(layout.joining)} HSMs joined realm {realm.hex()}")
    serving = list(layout.existing)
    for urls in layout.missing:
        serving.append(await new_group(session, realm, urls))
        click.echo(f"Created group {serving[-1].hex()}")
    view = await _led(session, realm)
    for step in spread(owners_of(view.groups_of(realm)), serving):
        await transfer_shown(session, manager, realm, step.source, step.destination, step.range)
        click.echo(f"Moved {show_range(step.range)} from {step.source.hex()} to {step.destination.hex()}")
    for _ in range(MOVES_MAX):
        reply = await call_manager(session, manager, REBALANCE, Empty(), timeout_s=COMMAND_TIMEOUT_S)
        if isinstance(reply, Refused) or not reply.group:
            break  # balanced, or another manager is at it: the periodic pass goes on
        click.echo(f"Group {reply.group.hex()} is led by {reply.destination.hex()} now")
    click.echo(f"Realm {realm.hex()}: {len(serving)} groups share the key space")
    return realm


async def _run(
    session: Session,
    manager: str | None,
    realm_text: str | None,
    groups: int | None,
    size: int | None,
    *,
    apply: bool,
    as_json: bool,
    replace_lost: bool = False,
) -> None:
    view = await read_overview(session.store, session.rpc)
    realm = _choose_realm(view, realm_text)
    hsms = choose_hsms(view, realm)
    if realm is not None and groups is not None:
        proposed = _told(propose(view, realm, hsms))
        if proposed and as_json:
            lines = [f"{PROGRAM} replace {lost.hex()} {url}" for lost, url in proposed]
            print_json({"realm": realm.hex(), "hsms": len(hsms), "commands": lines})
            return
        if proposed and not (apply and replace_lost):
            _print([f"{PROGRAM} replace {lost.hex()} {url}" for lost, url in proposed])
            click.echo("# HSMs are lost. Replace them first, or give --apply --replace-lost; then plan again", err=True)
            if apply:
                raise ToolFailure("nothing was changed: whether these HSMs are gone for good is yours to say")
            return
        if proposed:
            told = " ".join(f"{lost.hex()} {url}" for lost, url in proposed)
            async with session.recorded("replace", realm=realm.hex(), dead_and_new=told):
                await replace_hsms(session, manager, realm, proposed, dry_run=False)
            view = await read_overview(session.store, session.rpc)
            hsms = choose_hsms(view, realm)
    members = min(len(hsms), GROUP_MEMBERS_MAX) if size is None else size
    wanted = windows([hsm.id for hsm in hsms], len(hsms) if groups is None else groups, members)
    if realm is not None and view.groups_of(realm):
        view = await _led(session, realm)
    layout = make_layout(view, realm, hsms, wanted)
    for line in advice(layout, members):
        click.echo(f"warning: {line}", err=True)
    lines = commands(view, layout)
    if as_json:
        print_json({"realm": None if realm is None else realm.hex(), "hsms": len(hsms), "commands": lines})
    elif not lines:
        click.echo("nothing to do!")
    elif apply:
        named = {} if realm is None else {"realm": realm.hex()}
        async with session.recorded("plan", **named, groups=str(len(wanted)), hsms=str(len(hsms))):
            await apply_layout(session, manager, layout)
    else:
        _print(lines)


def _told(proposed: Mapping[HsmId, str | None]) -> list[tuple[HsmId, str]]:
    """Return the replacements that can be made; say which lost HSMs have none."""
    for lost, url in proposed.items():
        if url is None:
            click.echo(f"warning: HSM {lost.hex()} is lost, and there is no other HSM to replace it", err=True)
    return [(lost, url) for lost, url in proposed.items() if url is not None]


def _print(lines: Sequence[str]) -> None:
    for line in lines:
        click.echo(line)
    if any(" REALM" in line or " GROUP1" in line for line in lines):
        click.echo("# REALM, FIRST and GROUP1... stand for the ids that the commands before print", err=True)


@click.command()
@click.option(
    "--groups", required=True, type=click.IntRange(1, GROUPS_PER_HSM_MAX - 1), help="Groups that share the key space."
)
@realm_option
@manager_option
@click.option("--apply", is_flag=True, help="Do it; without this the commands are printed and nothing is changed.")
@click.option("--replace-lost", is_flag=True, help="With --apply: also replace HSMs that are gone, as planned.")
@click.option("--dry-run", is_flag=True, help="Print the commands even with --apply.")
@click.option("--json", "as_json", is_flag=True, help="Print the commands as one JSON object; changes nothing.")
@with_connection
def plan(
    connection: Connection,
    groups: int,
    realm_text: str | None,
    manager: str | None,
    *,
    apply: bool,
    replace_lost: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Lay a realm out: that many groups over all its HSMs, the key space split evenly, leaders spread.

    HSMs whose agents managers have forgotten (silent for 21 minutes) are lost: `replace` is proposed for each as long
    as there is another HSM for its groups, and nothing else until that is done.

    HSMs in no realm that hold the realm's keys join it; with no realm at all one is made. The recommended layout is 5
    HSMs and --groups 3. Groups of more than 9 HSMs are impossible; with more HSMs each group takes 9 of them in turn.
    """

    async def body(session: Session) -> None:
        doing = apply and not dry_run
        await _run(session, manager, realm_text, groups, None, apply=doing, as_json=as_json, replace_lost=replace_lost)

    with_session(connection, body)


@click.command()
@click.option(
    "--group-size", type=click.IntRange(1, GROUP_MEMBERS_MAX), default=5, show_default=True, help="Members per group."
)
@realm_option
@manager_option
@click.option("--dry-run", is_flag=True, help="Print the commands, and do nothing.")
@with_connection
def assimilate(
    connection: Connection, group_size: int, realm_text: str | None, manager: str | None, *, dry_run: bool
) -> None:
    """Take all HSMs into one realm with as many groups as HSMs, each HSM in --group-size of them."""

    async def body(session: Session) -> None:
        await _run(session, manager, realm_text, None, group_size, apply=not dry_run, as_json=False)

    with_session(connection, body)
