"""Management leases: exclusion, renewal, loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
import trio.testing

from juicebox_hsm.host.cluster.leases import usable_until_s
from juicebox_hsm.ports.errors import StoreInvalid, StoreUnavailable
from roles.manager.context import ManagerContext, ManagerState
from roles.manager.leases import LeaseBusy, LeaseLost, management_lease
from tests.unit.manager.fakes import FakeLeases, make_context


def _context() -> tuple[ManagerContext, FakeLeases]:
    context = make_context([], now_ms=lambda: round(trio.current_time() * 1000))
    leases = context.store.leases
    assert isinstance(leases, FakeLeases)
    return context, leases


async def test_excludes_others_and_is_given_back(autojump_clock: trio.testing.MockClock) -> None:
    """A second manager is refused while the first works, and admitted as soon as it is done."""
    context, leases = _context()
    async with management_lease(context, "x"):
        with pytest.raises(LeaseBusy):
            async with management_lease(context, "x"):
                raise AssertionError("both hold the lease")
    assert leases.rows == {}
    async with management_lease(context, "x"):
        assert context.state.held_leases.keys() == {"x"}
    assert not context.state.held_leases


async def test_renewed_for_as_long_as_the_body_runs(autojump_clock: trio.testing.MockClock) -> None:
    """A body longer than the lease keeps it."""
    context, leases = _context()
    async with management_lease(context, "x"):
        await trio.sleep(60)
        assert leases.rows["x"].expires_ms > trio.current_time() * 1000
    assert not leases.rows


async def test_lost_before_the_store_would_give_it_away(autojump_clock: trio.testing.MockClock) -> None:
    """Without renewal the body is cancelled 500 ms before the lease expires, and only the body."""
    context, leases = _context()
    begun = trio.current_time()

    async def work() -> None:
        async with management_lease(context, "x"):
            leases.broken = True
            await trio.sleep(60)

    with pytest.raises(LeaseLost):
        await work()
    assert trio.current_time() - begun <= 2.5 + 2.1  # giving it back may take 2 s more
    await trio.lowlevel.checkpoint()  # the caller itself is not cancelled


async def test_taken_over_by_another(autojump_clock: trio.testing.MockClock) -> None:
    """A lease whose row names somebody else is lost at the next renewal, and left alone."""
    context, leases = _context()

    async def work() -> None:
        async with management_lease(context, "x"):
            del leases.rows["x"]
            await leases.obtain("x", "other", 0, 3000)
            await trio.sleep(60)

    with pytest.raises(LeaseLost):
        await work()
    assert trio.current_time() < 1.5
    assert leases.rows["x"].owner == "other"


async def test_survives_a_short_outage(autojump_clock: trio.testing.MockClock) -> None:
    """A store that is back before the lease runs out costs nothing."""
    context, leases = _context()
    async with management_lease(context, "x"):
        await trio.sleep(0.9)
        leases.broken = True
        await trio.sleep(0.9)
        leases.broken = False
        await trio.sleep(10)
    assert not leases.rows


async def test_errors_of_the_body_leave_as_they_are(autojump_clock: trio.testing.MockClock) -> None:
    """The caller sees the body's error itself, not a group around it, and the lease is given back."""
    context, leases = _context()
    with pytest.raises(StoreUnavailable, match="mine"):
        async with management_lease(context, "x"):
            raise StoreUnavailable("mine")
    assert not leases.rows


async def test_outside_cancellation_gives_it_back(autojump_clock: trio.testing.MockClock) -> None:
    """Shutting down in the middle leaves no lease behind."""
    context, leases = _context()
    with trio.move_on_after(1.5):
        async with management_lease(context, "x"):
            await trio.sleep_forever()
    assert not leases.rows


async def test_a_damaged_store_costs_the_lease_only(autojump_clock: trio.testing.MockClock) -> None:
    """A renewal that fails for a lasting reason ends the body like any other loss, and nothing else."""
    context, leases = _context()

    async def damaged(*_: object) -> None:
        raise StoreInvalid("not ours")

    async def work() -> None:
        async with management_lease(context, "x"):
            leases.extend = damaged  # type: ignore[assignment,method-assign]
            await trio.sleep(60)

    with pytest.raises(LeaseLost):
        await work()


@pytest.mark.parametrize("slow", ["obtain", "extend"])
async def test_counts_from_the_sending(autojump_clock: trio.testing.MockClock, slow: str) -> None:
    """An answer that takes long lengthens nothing: the body ends before the store gives the lease to another."""
    context, leases = _context()
    original = getattr(leases, slow)
    sent = []

    async def answer_late(*args: object) -> object:
        sent.append(trio.current_time())
        answer = await original(*args)
        await trio.sleep(0.9)
        leases.broken = True
        return answer

    setattr(leases, slow, answer_late)
    until = 0.0

    async def work() -> None:
        nonlocal until
        async with management_lease(context, "x"):
            try:
                await trio.sleep(60)
            finally:
                until = trio.current_time()

    with pytest.raises(LeaseLost):
        await work()
    assert until == pytest.approx(usable_until_s(sent[0]))
    assert until * 1000 < leases.rows["x"].expires_ms - 400


async def test_clocks_far_apart_neither_steal_nor_wait(autojump_clock: trio.testing.MockClock) -> None:
    """A manager an hour ahead does not take what another renews; one an hour behind takes what a dead one left."""
    context, leases = _context()

    def beside(offset_ms: int) -> ManagerContext:
        """Return another manager, whose clock is off."""
        return replace(context, now_ms=lambda: round(trio.current_time() * 1000) + offset_ms, state=ManagerState())

    ahead, behind = beside(3_600_000), beside(-3_600_000)

    async def attempts(other: ManagerContext) -> int:
        """Try every second; return how often it was refused."""
        for attempt in range(60):
            try:
                async with management_lease(other, "x"):
                    return attempt
            except LeaseBusy:
                await trio.sleep(1)
        return 60

    async with management_lease(context, "x"):
        assert await attempts(ahead) == 60
        assert await attempts(behind) == 60
    await leases.obtain("x", "dead", ahead.now_ms(), 3000)
    assert await attempts(behind) == 3
