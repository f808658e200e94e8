"""Range transfers: the four steps, the cancel rule, and recovery from every crash point."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from juicebox_hsm.adapters.rpc import RpcUnreachable
from juicebox_hsm.host.cluster.planning import covers
from juicebox_hsm.host.cluster.progress import is_same
from juicebox_hsm.host.cluster.transfer import TransferRequest
from juicebox_hsm.ids import OwnedRange
from juicebox_hsm.wire.rpc import Done, GroupRole, Range, Refusal, Refused, TransferOutCall, TransferPrepare
from roles.manager.context import ManagerContext
from roles.manager.transfer import run_requested_transfer, run_transfer
from tests.host.cluster.agents import FULL, REALM, FakeAgent, group, hsm, record, three
from tests.unit.manager.fakes import FakeRpc, make_context, recover_transfers

LOW = OwnedRange(record("00"), record("7f", 0xFF))
MIDDLE = OwnedRange(record("40"), record("7f", 0xFF))


def _cluster() -> tuple[list[FakeAgent], ManagerContext, FakeRpc]:
    """Group 1 owns everything and is led by HSM 1; group 2 is empty and led by HSM 2."""
    agents = three(groups=2)
    agents[0].lead(group(1), FULL)
    agents[1].lead(group(2))
    context = make_context(agents)
    assert isinstance(context.rpc, FakeRpc)
    return agents, context, context.rpc


def _request(wanted: OwnedRange = LOW) -> TransferRequest:
    return TransferRequest(REALM, group(1), group(2), wanted)


def _owned(agents: list[FakeAgent]) -> list[OwnedRange]:
    found = []
    for number in (1, 2):
        for agent in agents:
            owned = agent.groups[group(number)].owned
            if agent.groups[group(number)].role is GroupRole.LEADER and owned is not None:
                found.append(owned)
    return found


def _is_settled(agents: list[FakeAgent]) -> bool:
    """Tell whether everything is owned once and nothing is pending."""
    pending = [
        agent.groups[group(number)].transferring
        for agent in agents
        for number in (1, 2)
        if agent.groups[group(number)].role is GroupRole.LEADER
    ]
    return covers(_owned(agents), FULL) and not any(pending)


async def test_four_steps_in_order(autojump_clock: trio.testing.MockClock) -> None:
    """prepare, out, in, complete, each at the right leader; the range has moved and nothing is pending."""
    agents, context, rpc = _cluster()
    assert await run_requested_transfer(context, _request()) == Done()
    steps = rpc.methods("transfer/prepare", "transfer/out", "transfer/in", "transfer/complete")
    assert steps == [
        ("tls://a2", "transfer/prepare"),
        ("tls://a1", "transfer/out"),
        ("tls://a2", "transfer/in"),
        ("tls://a1", "transfer/complete"),
    ]
    assert agents[1].groups[group(2)].owned == LOW
    assert _is_settled(agents)
    assert await context.store.leases.list() == []


async def test_same_group_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    """A group cannot transfer to itself."""
    _, context, rpc = _cluster()
    outcome = await run_requested_transfer(context, TransferRequest(REALM, group(1), group(1), LOW))
    assert isinstance(outcome, Refused)
    assert outcome.outcome is Refusal.INVALID_GROUP
    assert not rpc.calls


def test_malformed_ranges_are_refused() -> None:
    """Short ids and reversed ends never reach an agent."""
    for start, end in ((b"", b"\xff" * 32), (b"\xff" * 32, bytes(32))):
        assert TransferRequest.from_wire(TransferPrepare(REALM, group(1), group(2), Range(start, end))) is None


async def test_definite_refusal_withdraws_the_preparation(autojump_clock: trio.testing.MockClock) -> None:
    """A range the source cannot give leaves nothing prepared."""
    agents, context, rpc = _cluster()
    outcome = await run_requested_transfer(context, _request(MIDDLE))
    assert isinstance(outcome, Refused)
    assert outcome.outcome is Refusal.UNACCEPTABLE_RANGE
    assert rpc.methods("transfer/cancel_prepare") == [("tls://a2", "transfer/cancel_prepare")]
    assert _is_settled(agents)


@pytest.mark.parametrize("answer", [Refused(Refusal.COMMIT_TIMEOUT), RpcUnreachable("lost", maybe_delivered=True),
                                    Refused(Refusal.NO_STORE)])  # fmt: skip
async def test_uncertain_out_is_never_cancelled(
    autojump_clock: trio.testing.MockClock, answer: Refused | RpcUnreachable
) -> None:
    """When *out* may yet commit, the only group that can take the range keeps its preparation."""
    agents, context, rpc = _cluster()
    agents[0].refuse["transfer/out"] = answer
    outcome = await run_requested_transfer(context, _request())
    assert isinstance(outcome, Refused)
    assert not rpc.methods("transfer/cancel_prepare")
    assert agents[1].groups[group(2)].transferring is not None


async def test_bad_proof_is_an_unacceptable_range(autojump_clock: trio.testing.MockClock) -> None:
    """InvalidProof of *out* is definite: reported as UnacceptableRange, and withdrawn."""
    agents, context, rpc = _cluster()
    agents[0].refuse["transfer/out"] = Refused(Refusal.INVALID_PROOF)
    outcome = await run_requested_transfer(context, _request())
    assert isinstance(outcome, Refused)
    assert outcome.outcome is Refusal.UNACCEPTABLE_RANGE
    assert rpc.methods("transfer/cancel_prepare")


async def test_retries_until_there_is_a_leader(autojump_clock: trio.testing.MockClock) -> None:
    """A transfer begun between two leaders waits for the next one."""
    agents, context, _ = _cluster()
    agents[1].groups[group(2)].role = GroupRole.WITNESS
    async with trio.open_nursery() as nursery:

        async def move() -> None:
            assert await run_requested_transfer(context, _request()) == Done()

        nursery.start_soon(move)
        await trio.sleep(3)
        agents[2].lead(group(2))
    assert _is_settled(agents)


async def test_deadline(autojump_clock: trio.testing.MockClock) -> None:
    """Without a leader for two minutes the caller gets Timeout."""
    agents, context, _ = _cluster()
    agents[1].groups[group(2)].role = GroupRole.WITNESS
    outcome = await run_requested_transfer(context, _request())
    assert outcome == Refused(Refusal.TIMEOUT)
    assert 119 < trio.current_time() < 122


async def test_new_destination_leader_restarts_from_prepare(autojump_clock: trio.testing.MockClock) -> None:
    """A nonce that died with its leader is replaced by preparing again."""
    agents, context, rpc = _cluster()
    agents[1].refuse["transfer/in"] = Refused(Refusal.INVALID_NONCE)

    def forgive(_: str, method: str) -> None:
        if method == "transfer/in" and len(rpc.methods("transfer/in")) == 2:
            agents[1].refuse.clear()

    rpc.on_call = forgive
    assert await run_requested_transfer(context, _request()) == Done()
    assert len(rpc.methods("transfer/prepare")) == 2
    assert _is_settled(agents)


async def test_progress_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    """A running transfer is listed with its parameters, start, step and attempt, and is gone when it ended."""
    agents, context, rpc = _cluster()
    agents[1].refuse["transfer/in"] = Refused(Refusal.INVALID_NONCE)
    agents[0].refuse["transfer/complete"] = Refused(Refusal.NO_STORE)
    seen = []

    def look(_: str, method: str) -> None:
        if method.startswith("transfer/"):
            [progress] = context.state.transfers
            seen.append((method, progress.step.value, progress.attempt))
            running = progress.to_wire(context.now_ms() + 1500)
            assert is_same(running, _request().to_wire())
            assert (running.begun_ms, running.age_s) == (context.now_ms(), 1.5)
        if len(rpc.methods("transfer/in")) == 2:
            agents[1].refuse.clear()
        if len(rpc.methods("transfer/complete")) == 2:
            agents[0].refuse.clear()

    rpc.on_call = look
    assert await run_requested_transfer(context, _request()) == Done()
    assert [entry for entry in seen if entry[0] != "transfer/arrived"] == [
        ("transfer/prepare", "prepare", 1),
        ("transfer/out", "out", 1),
        ("transfer/in", "in", 1),
        ("transfer/prepare", "prepare", 2),
        ("transfer/out", "out", 2),
        ("transfer/in", "in", 2),
        ("transfer/complete", "complete", 1),
        ("transfer/complete", "complete", 2),
    ]
    assert context.state.transfers == []


async def test_lost_reply_of_in(autojump_clock: trio.testing.MockClock) -> None:
    """*in* took effect but its reply was lost: the retry learns that the range arrived and completes."""
    agents, context, rpc = _cluster()
    original = rpc._transfer_in
    tries = 0

    def lose_first(agent: FakeAgent, body: object) -> object:
        nonlocal tries
        tries += 1
        reply = original(agent, body)  # type: ignore[arg-type]
        if tries == 1:
            raise RpcUnreachable("reply lost", maybe_delivered=True)
        return reply

    rpc._transfer_in = lose_first  # type: ignore[method-assign]
    assert await run_requested_transfer(context, _request()) == Done()
    assert tries == 1
    assert _is_settled(agents)


async def test_complete_twice_is_success(autojump_clock: trio.testing.MockClock) -> None:
    """NotTransferring at *complete* means that an earlier try got through."""
    agents, context, _ = _cluster()
    agents[0].refuse["transfer/complete"] = Refused(Refusal.NOT_TRANSFERRING)
    assert await run_requested_transfer(context, _request()) == Done()


async def test_one_transfer_per_realm(autojump_clock: trio.testing.MockClock) -> None:
    """A second transfer waits a second for the lease and then says that a manager is busy."""
    _, context, rpc = _cluster()
    await context.store.leases.obtain(f"{REALM.hex()}-ownership", "other", context.now_ms(), 60_000)
    outcome = await run_requested_transfer(context, _request())
    assert outcome == Refused(Refusal.MANAGER_BUSY)
    assert trio.current_time() <= 1.0
    assert not rpc.calls


@pytest.mark.parametrize("last", ["transfer/prepare", "transfer/out", "transfer/in", "transfer/complete"])
async def test_recovery_after_every_crash_point(autojump_clock: trio.testing.MockClock, last: str) -> None:
    """A manager that dies after any step leaves a transfer that one recovery pass finishes."""
    agents, context, rpc = _cluster()
    with trio.CancelScope() as crash:

        def stop_after(_: str, method: str) -> None:
            if rpc.methods(last) and method != last:
                crash.cancel()
                raise RpcUnreachable("the manager is gone", maybe_delivered=False)

        rpc.on_call = stop_after
        await run_transfer(context, _request())
    rpc.on_call = lambda _url, _method: None
    rpc.calls.clear()
    await recover_transfers(context)
    assert _is_settled(agents)
    assert agents[1].groups[group(2)].owned == LOW
    assert len(rpc.methods("transfer/complete")) <= 1, "both records of one transfer are one piece of work"


@pytest.mark.parametrize("last", ["transfer/prepare", "transfer/out", "transfer/in"])
async def test_recovery_with_new_leaders(autojump_clock: trio.testing.MockClock, last: str) -> None:
    """The same, with both leaders replaced after the crash."""
    agents, context, rpc = _cluster()
    with trio.CancelScope() as crash:

        def stop_after(_: str, method: str) -> None:
            if rpc.methods(last) and method != last:
                crash.cancel()
                raise RpcUnreachable("the manager is gone", maybe_delivered=False)

        rpc.on_call = stop_after
        await run_transfer(context, _request())
    rpc.on_call = lambda _url, _method: None
    for number, old, new in ((1, 0, 2), (2, 1, 0)):
        before, after = agents[old].groups[group(number)], agents[new].groups[group(number)]
        after.owned, after.transferring, after.captured = before.owned, before.transferring, before.captured
        before.role, before.owned, before.transferring = GroupRole.WITNESS, None, None
        agents[new].lead(group(number), after.owned, starting=50)
    await recover_transfers(context)
    assert _is_settled(agents)


async def test_stranded_range_is_brought_home(autojump_clock: trio.testing.MockClock) -> None:
    """A late duplicate *out* after a cancelled preparation: the range is prepared again, not written off."""
    agents, context, rpc = _cluster()
    with trio.CancelScope() as crash:

        def stop(_: str, method: str) -> None:
            if method == "transfer/in":
                crash.cancel()
                raise RpcUnreachable("gone", maybe_delivered=False)

        rpc.on_call = stop
        await run_transfer(context, _request())
    rpc.on_call = lambda _url, _method: None
    agents[1].groups[group(2)].transferring = None  # the preparation was cancelled meanwhile
    await recover_transfers(context)
    assert _is_settled(agents)
    assert agents[1].groups[group(2)].owned == LOW


async def test_never_completes_on_status_reports_alone(autojump_clock: trio.testing.MockClock) -> None:
    """A destination that merely claims the range is not believed: without arrival nothing is completed."""
    agents, context, rpc = _cluster()
    with trio.CancelScope() as crash:

        def stop(_: str, method: str) -> None:
            if method == "transfer/in":
                crash.cancel()
                raise RpcUnreachable("gone", maybe_delivered=False)

        rpc.on_call = stop
        await run_transfer(context, _request())
    rpc.on_call = lambda _url, _method: None
    stale = agents[1].groups[group(2)]
    stale.transferring, stale.owned = None, LOW
    agents[1].refuse["transfer/arrived"] = Refused(Refusal.NOT_LEADER)
    rpc.calls.clear()
    await recover_transfers(context)
    assert not rpc.methods("transfer/complete")


async def test_uncommitted_records_are_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    """A pending record that is not committed yet belongs to whoever is working on it."""
    agents, context, rpc = _cluster()
    await run_requested_transfer(context, _request())
    found = agents[0].groups[group(1)]
    found.captured = 90
    agents[1].groups[group(2)].transferring = None
    rest = Range(record("80"), record("ff", 0xFF))
    rpc._transfer_out(agents[0], TransferOutCall(REALM, group(1), group(2), rest, b"n" * 16, b"prepared"))
    found.committed = 10
    rpc.calls.clear()
    await recover_transfers(context)
    assert not rpc.methods("transfer/arrived", "transfer/complete", "transfer/prepare")


async def test_recovery_respects_the_lease(autojump_clock: trio.testing.MockClock) -> None:
    """While somebody runs a transfer of the realm, recovery keeps out."""
    agents, context, rpc = _cluster()
    agents[1].groups[group(2)].captured = 5
    rpc._transfer_prepare(agents[1], _request().to_wire())
    await context.store.leases.obtain(f"{REALM.hex()}-ownership", "other", context.now_ms(), 60_000)
    await recover_transfers(context)
    assert not rpc.methods("transfer/prepare", "transfer/out")
    assert hsm(2) == agents[1].hsm


async def test_source_that_owns_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """A range that its source does not have is refused at once and leaves no preparation behind."""
    agents, context, _ = _cluster()
    agents[0].groups[group(1)].owned = None
    outcome = await run_requested_transfer(context, _request())
    assert isinstance(outcome, Refused)
    assert outcome.outcome is Refusal.UNACCEPTABLE_RANGE
    assert trio.current_time() < 1
    assert agents[1].groups[group(2)].transferring is None


async def test_recovery_withdraws_what_its_source_lost(autojump_clock: trio.testing.MockClock) -> None:
    """A preparation whose source no longer owns the range is withdrawn instead of being tried for ever."""
    agents, context, rpc = _cluster()
    rpc.agents["tls://a2"].refuse["transfer/cancel_prepare"] = RpcUnreachable("lost", maybe_delivered=False)
    agents[0].groups[group(1)].owned = None
    await run_requested_transfer(context, _request())
    assert agents[1].groups[group(2)].transferring is not None
    rpc.agents["tls://a2"].refuse.clear()
    await recover_transfers(context)
    assert agents[1].groups[group(2)].transferring is None


async def test_not_owner_of_a_deposed_leader_withdraws_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """A source leader that cannot prove that it is current is asked again; its preparation stays."""
    agents, context, rpc = _cluster()
    agents[0].refuse["transfer/out"] = Refused(Refusal.NOT_OWNER)
    agents[0].refuse["transfer/owns"] = Refused(Refusal.NOT_LEADER)
    outcome = await run_requested_transfer(context, _request())
    assert isinstance(outcome, Refused)
    assert outcome.outcome is Refusal.TIMEOUT
    assert not rpc.methods("transfer/cancel_prepare")
    agents[0].refuse.clear()
    await recover_transfers(context)
    assert _is_settled(agents)
