"""The steps of a transfer as the rules order them: which is next, and when a preparation may be withdrawn."""

from __future__ import annotations

from typing import Any

import pytest

from juicebox_hsm.host.cluster.transfer import (
    Call,
    Calls,
    Leaders,
    TransferRequest,
    complete,
    leaders_of,
    move_range,
    source_leader_of,
)
from juicebox_hsm.ids import OwnedRange
from juicebox_hsm.wire import rpc
from juicebox_hsm.wire.rpc import Done, PartitionInfo, Prepared, Refusal, Refused, TransferComplete, TransferredOut
from tests.host.cluster.agents import FULL, REALM, FakeAgent, group, record, three, view_of

LOW = OwnedRange(record("00"), record("7f", 0xFF))
REQUEST = TransferRequest(REALM, group(1), group(2), LOW)
BOUNDS = rpc.Range(LOW.start, LOW.end)
PREPARED = Prepared(b"n" * 16, b"prepared")
OUT = TransferredOut(PartitionInfo(BOUNDS, b"h" * 32), 7, b"out")


def _pair() -> list[FakeAgent]:
    """Group 1 owns everything and is led by the first HSM, group 2 owns nothing and is led by the second."""
    agents = three(2)
    agents[0].lead(group(1), FULL)
    agents[1].lead(group(2))
    return agents


def _leaders(agents: list[FakeAgent]) -> Leaders:
    found = leaders_of(view_of(agents), REQUEST)
    assert isinstance(found, Leaders)
    return found


def _play(calls: Calls, **replies: object) -> tuple[list[str], int | Refused]:
    """Answer each call by the last word of its method; return the calls in order, and what they conclude."""
    asked: list[Call[Any]] = []
    reply: object = None
    while True:
        try:
            asked.append(calls.send(reply))
        except StopIteration as end:
            outcome: int | Refused = end.value
            return [f"{call.method.name.partition('/')[2]} {call.member.name[-1]}" for call in asked], outcome
        reply = replies[asked[-1].method.name.partition("/")[2]]


def test_the_steps_in_order() -> None:
    """Prepare at the destination, out at the source, in at the destination; what is concluded is where it left."""
    calls = move_range(REQUEST, _leaders(_pair()))
    assert _play(calls, prepare=PREPARED, out=OUT, **{"in": Done()}) == (["prepare 2", "out 1", "in 2"], 7)


@pytest.mark.parametrize("refusal", Refusal)
def test_a_preparation_is_withdrawn_only_when_nothing_can_have_left(refusal: Refusal) -> None:
    """After any refusal of *out* that may have an effect still, only this destination can take the range."""
    definite = {
        Refusal.UNACCEPTABLE_RANGE,
        Refusal.INVALID_GROUP,
        Refusal.OTHER_TRANSFER_PENDING,
        Refusal.INVALID_PROOF,
    }
    calls = move_range(REQUEST, _leaders(_pair()))
    asked, outcome = _play(
        calls, prepare=PREPARED, out=Refused(refusal), owns=Refused(Refusal.NOT_LEADER), cancel_prepare=Done()
    )
    assert ("cancel_prepare 2" in asked) is (refusal in definite)
    assert "in 2" not in asked
    assert isinstance(outcome, Refused)
    assert outcome.outcome is (Refusal.UNACCEPTABLE_RANGE if refusal is Refusal.INVALID_PROOF else refusal)


@pytest.mark.parametrize(
    ("owns", "withdrawn"),
    [
        (Refused(Refusal.NOT_OWNED), True),
        (Done(), False),
        (Refused(Refusal.TRANSFER_IN_PROGRESS), False),
        (Refused(Refusal.RPC_ERROR), False),
    ],
)
def test_a_source_that_owns_nothing_is_believed_by_its_log_only(owns: object, *, withdrawn: bool) -> None:
    """`NotOwner` alone may come from a deposed leader: the committed log has to say that nothing is there."""
    calls = move_range(REQUEST, _leaders(_pair()))
    asked, outcome = _play(calls, prepare=PREPARED, out=Refused(Refusal.NOT_OWNER), owns=owns, cancel_prepare=Done())
    assert asked == ["prepare 2", "out 1", "owns 1", *(["cancel_prepare 2"] if withdrawn else [])]
    assert isinstance(outcome, Refused)
    assert outcome.outcome is (Refusal.UNACCEPTABLE_RANGE if withdrawn else Refusal.NOT_OWNER)


@pytest.mark.parametrize(
    ("arrived", "then"),
    [
        (Done(), []),
        (Refused(Refusal.NOT_ARRIVED), ["prepare 2"]),
        (Refused(Refusal.RPC_ERROR), ["prepare 2"]),
    ],
)
def test_what_arrived_is_not_moved_again(arrived: object, then: list[str]) -> None:
    """A source that shows this transfer as outgoing is asked about first; only a certain arrival skips the steps."""
    agents = _pair()
    agents[0].groups[group(1)].transferring = rpc.TransferringInfo(rpc.Direction.OUT, group(2), BOUNDS, 5, b"h" * 32)
    calls = move_range(REQUEST, _leaders(agents))
    asked, outcome = _play(calls, arrived=arrived, prepare=Refused(Refusal.NO_STORE))
    assert asked == ["arrived 2", *then]
    assert outcome == (5 if not then else Refused(Refusal.NO_STORE))


def test_another_transfer_of_the_source_is_not_this_one() -> None:
    """A marker that goes elsewhere, comes in, or is of another range, says nothing about this transfer."""
    other = rpc.Range(record("00"), record("3f", 0xFF))
    for marker in (
        rpc.TransferringInfo(rpc.Direction.OUT, group(3), BOUNDS, 5, b"h" * 32),
        rpc.TransferringInfo(rpc.Direction.IN, group(2), BOUNDS, 5),
        rpc.TransferringInfo(rpc.Direction.OUT, group(2), other, 5, b"h" * 32),
    ):
        agents = _pair()
        agents[0].groups[group(1)].transferring = marker
        asked, _ = _play(move_range(REQUEST, _leaders(agents)), prepare=Refused(Refusal.NO_STORE))
        assert asked == ["prepare 2"]


@pytest.mark.parametrize("reply", [Done(), Refused(Refusal.NOT_TRANSFERRING)])
def test_completion_names_where_the_range_left(reply: object) -> None:
    """The order is about one transfer, by its index; that there is none any more means that it got through."""
    calls = complete(REQUEST, _leaders(_pair()).source, 9)
    call = next(calls)
    assert isinstance(call.body, TransferComplete)
    assert call.body.at == 9
    with pytest.raises(StopIteration) as end:
        calls.send(reply)
    assert end.value.value == 9


def test_groups_are_missing_only_when_everybody_answered() -> None:
    """A group that nobody mentions may be that of the silent agent."""
    agents = _pair()
    for agent in agents:
        del agent.groups[group(2)]
    missing = leaders_of(view_of(agents), REQUEST)
    assert isinstance(missing, Refused)
    assert missing.outcome is Refusal.INVALID_GROUP
    agents[2].down = True
    unknown = leaders_of(view_of(agents), REQUEST)
    assert isinstance(unknown, Refused)
    assert unknown.outcome is Refusal.NO_DESTINATION_LEADER
    source = source_leader_of(view_of(agents), REQUEST)
    assert not isinstance(source, Refused)
    assert source.url == "tls://a1"
