"""Log compaction by the leader, and what a new leadership does once its predecessors are quiet (agent.md 10, 11).

Start: wait until all other members report Witness, or 60 s: former leaders may still need entries to release replies
and to record their events. Then resolve unknown outcomes, list the older rows, and compact as the index advances.
Before compacting up to X the capture statements that proved a commit at C > X are stored, so that one lagging witness
and a leader can go on while the third member is dead for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio

from juicebox_hsm.consensus.election import elect
from juicebox_hsm.errors import RealmError, check
from juicebox_hsm.host.log import LogRow
from juicebox_hsm.host.retry import STORE_RETRY
from juicebox_hsm.ids import HsmId
from juicebox_hsm.wire.rpc import GroupRole
from roles.agent.outbox import resolve_unknown, settle
from roles.agent.replicate import other_members
from roles.agent.state import GroupState, LeaderState

if TYPE_CHECKING:
    from roles.agent.context import Agent


def compactible_rows(starts: Sequence[int], index: int) -> int:
    """Return how many leading rows have all their entries at or below `index`.

    Only row starts are known, so row k counts iff row k+1 exists and starts at or below index + 1 (agent.md 10).
    """
    count = 0
    while count + 1 < len(starts) and starts[count + 1] <= index + 1:
        count += 1
    return count


def compaction_index(group: GroupState, leader: LeaderState) -> int:
    """Return the highest index that may be compacted: below the last commit, captured by us, and settled."""
    if leader.committed is None or group.captured is None or not leader.resolved:
        return 0
    return min(leader.committed - 1, group.captured.index, leader.settled)


async def keep_house(agent: Agent, group: GroupState, leader: LeaderState) -> None:
    """Settle, resolve and compact until cancelled with the leadership."""
    await wait_for_witnesses(agent, group)
    while leader.committed is None or leader.committed < leader.starting - 1:
        await leader.compactible.wait()
    failures = 0
    listed = False
    trouble = f"compaction {group.group.hex()}"
    while True:
        try:
            if not leader.resolved:
                await resolve_unknown(agent, group, leader)
            if not listed:
                await _take_older_rows(agent, group, leader)
                listed = True
            await compact_once(agent, group, leader)
        except RealmError as error:
            failures += 1
            agent.note_trouble(trouble, error)
            await trio.sleep(STORE_RETRY.delay_s(failures))
            continue
        failures = 0
        agent.clear_trouble(trouble)
        await trio.sleep(agent.timings.compact_pause_s)
        await leader.compactible.wait()


async def wait_for_witnesses(agent: Agent, group: GroupState) -> None:
    """Return when every other member's agent reports Witness and no answers due for this group, or after 60 s."""
    members = other_members(agent, group)
    with trio.move_on_after(agent.timings.witness_grace_s):
        while members:
            members = [member for member in members if not await _is_witness(agent, group, member)]
            if members:
                await trio.sleep(agent.timings.witness_poll_s)


async def _is_witness(agent: Agent, group: GroupState, member: HsmId) -> bool:
    url = agent.peers.url_of(member)
    if url is None:
        return False
    status = await agent.peers.status(url)
    if status is None:
        return False
    return any(
        info.realm == group.realm
        and info.group == group.group
        and info.role.name is GroupRole.WITNESS
        and not info.waiting_clients  # its last rows may be on their way
        for info in status.groups
    )


async def _take_older_rows(agent: Agent, group: GroupState, leader: LeaderState) -> None:
    """Prepend the rows below `starting` that earlier leaderships left."""
    rows = await agent.store.log.list_rows(group.realm, group.group, leader.starting)
    check(all(row.first_index < leader.starting for row in rows), "listed rows start below the leadership")
    check(
        not leader.uncompacted or leader.uncompacted[0].first_index == leader.starting,
        "our own first row starts the leadership",
    )
    leader.uncompacted.extendleft(reversed(rows))


async def compact_once(agent: Agent, group: GroupState, leader: LeaderState) -> None:
    """Raise `settled`, then certify and compact the rows that are ready. Raises `RealmError`."""
    await settle(agent, group, leader)
    index = compaction_index(group, leader)
    count = compactible_rows([row.first_index for row in leader.uncompacted], index)
    agent.metrics.gauge("agent.compaction.uncompacted_rows.count", len(leader.uncompacted))
    first = leader.uncompacted[0].first_index if leader.uncompacted else 0
    agent.metrics.gauge("agent.compaction.uncompacted_rows.first_index", first)
    if count == 0:
        return
    certificate = leader.certificate
    if certificate is None or certificate.index <= index:
        return
    votes = {captured.hsm: captured.index for captured in certificate.captures}
    proven = elect(group.configuration, votes)
    if proven is None or proven < certificate.index:
        return
    await agent.store.log.write_certificate(group.realm, group.group, certificate)
    rows: list[LogRow] = [leader.uncompacted[at] for at in range(count)]
    await agent.store.log.compact(group.realm, group.group, rows)
    for _ in range(count):
        leader.uncompacted.popleft()
    agent.metrics.gauge("agent.compaction.compact_index", index)
