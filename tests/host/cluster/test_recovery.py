"""What is left half done, since when, and what is done about it."""

from __future__ import annotations

from juicebox_hsm.host.cluster.recovery import (
    AskWhetherArrived,
    PendingKey,
    RunAgain,
    WaitForLeader,
    pending,
    pending_since,
    plan_recovery,
)
from juicebox_hsm.host.cluster.transfer import TransferRequest
from juicebox_hsm.ids import FULL_RANGE
from juicebox_hsm.wire import rpc
from tests.host.cluster.agents import OTHER_REALM, REALM, FakeAgent, group, record, three, view_of

REQUEST = TransferRequest(REALM, group(1), group(2), FULL_RANGE)
BOUNDS = rpc.Range(FULL_RANGE.start, FULL_RANGE.end)
OUTGOING = rpc.TransferringInfo(rpc.Direction.OUT, group(2), BOUNDS, 5, b"h" * 32)
INCOMING = rpc.TransferringInfo(rpc.Direction.IN, group(1), BOUNDS, 4)


def test_a_manager_remembers_since_when() -> None:
    """The first sight of a transfer counts; one that is gone and another one start anew."""
    agents = three()
    led = agents[0].lead(group(1), FULL_RANGE).groups[group(1)]
    bounds = rpc.Range(record("00"), record("0f", 0xFF))
    since: dict[PendingKey, int] = {}

    def look(now_ms: int) -> dict[PendingKey, int]:
        return pending_since(since, pending(view_of(agents), committed_only=False), now_ms)

    led.transferring = rpc.TransferringInfo(rpc.Direction.OUT, group(2), bounds, 5, b"h" * 32)
    for now_ms in (1000, 3000):
        since = look(now_ms)
    assert since == {((REALM, group(1)), 5): 1000}
    led.transferring = rpc.TransferringInfo(rpc.Direction.OUT, group(2), bounds, 9, b"h" * 32)
    since = look(4000)
    assert since == {((REALM, group(1)), 9): 4000}
    led.transferring = None
    assert look(5000) == {}


def _transferring(agents: list[FakeAgent], number: int, marker: rpc.TransferringInfo) -> None:
    agents[number - 1].groups[group(number)].transferring = marker


def _half_done() -> list[FakeAgent]:
    """Group 1 is led by the first HSM and group 2 by the second."""
    agents = three(2)
    agents[0].lead(group(1), FULL_RANGE)
    agents[1].lead(group(2))
    return agents


def test_a_prepared_transfer_is_run_again_and_once() -> None:
    """The records of both sides are one transfer; without the source's leader it waits."""
    agents = _half_done()
    _transferring(agents, 1, OUTGOING)
    _transferring(agents, 2, INCOMING)
    assert plan_recovery(view_of(agents), REALM) == [RunAgain(REQUEST)]
    agents[0].groups[group(1)].role = rpc.GroupRole.WITNESS
    assert plan_recovery(view_of(agents), REALM) == [WaitForLeader(REQUEST, group(1))]


def test_an_outgoing_transfer_is_asked_about_first() -> None:
    """A range that left is neither completed nor moved before the destination's log was asked."""
    agents = _half_done()
    _transferring(agents, 1, OUTGOING)
    [work] = plan_recovery(view_of(agents), REALM)
    assert isinstance(work, AskWhetherArrived)
    assert (work.request, work.at, work.destination.url) == (REQUEST, OUTGOING.at, "tls://a2")
    agents[1].groups[group(2)].role = rpc.GroupRole.WITNESS
    assert plan_recovery(view_of(agents), REALM) == [WaitForLeader(REQUEST, group(2))]


def test_only_what_is_committed_counts() -> None:
    """A record that the leader has not committed yet may never have been."""
    agents = _half_done()
    _transferring(agents, 1, OUTGOING)
    agents[0].groups[group(1)].committed = OUTGOING.at - 1
    assert plan_recovery(view_of(agents), REALM) == []
    assert plan_recovery(view_of(agents), OTHER_REALM) == []


def test_a_deposed_leaders_record_does_not_count() -> None:
    """Of two that claim to lead a group only the freshest is believed."""
    agents = _half_done()
    _transferring(agents, 1, OUTGOING)
    agents[2].lead(group(1), FULL_RANGE, starting=9)
    assert plan_recovery(view_of(agents), REALM) == []
