"""Transfers in groups that two members claim to lead: a deposed leader that has not noticed, and the current one.

Whatever the deposed ones say, and whichever leaders the manager can reach, a range that left its source and has not
arrived is never forgotten there (manager.md 6.3, S4).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import trio.testing

from juicebox_hsm.host.cluster.planning import covers
from juicebox_hsm.host.cluster.transfer import TransferRequest
from juicebox_hsm.host.cluster.view import wire_range
from juicebox_hsm.ids import OwnedRange
from juicebox_hsm.wire.rpc import Direction, Done, Refusal, Refused, TransferComplete, TransferInCall, TransferOutCall
from juicebox_hsm.wire.rpc import TransferringInfo as Marker
from roles.manager.context import ManagerContext
from roles.manager.transfer import run_requested_transfer
from tests.host.cluster.agents import FULL, REALM, FakeAgent, FakeGroup, group, hsm, record, subtract
from tests.unit.manager.fakes import FakeRpc, make_context, recover_transfers

LOW = OwnedRange(record("00"), record("7f", 0xFF))
REQUEST = TransferRequest(REALM, group(1), group(2), LOW)

STALE_SOURCES = ("says that it left", "says that it owns it", "says that it owns nothing", "refuses for good")
STALE_DESTINATIONS = ("claims the range", "says that it prepared", "knows nothing")


@dataclass
class _Duel:
    """Four members; the deposed leader and the current one of the source, then those of the destination."""

    stale_source: FakeAgent
    stale_destination: FakeAgent
    source: FakeAgent
    destination: FakeAgent
    context: ManagerContext
    rpc: FakeRpc

    @classmethod
    def create(cls) -> _Duel:
        members: list[bytes] = [hsm(number) for number in range(1, 5)]
        agents = [
            FakeAgent(
                f"tls://a{number}",
                hsm(number),
                groups={group(index): FakeGroup(list(members), captured=40) for index in (1, 2)},
            )
            for number in range(1, 5)
        ]
        agents[0].lead(group(1), FULL, starting=6)
        agents[1].lead(group(2), starting=6)
        agents[2].lead(group(1), FULL, starting=20)
        agents[3].lead(group(2), starting=20)
        context = make_context(agents)
        assert isinstance(context.rpc, FakeRpc)
        return cls(agents[0], agents[1], agents[2], agents[3], context, context.rpc)

    def send_out(self) -> int:
        """Prepare, and let the range leave its source; returns the index at which it left."""
        self.rpc._transfer_prepare(self.destination, REQUEST.to_wire())
        out = self.rpc._transfer_out(
            self.source, TransferOutCall(REALM, group(1), group(2), wire_range(LOW), b"n" * 16, b"prepared")
        )
        return int(out.at)

    def take_in(self, at: int) -> None:
        """Let the range arrive."""
        out = self.rpc._transfer_out(
            self.source, TransferOutCall(REALM, group(1), group(2), wire_range(LOW), b"n" * 16, b"prepared")
        )
        body = TransferInCall(REALM, group(1), group(2), out.transferring, at, b"n" * 16, out.statement)
        assert self.rpc._transfer_in(self.destination, body) == Done()

    def forget(self, at: int) -> None:
        """Complete."""
        body = TransferComplete(REALM, group(1), group(2), wire_range(LOW), at)
        assert self.rpc._transfer_complete(self.source, body) == Done()

    def move_back(self) -> None:
        """Give the range back to its source, as a transfer in the other direction would."""
        self.source.groups[group(1)].owned, self.destination.groups[group(2)].owned = FULL, None

    def deceive(self, at: int, source: str, destination: str) -> None:
        """Let the deposed leaders say what they may have seen last; each of them believes that it is committed."""
        theirs = self.stale_source.groups[group(1)]
        if source == "says that it left":
            theirs.owned = subtract(FULL, LOW)
            theirs.transferring = Marker(Direction.OUT, group(2), wire_range(LOW), at, b"h" * 32)
            theirs.captured = theirs.committed = at
        elif source == "says that it owns nothing":
            theirs.owned = None
        elif source == "refuses for good":
            self.stale_source.refuse["transfer/out"] = Refused(Refusal.UNACCEPTABLE_RANGE)
        theirs = self.stale_destination.groups[group(2)]
        if destination == "claims the range":
            theirs.owned = LOW
        elif destination == "says that it prepared":
            theirs.transferring = Marker(Direction.IN, group(1), wire_range(LOW), 10)

    @property
    def is_whole(self) -> bool:
        """Tell whether everything is owned by a current leader or on its way from one."""
        left, taken = self.source.groups[group(1)], self.destination.groups[group(2)]
        parts = [part for part in (left.owned, taken.owned) if part is not None]
        if left.transferring is not None and taken.owned is None:
            parts.append(LOW)
        return covers(parts, FULL)

    @property
    def has_moved(self) -> bool:
        """Tell whether the range is at its destination and nothing is pending."""
        left, taken = self.source.groups[group(1)], self.destination.groups[group(2)]
        return taken.owned == LOW and left.transferring is None and taken.transferring is None


@pytest.mark.parametrize("hidden", ["nobody", "source", "destination", "both"])
@pytest.mark.parametrize("stale", list(itertools.product(STALE_SOURCES, STALE_DESTINATIONS)), ids=" and ".join)
async def test_range_in_flight_is_never_forgotten(
    autojump_clock: trio.testing.MockClock, hidden: str, stale: tuple[str, str]
) -> None:
    """Nobody took the range over: no *complete*, whatever is claimed; and it arrives once current leaders are seen."""
    for prepared in (True, False):
        duel = _Duel.create()
        at = duel.send_out()
        if not prepared:
            duel.destination.groups[group(2)].transferring = None
        duel.deceive(at, *stale)
        duel.source.down = hidden in {"source", "both"}
        duel.destination.down = hidden in {"destination", "both"}

        def check(_: str, method: str, duel: _Duel = duel) -> None:
            assert duel.is_whole
            arrived = duel.destination.groups[group(2)].owned == LOW
            assert method != "transfer/complete" or arrived, "sent although nobody took the range over"

        duel.rpc.on_call = check
        await recover_transfers(duel.context)
        assert duel.is_whole
        duel.source.down = duel.destination.down = False
        for _ in range(2):  # what a deposed leader had withdrawn takes a pass of its own
            await recover_transfers(duel.context)
        assert duel.has_moved


@pytest.mark.parametrize("asked", ["recovery", "an operator"])
async def test_an_earlier_arrival_completes_nothing_later(autojump_clock: trio.testing.MockClock, asked: str) -> None:
    """A deposed source leader still shows a transfer that arrived long ago; the same range is in flight again.

    That transfer did arrive, so the manager may order it to be forgotten; the order finds the current leader, and must
    leave the transfer that is in flight alone.
    """
    duel = _Duel.create()
    first = duel.send_out()
    duel.take_in(first)
    duel.forget(first)
    duel.move_back()
    second = duel.send_out()
    assert second > first
    duel.destination.groups[group(2)].transferring = None
    duel.deceive(first, "says that it left", "knows nothing")
    duel.source.down = True

    def show(_: str, method: str) -> None:
        duel.source.down = duel.source.down and method != "transfer/arrived"
        assert duel.is_whole

    duel.rpc.on_call = show
    if asked == "recovery":
        await recover_transfers(duel.context)
    else:
        await run_requested_transfer(duel.context, REQUEST)
    assert duel.rpc.methods("transfer/complete") == [(duel.source.url, "transfer/complete")]
    assert duel.source.groups[group(1)].transferring is not None
    assert duel.is_whole
    await recover_transfers(duel.context)
    assert duel.has_moved


async def test_the_current_leaders_are_asked(autojump_clock: trio.testing.MockClock) -> None:
    """With both claimants in sight every step goes to the one that began last."""
    duel = _Duel.create()
    duel.deceive(10, "says that it left", "claims the range")
    assert await run_requested_transfer(duel.context, REQUEST) == Done()
    asked = {url for url, method in duel.rpc.calls if method.startswith("transfer/")}
    assert asked == {duel.source.url, duel.destination.url}
    assert duel.has_moved
