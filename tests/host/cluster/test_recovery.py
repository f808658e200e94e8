"""What is left half done, since when, and what is done about it."""

from __future__ import annotations

from juicebox_hsm.host.cluster.recovery import PendingKey, pending, pending_since
from juicebox_hsm.ids import FULL_RANGE
from juicebox_hsm.wire import rpc
from tests.host.cluster.agents import REALM, group, record, three, view_of


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
