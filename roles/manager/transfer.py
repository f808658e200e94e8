"""Carry out transfers: find leaders, make the calls that the rules ask for, retry under one deadline (manager.md 6.2).

The steps and what may be cancelled are in `host.cluster.transfer`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.leases import ownership_lease
from juicebox_hsm.host.cluster.progress import TransferProgress, listed
from juicebox_hsm.host.cluster.transfer import (
    LEASE_RETRY,
    PHASE_A_RETRY,
    PHASE_B_RETRY,
    Call,
    Calls,
    TransferRequest,
    complete,
    leaders_of,
    move_range,
    pause_before_again,
    source_leader_of,
)
from juicebox_hsm.host.cluster.view import ClusterView
from juicebox_hsm.host.retry import RetryProfile
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.wire.methods import Request
from juicebox_hsm.wire.rpc import Done, Refusal, Refused, TransferStep
from roles.manager.context import ManagerContext
from roles.manager.leases import LeaseBusy, LeaseLost, management_lease
from roles.survey.overview import IDS_TIMEOUT_S, read_overview

DEADLINE_S: Final = 120.0
STEP_TIMEOUT_S: Final = 65.0  # agents wait up to 60 s for the commit


async def run_requested_transfer(context: ManagerContext, request: TransferRequest) -> Done | Refused:
    """Carry out an operator's `transfer`; waits up to 1 s for the realm's ownership lease."""
    if request.source == request.destination:
        return Refused(Refusal.INVALID_GROUP, detail="source and destination are the same group")
    begun, attempt = trio.current_time(), 0
    while True:
        attempt += 1
        try:
            async with management_lease(context, ownership_lease(request.realm)):
                return await run_transfer(context, request)
        except LeaseBusy:
            if LEASE_RETRY.exhausted(attempt, trio.current_time() + LEASE_RETRY.delay_s(attempt) - begun):
                return Refused(Refusal.MANAGER_BUSY)
        except LeaseLost as error:
            return Refused(Refusal.MANAGER_BUSY, detail=str(error))
        except StoreUnavailable as error:
            return Refused(Refusal.NO_STORE, detail=str(error))
        await trio.sleep(LEASE_RETRY.delay_s(attempt))


async def run_transfer(context: ManagerContext, request: TransferRequest) -> Done | Refused:
    """Run all four steps with retries. The caller holds the ownership lease."""
    begun = trio.current_time()
    context.log.info("transfer begins", transfer=str(request))
    outcome: Done | Refused = Refused(Refusal.TIMEOUT)
    with (
        listed(context.state.transfers, request.progress(context.now_ms())) as progress,
        trio.move_on_after(DEADLINE_S),
    ):
        move = partial(_move_range, context, request, progress)
        left = await _retried(context, request, progress, move, PHASE_A_RETRY)
        outcome = left if isinstance(left, Refused) else await _completed(context, request, left, progress)
    result = "ok" if isinstance(outcome, Done) else outcome.outcome.value
    elapsed_ns = round((trio.current_time() - begun) * 1e9)
    context.meter.timing("manager.transfer.time.ns", elapsed_ns, result=result)
    context.log.info("transfer ended", transfer=str(request), result=result)
    return outcome


async def complete_only(context: ManagerContext, request: TransferRequest, at: int) -> Done | Refused:
    """Run only the last step, for a range that left at `at` and has arrived; the deadline is the caller's."""
    context.log.info("completion begins", transfer=str(request), at=at)
    with listed(context.state.transfers, request.progress(context.now_ms())) as progress:
        outcome = await _completed(context, request, at, progress)
    result = "ok" if isinstance(outcome, Done) else outcome.outcome.value
    context.log.info("completion ended", transfer=str(request), at=at, result=result)
    return outcome


async def _completed(
    context: ManagerContext, request: TransferRequest, at: int, progress: TransferProgress
) -> Done | Refused:
    """Run phase B, with retries."""
    progress.step = TransferStep.COMPLETE
    phase = partial(_complete, context, request, at, progress)
    outcome = await _retried(context, request, progress, phase, PHASE_B_RETRY)
    return outcome if isinstance(outcome, Refused) else Done()


async def _retried(
    context: ManagerContext,
    request: TransferRequest,
    progress: TransferProgress,
    phase: Callable[[], Awaitable[int | Refused]],
    profile: RetryProfile,
) -> int | Refused:
    """Repeat a phase with growing pauses until it succeeds, fails for good, or the deadline cancels us."""
    progress.attempt = 1
    while True:
        outcome = await phase()
        pause_s = pause_before_again(outcome, progress.attempt, profile)
        if pause_s is None or not isinstance(outcome, Refused):
            return outcome
        context.log.info(
            "transfer step is retried", transfer=str(request), reason=outcome.outcome.value, detail=outcome.detail
        )
        await trio.sleep(pause_s)
        progress.attempt += 1


async def _look(context: ManagerContext) -> ClusterView | Refused:
    """Ask all agents anew."""
    try:
        return await read_overview(context.store, context.rpc, IDS_TIMEOUT_S)
    except StoreUnavailable as error:
        return Refused(Refusal.NO_STORE, detail=str(error))


async def _move_range(context: ManagerContext, request: TransferRequest, progress: TransferProgress) -> int | Refused:
    """Run phase A once between the leaders of now."""
    progress.step = TransferStep.PREPARE
    view = await _look(context)
    leaders = view if isinstance(view, Refused) else leaders_of(view, request)
    return leaders if isinstance(leaders, Refused) else await _run(context, move_range(request, leaders), progress)


async def _complete(
    context: ManagerContext, request: TransferRequest, at: int, progress: TransferProgress
) -> int | Refused:
    """Run phase B once at the source's leader of now."""
    view = await _look(context)
    source = view if isinstance(view, Refused) else source_leader_of(view, request)
    return source if isinstance(source, Refused) else await _run(context, complete(request, source, at), progress)


async def _run(context: ManagerContext, calls: Calls, progress: TransferProgress) -> int | Refused:
    """Make the calls that the rules ask for, one after the other, and return what they conclude."""
    reply: object = None
    while True:
        try:
            call = calls.send(reply)
        except StopIteration as end:
            outcome: int | Refused = end.value
            return outcome
        progress.step = call.step
        reply = await call_step(context, call)


async def call_step(context: ManagerContext, call: Call[Request]) -> object:
    """Make one call; RPC trouble becomes `RpcError`, whose outcome is uncertain."""
    try:
        reply: object = await context.rpc.call(call.member.url, call.method, call.body, timeout_s=STEP_TIMEOUT_S)
    except RealmError as error:
        reply = Refused(Refusal.RPC_ERROR, detail=f"{call.method.name} at {call.member.url}: {error}")
    if isinstance(reply, Refused):
        context.log.info("transfer step refused", step=call.method.name, agent=call.member.url, refusal=str(reply))
    return reply
