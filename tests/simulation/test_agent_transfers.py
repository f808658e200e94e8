"""Ownership transfer at the agents: whole, split, merged, cancelled, repeated, refused (agent.md 14)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio

from juicebox_hsm.ids import GroupId
from juicebox_hsm.wire.rpc import (
    ArrivedCall,
    Done,
    OwnsCall,
    PartitionInfo,
    Prepared,
    Range,
    Refusal,
    Refused,
    TransferComplete,
    TransferInCall,
    TransferOutCall,
    TransferPrepare,
    TransferredOut,
)
from tests.simulation.cluster import SimAgent, Simulation, simulation

FULL = Range(bytes(32), b"\xff" * 32)
UPPER = Range(b"\x80" + bytes(31), b"\xff" * 32)
LOWER = Range(bytes(32), b"\x7f" + b"\xff" * 31)
MIDDLE = Range(b"\x40" + bytes(31), b"\x60" + bytes(31))
INVERTED = Range(b"\xff" * 32, bytes(32))


class Pair:
    """One agent that leads two groups; `source` owns everything."""

    def __init__(self, sim: Simulation, agent: SimAgent, source: GroupId, destination: GroupId) -> None:
        self.sim = sim
        self.agent = agent
        self.source = source
        self.destination = destination

    @classmethod
    async def create(cls, sim: Simulation) -> Pair:
        source = await sim.new_realm(1)
        return cls(sim, sim.agents[0], source, await sim.new_group(sim.agents))

    def order(self, moved: Range, *, back: bool = False) -> TransferPrepare:
        ends = (self.destination, self.source) if back else (self.source, self.destination)
        return TransferPrepare(self.sim.realm, *ends, moved)

    async def prepare(self, moved: Range) -> Any:
        return await self.agent.call("transfer/prepare", self.order(moved))

    async def out(self, moved: Range, prepared: Prepared) -> Any:
        call = TransferOutCall(self.sim.realm, self.source, self.destination, moved, prepared.nonce, prepared.statement)
        return await self.agent.call("transfer/out", call)

    async def take_in(self, out: TransferredOut, prepared: Prepared, part: PartitionInfo | None = None) -> Any:
        call = TransferInCall(
            self.sim.realm,
            self.source,
            self.destination,
            part or out.transferring,
            out.at,
            prepared.nonce,
            out.statement,
        )
        return await self.agent.call("transfer/in", call)

    async def complete(self, moved: Range, at: int) -> Any:
        order = TransferComplete(self.sim.realm, self.source, self.destination, moved, at)
        return await self.agent.call("transfer/complete", order)

    async def owns(self, group: GroupId, asked: Range) -> Any:
        return await self.agent.call("transfer/owns", OwnsCall(self.sim.realm, group, asked))

    async def arrived(self, at: int) -> Any:
        return await self.agent.call("transfer/arrived", ArrivedCall(self.sim.realm, self.source, self.destination, at))


def refusal(reply: object) -> Refusal | None:
    return reply.outcome if isinstance(reply, Refused) else None


async def test_records_follow_their_range(tmp_path: Path) -> None:
    """Users keep their secrets through a split, the move of the rest, and both moves back."""
    async with simulation(tmp_path) as sim:
        pair = await Pair.create(sim)
        clients = {f"user{number}": sim.client(f"user{number}") for number in range(6)}
        for user, client in clients.items():
            await client.register(b"1234", user.encode(), b"info", 5)

        async def all_there() -> None:
            for user, client in clients.items():
                assert await client.recover(b"1234", b"info") == user.encode()

        await sim.transfer(pair.source, pair.destination, UPPER)
        await all_there()
        await sim.transfer(pair.source, pair.destination, LOWER)
        await all_there()
        await sim.transfer(pair.destination, pair.source, LOWER)
        await all_there()
        await sim.transfer(pair.destination, pair.source, UPPER)
        await all_there()
        assert isinstance(await pair.owns(pair.source, FULL), Done)


async def test_every_step_may_be_repeated(tmp_path: Path) -> None:
    """A coordinator that dies after any step can be followed by one that starts over."""
    async with simulation(tmp_path) as sim:
        pair = await Pair.create(sim)
        assert isinstance(await pair.prepare(UPPER), Prepared)
        prepared = await pair.prepare(UPPER)
        first = await pair.out(UPPER, prepared)
        assert isinstance(first, TransferredOut)
        again = await pair.prepare(UPPER)
        assert again.nonce != prepared.nonce
        out = await pair.out(UPPER, again)
        assert (out.transferring, out.at) == (first.transferring, first.at)
        assert refusal(await pair.take_in(first, prepared)) is Refusal.INVALID_NONCE
        assert refusal(await pair.arrived(out.at)) is Refusal.NOT_ARRIVED
        assert isinstance(await pair.take_in(out, again), Done)
        assert refusal(await pair.take_in(out, again)) is Refusal.NOT_PREPARED
        assert isinstance(await pair.arrived(out.at), Done)
        assert refusal(await pair.arrived(out.at + 1)) is Refusal.NOT_ARRIVED
        assert isinstance(await pair.complete(UPPER, out.at), Done)
        assert refusal(await pair.complete(UPPER, out.at)) is Refusal.NOT_TRANSFERRING


async def test_a_late_complete_leaves_the_next_transfer_alone(tmp_path: Path) -> None:
    """A *complete* of an earlier move of the same range does not make the source forget one still in flight."""
    async with simulation(tmp_path) as sim:
        pair = await Pair.create(sim)
        first = await pair.out(UPPER, await pair.prepare(UPPER))
        await sim.transfer(pair.source, pair.destination, UPPER)
        await sim.transfer(pair.destination, pair.source, UPPER)
        prepared = await pair.prepare(UPPER)
        second = await pair.out(UPPER, prepared)
        assert second.at > first.at
        assert refusal(await pair.complete(UPPER, first.at)) is Refusal.NOT_TRANSFERRING
        again = await pair.out(UPPER, prepared)
        assert again.at == second.at, "it is still in flight"
        assert isinstance(await pair.take_in(again, prepared), Done)
        assert isinstance(await pair.complete(UPPER, second.at), Done)


async def test_a_preparation_can_be_withdrawn(tmp_path: Path) -> None:
    """After a cancel the destination is free again, and a second cancel finds nothing."""
    async with simulation(tmp_path) as sim:
        pair = await Pair.create(sim)
        assert isinstance(await pair.prepare(UPPER), Prepared)
        assert refusal(await pair.prepare(LOWER)) is Refusal.OTHER_TRANSFER_PENDING
        assert refusal(await pair.owns(pair.destination, UPPER)) is Refusal.TRANSFER_IN_PROGRESS
        assert isinstance(await pair.agent.call("transfer/cancel_prepare", pair.order(UPPER)), Done)
        assert refusal(await pair.agent.call("transfer/cancel_prepare", pair.order(UPPER))) is Refusal.NOT_PREPARED
        assert isinstance(await pair.prepare(LOWER), Prepared)


async def test_ranges_that_cannot_move_are_refused(tmp_path: Path) -> None:
    """The middle of a range, an inverted one, somebody else's, and an order with the wrong statement stay put."""
    async with simulation(tmp_path) as sim:
        pair = await Pair.create(sim)
        assert refusal(await pair.prepare(INVERTED)) is Refusal.UNACCEPTABLE_RANGE
        prepared = await pair.prepare(MIDDLE)
        assert refusal(await pair.out(MIDDLE, prepared)) is Refusal.UNACCEPTABLE_RANGE
        assert refusal(await pair.out(INVERTED, prepared)) is Refusal.UNACCEPTABLE_RANGE
        assert refusal(await pair.out(UPPER, prepared)) is Refusal.INVALID_STATEMENT
        assert isinstance(await pair.agent.call("transfer/cancel_prepare", pair.order(MIDDLE)), Done)
        back = await pair.agent.call("transfer/prepare", pair.order(UPPER, back=True))
        assert refusal(back) is Refusal.UNACCEPTABLE_RANGE
        assert isinstance(await pair.owns(pair.source, FULL), Done)
        unowned = await pair.owns(pair.destination, UPPER)
        assert refusal(unowned) is Refusal.NOT_OWNED
        assert refusal(await pair.owns(pair.source, INVERTED)) is Refusal.NOT_OWNED


async def test_witnesses_refuse_transfers(tmp_path: Path) -> None:
    """Only a leader's agent answers; foreign groups and realms are named as such."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        witness = next(member for member in sim.agents if member is not sim.leader_of(group))
        order = TransferPrepare(sim.realm, bytes(16), group, UPPER)
        assert refusal(await witness.call("transfer/prepare", order)) is Refusal.NOT_LEADER
        foreign = TransferPrepare(sim.realm, group, bytes(16), UPPER)
        assert refusal(await witness.call("transfer/prepare", foreign)) is Refusal.INVALID_GROUP
        elsewhere = TransferPrepare(bytes(16), group, group, UPPER)
        assert refusal(await witness.call("transfer/prepare", elsewhere)) is Refusal.INVALID_REALM


async def test_owns_needs_the_fresh_tail(tmp_path: Path) -> None:
    """A deposed leader that has not noticed cannot vouch for what it owns (agent.md 14)."""
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(3)
        sim.manager.appoints = False
        await sim.settle_peers()
        old = sim.leader_of(group)
        assert old is not None
        call = OwnsCall(sim.realm, group, FULL)
        assert isinstance(await old.call("transfer/owns", call), Done)
        for member in sim.agents:
            if member is not old:
                sim.cut.add(frozenset((old.name, member.name)))

        async def deaf(*_: object) -> list[object]:
            await trio.lowlevel.checkpoint()
            return []

        old.log.read_from = deaf  # type: ignore[attr-defined]
        rival = next(member for member in sim.agents if member is not old)
        assert isinstance(await sim.become_leader(rival, group), Done)
        await rival.call("app", sim.register1(group, "alice"))
        assert old.group(group).is_leader
        assert refusal(await old.call("transfer/owns", call)) is Refusal.NOT_LEADER
        assert isinstance(await rival.call("transfer/owns", call), Done)
