"""Refusals and rare turns of the agent's methods: what peers, managers and operators may send at the wrong time."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from juicebox_hsm.consensus.codec import decode_captured, encode_log_entry
from juicebox_hsm.consensus.types import Partition
from juicebox_hsm.crypto.noise import Initiator
from juicebox_hsm.host.leadership.state import Limits
from juicebox_hsm.host.retry import RetryProfile
from juicebox_hsm.host.services import TenantLimits
from juicebox_hsm.hsm.messages import CaptureNext, PersistState, Request, Response
from juicebox_hsm.ids import GroupId, RealmId, RecordId
from juicebox_hsm.merkle.walk import Lost, Side
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.ports.tenant_config import TenantConfig
from juicebox_hsm.wire.client import HandshakeRequest, encode_noise_request
from juicebox_hsm.wire.rpc import (
    App,
    AppOk,
    BecomeLeaderCall,
    CapturedReply,
    Done,
    Empty,
    GroupCall,
    GroupJoin,
    GroupNew,
    GroupRole,
    RealmJoin,
    Refusal,
    Refused,
    Replicate,
    SteppedDown,
    TenantsReloaded,
)
from roles.agent.leader import hand_over
from roles.agent.outbox import Dispatcher
from roles.agent.ratelimit import FIRST_READ_RETRY_S
from tests.simulation.cluster import KEEP_EVENTS, QUICK, TENANT, SimAgent, Simulation, simulation, until
from tests.simulation.test_agent_groups import all_at_end
from tests.simulation.test_agent_leaders import blind


def refusal(reply: object) -> Refusal | None:
    return reply.outcome if isinstance(reply, Refused) else None


def leader_and_witness(sim: Simulation, group: GroupId) -> tuple[SimAgent, SimAgent]:
    """Return the leader's agent and one of the others."""
    leader = sim.leader_of(group)
    assert leader is not None
    return leader, next(member for member in sim.agents if member is not leader)


async def test_become_leader_minds_the_asked_end(tmp_path: Path) -> None:
    """A log that ends before or after the asked index, and unknown groups, are refused with the right reason."""
    async with simulation(tmp_path, dataclasses.replace(QUICK, become_leader_s=0.2)) as sim:
        group = await sim.new_realm(3)
        await all_at_end(sim, group)
        leader, witness = leader_and_witness(sim, group)
        end = leader.group(group).leader.next_index - 1
        future = await sim.become_leader(witness, group, end + 1)
        assert (refusal(future), future.index) == (Refusal.FUTURE_INDEX, end)
        stale = await sim.become_leader(witness, group, end - 1)
        assert (refusal(stale), stale.index) == (Refusal.STALE_INDEX, end)
        assert refusal(await sim.become_leader(witness, GroupId(bytes(16)))) is Refusal.INVALID_GROUP
        assert isinstance(await sim.become_leader(leader, group, end), Done)
        assert sim.leader_of(group) is leader


async def test_become_leader_refuses_who_is_far_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate near the end is waited for; one too far behind is refused at once with what it has."""
    monkeypatch.setattr("juicebox_hsm.host.candidacy.TRAILING_CAPTURE_MAX", 1)
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        await all_at_end(sim, group)
        leader, witness = leader_and_witness(sim, group)

        async def deaf(*_: object) -> list[object]:
            await trio.lowlevel.checkpoint()
            return []

        witness.log.read_from = deaf  # type: ignore[attr-defined]
        sim.cut.add(frozenset((leader.name, witness.name)))
        have = witness.group(group).position - 1
        for number in range(3):
            assert isinstance(await leader.call("app", sim.register1(group, f"user{number}")), AppOk)
        began = trio.current_time()
        refused = await sim.become_leader(witness, group)
        assert (refusal(refused), refused.index) == (Refusal.NOT_CAPTURED, have)
        assert trio.current_time() - began < QUICK.become_leader_s
        monkeypatch.setattr("juicebox_hsm.host.candidacy.TRAILING_CAPTURE_MAX", 1000)

        async def soon() -> None:
            await trio.sleep(0.1)
            del witness.log.read_from

        async with trio.open_nursery() as nursery:
            nursery.start_soon(soon)
            assert isinstance(await sim.become_leader(witness, group), Done)


async def test_stepdown_of_who_does_not_lead(tmp_path: Path) -> None:
    """Stepping down is refused by a witness and answered with the last index by the leader, once."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        sim.manager.appoints = False
        leader, witness = leader_and_witness(sim, group)
        call = GroupCall(sim.realm, group)
        assert refusal(await witness.call("stepdown", call)) is Refusal.NOT_LEADER
        assert refusal(await leader.call("stepdown", GroupCall(sim.realm, bytes(16)))) is Refusal.INVALID_GROUP
        end = leader.group(group).leader.next_index - 1
        assert await leader.call("stepdown", call) == SteppedDown(end)
        await until(lambda: leader.group(group).leader is None)
        assert refusal(await leader.call("stepdown", call)) is Refusal.NOT_LEADER


async def test_membership_refusals(tmp_path: Path) -> None:
    """Joining with wrong statements, foreign realms and bad configurations is refused; joining twice is fine."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        first, other = sim.agents[:2]
        stranger = await sim.start_agent()
        assert refusal(await first.call("realm/new", Empty())) is Refusal.HAVE_REALM
        wrong = RealmJoin(sim.realm, first.hsm_id, bytes(32))
        assert refusal(await stranger.call("realm/join", wrong)) is Refusal.INVALID_STATEMENT
        foreign = RealmJoin(bytes(16), first.hsm_id, bytes(32))
        assert refusal(await other.call("realm/join", foreign)) is Refusal.HAVE_OTHER_REALM
        assert refusal(await first.call("group/new", GroupNew(bytes(16), []))) is Refusal.INVALID_REALM
        assert refusal(await first.call("group/new", GroupNew(sim.realm, []))) is Refusal.INVALID_CONFIGURATION
        unsigned = GroupNew(sim.realm, [(first.hsm_id, bytes(32))])
        assert refusal(await first.call("group/new", unsigned)) is Refusal.INVALID_STATEMENT
        members = list(first.group(group).configuration)
        forged = GroupJoin(sim.realm, bytes(16), members, bytes(32))
        assert refusal(await other.call("group/join", forged)) is Refusal.INVALID_STATEMENT
        again = GroupJoin(sim.realm, group, members, sim.statements[group])
        position = other.group(group).position
        assert isinstance(await other.call("group/join", again), Done)
        assert other.group(group).position == position


async def test_forged_pushes_are_dropped(tmp_path: Path) -> None:
    """Garbage, gaps and forged entries from a peer neither end the member nor stop it from following the log."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        await all_at_end(sim, group)
        leader, witness = leader_and_witness(sim, group)
        last = await sim.store.log.read_last(sim.realm, group)
        assert last is not None
        following = dataclasses.replace(last, index=last.index + 1, prev_mac=last.entry_mac, entry_mac=b"f" * 32)
        beyond = dataclasses.replace(following, index=last.index + 2, prev_mac=b"f" * 32)
        for entries in (
            [b"garbage"],
            [encode_log_entry(following)],
            [encode_log_entry(last), encode_log_entry(following)],
            [encode_log_entry(beyond)],
            [encode_log_entry(last), encode_log_entry(beyond)],
            [encode_log_entry(last)] * 201,
        ):
            reply = await witness.call("replicate", Replicate(sim.realm, group, 1, entries, last.index))
            assert isinstance(reply, CapturedReply)
            assert reply.behind
        known = await witness.call("replicate", Replicate(sim.realm, group, 1, [encode_log_entry(last)], last.index))
        assert isinstance(known, CapturedReply)
        assert not known.behind
        assert isinstance(await leader.call("app", sim.register1(group, "alice")), AppOk)
        await all_at_end(sim, group)
        assert refusal(await witness.call("replicate", Replicate(sim.realm, bytes(16), 1, [], 0))) is (
            Refusal.INVALID_GROUP
        )


class HoldsPersist:
    """An HSM transport that keeps PersistState waiting, and tells how many are."""

    def __init__(self, inner: Callable[[Request], Awaitable[Response]]) -> None:
        self._inner = inner
        self.proceed = trio.Event()
        self.held = 0
        self.captured = 0

    async def send(self, request: Request) -> Response:
        if isinstance(request, PersistState):
            self.held += 1
            await self.proceed.wait()
        reply = await self._inner(request)
        self.captured += isinstance(request, CaptureNext)
        return reply


async def test_pushes_are_answered_after_they_are_persisted(tmp_path: Path) -> None:
    """A member answers a push when what was pushed is durable, and with the capture of just that."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        await sim.settle_peers()
        await all_at_end(sim, group)
        leader, witness = leader_and_witness(sim, group)
        blind(witness)
        sim.cut.add(frozenset((leader.name, witness.name)))
        position = witness.group(group).position
        assert isinstance(await leader.call("app", sim.register1(group, "alice")), AppOk)
        entries = await sim.store.log.read_from(sim.realm, group, position, 10)
        assert isinstance(entries, list)
        witness.agent.hsm = hsm = HoldsPersist(witness.hsm.send)
        replies: list[CapturedReply] = []

        async def push() -> None:
            body = Replicate(sim.realm, group, 2, [encode_log_entry(entry) for entry in entries], entries[-1].index)
            replies.append(await witness.call("replicate", body))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(push)
            await until(lambda: hsm.held and hsm.captured)
            await trio.testing.wait_all_tasks_blocked()
            assert replies == []
            hsm.proceed.set()
        [reply] = replies
        assert not reply.behind
        assert reply.captured is not None
        assert decode_captured(reply.captured).index == entries[-1].index


async def test_captured_is_persisted_and_signed(tmp_path: Path) -> None:
    """`captured` answers with the member's own persisted head, None before the first."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        await all_at_end(sim, group)
        leader, witness = leader_and_witness(sim, group)
        end = leader.group(group).leader.next_index - 1
        await until(lambda: witness.group(group).captured.index == end)
        reply = await witness.call("captured", GroupCall(sim.realm, group))
        captured = decode_captured(reply.captured)
        assert (captured.hsm, captured.index) == (witness.hsm_id, end)
        assert refusal(await witness.call("captured", GroupCall(sim.realm, bytes(16)))) is Refusal.INVALID_GROUP


class MissingProofs:
    """A node store that does not find proofs for the first calls."""

    def __init__(self, inner: Any, missing: int, error: bool) -> None:
        self._inner = inner
        self.missing = missing
        self._error = error

    async def read_proofs(
        self, realm: RealmId, partition: Partition, records: Sequence[RecordId]
    ) -> list[bytes | Lost]:
        if self.missing:
            self.missing -= 1
            if self._error:
                raise StoreUnavailable("down")
            return [Lost(0, partition.root_hash)] * len(records)
        proofs: list[bytes | Lost] = await self._inner.read_proofs(realm, partition, records)
        return proofs

    async def read_edge_proof(self, realm: RealmId, partition: Partition, side: Side) -> bytes:
        proof: bytes = await self._inner.read_edge_proof(realm, partition, side)
        return proof


@pytest.mark.parametrize("error", [False, True])
async def test_requests_wait_for_their_proofs(tmp_path: Path, error: bool) -> None:
    """A missing node or a store that does not answer delays a request and does not fail it."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        nodes = MissingProofs(agent.store.nodes, 3, error)
        agent.agent.store = dataclasses.replace(agent.store, nodes=nodes)
        assert isinstance(await agent.call("app", sim.register1(group, "alice")), AppOk)
        assert nodes.missing == 0


async def test_requests_without_proofs_end_with_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the retries are used up the answer is NoStore with the message unused, and the agent lives."""
    few = partial(Limits, retry=RetryProfile(0.001, 0.001, 3, 30.0))
    monkeypatch.setattr("roles.agent.context.Limits", few)
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        agent.agent.store = dataclasses.replace(agent.store, nodes=MissingProofs(agent.store.nodes, 3, error=False))
        assert await agent.call("app", sim.register1(group, "alice")) == Refused(Refusal.NO_STORE)
        assert isinstance(await agent.call("app", sim.register1(group, "alice")), AppOk)


async def test_handshakes_are_answered_without_the_log(tmp_path: Path) -> None:
    """Opening a session appends nothing and is not rate limited; a spoiled one is a SessionError."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        agent.agent.limiters.of(TENANT).rate = 0
        good = HandshakeRequest(*Initiator(sim.public_key, sim.random(32)).write(b""))
        spoiled = dataclasses.replace(good, payload_ciphertext=bytes(16))

        def app(noise: HandshakeRequest) -> App:
            return App(sim.realm, group, bytes(32), 7, True, encode_noise_request(noise), TENANT, "0" * 64)

        assert isinstance(await agent.call("app", app(good)), AppOk)
        assert refusal(await agent.call("app", app(spoiled))) is Refusal.SESSION_ERROR
        assert agent.log.appends == [1]
        assert refusal(await agent.call("app", sim.register1(group, "alice"))) is Refusal.RATE_LIMIT_EXCEEDED


async def test_tenant_limits_are_reloaded(tmp_path: Path) -> None:
    """A changed capacity counts from `tenants/reload` on."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        await sim.store.tenants.put(TENANT, TenantLimits(0))
        assert await agent.call("tenants/reload", Empty()) == TenantsReloaded(1)
        assert refusal(await agent.call("app", sim.register1(group, "alice"))) is Refusal.RATE_LIMIT_EXCEEDED
        await sim.store.tenants.put(TENANT, TenantLimits(1000))
        await agent.call("tenants/reload", Empty())
        assert isinstance(await agent.call("app", sim.register1(group, "alice")), AppOk)


class ClosedTenants:
    """Tenants' limits that cannot be read while `closed`."""

    def __init__(self, inner: TenantConfig) -> None:
        self._inner = inner
        self.closed = True

    async def list(self) -> dict[str, TenantLimits]:
        if self.closed:
            raise StoreUnavailable("down")
        return await self._inner.list()

    async def put(self, tenant: str, limits: TenantLimits) -> None:
        await self._inner.put(tenant, limits)

    async def remove(self, tenant: str) -> None:
        await self._inner.remove(tenant)


async def test_nobody_is_judged_by_limits_that_were_never_read(tmp_path: Path) -> None:
    """An agent that began while the store was away blames no tenant for its rate, and serves soon after it is back."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        await sim.store.tenants.put(TENANT, TenantLimits(1000))
        tenants = ClosedTenants(agent.store.tenants)
        agent.store = dataclasses.replace(agent.store, tenants=tenants)
        await sim.restart(agent)
        await sim.appoint(group)
        for _ in range(100):
            assert refusal(await agent.call("app", sim.register1(group, "alice"))) is Refusal.NO_STORE
        tenants.closed = False
        await trio.sleep(FIRST_READ_RETRY_S + 0.05)
        for _ in range(100):
            assert isinstance(await agent.call("app", sim.register1(group, "alice")), AppOk)


async def test_rate_limits_are_shared_by_gossip(tmp_path: Path) -> None:
    """What one agent admitted counts at the others soon after."""
    async with simulation(tmp_path) as sim:
        await sim.new_realm(3)
        await sim.settle_peers()
        first, second = sim.agents[:2]
        for member in (first, second):
            member.agent.limiters.configure({"other": 1})
        record, now_s = RecordId(bytes(32)), trio.current_time()
        first.agent.limiters.of("other").reserve(record, now_s, 5)
        assert second.agent.limiters.of("other").knows_peers is False
        await until(lambda: second.agent.limiters.of("other").knows_peers)
        for _ in range(5):  # those that the first one reserved
            assert second.agent.limiters.of("other").admit(record, trio.current_time())
        assert not second.agent.limiters.of("other").admit(record, trio.current_time())


async def test_shutdown_hands_over_through_a_manager(tmp_path: Path) -> None:
    """An agent that stops asks a manager first, so another member leads before it is gone."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        await sim.settle_peers()
        leader, _ = leader_and_witness(sim, group)
        leader.agent.stopping = True
        with trio.fail_after(5):
            await hand_over(leader.agent)
        successor = sim.leader_of(group)
        assert successor is not None
        assert successor is not leader


async def test_one_dispatcher_holds_the_lease(tmp_path: Path) -> None:
    """A second dispatcher publishes nothing while the lease is held, and takes over once it is given back."""
    async with simulation(tmp_path, KEEP_EVENTS) as sim:
        group = await sim.new_realm(3)
        leader, other = leader_and_witness(sim, group)
        assert isinstance(await leader.call("app", sim.register1(group, "alice")), AppOk)
        first, second = Dispatcher(leader.agent), Dispatcher(other.agent)
        assert await first.dispatch(sim.realm) == 1
        assert isinstance(await leader.call("app", sim.register1(group, "alice")), AppOk)
        assert await second.dispatch(sim.realm) == 0
        await first.release()
        third = Dispatcher(other.agent)
        assert await third.dispatch(sim.realm) == 1
        assert await third.dispatch(sim.realm) == 0


async def test_status_tells_the_roles(tmp_path: Path) -> None:
    """Status shows the HSM's groups and the agent's own view, and works at a witness too."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        leader, witness = leader_and_witness(sim, group)
        told = await leader.call("status", Empty())
        mine = next(info for info in told.groups if info.group == group)
        assert (mine.leading, mine.role.name) == (True, GroupRole.LEADER)
        assert mine.last_appended[0] == leader.group(group).leader.next_index - 1
        reported = next(info for info in told.hsm.realm.groups if info.id == group)
        assert reported.leader.owned_range.start == bytes(32)
        other = await witness.call("status", Empty())
        assert [(info.leading, info.role.name) for info in other.groups if info.group == group] == [
            (False, GroupRole.WITNESS)
        ]


GARBAGE: dict[str, tuple[object, ...]] = {
    "realm": (b"", bytes(15), bytes(17)),
    "group": (b"", bytes(15), bytes(17)),
    "record_id": (b"", bytes(31), bytes(33)),
    "session_id": (-1, 2**32, 2**63),
    "encrypted": (b"", b"\xff", bytes(1_000)),
    "tenant": ("", "a" * 257, "a b", "a\x00", "a:b", "\u00e4", "test-"),
    "user": ("", "u", "0" * 63, "0" * 65, "g" * 64, "A" * 64, "0" * 63 + "\n"),
}


async def test_garbage_in_any_field_of_a_request_is_refused_before_the_hsm(tmp_path: Path) -> None:
    """Each field of `app` is judged at the door: a documented refusal, nothing appended, the leader stays."""
    assert set(GARBAGE) == set(App.__struct_fields__) - {"handshake_only"}
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        agent, good = sim.agents[0], sim.register1(group, "alice")
        for name, values in GARBAGE.items():
            for value in values:
                reply = await agent.call("app", msgspec.structs.replace(good, **{name: value}))
                assert refusal(reply) in {Refusal.DECODING_ERROR, Refusal.INVALID_REALM, Refusal.INVALID_GROUP}, name
        assert agent.log.appends == [1]
        assert isinstance(await agent.call("app", good), AppOk)


async def test_an_earlier_leaders_intent_without_a_row_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An intent that nothing can record (from a version that asked the HSM first) is told and blocks no compaction."""
    monkeypatch.setattr("roles.agent.app.is_well_formed", lambda _request: True)
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        agent = sim.agents[0]
        await agent.call("app", msgspec.structs.replace(sim.register1(group, "alice"), tenant=""))
        monkeypatch.setattr(agent.agent.store.outbox, "settled", _none_settled)
        await agent.call("stepdown", GroupCall(sim.realm, group))
        await until(lambda: sim.leader_of(group) is None)
        await agent.call("become_leader", BecomeLeaderCall(sim.realm, group))
        await until(lambda: agent.agent.set_aside > 0)
        status = await agent.call("status", Empty())
        assert "were set aside" in status.outbox.warning
        assert isinstance(await agent.call("app", sim.register1(group, "bob")), AppOk)


async def _none_settled(_realm: RealmId, _group: GroupId) -> int:
    return 0
