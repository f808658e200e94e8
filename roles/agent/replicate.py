"""Push: the leader's agent sends acknowledged entries to every member, and members answer with captures (agent.md 7).

One call in flight per member, the next covers everything since. With nothing to send, an empty call every 250 ms is
the heartbeat; its answers carry the progress of members that catch up by reading the log. None of this matters for
safety: the HSM checks MACs and chaining itself, and only persisted captures are signed.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

import trio

from juicebox_hsm.consensus.codec import decode_captured, decode_log_entry, encode_captured
from juicebox_hsm.errors import DecodingError, RealmError
from juicebox_hsm.ids import HsmId
from juicebox_hsm.wire.methods import REPLICATE
from juicebox_hsm.wire.rpc import CapturedReply, GroupCall, Refusal, Refused, Replicate
from roles.agent.oneshot import Signal
from roles.agent.state import GroupState, LeaderState

if TYPE_CHECKING:
    from roles.agent.context import Agent

REPLICATE_ENTRIES_MAX: Final = 200
UNREACHABLE_PAUSE_S: Final = 0.1
BEHIND_PAUSE_S: Final = 0.05
"""Between pushes to a member that reads the log and has not come closer: asking again at once would only delay it."""


def encoded_capture(group: GroupState) -> bytes | None:
    """Return the HSM's own persisted capture of the group, encoded."""
    return None if group.captured is None else encode_captured(group.captured)


def other_members(agent: Agent, group: GroupState) -> list[HsmId]:
    """Return the members without our own HSM."""
    return [member for member in group.configuration if member != agent.hsm_id]


# --- leader's side ---------------------------------------------------------------------------------------


async def push_to_member(agent: Agent, group: GroupState, leader: LeaderState, member: HsmId) -> None:
    """Keep one member supplied until the leadership ends."""
    signal = leader.member_signals[member]
    next_index = leader.next_index
    while group.leader is leader:
        url = agent.peers.url_of(member)
        if url is None:
            agent.peers.suspect()
            await signal.wait_at_most(agent.timings.heartbeat_s)
            await trio.sleep(min(UNREACHABLE_PAUSE_S, agent.timings.heartbeat_s))
            continue
        if next_index >= leader.next_index:
            await signal.wait_at_most(agent.timings.heartbeat_s)
            if group.leader is not leader:
                return
        next_index = await _push_once(agent, group, leader, member, url, next_index)


async def _push_once(
    agent: Agent, group: GroupState, leader: LeaderState, member: HsmId, url: str, next_index: int
) -> int:
    """Send what the member may lack, count its vote, and return the next index to send."""
    asked = next_index
    entries = leader.recent_from(next_index, REPLICATE_ENTRIES_MAX)
    if entries is None:
        # further behind than what is kept: it reads the log, and we go on with what comes
        next_index, entries = leader.next_index, []
    last = next_index + len(entries) - 1
    body = Replicate(group.realm, group.group, leader.starting, entries, last)
    try:
        reply = await agent.rpc.call(url, REPLICATE, body, timeout_s=agent.timings.replicate_timeout_s)
    except RealmError:
        agent.metrics.count("agent.replicate", result="unreachable")
        agent.peers.suspect()
        await trio.sleep(min(UNREACHABLE_PAUSE_S, agent.timings.heartbeat_s))
        return next_index
    if not isinstance(reply, CapturedReply):
        agent.metrics.count("agent.replicate", result="refused")
        await trio.sleep(agent.timings.heartbeat_s)
        return next_index
    agent.metrics.count("agent.replicate", result="behind" if reply.behind else "ok")
    if reply.captured is not None:
        try:
            captured = decode_captured(reply.captured)
        except DecodingError:
            agent.metrics.count("agent.replicate.undecodable")
            return last + 1
        if captured.hsm == member and captured.realm == group.realm and captured.group == group.group:
            leader.vote(captured)
            if reply.behind:
                wanted = max(captured.index + 1, leader.starting)
                if wanted == asked:
                    await trio.sleep(min(BEHIND_PAUSE_S, agent.timings.heartbeat_s))
                return wanted
    return last + 1


def prepare_members(agent: Agent, group: GroupState, leader: LeaderState) -> list[HsmId]:
    """Create the wake-up signals of the other members' pushers; returns those members."""
    members = other_members(agent, group)
    for member in members:
        leader.member_signals.setdefault(member, Signal())
    return members


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
    if len(body.entries) > REPLICATE_ENTRIES_MAX:
        return CapturedReply(encoded_capture(group), behind=True)
    try:
        entries = [decode_log_entry(encoded) for encoded in body.entries]
    except DecodingError:
        agent.metrics.count("agent.push.refused", outcome="undecodable")
        follower.wake.set()
        return CapturedReply(encoded_capture(group), behind=True)
    if any(later.index != earlier.index + 1 for earlier, later in pairwise(entries)):
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
