"""The end of a group: `group/retire`, and the HSM's leaving of groups whose log has ended (agent.md 16)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from juicebox_hsm.consensus.types import Certificate, LogEntry
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.ending import has_cleared_up, proof_of_end
from juicebox_hsm.host.group import GroupState
from juicebox_hsm.host.transfer import refusal_of
from juicebox_hsm.hsm.messages import ForgetGroup, ForgetGroupOk, Outcome, RetireGroup, RetireGroupOk
from juicebox_hsm.ports.errors import HsmGone
from juicebox_hsm.wire.rpc import Done, GroupCall, Refusal, Refused
from roles.agent.transfer import committed

if TYPE_CHECKING:
    from roles.agent.context import Agent

TICK_S: Final = 1.0
RESOLVE_DETAIL: Final = "requests of earlier leaderships are not recorded yet"


async def handle_group_retire(agent: Agent, body: GroupCall) -> Done | Refused:
    """End a group that owns nothing; answers when that is committed. Idempotent while the group is known."""
    found = agent.groups.leading(body.realm, body.group)
    if isinstance(found, Refusal):
        return Refused(found)
    group, leader = found
    if not leader.snapshot(trio.current_time()).resolved:
        return Refused(Refusal.BUSY, detail=RESOLVE_DETAIL)
    reply = await agent.hsm.send(RetireGroup(group.realm, group.group))
    if not isinstance(reply, RetireGroupOk):
        return Refused(refusal_of(reply))
    agent.log.warning("group retired", realm=group.realm.hex(), group=group.group.hex(), index=reply.wait_til_committed)
    return await committed(agent, group, reply.wait_til_committed, reply.clock, reply.entry) or Done()


async def leave_ended_groups(agent: Agent) -> None:
    """Look once a second for groups whose log has ended, and let the HSM forget those whose time has come."""
    while True:
        await trio.sleep(TICK_S)
        for group in agent.groups:
            if group.end is None:
                continue
            try:
                # nothing else is asked of the HSM for this group meanwhile
                async with agent.follower(group).lock:
                    await _try_to_leave(agent, group, group.end)
            except HsmGone:
                raise
            except RealmError as error:
                agent.note_trouble(Code.GROUP_NOT_LEFT, error, group.group)
            else:
                agent.clear_trouble(Code.GROUP_NOT_LEFT, group.group)


async def _try_to_leave(agent: Agent, group: GroupState, entry: LogEntry) -> None:
    """Let the HSM forget an ended group, if it is time. Raises `RealmError`."""
    if not await _has_left_leadership(agent, group, entry):
        return
    certificate = await _certificate(agent, group, entry)
    if certificate is None:
        return
    reply = await agent.hsm.send(ForgetGroup(group.realm, group.group, entry, certificate.captures))
    about: dict[str, object] = {"realm": group.realm.hex(), "group": group.group.hex()}
    if not isinstance(reply, ForgetGroupOk) and reply is not Outcome.INVALID_GROUP:
        agent.log.warning("HSM does not forget an ended group", **about, answer=str(reply))
        return
    agent.drop_group(group)
    agent.log.warning("group forgotten", **about, index=entry.index)
    agent.metrics.count("agent.group_forgotten")


async def _has_left_leadership(agent: Agent, group: GroupState, entry: LogEntry) -> bool:
    """Leave a leadership that has nothing more to do; tell whether there is none."""
    driver = agent.driver_of(group)
    if driver is None:
        return True
    now = trio.current_time()
    if has_cleared_up(driver.leader.snapshot(now), entry, now - group.ended_at_s):
        await driver.leave(by_others=True)
    return agent.driver_of(group) is None


async def _certificate(agent: Agent, group: GroupState, entry: LogEntry) -> Certificate | None:
    """Return the proof of the end from the store, or make it of living members' captures and store it."""
    stored = await agent.store.log.read_certificate(group.realm, group.group)
    if stored is not None:
        proof = proof_of_end(entry, group.configuration, stored.captures)
        if proof is not None:
            return proof
    own = [] if group.captured is None else [group.captured]
    proof = proof_of_end(entry, group.configuration, [*own, *await agent.follower(group).live_captures()])
    if proof is not None:
        await agent.store.log.write_certificate(group.realm, group.group, proof)
    return proof
