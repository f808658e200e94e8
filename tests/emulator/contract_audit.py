"""Contract of `ports.AuditTrail`."""

from __future__ import annotations

import trio

from juicebox_hsm.host.audit import AuditEntry, make_entry
from juicebox_hsm.ports.store import Store
from tests.emulator.contract import Backend

NOW_MS = 1_795_512_600_000


def audit_entry(number: int, when_ms: int = NOW_MS, who: str = "operator/me") -> AuditEntry:
    """Return the first entry of a change."""
    return make_entry(
        number.to_bytes(16, "big"), when_ms, who=who, origin="127.0.0.1:1", recorded_by="m1", action="stepdown",
        arguments=(("hsm", "ab" * 16), ("name", "zo\u00eb \x1b[31m")),
    )  # fmt: skip


class AuditContract:
    """`ports.AuditTrail`."""

    async def test_entries_come_back(self, store: Store) -> None:
        """Every entry is read as it was added, by time, whatever the order of adding; `since` is the first moment."""
        assert await store.audit.read(0, 10) == []
        entries = [audit_entry(number, NOW_MS + 10 * number) for number in range(6)]
        ended = entries[1].ended(NOW_MS + 15, failed=True, detail="no")
        for entry in (entries[3], entries[0], entries[5], ended, entries[1], entries[4], entries[2]):
            await store.audit.add(entry)
        wanted = [entries[0], entries[1], ended, *entries[2:]]
        assert await store.audit.read(0, 10) == wanted
        assert await store.audit.read(NOW_MS + 15, 10) == wanted[2:]
        assert await store.audit.read(NOW_MS + 51, 10) == []

    async def test_the_newest_are_kept_when_there_are_many(self, store: Store) -> None:
        """A reader that takes only so many gets the latest, still oldest first."""
        entries = [audit_entry(number, NOW_MS + number) for number in range(20)]
        for entry in entries:
            await store.audit.add(entry)
        assert await store.audit.read(0, 5) == entries[-5:]
        assert await store.audit.read(NOW_MS + 17, 5) == entries[-3:]

    async def test_what_stands_stands(self, store: Store) -> None:
        """An entry that is added again changes nothing, and another one in its place neither."""
        first = audit_entry(1)
        await store.audit.add(first)
        await store.audit.add(first)
        await store.audit.add(audit_entry(1, who="operator/somebody-else"))
        assert await store.audit.read(0, 10) == [first]

    async def test_everybody_adds_to_one_trail(self, backend: Backend, store: Store) -> None:
        """Entries of all processes are in it, also those of one moment; it is there after opening again."""
        async with backend.open() as second, trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon((store if number % 2 else second).audit.add, audit_entry(number))
        async with backend.open() as third:
            found = await third.audit.read(0, 100)
        assert sorted(entry.change for entry in found) == [number.to_bytes(16, "big") for number in range(20)]
