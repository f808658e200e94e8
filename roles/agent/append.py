"""The producer: one loop per led group turns waiting requests into log entries and appends them (agent.md 5, 6).

Everything is done per batch: one read of proofs, one run of the HSM over the requests, one store append with the
squashed delta and the intents. While an append is in flight the next requests gather; that, not concurrency, is where
throughput comes from. Only after the store acknowledged a batch do its entries go to HSMs, ours and the members'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from juicebox_hsm.adapters.clock.retrying import retrying
from juicebox_hsm.consensus.codec import encode_log_entry
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.log import AppendOutcome
from juicebox_hsm.merkle.kernel import squash
from juicebox_hsm.ports.errors import StoreAmbiguous
from roles.agent.app import run_requests
from roles.agent.state import RECENT_ENTRIES_MAX, GroupState, LeaderState, Queued

if TYPE_CHECKING:
    from roles.agent.context import Agent

EMPTY_DELTA: Final = squash([])


async def produce(agent: Agent, group: GroupState, leader: LeaderState) -> None:
    """Run requests and append their entries until the leadership ends."""
    missing_since: float | None = None
    while group.leader is leader:
        if leader.incoming:
            await run_requests(agent, group, leader)
        if leader.next_index in leader.queue:
            missing_since = None
            await append_batch(agent, group, leader)
        elif not leader.incoming and not leader.queue:
            missing_since = None
            await leader.work.wait()
        elif not leader.incoming:
            missing_since = await _wait_for_hole(agent, group, leader, missing_since)


async def _wait_for_hole(
    agent: Agent, group: GroupState, leader: LeaderState, missing_since: float | None
) -> float | None:
    """Wait for the entry at `next_index`; after 5 s without it the leadership cannot go on."""
    now = trio.current_time()
    began = now if missing_since is None else missing_since
    left_s = began + agent.timings.hole_s - now
    if left_s > 0:
        await leader.work.wait_at_most(left_s)
        return began
    await give_up(agent, group, leader, f"index {leader.next_index} never arrived")
    return None


async def append_batch(agent: Agent, group: GroupState, leader: LeaderState) -> None:
    """Append the entries that continue the log, then feed and push them; handles every outcome."""
    batch = leader.take_batch()
    entries = [queued.entry for queued in batch]
    intents = [queued.intent for queued in batch]
    deltas = [queued.delta for queued in batch if len(queued.delta) > len(EMPTY_DELTA)]
    delta = EMPTY_DELTA if not deltas else deltas[0] if len(deltas) == 1 else squash(deltas)

    async def append() -> AppendOutcome:
        return await agent.store.log.append(group.realm, group.group, entries, intents, delta)

    began = trio.current_time()
    try:
        # A cancelled write is always an unknown outcome, so it is never cancelled; retries bound it to 30 s.
        with trio.CancelScope(shield=True):
            outcome = await retrying(append, on_retry=lambda _: agent.metrics.count("bigtable.append.retry"))
    except StoreAmbiguous as error:
        await give_up(agent, group, leader, f"append of unknown outcome: {error}")
        return
    except RealmError as error:
        await give_up(agent, group, leader, f"append failed: {error}")
        return
    agent.metrics.timing("bigtable.append.time", int((trio.current_time() - began) * 1e9))
    agent.metrics.gauge("bigtable.append.batch.size", len(batch))
    agent.metrics.gauge("bigtable.append.queue.size", len(leader.queue))
    if outcome is AppendOutcome.CONFLICT:
        await lose(agent, group, leader, entries[0].index)
        return
    await acknowledged(agent, group, leader, batch)


async def acknowledged(agent: Agent, group: GroupState, leader: LeaderState, batch: list[Queued]) -> None:
    """Note appended entries, wake the pushers, and let our own HSM capture them."""
    entries = [queued.entry for queued in batch]
    leader.appended(batch)
    if leader.member_signals:
        leader.recent.extend((entry.index, encode_log_entry(entry)) for entry in entries)
        while len(leader.recent) > RECENT_ENTRIES_MAX:
            leader.recent.popleft()
        for signal in leader.member_signals.values():
            signal.set()
    await agent.follower(group).push(entries)


async def lose(agent: Agent, group: GroupState, leader: LeaderState, index: int) -> None:
    """Another leader wrote at `index`: nothing of ours can follow; step down and let capture sort it out."""
    agent.metrics.count("agent.append.conflict")
    first_notice = group.is_leader
    leader.block_appends()
    if first_notice and group.leader is leader:
        await agent.step_down(group, force=False, why=f"another leader wrote index {index}")
    agent.follower(group).wake.set()


async def give_up(agent: Agent, group: GroupState, leader: LeaderState, why: str) -> None:
    """Leadership cannot continue with an unknown log tail (agent.md 13): forced StepDown, queue and waiters dropped."""
    agent.metrics.count("agent.append.given_up")
    leader.block_appends()
    if group.leader is leader:
        await agent.step_down(group, force=True, why=why)
