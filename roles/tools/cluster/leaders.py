"""`cluster stepdown|rebalance|drain|undrain`: who leads (operator-tools.md 2, manager.md 4, 5)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Final

import click

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.host.cluster.appointment import resolve
from juicebox_hsm.host.cluster.balance import loads, next_move
from juicebox_hsm.host.cluster.settings import DRAIN_PREFIX, PAUSED, drain_setting, drained_hsms
from juicebox_hsm.host.cluster.view import ClusterView, GroupView
from juicebox_hsm.ids import HsmId
from juicebox_hsm.wire.methods import LEADER_STEPDOWN, REBALANCE
from juicebox_hsm.wire.rpc import Empty, Refusal, Refused, StepdownOrder
from roles.survey.overview import IDS_TIMEOUT_S, read_overview
from roles.tools.agents import is_url, named_agent
from roles.tools.cluster.show import with_session
from roles.tools.ids import is_id, resolve_id
from roles.tools.recording import user_and_host
from roles.tools.session import (
    COMMAND_TIMEOUT_S,
    Connection,
    Session,
    ToolFailure,
    call_manager,
    refused,
    with_connection,
)
from roles.words import describe_loads

MOVES_MAX: Final = 10_000  # groups x HSMs of a large cluster: rebalancing ends long before
TEXTS: Final = {
    Refusal.NO_HSM: "the agent has no HSM",
    Refusal.NO_STORE: "the store cannot be reached",
    Refusal.NOT_LEADER: "leads nothing",
    Refusal.INVALID_REALM: "no such realm",
    Refusal.INVALID_GROUP: "no such group",
    Refusal.INVALID_HSM: "no such HSM",
    Refusal.BUSY: "another manager is working on the group; try again",
    Refusal.RPC_ERROR: "an agent did not answer",
    Refusal.STEP_DOWN_FAILED: "the leader did not step down",
    Refusal.LEADERSHIP_TRANSFER_ROLLED_BACK: "the new HSM refused; the old leader leads again",
    Refusal.LEADERSHIP_TRANSFER_FAILED: "no candidate took the leadership; the manager keeps trying",
}

manager_option = click.option(
    "-c", "--cluster", "manager", metavar="URL", help="Manager to ask; default any in discovery."
)


def _who_and_when() -> bytes:
    return f"{user_and_host()} {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}".encode()


def _order(view: ClusterView, text: str, kind: str | None) -> tuple[str, StepdownOrder]:
    """Find what an id or prefix means among HSMs and groups."""
    hsms = {bytes(hsm) for hsm in view.hsms} if kind != "group" else set()
    groups = {bytes(key[1]): key for key in view.groups} if kind != "hsm" else {}
    found = resolve_id(text, hsms | set(groups), kind or "HSM or group")
    if found in groups:
        realm, group = groups[found]
        return f"group {group.hex()}", StepdownOrder(realm=realm, group=group)
    if kind == "group":
        raise ToolFailure(f"no item with that ID: group {text}", ExitCode.ID)
    return f"HSM {found.hex()}", StepdownOrder(hsm=found)


@click.command()
@manager_option
@click.option("--type", "kind", type=click.Choice(["hsm", "group"]), help="What ID names; default either.")
@click.argument("id_text", metavar="ID")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@with_connection
def stepdown(connection: Connection, manager: str | None, kind: str | None, id_text: str, *, dry_run: bool) -> None:
    """Hand over the leadership of a group, or of all groups an HSM leads. ID may be a prefix."""

    async def body(session: Session) -> None:
        view = await read_overview(session.store, session.rpc, IDS_TIMEOUT_S)
        subject, order = _order(view, id_text, kind)
        if dry_run:
            led = resolve(view, order)
            if isinstance(led, Refused):
                raise refused(led, TEXTS, f"{subject}: ")
            if stuck := _stuck(led):
                raise ToolFailure(f"{subject}: nobody else could lead {', '.join(stuck)}")
            click.echo(f"would hand over {subject}")
            return
        reply = await call_manager(session, manager, LEADER_STEPDOWN, order, timeout_s=COMMAND_TIMEOUT_S)
        if isinstance(reply, Refused):
            raise refused(reply, TEXTS, f"{subject}: ")
        click.echo(f"Leadership handed over: {subject}")

    with_session(connection, body)


@click.command()
@manager_option
@click.option("-f", "--full", is_flag=True, help="Go on until balanced.")
@click.option("--pause", is_flag=True, help="Stop the managers' periodic rebalancing.")
@click.option("--resume", is_flag=True, help="Let it go on.")
@click.option("--dry-run", is_flag=True, help="Show all workloads and what would move, and do nothing.")
@with_connection
def rebalance(
    connection: Connection, manager: str | None, *, full: bool, pause: bool, resume: bool, dry_run: bool
) -> None:
    """Move one leadership from the busiest HSM to a less busy one, or all that help with --full."""
    if pause and resume:
        raise click.UsageError("--pause and --resume exclude each other")

    async def body(session: Session) -> None:
        if dry_run:
            click.echo(await _next_move(session))
            return
        if pause:
            async with session.recorded("pause-rebalancing"):
                await session.store.settings.put(PAUSED, _who_and_when())
            click.echo("Periodic rebalancing paused.")
            return
        if resume:
            async with session.recorded("resume-rebalancing"):
                await session.store.settings.remove(PAUSED)
            click.echo("Periodic rebalancing resumed.")
            return
        for _ in range(MOVES_MAX if full else 1):
            reply = await call_manager(session, manager, REBALANCE, Empty(), timeout_s=COMMAND_TIMEOUT_S)
            if isinstance(reply, Refused):
                raise refused(reply, TEXTS, "rebalancing: ")
            if not reply.group:
                click.echo("Already balanced.")
                return
            click.echo(f"Moved group {reply.group.hex()} from {reply.source.hex()} to {reply.destination.hex()}")

    with_session(connection, body)


async def _next_move(session: Session) -> str:
    """Return all workloads with the move that a manager would make now marked."""
    view = await read_overview(session.store, session.rpc)
    hsms = loads(view, drained_hsms(await session.store.settings.list(DRAIN_PREFIX)))
    move = next_move(hsms)
    return describe_loads(hsms, move) + ("" if move is not None else "\nAlready balanced.")


def _hsm_of(view: ClusterView, text: str) -> HsmId:
    """Return the HSM behind an agent (name or URL), or with this id or prefix if an agent or a group knows it."""
    url = text if is_url(text) else named_agent(view, text)
    if url is None:
        members = {hsm for group in view.groups.values() for hsm in group.configuration}
        known = members | set(view.hsms)
        if not is_id(text):
            raise ToolFailure(f"no agent is called {text!r}, and it is no HSM id; see `cluster agents`", ExitCode.ID)
        found = HsmId(resolve_id(text, known, "HSM"))
        if found not in known:
            raise ToolFailure(f"no item with that ID: HSM {text}", ExitCode.ID)
        return found
    behind = view.by_url(url)
    if behind is None:
        raise ToolFailure(f"{text}: no agent with an HSM answers there; give the HSM's full id", ExitCode.UNREACHABLE)
    return behind.id


def _is_idle(group: GroupView) -> bool:
    """Tell whether a group serves nothing and nobody else could lead it, like the one a realm begins with."""
    return group.owned_range is None and len(group.configuration) == 1


def _stuck(groups: Iterable[GroupView]) -> list[str]:
    """Return the groups of which nobody but the leader answers, by id."""
    return [group.id.hex() for group in groups if len(group.members) == 1]


@click.command()
@manager_option
@click.argument("agent")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@with_connection
def drain(connection: Connection, manager: str | None, agent: str, *, dry_run: bool) -> None:
    """Take an HSM out of leadership, until it leads nothing that serves: AGENT is an agent's name or URL, or an HSM id.

    A group that owns no range and has no other member stays where it is: the one a realm began with, for instance.
    """

    async def body(session: Session) -> None:
        view = await read_overview(session.store, session.rpc, IDS_TIMEOUT_S)
        hsm = _hsm_of(view, agent)
        led = view.led_by(hsm)
        moving = [group for group in led if not _is_idle(group)]
        if dry_run:
            if stuck := _stuck(moving):
                raise ToolFailure(f"HSM {hsm.hex()} leads {', '.join(stuck)}: nobody else could take over")
            names = ", ".join(group.id.hex() for group in moving)
            click.echo(f"would drain HSM {hsm.hex()}, which leads {names or 'nothing'}")
            return
        async with session.recorded("drain", hsm=hsm.hex()):
            await session.store.settings.put(drain_setting(hsm), _who_and_when())
        # one by one beside an idle group, whose leadership nobody could take
        by_group = [StepdownOrder(realm=group.realm, group=group.id) for group in moving]
        for order in by_group if len(moving) < len(led) else [StepdownOrder(hsm=hsm)]:
            await _hand_over_drained(session, manager, hsm, order)
        after = await read_overview(session.store, session.rpc, IDS_TIMEOUT_S)
        click.echo(still_led(hsm, after.led_by(hsm)))

    with_session(connection, body)


async def _hand_over_drained(session: Session, manager: str | None, hsm: HsmId, order: StepdownOrder) -> None:
    """Hand over what a drained HSM leads; that it leads nothing or does not run is what was wanted."""
    reply = await call_manager(session, manager, LEADER_STEPDOWN, order, timeout_s=COMMAND_TIMEOUT_S)
    if isinstance(reply, Refused) and reply.outcome not in (Refusal.NOT_LEADER, Refusal.INVALID_HSM):
        raise refused(reply, TEXTS, f"HSM {hsm.hex()} is marked as drained, but: ")


def still_led(hsm: HsmId, led: Sequence[GroupView]) -> str:
    """Return what a drained HSM still leads; raises `ToolFailure` for a group that serves or could move."""
    idle = [group.id.hex() for group in led if _is_idle(group)]
    leading = [group.id.hex() for group in led if not _is_idle(group)]
    if leading:
        raise ToolFailure(f"HSM {hsm.hex()} is drained but leads {', '.join(leading)}: nobody else could take over")
    if not idle:
        return f"HSM {hsm.hex()} is drained and leads nothing"
    what = "groups that own no range and have" if len(idle) > 1 else "a group that owns no range and has"
    return f"HSM {hsm.hex()} is drained; it still leads {', '.join(idle)}, {what} no other member"


@click.command()
@click.argument("agent")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@with_connection
def undrain(connection: Connection, agent: str, *, dry_run: bool) -> None:
    """Let a drained HSM lead again: AGENT is an agent's name or URL, or an HSM id."""

    async def body(session: Session) -> None:
        drained = drained_hsms(await session.store.settings.list(DRAIN_PREFIX))
        view = await read_overview(session.store, session.rpc, IDS_TIMEOUT_S)
        if is_url(agent) or named_agent(view, agent) is not None:
            hsm = _hsm_of(view, agent)
        else:
            hsm = HsmId(resolve_id(agent, drained, "drained HSM"))
        if hsm not in drained:
            raise ToolFailure(f"HSM {hsm.hex()} is not drained", ExitCode.ID)
        if dry_run:
            click.echo(f"Would let HSM {hsm.hex()} lead again")
            return
        async with session.recorded("undrain", hsm=hsm.hex()):
            await session.store.settings.remove(drain_setting(hsm))
        click.echo(f"HSM {hsm.hex()} may lead again")

    with_session(connection, body)
