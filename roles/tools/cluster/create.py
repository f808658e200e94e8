"""Make realms and groups: the steps behind `new-realm`, `join-realm`, `new-group` and the demo (manager.md 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import trio

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.consensus.types import GROUP_MEMBERS_MAX, GROUPS_PER_HSM_MAX
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.view import ClusterView, HsmView
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.wire.methods import GROUP_JOIN, GROUP_NEW, REALM_JOIN, REALM_NEW, Method, Reply, Request
from juicebox_hsm.wire.rpc import Empty, GroupJoin, GroupNew, RealmJoin, Refusal, Refused
from roles.survey.overview import ask_agents, why_silent
from roles.tools.session import (
    COMMAND_TIMEOUT_S,
    STATUS_TIMEOUT_S,
    Session,
    ToolFailure,
    refusal_text,
)

FIRST_COMMIT_S: Final = 30.0
POLL_S: Final = 0.02

TEXTS: Final = {
    Refusal.NO_HSM: "no HSM at the agent",
    Refusal.HAVE_REALM: "the HSM is in a realm already",
    Refusal.HAVE_OTHER_REALM: "the HSM is in a different realm",
    Refusal.INVALID_REALM: "the HSM is not in this realm",
    Refusal.INVALID_STATEMENT: "the realm statement was rejected: the HSMs do not hold the same realm keys",
    Refusal.TOO_MANY_GROUPS: f"an HSM is in {GROUPS_PER_HSM_MAX} groups already",
    Refusal.STALE_GENERATION: "a member has left another group meanwhile; run this again",
    Refusal.INVALID_CONFIGURATION: f"invalid configuration: a group has 1 to {GROUP_MEMBERS_MAX} different members",
    Refusal.NO_STORE: "the agent cannot reach the store",
    Refusal.STORE_PRECONDITION_FAILED: "the first entry could not be written: another creator was faster",
}


async def _call(session: Session, url: str, method: Method[Request, Reply | Refused], body: Request) -> Reply:
    """Call an agent; trouble and refusals become a `ToolFailure` naming the agent."""
    try:
        reply = await session.rpc.call(url, method, body, timeout_s=COMMAND_TIMEOUT_S)
    except RealmError as error:
        raise ToolFailure(f"{url}: {why_silent(error, url)}", ExitCode.UNREACHABLE) from None
    if isinstance(reply, Refused):
        raise ToolFailure(f"{url}: {refusal_text(reply, TEXTS)}")
    return reply


def _hsm_at(view: ClusterView, url: str) -> HsmView:
    """Return the HSM behind an agent that was asked for its status."""
    agent = next((agent for agent in view.agents if agent.url == url), None)
    if agent is None or agent.status is None:
        raise ToolFailure(f"{url}: no answer: {agent.error if agent else 'not asked'}", ExitCode.UNREACHABLE)
    hsm = view.by_url(url)
    if hsm is None:
        raise ToolFailure(f"{url}: {TEXTS[Refusal.NO_HSM]}")
    return hsm


async def wait_first_commit(session: Session, url: str, realm: RealmId, group: GroupId) -> None:
    """Poll the leader's status until entry 1 is committed; gives up after 30 s."""
    with trio.move_on_after(FIRST_COMMIT_S):
        while True:
            view = await ask_agents(session.rpc, [url], STATUS_TIMEOUT_S)
            found = view.group(realm, group)
            leader = None if found is None or found.leader is None else found.leader.info.leader
            if leader is not None and (leader.committed or 0) >= 1:
                return
            await trio.sleep(POLL_S)
    raise ToolFailure(
        f"group {group.hex()} of realm {realm.hex()} was created at {url}, but its first entry was not committed "
        f"within {FIRST_COMMIT_S:.0f} s; look at the agents' logs and at `cluster groups`"
    )


async def check_new_realm(session: Session, url: str) -> None:
    """Ask an agent whether its HSM could begin a realm; raises `ToolFailure` if not. Changes nothing."""
    view = await ask_agents(session.rpc, [url], STATUS_TIMEOUT_S)
    if _hsm_at(view, url).realm is not None:
        raise ToolFailure(f"{url}: {TEXTS[Refusal.HAVE_REALM]}")


async def new_realm(session: Session, url: str) -> tuple[RealmId, GroupId]:
    """Create a realm at one agent, with a group of this HSM alone that owns everything."""
    await check_new_realm(session, url)
    created = await _call(session, url, REALM_NEW, Empty())
    realm, group = RealmId(created.realm), GroupId(created.group)
    await wait_first_commit(session, url, realm, group)
    return realm, group


async def check_join(session: Session, realm: RealmId, urls: Sequence[str], view: ClusterView) -> HsmView:
    """Return an HSM of the realm that `view` shows, if the HSMs behind `urls` could join. Changes nothing.

    Raises `ToolFailure`: exit 3 when no HSM is in such a realm, 4 when one that did not answer may be.
    """
    peer = next((hsm for hsm in view.hsms.values() if hsm.realm == realm), None)
    if peer is None:
        code = ExitCode.UNREACHABLE if any(agent.status is None for agent in view.agents) else ExitCode.ID
        raise ToolFailure(f"no reachable HSM of realm {realm.hex()}", code)
    asked = await ask_agents(session.rpc, urls, STATUS_TIMEOUT_S)
    for url in urls:
        hsm = _hsm_at(asked, url)
        if hsm.realm not in (None, realm):
            raise ToolFailure(f"{url}: {TEXTS[Refusal.HAVE_OTHER_REALM]}")
        if hsm.public_key != peer.public_key:
            raise ToolFailure(f"{url}: {TEXTS[Refusal.INVALID_STATEMENT]}")
    return peer


async def join_realm(session: Session, realm: RealmId, urls: Sequence[str], view: ClusterView) -> None:
    """Let the HSMs behind `urls` join; `view` must show one HSM of the realm."""
    peer = await check_join(session, realm, urls, view)
    problems: list[ToolFailure] = []

    async def join(url: str) -> None:
        try:
            await _call(session, url, REALM_JOIN, RealmJoin(realm, peer.id, peer.statement))
        except ToolFailure as problem:
            problems.append(problem)

    async with trio.open_nursery() as nursery:
        for url in urls:
            nursery.start_soon(join, url)
    if problems:
        raise ToolFailure("; ".join(problem.message for problem in problems), ExitCode(problems[0].exit_code))


async def check_new_group(session: Session, realm: RealmId, urls: Sequence[str]) -> list[HsmView]:
    """Return the HSMs behind `urls`, by id, if they could form a group. Changes nothing."""
    view = await ask_agents(session.rpc, urls, STATUS_TIMEOUT_S)
    members: list[HsmView] = []
    for url in urls:
        hsm = _hsm_at(view, url)
        if hsm.realm != realm:
            where = "in no realm" if hsm.realm is None else f"in realm {hsm.realm.hex()}"
            raise ToolFailure(f"{url}: its HSM is {where}; join it first with `cluster join-realm`")
        if len(hsm.groups) >= GROUPS_PER_HSM_MAX:
            raise ToolFailure(f"{url}: {TEXTS[Refusal.TOO_MANY_GROUPS]}")
        members.append(hsm)
    members.sort(key=lambda hsm: hsm.id)
    if len({hsm.id for hsm in members}) != len(members) or not 1 <= len(members) <= GROUP_MEMBERS_MAX:
        raise ToolFailure(TEXTS[Refusal.INVALID_CONFIGURATION])
    return members


async def new_group(session: Session, realm: RealmId, urls: Sequence[str]) -> GroupId:
    """Create a group without a range over the HSMs behind `urls`; the first one leads it."""
    members = await check_new_group(session, realm, urls)
    generations = tuple(hsm.generation for hsm in members)
    proven = [(bytes(hsm.id), hsm.statement) for hsm in members]
    created = await _call(session, urls[0], GROUP_NEW, GroupNew(realm, proven, generations))
    group = GroupId(created.group)
    call = GroupJoin(realm, group, [hsm.id for hsm in members], created.statement, generations)
    problems: list[str] = []

    async def join(url: str) -> None:
        try:
            await _call(session, url, GROUP_JOIN, call)
        except ToolFailure as problem:
            problems.append(problem.message)

    async with trio.open_nursery() as nursery:
        for url in urls[1:]:
            nursery.start_soon(join, url)
    if problems:
        raise ToolFailure(f"group {group.hex()} exists but is degraded, not joined: {'; '.join(sorted(problems))}")
    await wait_first_commit(session, urls[0], realm, group)
    return group
