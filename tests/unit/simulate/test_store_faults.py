"""What the simulated store does to calls that are not acknowledged, and never to those that are."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import trio
import trio.testing

from juicebox_hsm.host.log import AppendOutcome
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ports.errors import StoreAmbiguous, StoreUnavailable
from juicebox_hsm.ports.store import Store
from roles.tools.simulate.store import SimulatedStore, StoreView
from roles.tools.simulate.store_gate import CUT_OFF_S, StoreFaults
from tests.emulator.realm_data import GROUP, REALM, append, batch, event

URL = "tls://a"


async def opened(seed: int = 1) -> tuple[SimulatedStore, StoreView]:
    """Return a store with one realm and a view of it."""
    shared = SimulatedStore(random.Random(seed))
    view = shared.view("one")
    await view.store.realms.create_realm(REALM)
    return shared, view


async def tail(shared: SimulatedStore) -> int:
    """Return the last index of the log as a process without trouble sees it."""
    last = await shared.view("reader").store.log.read_last(REALM, GROUP)
    return 0 if last is None else last.index


async def test_a_refused_write_never_happens(autojump_clock: trio.testing.MockClock) -> None:
    """`StoreUnavailable` from an append means that nothing was applied, then or later."""
    shared, view = await opened()
    view.faults.refuse = 1.0
    for _ in range(20):
        with pytest.raises(StoreUnavailable):
            await append(view.store, batch(1, 2))
    await trio.sleep(10)
    assert await tail(shared) == 0


async def test_an_unseen_append_is_done_done_later_or_lost(autojump_clock: trio.testing.MockClock) -> None:
    """All three fates of an ambiguous append occur, and a late one lands only while nobody else has appended."""
    fates: set[tuple[int, int]] = set()
    for seed in range(40):
        shared, view = await opened(seed)
        view.faults.half = 1.0
        with pytest.raises(StoreAmbiguous):
            await append(view.store, batch(1, 2))
        at_once = await tail(shared)
        if not at_once and seed % 2:
            assert await append(shared.view("other").store, batch(1, 1, salt=1)) is AppendOutcome.APPENDED
        await trio.sleep(3)
        fates.add((at_once, await tail(shared)))
    assert fates == {(2, 2), (0, 2), (0, 0), (0, 1)}


@pytest.mark.parametrize("end", ["cancel", "crash"])
async def test_a_call_that_is_given_up(autojump_clock: trio.testing.MockClock, end: str) -> None:
    """A caller that goes away before the answer leaves an append that was done, comes later or never comes."""
    fates: set[tuple[int, int]] = set()
    for seed in range(40):
        shared, view = await opened(seed)
        view.faults.latency_s = (1.0, 1.0)
        if end == "cancel":
            with trio.move_on_after(0.5):
                await append(view.store, batch(1, 2))
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(expect_ambiguous, view.store)
                await trio.sleep(0.5)
                view.crash()
                began_s = trio.current_time()
            assert trio.current_time() == began_s, "a dead process waits for nothing"
        at_once = await tail(shared)
        await trio.sleep(3)
        fates.add((at_once, await tail(shared)))
    assert fates == {(2, 2), (0, 2), (0, 0)}


async def test_a_write_of_a_frozen_process_may_land(autojump_clock: trio.testing.MockClock) -> None:
    """A call under way may take effect while its process stands still; its answer is true when it comes."""
    seen = set()
    for seed in range(20):
        shared, view = await opened(seed)
        view.faults.latency_s = (1.0, 1.0)
        outcomes: list[AppendOutcome] = []
        async with trio.open_nursery() as nursery:

            async def write(view: StoreView = view, outcomes: list[AppendOutcome] = outcomes) -> None:
                outcomes.append(await append(view.store, batch(1, 2)))

            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            view.freeze()
            at_once = await tail(shared)
        assert outcomes == [AppendOutcome.APPENDED]
        assert await tail(shared) == 2
        seen.add(at_once)
    assert seen == {0, 2}


async def expect_ambiguous(store: Store) -> None:
    """Append inside a shield, as agents do."""
    with trio.CancelScope(shield=True), pytest.raises(StoreAmbiguous):
        await append(store, batch(1, 2))


async def test_what_was_acknowledged_stays(autojump_clock: trio.testing.MockClock) -> None:
    """Whatever else goes wrong, an append that was answered is in the log for everybody, at once and for good."""
    chance = random.Random(3)
    shared, view = await opened(3)
    view.faults.latency_s, view.faults.half, view.faults.refuse = (0.0, 0.2), 0.3, 0.2
    acknowledged = 0
    for _ in range(200):
        first = await tail(shared) + 1
        try:
            with trio.move_on_after(chance.choice((0.1, 1.0))):
                if await append(view.store, batch(first, first)) is AppendOutcome.APPENDED:
                    acknowledged = first
        except (StoreAmbiguous, StoreUnavailable):
            pass
        assert await tail(shared) >= acknowledged
    assert acknowledged > 50


async def test_one_process_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    """A process that is cut off is refused after a moment, others are not; it comes back when the world says so."""
    shared, view = await opened()
    view.faults.cut_off = True
    began_s = trio.current_time()
    with pytest.raises(StoreUnavailable):
        await view.store.log.read_last(REALM, GROUP)
    assert trio.current_time() - began_s == CUT_OFF_S
    assert await append(shared.view("two").store, batch(1, 1)) is AppendOutcome.APPENDED
    view.faults.cut_off = False
    assert await view.store.log.read_last(REALM, GROUP) == batch(1, 1)[0]


async def test_a_crashed_process_gets_nothing_more(autojump_clock: trio.testing.MockClock) -> None:
    """After its end a process can neither read nor write, and calls return at once."""
    shared, view = await opened()
    view.crash()
    calls: tuple[Callable[[], object], ...] = (
        lambda: append(view.store, batch(1, 1)),
        lambda: view.store.log.read_last(REALM, GROUP),
        lambda: view.store.outbox.record(REALM, [event(1)], {}),
    )
    for call in calls:
        with pytest.raises(StoreUnavailable):
            await call()  # type: ignore[misc]  # all three are coroutines
    await trio.sleep(5)
    assert await tail(shared) == 0


async def test_stale_reads_show_a_former_state(autojump_clock: trio.testing.MockClock) -> None:
    """Discovery may be some seconds old where that is asked for; logs never are."""
    shared, view = await opened()
    other = shared.view("two", StoreFaults(stale=1.0, stale_s=2.0))
    seen = set()
    for number in range(40):
        await trio.sleep(0.5)
        await view.store.discovery.register(ServiceKind.AGENT, URL, number)
        assert await append(view.store, batch(number + 1, number + 1)) is AppendOutcome.APPENDED
        found = await other.store.discovery.list()
        seen.add(number - found[0].registered_ms if found else -1)
        last = await other.store.log.read_last(REALM, GROUP)
        assert last is not None
        assert last.index == number + 1
    assert seen - {-1} == {0, 1, 2, 3, 4} or seen - {-1} == {1, 2, 3, 4}


async def test_events_of_unknown_outcome(autojump_clock: trio.testing.MockClock) -> None:
    """A record of two tenants' events may be torn; late events come only if nobody numbered others meanwhile."""
    seen = set()
    for seed in range(60):
        shared, view = await opened(seed)
        view.faults.half = 0.7
        with pytest.raises(StoreAmbiguous):
            await record_until_unseen(view.store)
        outbox = shared.view("two").store.outbox
        before = [cursor.tail for cursor in await outbox.cursors(REALM)]
        await outbox.record(REALM, [event(3)], {})
        await trio.sleep(3)
        after = [cursor.tail for cursor in await outbox.cursors(REALM)]
        assert after[0] == (before[0] if before else 0) + 1, "the late writer's number was taken"
        rows = await outbox.read(REALM, "acme", 0, 100)
        assert [row.seq for row in rows] == list(range(1, after[0] + 1))
        seen.add((tuple(before), tuple(after)))
    assert ((), (1,)) in seen
    assert ((1,), (2,)) in seen
    assert ((1, 1), (2, 1)) in seen


async def test_a_record_that_is_refused_in_the_middle(autojump_clock: trio.testing.MockClock) -> None:
    """Once an event is written a record is not refused any more, which would invite to write it again: it is torn."""
    seen = set()
    for seed in range(60):
        shared, view = await opened(seed)
        view.faults.refuse = 0.5
        try:
            await view.store.outbox.record(REALM, [event(1), event(2, "b")], {GROUP: 2})
        except StoreUnavailable:
            seen.add("unavailable")
            assert not await shared.view("two").store.outbox.cursors(REALM)
        except StoreAmbiguous:
            seen.add("ambiguous")
            assert await shared.view("two").store.outbox.cursors(REALM)
        else:
            seen.add("written")
    assert seen == {"unavailable", "ambiguous", "written"}


async def record_until_unseen(store: Store) -> None:
    """Record the same two events until the outcome is unknown."""
    while True:
        await store.outbox.record(REALM, [event(1), event(2, "b")], {GROUP: 2})


async def test_the_same_seed_gives_the_same_store(autojump_clock: trio.testing.MockClock) -> None:
    """Two runs with one seed count the same outcomes."""
    counts = []
    for _ in range(2):
        shared, view = await opened(9)
        view.faults.latency_s, view.faults.half, view.faults.refuse = (0.0, 0.2), 0.3, 0.2
        for _ in range(100):
            first = await tail(shared) + 1
            try:
                await append(view.store, batch(first, first))
            except (StoreAmbiguous, StoreUnavailable):
                continue
        counts.append((dict(shared.counts), await tail(shared)))
    assert counts[0] == counts[1]
