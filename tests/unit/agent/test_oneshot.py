"""The wake-up primitives: nothing set is lost, whoever is cancelled."""

from __future__ import annotations

import trio
import trio.testing

from roles.agent.oneshot import Signal, Slot


async def test_signal_set_before_wait_is_not_lost() -> None:
    """A setting without a waiter makes the next wait return, once."""
    signal = Signal()
    signal.set()
    signal.set()
    await signal.wait()
    assert not signal.is_set
    assert not await signal.wait_at_most(0)


async def test_signal_wakes_its_waiter(autojump_clock: trio.testing.MockClock) -> None:
    """A waiter resumes when the signal is set, and a wait that timed out leaves the signal usable."""
    signal = Signal()
    assert not await signal.wait_at_most(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(signal.wait)
        await trio.testing.wait_all_tasks_blocked()
        signal.set()
    assert not signal.is_set


async def test_signal_survives_cancelled_waiters() -> None:
    """A cancelled wait takes no setting with it."""
    signal = Signal()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(signal.wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    signal.set()
    with trio.CancelScope() as scope:
        scope.cancel()
        await signal.wait()
    assert signal.is_set


async def test_slot_delivers_the_first_value() -> None:
    """A second value changes nothing, before and after the wait."""
    slot: Slot[str] = Slot()
    slot.fill("first")
    slot.fill("second")
    assert await slot.wait() == "first"


async def test_slot_wakes_its_waiter() -> None:
    """The waiting task gets the value."""
    slot: Slot[int] = Slot()
    got: list[int] = []

    async def wait() -> None:
        got.append(await slot.wait())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        slot.fill(7)
    assert got == [7]


async def test_slot_knows_that_its_waiter_left() -> None:
    """A cancelled waiter marks the slot, and filling it afterwards is harmless."""
    slot: Slot[int] = Slot()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(slot.wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert slot.gone
    slot.fill(1)
