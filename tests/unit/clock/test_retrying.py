"""Tries, and the one budget of time of those that are nested."""

from __future__ import annotations

from functools import partial

import pytest
import trio
import trio.testing

from juicebox_hsm.adapters.clock.retrying import Attempts, budget, retrying
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.retry import RetryProfile
from juicebox_hsm.ports.errors import StoreInvalid, StoreUnavailable


async def test_retrying_stops_at_what_cannot_pass(autojump_clock: trio.testing.MockClock) -> None:
    """Passing errors are retried, others and the last one allowed are raised."""
    failures: list[RealmError] = [StoreUnavailable("a"), StoreUnavailable("b")]

    async def works_third_time() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert await retrying(works_third_time) == "done"

    async def never() -> None:
        calls.append(1)
        raise StoreUnavailable("down")

    calls: list[int] = []
    began = trio.current_time()
    with pytest.raises(StoreUnavailable):
        await retrying(never)
    assert 30 <= trio.current_time() - began <= 32
    assert len(calls) <= 50

    async def invalid() -> None:
        raise StoreInvalid("no")

    with pytest.raises(StoreInvalid):
        await retrying(invalid)


@pytest.mark.parametrize("call_s", [0.0, 3.0, 7.0])
async def test_nested_retries_share_one_budget(call_s: float, autojump_clock: trio.testing.MockClock) -> None:
    """An operation that retries calls which retry themselves ends when the outermost budget does, plus one call.

    Its first part takes most of the time and succeeds; the rest has what is left, not a budget of its own.
    """
    began = trio.current_time()

    async def call(*, until_s: float) -> None:
        await trio.sleep(call_s)
        if trio.current_time() - began < until_s:
            raise StoreUnavailable("down")

    async def operation() -> None:
        await retrying(partial(call, until_s=20.0))
        await retrying(partial(call, until_s=1000.0))

    with pytest.raises(StoreUnavailable):
        await retrying(operation)
    assert 30 <= trio.current_time() - began <= 30 + call_s + 2.0


async def test_budget_never_outlives_an_outer_one(autojump_clock: trio.testing.MockClock) -> None:
    """An inner budget may be shorter, not longer, and what comes after the block is free of it."""
    with budget(5.0):
        with budget(1.0):
            short = Attempts()
        with budget(100.0):
            bounded = Attempts()
    free = Attempts()
    await trio.sleep(1.0)
    assert (short.exhausted(), bounded.exhausted()) == (True, False)
    await trio.sleep(4.0)
    assert (bounded.exhausted(), free.exhausted()) == (True, False)


async def test_tries_are_counted_one_by_one(autojump_clock: trio.testing.MockClock) -> None:
    """A shared budget is of time only: another operation within it has its own number of tries."""
    few = RetryProfile(attempts_max=2)
    with budget(30.0):
        first, second = Attempts(few), Attempts(few)
        assert [first.exhausted(), first.exhausted(), second.exhausted()] == [False, True, False]
