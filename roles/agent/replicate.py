"""Push: the leader's agent sends acknowledged entries to every member, and members answer with captures (agent.md 7).

One call in flight per member, the next covers everything since. With nothing to send, an empty call every 250 ms is
the heartbeat; its answers carry the progress of members that catch up by reading the log. None of this matters for
safety: the HSM checks MACs and chaining itself, and only persisted captures are signed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from juicebox_hsm.consensus.codec import decode_captured, decode_log_entry, encode_captured
from juicebox_hsm.consensus.types import Captured
from juicebox_hsm.errors import DecodingError, RealmError
from juicebox_hsm.host.group import GroupState
from juicebox_hsm.host.leadership.effects import Long, Pause, Pausing, Push
from juicebox_hsm.host.leadership.events import MemberTurn, PushAnswered, PushFailed
from juicebox_hsm.host.leadership.push import PUSH_ENTRIES_MAX
from juicebox_hsm.ids import HsmId
from juicebox_hsm.wire.methods import REPLICATE
from juicebox_hsm.wire.rpc import CapturedReply, GroupCall, Refusal, Refused, Replicate

if TYPE_CHECKING:
    from roles.agent.context import Agent
    from roles.agent.driver import Driver

_PAUSES_S: Final = {Pausing.UNREACHABLE: 0.1, Pausing.BEHIND: 0.05}
"""Pauses of a pusher, a heartbeat at most; after a refusal just that."""


def encoded_capture(group: GroupState) -> bytes | None:
    """Return the HSM's own persisted capture of the group, encoded."""
    return None if group.captured is None else encode_captured(group.captured)


# --- leader's side ---------------------------------------------------------------------------------------


async def push_to_member(agent: Agent, driver: Driver, member: HsmId) -> None:
    """Keep one member supplied until the leadership ends."""
    effect = driver.step(MemberTurn(member))
    while not driver.leader.has_ended:
        if effect is None:
            woken = await driver.wait(member, agent.timings.heartbeat_s)
            effect = driver.step(MemberTurn(member, heartbeat=not woken))
        else:
            effect = await _carry_out(agent, driver, effect) or driver.step(MemberTurn(member))


async def _carry_out(agent: Agent, driver: Driver, effect: Long) -> Long | None:
    match effect:
        case Push():
            return driver.step(await _push(agent, driver, effect))
        case Pause(_, why):
            timings = agent.timings
            await trio.sleep(min(_PAUSES_S.get(why, timings.heartbeat_s), timings.heartbeat_s))
            return None
        case _:
            raise TypeError(f"not of a pusher: {effect}")


async def _push(agent: Agent, driver: Driver, push: Push) -> PushAnswered | PushFailed:
    """Send what the member may lack; tells its answer."""
    group, member = driver.group, push.member
    url = agent.peers.url_of(member)
    if url is None:
        agent.peers.suspect()
        return PushFailed(member, reached=False)
    body = Replicate(group.realm, group.group, driver.leader.starting, list(push.entries), push.last)
    try:
        reply = await agent.rpc.call(url, REPLICATE, body, timeout_s=agent.timings.replicate_timeout_s)
    except RealmError:
        agent.metrics.count("agent.replicate", result="unreachable")
        agent.peers.suspect()
        return PushFailed(member, reached=False)
    if not isinstance(reply, CapturedReply):
        agent.metrics.count("agent.replicate", result="refused")
        return PushFailed(member, reached=True)
    agent.metrics.count("agent.replicate", result="behind" if reply.behind else "ok")
    captured: Captured | None = None
    if reply.captured is not None:
        try:
            captured = decode_captured(reply.captured)
        except DecodingError:
            agent.metrics.count("agent.replicate.undecodable")
    return PushAnswered(member, captured, behind=reply.behind)


# --- member's side ---------------------------------------------------------------------------------------


async def handle_replicate(agent: Agent, body: Replicate) -> CapturedReply | Refused:
    """Capture and persist pushed entries, then answer with our persisted capture."""
    group = agent.groups.find(body.realm, body.group)
    if isinstance(group, Refusal):
        return Refused(group)
    follower = agent.follower(group)
    if not body.entries:
        if body.last >= group.position:
            follower.wake.set()
        return CapturedReply(encoded_capture(group), behind=body.last >= group.position)
    if len(body.entries) > PUSH_ENTRIES_MAX:
        return CapturedReply(encoded_capture(group), behind=True)
    try:
        entries = [decode_log_entry(encoded) for encoded in body.entries]
    except DecodingError:
        agent.metrics.count("agent.push.refused", outcome="undecodable")
        follower.wake.set()
        return CapturedReply(encoded_capture(group), behind=True)
    ticket = await follower.push(entries)
    if ticket is None:
        return CapturedReply(encoded_capture(group), behind=True)
    await agent.persister.covered(ticket)
    return CapturedReply(encoded_capture(group))


def handle_captured(agent: Agent, body: GroupCall) -> CapturedReply | Refused:
    """Answer with our persisted capture."""
    group = agent.groups.find(body.realm, body.group)
    if isinstance(group, Refusal):
        return Refused(group)
    return CapturedReply(encoded_capture(group))
