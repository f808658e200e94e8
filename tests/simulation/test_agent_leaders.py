"""Who counts as the leader when several lead: members that hear them, and what they tell the managers."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from juicebox_hsm.adapters.clock.retrying import retrying
from juicebox_hsm.host.log import AppendOutcome
from juicebox_hsm.host.retry import RetryProfile
from juicebox_hsm.hsm.messages import BecomeLeader, NotCaptured, Outcome, Request, Response
from juicebox_hsm.ids import GroupId
from juicebox_hsm.ports.errors import StoreAmbiguous, StoreUnavailable
from juicebox_hsm.wire.rpc import AppOk, BecomeLeaderCall, DamageKind, Done, GroupCall, Refusal, Refused, SteppedDown
from roles.agent.leader import handle_become_leader
from tests.simulation.cluster import QUICK, SimAgent, Simulation, simulation, until
from tests.simulation.test_agent_groups import all_at_end

HEARTBEATS_PER_SILENCE = round(QUICK.silence_s / QUICK.heartbeat_s)


async def heartbeats(member: SimAgent, count: int) -> None:
    """Wait until `member` was called `count` times by leaders."""
    handler = member.handlers["replicate"]
    called = 0

    async def counting(body: object, caller: object) -> object:
        nonlocal called
        called += 1
        return await handler(body, caller)

    member.handlers = {**member.handlers, "replicate": counting}
    await until(lambda: called >= count)
    member.handlers = {**member.handlers, "replicate": handler}


async def with_rival(sim: Simulation, entries: int = 3) -> tuple[GroupId, SimAgent, SimAgent, SimAgent]:
    """Make a rival whose leadership began after the old one's; returns group, old leader, rival, the third."""
    group = await sim.new_realm(3)
    await sim.settle_peers()
    old = sim.leader_of(group)
    assert old is not None
    rival, third = (member for member in sim.agents if member is not old)
    for number in range(entries):
        assert isinstance(await old.call("app", sim.register1(group, f"user{number}")), AppOk)
    await all_at_end(sim, group)
    sim.manager.appoints = False
    assert isinstance(await sim.become_leader(rival, group), Done)
    await heartbeats(third, 4)
    sim.manager.hints.clear()
    return group, old, rival, third


async def test_older_leader_that_wins_a_duel_is_not_lost(tmp_path: Path) -> None:
    """An idle rival that began later and was beaten leaves the group with the older leader, whom nobody reports."""
    async with simulation(tmp_path) as sim:
        group, old, rival, third = await with_rival(sim)
        assert rival.group(group).leader.starting > old.group(group).leader.starting
        assert isinstance(await old.call("app", sim.register1(group, "winner")), AppOk)
        await until(lambda: rival.group(group).leader is None)
        async with trio.open_nursery() as nursery:
            for member in (rival, third):
                nursery.start_soon(heartbeats, member, 3 * HEARTBEATS_PER_SILENCE)
        assert old.group(group).leader is not None
        assert sim.manager.hints == []


async def test_idle_rival_that_dies_leaves_the_older_leader(tmp_path: Path) -> None:
    """When the later of two idle leaders dies, the older one leads and is not reported, until it dies too."""
    async with simulation(tmp_path) as sim:
        group, old, rival, third = await with_rival(sim)
        started = rival.group(group).leader.starting
        rival.kill()
        await rival.closed.wait()
        await heartbeats(third, 3 * HEARTBEATS_PER_SILENCE)
        assert sim.manager.hints == []
        old.kill()
        await until(lambda: sim.manager.hints)
        assert sim.manager.hints[0] == (group, started)


async def test_beaten_leader_that_has_not_noticed_does_not_hide_a_loss(tmp_path: Path) -> None:
    """A leader that was beaten and cannot see it speaks on; the one that beat it is missed all the same."""
    async with simulation(tmp_path) as sim:
        group, old, rival, third = await with_rival(sim)
        sim.cut.add(frozenset((old.name, rival.name)))
        blind(old)
        assert isinstance(await rival.call("app", sim.register1(group, "winner")), AppOk)
        started = rival.group(group).leader.starting
        rival.kill()
        await until(lambda: sim.manager.hints)
        assert sim.manager.hints[0] == (group, started)
        assert old.group(group).leader is not None
        assert third.group(group).leader is None


def blind(member: SimAgent) -> None:
    """Let an agent see nothing new in its log, as behind a store that hangs."""

    async def nothing(*_: object) -> list[object]:
        await trio.lowlevel.checkpoint()
        return []

    member.log.read_from = nothing  # type: ignore[attr-defined]


async def with_successor(sim: Simulation) -> tuple[GroupId, SimAgent, SimAgent]:
    """Hand a group over after its first leader spoke; returns group, old and new leader. Silence alarms nobody."""
    group = await sim.new_realm(3)
    await sim.settle_peers()
    await all_at_end(sim, group)
    old = sim.leader_of(group)
    assert old is not None
    await heartbeats(next(member for member in sim.agents if member is not old), 2)
    sim.manager.appoints = False  # here nothing keeps it from acting on a hint in the middle of a hand-over
    new = await sim.hand_over_group(old, group)
    assert new is not None
    sim.manager.hints.clear()
    return group, old, new


NO_SILENCE = dataclasses.replace(QUICK, silence_s=1000.0)


async def test_leader_that_gives_up_reports_itself(tmp_path: Path) -> None:
    """Nobody is silent and no stream closed, so only the agent that left leadership unasked can raise the alarm."""
    async with simulation(tmp_path, NO_SILENCE) as sim:
        group, _, new = await with_successor(sim)
        started = new.group(group).leader.starting

        async def lose_the_reply(_really: object) -> AppendOutcome:
            raise StoreAmbiguous("the answer was lost")

        new.log.on_append = lose_the_reply
        await new.call_and_forget("app", sim.register1(group, "alice"))
        assert new.group(group).leader is None
        await until(lambda: (group, started) in sim.manager.hints)


async def test_leader_that_was_asked_to_leave_reports_nothing(tmp_path: Path) -> None:
    """Who asked for the step-down also looks for a successor."""
    async with simulation(tmp_path, NO_SILENCE) as sim:
        group, _, new = await with_successor(sim)
        assert isinstance(await new.call("stepdown", GroupCall(sim.realm, group)), SteppedDown)
        await until(lambda: new.group(group).leader is None)
        assert new.agent.leaders.unreported((sim.realm, group)) is None


async def test_append_that_never_succeeds_ends_the_leadership(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the retries are used up leadership ends by force, whoever waits is told so, and the agent lives."""
    few = partial(retrying, profile=RetryProfile(0.001, 0.001, 3, 30.0))
    monkeypatch.setattr("roles.agent.append.retrying", few)
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        await sim.settle_peers()
        sim.manager.appoints = False
        leader = sim.leader_of(group)
        assert leader is not None
        failures = 0

        async def fail(_really: object) -> AppendOutcome:
            nonlocal failures
            failures += 1
            raise StoreUnavailable("down")

        leader.log.on_append = fail
        with trio.fail_after(5):
            reply = await leader.call("app", sim.register1(group, "alice"))
        assert reply == Refused(Refusal.NOT_LEADER, consumed=True)
        assert failures == 3
        await until(lambda: leader.group(group).leader is None)
        assert leader.metrics.counter("agent.stepdown", forced="true").value == 1
        leader.log.on_append = None
        again = await sim.appoint(group)
        assert again is not None
        assert isinstance(await again.call("app", sim.register1(group, "bob")), AppOk)


class AnswersBecomeLeader:
    """An HSM transport that answers BecomeLeader itself."""

    def __init__(self, inner: Callable[[Request], Awaitable[Response]], answer: Response) -> None:
        self._inner = inner
        self._answer = answer
        self.asked = 0

    async def send(self, request: Request) -> Response:
        if isinstance(request, BecomeLeader):
            self.asked += 1
            return self._answer
        return await self._inner(request)


@pytest.mark.parametrize(
    ("answer", "refused", "once"),
    [
        (Outcome.STEPDOWN_IN_PROGRESS, Refused(Refusal.STEPDOWN_IN_PROGRESS), True),
        (Outcome.INVALID_REALM, Refused(Refusal.INVALID_REALM), True),
        (Outcome.INVALID_GROUP, Refused(Refusal.INVALID_GROUP), True),
        (NotCaptured(2), Refused(Refusal.NOT_CAPTURED, index=2), False),
        (NotCaptured(None), Refused(Refusal.NOT_CAPTURED), False),
    ],
)
async def test_what_the_hsm_says_to_become_leader_is_passed_on(
    tmp_path: Path, answer: Response, refused: Refused, once: bool
) -> None:
    """Each refusal of the HSM has its own answer; a capture close behind is waited for until the deadline."""
    async with simulation(tmp_path, dataclasses.replace(QUICK, become_leader_s=0.1)) as sim:
        group = await sim.new_realm(3)
        await all_at_end(sim, group)
        witness = next(member for member in sim.agents if member is not sim.leader_of(group))
        witness.agent.hsm = hsm = AnswersBecomeLeader(witness.hsm.send, answer)
        assert await sim.become_leader(witness, group) == refused
        assert (hsm.asked == 1) == once
        assert witness.group(group).leader is None


async def test_last_entry_that_the_hsm_refuses_is_told(tmp_path: Path) -> None:
    """A log that ends in an entry with a wrong MAC is corrupted: nobody leads from there."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        await all_at_end(sim, group)
        witness = next(member for member in sim.agents if member is not sim.leader_of(group))
        witness.agent.hsm = AnswersBecomeLeader(witness.hsm.send, Outcome.INVALID_MAC)
        refused = await handle_become_leader(witness.agent, BecomeLeaderCall(sim.realm, group, None))
        assert isinstance(refused, Refused)
        assert refused.outcome is Refusal.STORE_DAMAGED
        (damage,) = witness.agent.damages.lately(trio.current_time())
        assert damage.kind is DamageKind.LOG
