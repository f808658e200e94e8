"""What the child processes of `test_sqlite_processes` do: `python -m tests.emulator.sqlite_process TASK PATH ...`."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys

import trio

from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.host.events import EventKind
from juicebox_hsm.host.log import AppendOutcome
from juicebox_hsm.ids import RecordId
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.ports.store import Store
from tests.emulator.realm_data import GROUP, REALM, Grown, append, batch, entry, event, intent

RACE_INDEXES = 150


def say(text: str) -> None:
    """Print a line that survives a kill right after it."""
    os.write(1, (text + "\n").encode())


async def write_batches(store: Store, count: int) -> None:
    """Append tree changes with intents and outbox rows, and say each one once it is acknowledged."""
    grown, rng = await Grown.start(store), random.Random(1)
    say("append 1")
    for number in range(1, count + 1):
        await grown.write({RecordId(rng.randbytes(32)): number.to_bytes(8, "big") for _ in range(4)})
        say(f"append {grown.index}")
        tails = await store.outbox.record(REALM, [event(number), event(number, "b")], {GROUP: grown.index})
        say(f"record {tails['acme']}")


async def race(store: Store, salt: int) -> None:
    """Try to append every index with our own mark, following whatever stands; say which we won."""
    last = await store.log.read_last(REALM, GROUP)
    index = 0 if last is None else last.index
    while index < RACE_INDEXES:
        previous_salt = None if last is None else int.from_bytes(last.entry_mac[8:16], "big")
        if await append(store, [entry(index + 1, salt, previous_salt)]) is AppendOutcome.APPENDED:
            say(f"won {index + 1}")
        last = await store.log.read_last(REALM, GROUP)
        assert last is not None
        assert last.index >= index
        index = last.index


async def record_events(store: Store, number: int) -> None:
    """Append to one tenant's sequence from several tasks."""

    async def one(task: int) -> None:
        for at in range(20):
            at_index = number * 1000 + task * 100 + at
            await store.outbox.record(REALM, [event(at_index), event(at_index, kind=EventKind.DELETE)], {})

    async with trio.open_nursery() as nursery:
        for task in range(5):
            nursery.start_soon(one, task)


async def fill_disk(store: Store) -> None:
    """Append until the file may not grow, check that nothing half-done stays, and go on when there is room again."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    index, refused = 0, 0
    while refused < 3:
        try:
            new = batch(index + 1, index + 50)
            assert await append(store, new, intents=[intent(1, "t" * 200)] * 50) is AppendOutcome.APPENDED
            index += 50
            assert refused == 0
        except StoreUnavailable:
            refused += 1
    assert index > 50
    last = await store.log.read_last(REALM, GROUP)
    assert last == entry(index), "what was refused was rolled back"
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert await append(store, batch(index + 1, index + 50)) is AppendOutcome.APPENDED
    say(f"full at {index}")


async def main(task: str, path: str, numbers: list[int]) -> None:
    """Run one task on the store at `path`."""
    async with open_store(f"sqlite:{path}") as store:
        await store.realms.create_realm(REALM)
        match task:
            case "write":
                await write_batches(store, *numbers)
            case "race":
                await race(store, *numbers)
            case "record":
                await record_events(store, *numbers)
            case "fill":
                await fill_disk(store)


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2], [int(argument) for argument in sys.argv[3:]])
