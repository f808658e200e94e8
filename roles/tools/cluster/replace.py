"""`cluster retire` and `cluster replace`: end a group, replace lost HSMs (operator-tools.md 2, record 0030)."""

from __future__ import annotations

import string
import time
from collections.abc import Collection, Sequence
from typing import Final

import click
import trio

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.host.cluster.leases import LEASE_MS, ownership_lease
from juicebox_hsm.host.cluster.ranges import show_range
from juicebox_hsm.host.cluster.replacement import Join, Make, Move, ReplacementStep, Retire, next_step, pending_towards
from juicebox_hsm.host.cluster.view import ClusterView, GroupView
from juicebox_hsm.ids import ID_BYTES, GroupId, HsmId, RealmId
from juicebox_hsm.wire.methods import GROUP_RETIRE
from juicebox_hsm.wire.rpc import GroupCall, Refusal, Refused
from roles.survey.overview import read_overview
from roles.tools.agents import agent_urls
from roles.tools.cluster.change import transfer_shown
from roles.tools.cluster.create import join_realm, new_group
from roles.tools.cluster.leaders import manager_option
from roles.tools.cluster.show import with_session
from roles.tools.ids import resolve_id
from roles.tools.session import Connection, Session, ToolFailure, refused, with_connection

RETIRE_TIMEOUT_S: Final = 65.0  # the agent waits up to 60 s for the commit
RETIRE_S: Final = 180.0
"""A new leader resolves what its predecessors left after a grace of 60 s; three times that (own)."""
FORGET_S: Final = 180.0
"""A leader takes up to 150 s to clear up before it forgets (agent.md 14a)."""
POLL_S: Final = 0.5
STEPS_MAX: Final = 100
"""Five steps a group, 16 groups an HSM, and some for what others do meanwhile."""

TEXTS: Final = {
    Refusal.STILL_OWNER: "it still owns a range; move that first with `cluster transfer`",
    Refusal.OTHER_TRANSFER_PENDING: "a transfer of it is pending; a manager finishes it, then run this again",
    Refusal.NOT_LEADER: "its leader has changed; run this again",
    Refusal.BUSY: "its leader still records requests of earlier leaders; run this again",
    Refusal.COMMIT_TIMEOUT: "its end was not committed in time: is a majority of its members up?",
}


async def retire_group(session: Session, realm: RealmId, group: GroupId) -> None:
    """End a group and wait until the members that answer have forgotten it; others will when they are back.

    Ending it needs the lease under which ranges move, so that none is on its way to a group that no longer takes it.
    """
    await _end(session, realm, group)
    deadline = trio.current_time() + FORGET_S
    while True:
        view = await _look(session)
        found = view.group(realm, group)
        if found is None:
            return
        if all(member.agent is None for member in found.members) or trio.current_time() > deadline:
            raise ToolFailure(
                f"group {group.hex()} is retired, but HSM {found.members[0].hsm.hex()} does not forget it"
            )
        await trio.sleep(POLL_S)


async def _end(session: Session, realm: RealmId, group: GroupId) -> None:
    """Have the group's leader end it."""
    deadline = trio.current_time() + RETIRE_S
    while True:
        view = await _look(session)
        found = view.group(realm, group)
        if found is None or found.has_ended:
            return
        outcome = await _try_to_end(session, view, found)
        if outcome is None:
            return
        if outcome.outcome not in (Refusal.BUSY, Refusal.MANAGER_BUSY, Refusal.NOT_LEADER):
            raise refused(outcome, TEXTS, f"group {group.hex()}: ")
        if trio.current_time() > deadline:
            raise refused(outcome, TEXTS, f"group {group.hex()}: ")
        await trio.sleep(POLL_S)


async def _try_to_end(session: Session, view: ClusterView, group: GroupView) -> Refused | None:
    check_retire(view, group)
    leader = group.leader
    if leader is None:
        return Refused(Refusal.NOT_LEADER)
    lease = await session.store.leases.obtain(
        ownership_lease(group.realm), "cluster retire", session.now_ms(), LEASE_MS + round(RETIRE_TIMEOUT_S * 1000)
    )
    if lease is None:
        return Refused(Refusal.MANAGER_BUSY, detail="ranges are being moved")
    try:
        call = GroupCall(group.realm, group.id)
        reply = await session.rpc.call(leader.url, GROUP_RETIRE, call, timeout_s=RETIRE_TIMEOUT_S)
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(POLL_S):
            await session.store.leases.terminate(lease)
    return reply if isinstance(reply, Refused) else None


def check_retire(view: ClusterView, group: GroupView) -> None:
    """Raise `ToolFailure` for what would be refused, as far as `view` shows it, and while a transfer names it."""
    if group.owned_range is not None:
        raise refused(Refused(Refusal.STILL_OWNER), TEXTS, f"group {group.id.hex()}: ")
    other = pending_towards(view, group.realm, group.id)
    if other is not None:
        raise refused(Refused(Refusal.OTHER_TRANSFER_PENDING), TEXTS, f"group {group.id.hex()}: ")


async def _look(session: Session) -> ClusterView:
    return await read_overview(session.store, session.rpc)


def _find_group(view: ClusterView, text: str) -> GroupView:
    groups = {bytes(group.id): group for group in view.groups.values()}
    return groups[resolve_id(text, list(groups), "group")]


@click.command()
@click.argument("group")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@with_connection
def retire(connection: Connection, group: str, *, dry_run: bool) -> None:
    """End GROUP (an id or a prefix), which owns nothing, for good, so that its members are free for another one.

    Its members' HSMs forget it. One that is away does so when it is back. Every agent of the realm must be of a version
    that knows retired groups: look at `cluster agents`.
    """

    async def body(session: Session) -> None:
        found = _find_group(await _look(session), group)
        if dry_run:
            check_retire(await _look(session), found)
            click.echo(f"would retire group {found.id.hex()}")
            return
        await retire_group(session, found.realm, found.id)
        click.echo(f"Retired group {found.id.hex()}")

    with_session(connection, body)


def tell(step: ReplacementStep) -> str:
    """Return what a step does, for a line that begins with a capital letter or with `would`."""
    match step:
        case Join(url=url):
            return f"join the HSM behind {url} to the realm"
        case Make(old=old, urls=urls):
            return f"make a group over {', '.join(urls)} for {old.hex()}"
        case Move(old=old, new=new, range=moved):
            return f"move {show_range(moved)} from {old.hex()} to {new.hex()}"
        case Retire(group=group):
            return f"retire group {group.hex()}"


async def take_step(session: Session, manager: str | None, realm: RealmId, step: ReplacementStep) -> None:
    """Carry out one step. Raises `ToolFailure`; running the command again goes on."""
    match step:
        case Join(url=url):
            await join_realm(session, realm, [url], await _look(session))
        case Make(urls=urls):
            await new_group(session, realm, urls)
        case Move(old=old, new=new, range=moved):
            await transfer_shown(session, manager, realm, old, new, moved)
        case Retire(group=group):
            await retire_group(session, realm, group)


async def replace_hsms(
    session: Session, manager: str | None, realm: RealmId, pairs: Sequence[tuple[HsmId, str]], *, dry_run: bool
) -> None:
    """Replace HSMs by those behind the given agents, saying each step. Raises `ToolFailure`."""
    replacing = dict(pairs)
    for number in range(STEPS_MAX):
        step = next_step(await _look(session), realm, replacing)
        if step is None:
            click.echo("Replaced " + ", ".join(hsm.hex() for hsm in replacing) if number else "nothing to do!")
            return
        if dry_run:
            click.echo(f"would {tell(step)}, and go on from there")
            return
        told = tell(step)
        click.echo(told[0].upper() + told[1:])
        await take_step(session, manager, realm, step)
    raise ToolFailure("the realm changes while its HSMs are replaced; look at `cluster status`, then run this again")


def _pairs(view: ClusterView, dead_hsms: Sequence[str], urls: Sequence[str]) -> tuple[RealmId, list[tuple[HsmId, str]]]:
    """Return who is replaced by whom: HSMs by id or a prefix, known from the groups they are in, by agents' URLs."""
    if len(dead_hsms) != len(urls):
        raise ToolFailure("give DEAD and NEW in turn: an HSM id, then the new HSM's agent", ExitCode.USAGE)
    homes = {bytes(hsm): group.realm for group in view.groups.values() for hsm in group.configuration}
    homes |= {bytes(hsm.id): hsm.realm for hsm in view.hsms.values() if hsm.realm is not None}
    found = [(_hsm_of(dead, homes), url) for dead, url in zip(dead_hsms, urls, strict=True)]
    new = [view.by_url(url) for _, url in found]
    realms = {homes[dead] for dead, _ in found if dead in homes}
    realms |= {hsm.realm for hsm in new if hsm is not None and hsm.realm is not None}
    once = len({url for _, url in found}) == len({dead for dead, _ in found}) == len(found)
    if len(realms) != 1 or not once:
        raise ToolFailure("each HSM and each agent is named once, all of one realm", ExitCode.USAGE)
    return realms.pop(), found


def _hsm_of(text: str, known: Collection[bytes]) -> HsmId:
    """Resolve an id or prefix; a whole id may be of an HSM that no group names any more: it is replaced already."""
    if len(text) == 2 * ID_BYTES and all(digit in string.hexdigits for digit in text):
        return HsmId(bytes.fromhex(text))
    return HsmId(resolve_id(text, list(known), "HSM"))


@click.command()
@click.argument("pairs", nargs=-1, required=True, metavar="DEAD NEW [DEAD NEW]...")
@manager_option
@click.option("--dry-run", is_flag=True, help="Say what the next step would be, and do nothing.")
@with_connection
def replace(connection: Connection, pairs: tuple[str, ...], manager: str | None, *, dry_run: bool) -> None:
    """Replace the HSM DEAD (an id or a prefix) by the one behind the agent NEW (name or URL), in every group it is in.

    NEW joins the realm if it has to. For each group with DEAD another one with NEW in its place is made, the whole
    range moves there, and the old group is retired. Clients are served meanwhile. Interrupted anywhere, run it again:
    it goes on.
    """

    async def body(session: Session) -> None:
        view = await _look(session)
        new = await agent_urls(session, pairs[1::2])
        realm, named = _pairs(view, pairs[::2], new)
        began = time.monotonic()
        if dry_run:
            await replace_hsms(session, manager, realm, named, dry_run=True)
            return
        told = " ".join(f"{dead.hex()} {url}" for dead, url in named)
        async with session.recorded("replace", realm=realm.hex(), dead_and_new=told):
            await replace_hsms(session, manager, realm, named, dry_run=False)
        silent = [agent.url for agent in (await _look(session)).agents if agent.status is None]
        if silent:
            click.echo(f"after {time.monotonic() - began:.0f} s; these agents in discovery do not answer:", err=True)
            for url in silent:
                click.echo(f"  {url}: if it is gone for good, `cluster discovery remove {url}`", err=True)

    with_session(connection, body)
