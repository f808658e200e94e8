"""Creation of realms and groups, joining them, and what is known of them at start (agent.md 4)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from juicebox_hsm.adapters.clock.retrying import retrying
from juicebox_hsm.consensus.types import LogEntry, Witness
from juicebox_hsm.errors import RealmError, check
from juicebox_hsm.host.leadership.events import Inherited
from juicebox_hsm.host.log import AppendOutcome
from juicebox_hsm.host.retry import HSM_RETRY, STORE_RETRY
from juicebox_hsm.host.witness import position_after
from juicebox_hsm.hsm.messages import (
    JoinGroup,
    JoinRealm,
    JoinRealmOk,
    NewGroup,
    NewGroupOk,
    NewRealm,
    NewRealmOk,
    Outcome,
    RoleOk,
    Status,
    StatusOk,
)
from juicebox_hsm.ids import GroupId, HsmId, RealmId
from juicebox_hsm.merkle.kernel import EMPTY_DELTA
from juicebox_hsm.wire.rpc import (
    Done,
    GroupCreated,
    GroupJoin,
    GroupNew,
    RealmCreated,
    RealmJoin,
    RealmJoined,
    Refusal,
    Refused,
)

if TYPE_CHECKING:
    from roles.agent.context import Agent

_REFUSALS = {
    Outcome.HAVE_REALM: Refusal.HAVE_REALM,
    Outcome.HAVE_OTHER_REALM: Refusal.HAVE_OTHER_REALM,
    Outcome.INVALID_REALM: Refusal.INVALID_REALM,
    Outcome.INVALID_CONFIGURATION: Refusal.INVALID_CONFIGURATION,
    Outcome.INVALID_STATEMENT: Refusal.INVALID_STATEMENT,
    Outcome.TOO_MANY_GROUPS: Refusal.TOO_MANY_GROUPS,
    Outcome.STALE_GENERATION: Refusal.STALE_GENERATION,
}


TABLES_RETRY: Final = replace(STORE_RETRY, total_s=120.0)
"""Bigtable takes seconds for each of a realm's tables, and giving up costs a new HSM."""


class RealmTablesFailed(RealmError):
    """The HSM made a realm and its tables cannot be created: the HSM must be initialised again."""


def _refused(reply: object) -> Refused:
    refusal = _REFUSALS.get(reply) if isinstance(reply, Outcome) else None
    check(refusal is not None, "the HSM refuses membership requests as specified")
    return Refused(refusal if refusal is not None else Refusal.NO_HSM)


async def learn_groups(agent: Agent) -> None:
    """Ask the HSM for its id and groups and start their watchers. A leadership that outlived us is dropped first."""

    async def ask() -> object:
        return await agent.hsm.send(Status())

    status = await retrying(ask, HSM_RETRY)
    check(isinstance(status, StatusOk), "Status cannot be refused")
    if not isinstance(status, StatusOk):
        return
    agent.hsm_id = status.id
    if status.realm is None:
        return
    for known in status.realm.groups:
        position = position_after(None if known.captured is None else known.captured[0])
        group = agent.add_group(status.realm.id, known.id, known.configuration, position)
        if isinstance(known.role.role, Witness):
            agent.adopt(group, known.role)
        else:
            await agent.step_down(group, force=True, why="a leadership from before this agent's start")


async def handle_realm_new(agent: Agent) -> RealmCreated | Refused:
    """Create a realm with one group of this HSM alone.

    Raises `RealmTablesFailed`, which must end the process, if its tables cannot be made.
    """
    reply = await agent.hsm.send(NewRealm())
    if not isinstance(reply, NewRealmOk):
        return _refused(reply)
    check(agent.hsm_id is not None, "the HSM's id is known before methods are served")
    members = (HsmId(agent.hsm_id),) if agent.hsm_id is not None else ()
    try:
        await retrying(lambda: agent.store.realms.create_realm(reply.realm), TABLES_RETRY)
    except RealmError as error:
        raise RealmTablesFailed(f"realm {reply.realm.hex()}: {error}; initialise this HSM again") from error
    refused = await _append_first(agent, reply.realm, reply.group, reply.entry, reply.delta)
    if refused is not None:
        return refused
    group = agent.add_group(reply.realm, reply.group, members, 1)
    agent.adopt(group, reply.role)
    agent.tell(group, Inherited(reply.entry))
    return RealmCreated(reply.realm, reply.group)


async def handle_group_new(agent: Agent, body: GroupNew) -> GroupCreated | Refused:
    """Create a group without a partition, led by this HSM."""
    if agent.hsm_id is None:
        return Refused(Refusal.NO_HSM)
    members = tuple((HsmId(member), statement) for member, statement in body.members)
    reply = await agent.hsm.send(NewGroup(RealmId(body.realm), members, body.generations))
    if not isinstance(reply, NewGroupOk):
        return _refused(reply)
    realm = RealmId(body.realm)
    refused = await _append_first(agent, realm, reply.group, reply.entry, EMPTY_DELTA)
    if refused is not None:
        return refused
    group = agent.add_group(realm, reply.group, tuple(member for member, _ in members), 1)
    agent.adopt(group, reply.role)
    agent.tell(group, Inherited(reply.entry))
    return GroupCreated(reply.group, reply.statement)


async def _append_first(agent: Agent, realm: RealmId, group: GroupId, entry: LogEntry, delta: bytes) -> Refused | None:
    """Append entry 1; None on success."""
    try:
        outcome = await retrying(lambda: agent.store.log.append(realm, group, [entry], [None], delta))
    except RealmError as error:
        agent.log.warning("first entry not written", group=group.hex(), error=str(error))
        return Refused(Refusal.NO_STORE)
    if outcome is AppendOutcome.CONFLICT:
        return Refused(Refusal.STORE_PRECONDITION_FAILED)
    return None


async def handle_realm_join(agent: Agent, body: RealmJoin) -> RealmJoined | Refused:
    """Join a realm whose keys this HSM holds."""
    reply = await agent.hsm.send(JoinRealm(RealmId(body.realm), HsmId(body.peer), body.statement))
    if isinstance(reply, JoinRealmOk):
        return RealmJoined(reply.hsm)
    return _refused(reply)


async def handle_group_join(agent: Agent, body: GroupJoin) -> Done | Refused:
    """Join a group; idempotent."""
    realm, group_id = RealmId(body.realm), GroupId(body.group)
    members = tuple(HsmId(member) for member in body.configuration)
    reply = await agent.hsm.send(JoinGroup(realm, group_id, members, body.statement, body.generations))
    if not isinstance(reply, RoleOk):
        return _refused(reply)
    group = agent.groups.get(realm, group_id)
    if group is None:
        group = agent.add_group(realm, group_id, members, 1)
    agent.adopt(group, reply.role)
    return Done()
