"""Calls cross to the asyncio thread and back; cancelled ones leave nothing behind; tokens are renewed in time."""

from __future__ import annotations

import asyncio
import datetime as dt
import threading
from collections.abc import AsyncIterator, Callable

import pytest
import trio
import trio.testing

from juicebox_hsm.adapters.bigtable import auth
from juicebox_hsm.adapters.bigtable.auth import ApplicationDefault, NoAuthorization
from juicebox_hsm.adapters.bigtable.driver import CallFailed, Driver
from juicebox_hsm.adapters.bigtable.retry import CallAttempts, NoSuchTable, translate
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.host.retry import RetryProfile
from juicebox_hsm.ports.errors import StoreInvalid, StoreUnavailable


@pytest.fixture
async def driver() -> AsyncIterator[Driver]:
    """Run a driver."""
    made = Driver()
    await made.start()
    yield made
    await made.stop()


async def test_results_and_errors_cross(driver: Driver) -> None:
    """What the coroutine returns or raises arrives in the task that waits, from another thread than ours."""

    async def thread() -> int:
        return threading.get_ident()

    async def fail() -> None:
        raise CallFailed("INTERNAL", "broken")

    async def cancel() -> None:
        raise asyncio.CancelledError

    assert await driver.run(thread) != threading.get_ident()
    with pytest.raises(CallFailed, match="broken"):
        await driver.run(fail)
    with pytest.raises(CallFailed, match="CANCELLED"):
        await driver.run(cancel)


async def test_many_at_once(driver: Driver) -> None:
    """A thousand calls under way each give their own answer, with only one more thread."""
    found: dict[int, int] = {}
    threads = set(threading.enumerate())

    async def ask(number: int) -> None:
        async def answer() -> int:
            await asyncio.sleep(0)
            return number * number

        found[number] = await driver.run(answer)

    async with trio.open_nursery() as nursery:
        for number in range(1000):
            nursery.start_soon(ask, number)
    assert found == {number: number * number for number in range(1000)}
    assert set(threading.enumerate()) <= threads


async def test_cancelling_cancels_the_call(driver: Driver) -> None:
    """A cancelled task goes on at once, and its coroutine is cancelled, also if that had not begun."""
    cancelled = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver.run, wait)
            await trio.testing.wait_all_tasks_blocked()
            await driver.run(lambda: asyncio.sleep(0))
            scope.cancel()
    assert await trio.to_thread.run_sync(cancelled.wait, 5)
    with trio.CancelScope() as scope:
        scope.cancel()
        await driver.run(wait)
    assert scope.cancelled_caught


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("UNAVAILABLE", StoreUnavailable),
        ("CANCELLED", StoreUnavailable),
        ("PERMISSION_DENIED", StoreUnavailable),
        ("NOT_FOUND", NoSuchTable),
        ("INVALID_ARGUMENT", StoreInvalid),
        ("FAILED_PRECONDITION", StoreInvalid),
    ],
)
def test_failures_become_the_ports_errors(code: str, error: type[Exception]) -> None:
    """Each status has one meaning for the callers of the ports, and the text names both."""
    made = translate(CallFailed(code, "details"), "read x")
    assert type(made) is error
    assert str(made) == f"read x: {code}: details"


async def test_attempts_end(autojump_clock: trio.testing.MockClock) -> None:
    """Passing failures are waited out with growing pauses until number or time is used up; others end at once."""
    passing = CallFailed("UNAVAILABLE", "")
    attempts = CallAttempts("x", RetryProfile(attempts_max=4, first_s=1, cap_s=3, total_s=100, spread=0.2))
    begun = trio.current_time()
    for _ in range(3):
        await attempts.after(passing)
    assert 0.8 * 6 <= trio.current_time() - begun <= 1.2 * 6
    with pytest.raises(StoreUnavailable):
        await attempts.after(passing)
    attempts = CallAttempts("x", RetryProfile(attempts_max=1000, first_s=1, cap_s=1, total_s=10, spread=0.2))
    begun = trio.current_time()
    with pytest.raises(StoreUnavailable):  # noqa: PT012 - which attempt is the last is the question
        while True:
            await attempts.after(passing)
    assert 10 <= trio.current_time() - begun <= 12
    with pytest.raises(StoreInvalid):
        await CallAttempts("x").after(CallFailed("INVALID_ARGUMENT", ""))


async def inline(work: Callable[[], None]) -> None:
    """Work here: a clock that jumps would not wait for a thread."""
    work()


class FakeCredentials:
    """Credentials whose tokens are numbered."""

    def __init__(self, lifetime_s: float) -> None:
        self.lifetime_s = lifetime_s
        self.refreshed = 0
        self.fails = False
        self.token = ""
        self.expiry: dt.datetime | None = None

    def refresh(self, transport: object) -> None:
        """Give the next token."""
        if self.fails:
            raise OSError("no network")
        self.refreshed += 1
        self.token = f"token{self.refreshed}"
        self.expiry = (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=self.lifetime_s)).replace(tzinfo=None)


async def test_tokens_are_renewed_early(autojump_clock: trio.testing.MockClock) -> None:
    """A token is replaced 5 minutes before it expires; while that fails the old one serves and it is tried again."""
    credentials = FakeCredentials(3600)
    found = ApplicationDefault(credentials, None, inline)
    await found.refresh()
    assert found.metadata() == (("authorization", "Bearer token1"),)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.keep_fresh)
        await trio.sleep(3600 - auth.EARLY_S - 60)
        assert credentials.refreshed == 1
        await trio.sleep(120)
        assert found.metadata() == (("authorization", "Bearer token2"),)
        credentials.fails, credentials.lifetime_s = True, 0
        credentials.expiry = dt.datetime(2020, 1, 1)  # noqa: DTZ001 - the library's are naive
        await trio.sleep(3600)
        assert found.metadata() == (("authorization", "Bearer token2"),)
        credentials.fails = False
        await trio.sleep(60)
        assert credentials.refreshed > 2
        nursery.cancel_scope.cancel()


async def test_refused_tokens_are_renewed_once(autojump_clock: trio.testing.MockClock) -> None:
    """However many calls are refused at the same time, one new token is fetched; a fresh one is not the reason."""
    credentials, metrics = FakeCredentials(3600), Metrics()
    found = ApplicationDefault(credentials, None, inline, metrics)
    await found.refresh()
    assert not await found.renew()
    await trio.sleep(auth.MIN_AGE_S + 1)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(found.renew)
    assert credentials.refreshed == 2
    credentials.fails = True
    await trio.sleep(auth.MIN_AGE_S + 1)
    assert not await found.renew()
    assert found.metadata() == (("authorization", "Bearer token2"),)
    assert metrics.timer("gcp.get_token.time", result="ok").count == 2
    assert metrics.counter("gcp.get_token.retryable_errors").value == 1
    nobody = NoAuthorization()
    assert nobody.metadata() == ()
    assert not await nobody.renew()
