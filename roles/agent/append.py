"""The producing lane's work: log tail, proofs, the HSM, the append, and our own capture (agent.md 5, 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from juicebox_hsm.adapters.clock.retrying import budget, retrying
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.leadership.effects import Append, AskHsm, Long, ReadProofs, ReadTail, ShowOwn, StepDown
from juicebox_hsm.host.leadership.events import (
    AppendFinished,
    AppendResult,
    HsmAnswered,
    Lane,
    OwnShown,
    ProofsFailed,
    ProofsRead,
    SteppedDown,
    TailFailed,
    TailRead,
)
from juicebox_hsm.host.log import AppendOutcome
from juicebox_hsm.hsm.messages import AppRequest, AppRequestOk, Outcome
from juicebox_hsm.ports.errors import StoreAmbiguous

if TYPE_CHECKING:
    from roles.agent.context import Agent
    from roles.agent.driver import Driver

_RESULTS = {AppendOutcome.APPENDED: AppendResult.APPENDED, AppendOutcome.CONFLICT: AppendResult.CONFLICT}


async def produce(agent: Agent, driver: Driver) -> None:
    """Run requests and append their entries until the leadership ends."""
    producer = _Producer(agent)
    await driver.run_lane(Lane.PRODUCE, producer.carry_out)


class _Producer:
    """Carries out the lane's effects, and times batches."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._batch_began: float | None = None

    async def carry_out(self, driver: Driver, effect: Long) -> Long | None:
        """Do one thing; returns what follows it."""
        match effect:
            case AskHsm():
                follows = await _ask(self._agent, driver, effect)
                if not isinstance(follows, AskHsm) and self._batch_began is not None:
                    elapsed_s = trio.current_time() - self._batch_began
                    self._agent.metrics.timing("agent.start_app_request", int(elapsed_s * 1e9))
                    self._batch_began = None
                return follows
            case ReadTail():
                self._batch_began = trio.current_time()
                return await _read_tail(self._agent, driver)
            case ReadProofs():
                self._batch_began = trio.current_time()
                return await _read_proofs(self._agent, driver, effect)
            case Append():
                return await _append(self._agent, driver, effect)
            case ShowOwn(entries):
                await self._agent.follower(driver.group).push(entries)
                return driver.step(OwnShown())
            case StepDown():
                await driver.step_down(effect)
                return driver.step(SteppedDown())
            case _:
                raise TypeError(f"not of the producing lane: {effect}")


async def _read_tail(agent: Agent, driver: Driver) -> Long | None:
    group = driver.group
    try:
        last = await retrying(lambda: agent.store.log.read_last(group.realm, group.group), on_retry=driver.store_failed)
    except RealmError as error:
        agent.log.warning("log tail not read", group=group.group.hex(), error=str(error))
        return driver.step(TailFailed())
    return driver.step(TailRead(last))


async def _read_proofs(agent: Agent, driver: Driver, effect: ReadProofs) -> Long | None:
    group = driver.group
    records = [request.record_id for request in effect.requests]
    for request in effect.requests:
        if request.steps is not None:
            request.steps.enter("proofs")
    try:
        with budget(effect.within_s):
            proofs = await agent.store.nodes.read_proofs(group.realm, effect.partition, records)
    except RealmError as error:
        agent.log.warning("proofs not read", group=group.group.hex(), error=str(error))
        follows = driver.step(ProofsFailed())
        driver.tell_store(error)
        return follows
    driver.store_works()
    missing = sum(proof is None for proof in proofs)
    if missing:
        agent.metrics.count("agent.start_app_request.missing_node", missing)
    return driver.step(ProofsRead(proofs))


async def _ask(agent: Agent, driver: Driver, effect: AskHsm) -> Long | None:
    """Ask the HSM. No checkpoint from its reply to the queue: a hole in the log would stall the group."""
    group, request = driver.group, effect.request
    if request.steps is not None:
        request.steps.enter("hsm")
    reply = await agent.hsm.send(
        AppRequest(
            group.realm,
            group.group,
            request.record_id,
            request.session_id,
            request.encrypted,
            effect.proof,
            effect.index,
        )
    )
    if reply is Outcome.STALE_PROOF:
        agent.metrics.count("agent.start_app_request.stale_proof")
    answered = HsmAnswered(request, reply, agent.outbox_tails.get(request.tenant, 0) + 1)
    # The leadership that made the entry: while we waited for the HSM, another may have begun.
    current = agent.driver_of(group) or driver
    if isinstance(reply, AppRequestOk):
        current.made(request, reply.entry.index)
    follows = current.step(answered)
    return follows if current is driver else None


async def _append(agent: Agent, driver: Driver, effect: Append) -> Long | None:
    group = driver.group

    async def append() -> AppendOutcome:
        return await agent.store.log.append(group.realm, group.group, effect.entries, effect.intents, effect.delta)

    def on_retry(error: RealmError) -> None:
        agent.metrics.count("bigtable.append.retry")
        driver.store_failed(error)

    began = trio.current_time()
    try:
        # A cancelled write is always an unknown outcome, so it is never cancelled; retries bound it to 30 s.
        with trio.CancelScope(shield=True):
            outcome = await retrying(append, on_retry=on_retry)
    except StoreAmbiguous as error:
        agent.metrics.count("agent.append.given_up")
        return driver.step(AppendFinished(AppendResult.AMBIGUOUS, str(error)))
    except RealmError as error:
        agent.metrics.count("agent.append.given_up")
        return driver.step(AppendFinished(AppendResult.REFUSED, str(error)))
    driver.store_works()
    agent.metrics.timing("bigtable.append.time", int((trio.current_time() - began) * 1e9))
    agent.metrics.gauge("bigtable.append.batch.size", len(effect.entries))
    agent.metrics.gauge("bigtable.append.queue.size", driver.leader.queued)
    driver.enter("commit", (entry.index for entry in effect.entries))
    if outcome is AppendOutcome.CONFLICT:
        agent.metrics.count("agent.append.conflict")
    return driver.step(AppendFinished(_RESULTS[outcome]))
