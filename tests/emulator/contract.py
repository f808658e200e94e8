"""Contract of the store's ports: logs, trees and cluster facts (the outbox's is in `contract_outbox`).

A back end joins by a test module with a `backend` fixture (a `Backend`) and a class that inherits `StoreContract`.
Nothing here knows how a back end keeps things.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import pytest
import trio

from juicebox_hsm.consensus.types import LogEntry, Partition, TransferringIn, TransferringOut
from juicebox_hsm.host.log import AppendOutcome, Compacted, LogRow
from juicebox_hsm.host.services import ServiceAddress, ServiceKind, TenantLimits
from juicebox_hsm.ids import FULL_RANGE, GroupId, HsmId, OwnedRange, RealmId, RecordId
from juicebox_hsm.merkle.walk import Lost, Side
from juicebox_hsm.ports.errors import MissingNode
from juicebox_hsm.ports.store import Store
from tests.emulator.realm_data import (
    GROUP,
    HSM,
    OTHER_GROUP,
    REALM,
    Grown,
    append,
    batch,
    certificate,
    entry,
    intent,
    mac,
    random_record,
)

APPENDED, CONFLICT = AppendOutcome.APPENDED, AppendOutcome.CONFLICT
MIDDLE = OwnedRange(RecordId(b"\x40" + bytes(31)), RecordId(b"\xbf" + b"\xff" * 31))


class Backend(Protocol):
    """One fresh, empty store that can be opened any number of times, also at the same time."""

    def open(self) -> AbstractAsyncContextManager[Store]:
        """Open the store."""


@pytest.fixture
async def store(backend: Backend) -> AsyncIterator[Store]:
    """Open a fresh store with one realm."""
    async with backend.open() as opened:
        await opened.realms.create_shared()
        await opened.realms.create_realm(REALM)
        yield opened


class LogContract:
    """`ports.LogStore`."""

    async def test_append_and_read(self, store: Store) -> None:
        """Appended entries come back whole and in order, from any index and over batch boundaries."""
        assert await store.log.read_last(REALM, GROUP) is None
        assert await store.log.read_from(REALM, GROUP, 1, 10) == []
        for first, last in ((1, 1), (2, 6), (7, 7), (8, 107)):
            assert await append(store, batch(first, last)) is APPENDED
        assert await store.log.read_last(REALM, GROUP) == entry(107)
        assert await store.log.read_from(REALM, GROUP, 1, 1000) == batch(1, 107)
        assert await store.log.read_from(REALM, GROUP, 4, 1000) == batch(4, 107)
        assert await store.log.read_from(REALM, GROUP, 108, 10) == []
        assert await store.log.read_from(REALM, GROUP, 2**64 - 1, 10) == []
        part = await store.log.read_from(REALM, GROUP, 3, 5)
        assert isinstance(part, list)
        assert part == batch(3, 2 + len(part))
        assert len(part) >= 5

    async def test_every_field_survives(self, store: Store) -> None:
        """Partitions, both kinds of transfer, consumed sources and the end of a log are read as they were written."""
        part = Partition(MIDDLE, b"\x07" * 32)
        consumed = ((GroupId(b"\x01" * 16), 5), (GroupId(b"\x02" * 16), 2**40))
        entries = [
            LogEntry(1, part, TransferringIn(OTHER_GROUP, MIDDLE, 1), bytes(32), mac(1), HSM, consumed),
            LogEntry(2, None, TransferringOut(OTHER_GROUP, part, 2), mac(1), mac(2), HsmId(b"\x99" * 16)),
            LogEntry(3, None, None, mac(2), mac(3), HSM, consumed, retired=True),
        ]
        assert await append(store, entries) is APPENDED
        assert await store.log.read_from(REALM, GROUP, 1, 10) == entries

    async def test_append_needs_the_exact_tail(self, store: Store) -> None:
        """A batch that does not continue the last entry, by index and mac, conflicts and leaves nothing behind."""
        assert await append(store, batch(2, 3)) is CONFLICT, "the previous entry is missing"
        assert await append(store, batch(1, 5)) is APPENDED
        for wrong in (
            batch(1, 5),
            batch(1, 1, salt=9),
            batch(3, 6),
            batch(5, 6),
            batch(7, 8),
            [entry(6, previous_salt=9)],
        ):
            assert await append(store, wrong) is CONFLICT
        assert await store.log.read_from(REALM, GROUP, 1, 100) == batch(1, 5)
        assert await append(store, batch(6, 6)) is APPENDED

    async def test_groups_are_separate(self, store: Store) -> None:
        """A group's log neither sees nor disturbs another group's, of this realm or another."""
        other_realm = RealmId(b"\x12" * 16)
        await store.realms.create_realm(other_realm)
        assert await store.log.list_groups(REALM) == []
        assert await append(store, batch(1, 9)) is APPENDED
        assert await append(store, batch(1, 2, salt=1), group=OTHER_GROUP) is APPENDED
        assert await store.log.read_last(REALM, OTHER_GROUP) == entry(2, salt=1)
        assert await store.log.read_last(REALM, GroupId(b"\x20" * 16)) is None
        assert await store.log.read_last(other_realm, GROUP) is None
        assert await store.log.list_groups(REALM) == [GROUP, OTHER_GROUP]
        assert await store.log.list_groups(other_realm) == []
        assert await store.realms.list_realms() == [REALM, other_realm]

    async def test_one_winner_among_concurrent_appends(self, store: Store) -> None:
        """Of 64 concurrent appends at one index exactly one is appended, and it is what the log then holds."""
        outcomes: dict[int, AppendOutcome] = {}

        async def attempt(salt: int) -> None:
            outcomes[salt] = await append(store, batch(1, 1 + salt % 3, salt=salt))

        async with trio.open_nursery() as nursery:
            for salt in range(64):
                nursery.start_soon(attempt, salt)
        winners = [salt for salt, outcome in outcomes.items() if outcome is APPENDED]
        assert len(winners) == 1
        assert await store.log.read_from(REALM, GROUP, 1, 10) == batch(1, 1 + winners[0] % 3, salt=winners[0])

    async def test_intents(self, store: Store) -> None:
        """Intents come back with their entries, limited to the asked range; entries without one are left out."""
        await append(store, batch(1, 3), intents=[None, intent(2), intent(3)])
        await append(store, batch(4, 5))
        await append(store, batch(6, 7), intents=[intent(6, tenant="\u00e9"), None])
        everything = [(entry(2), intent(2)), (entry(3), intent(3)), (entry(6), intent(6, tenant="\u00e9"))]
        assert await store.log.read_intents(REALM, GROUP, 1, 2**64 - 1) == everything
        assert await store.log.read_intents(REALM, GROUP, 3, 5) == everything[1:2]
        assert await store.log.read_intents(REALM, GROUP, 4, 5) == []
        assert await store.log.read_intents(REALM, OTHER_GROUP, 1, 9) == []

    async def test_compaction(self, store: Store) -> None:
        """Compacted rows read as Compacted, the rest as before; compacting again changes nothing."""
        for first, last in ((1, 2), (3, 5), (6, 6), (7, 9)):
            await append(store, batch(first, last))
        rows = await store.log.list_rows(REALM, GROUP, 7)
        assert rows == [LogRow(first, is_tombstone=False) for first in (1, 3, 6)]
        assert await store.log.list_rows(REALM, OTHER_GROUP, 7) == []
        for _ in range(2):
            await store.log.compact(REALM, GROUP, rows[:2])
            assert await store.log.read_from(REALM, GROUP, 1, 10) == Compacted(1)
            assert isinstance(await store.log.read_from(REALM, GROUP, 4, 10), Compacted)
            assert await store.log.read_from(REALM, GROUP, 6, 10) == batch(6, 9)
            assert await store.log.read_from(REALM, GROUP, 8, 10) == batch(8, 9)
            left = [row for row in await store.log.list_rows(REALM, GROUP, 2**63) if not row.is_tombstone]
            assert left == [LogRow(6, is_tombstone=False), LogRow(7, is_tombstone=False)]
        assert await append(store, batch(1, 2)) is CONFLICT, "an old leader cannot write into the gap"
        assert await append(store, batch(3, 4)) is CONFLICT
        assert await append(store, batch(10, 10)) is APPENDED

    async def test_compaction_of_many_rows(self, store: Store) -> None:
        """More rows than one page or slice are listed and removed completely."""
        for index in range(1, 451):
            await append(store, batch(index, index))
        rows = await store.log.list_rows(REALM, GROUP, 450)
        assert [row.first_index for row in rows] == list(range(1, 450))
        await store.log.compact(REALM, GROUP, rows)
        assert await store.log.read_from(REALM, GROUP, 449, 10) == Compacted(449)
        assert await store.log.read_from(REALM, GROUP, 450, 10) == batch(450, 450)

    async def test_certificates(self, store: Store) -> None:
        """The certificate of the highest index is read; writing removes only older ones."""
        assert await store.log.read_certificate(REALM, GROUP) is None
        await store.log.write_certificate(REALM, GROUP, certificate(5))
        await store.log.write_certificate(REALM, GROUP, certificate(9))
        assert await store.log.read_certificate(REALM, GROUP) == certificate(9)
        await store.log.write_certificate(REALM, GROUP, certificate(7))
        assert await store.log.read_certificate(REALM, GROUP) == certificate(9), "a deposed leader cannot put back"
        assert await store.log.read_certificate(REALM, OTHER_GROUP) is None
        assert await store.log.list_groups(REALM) == [], "a certificate is not a log"

    async def test_another_opener_sees_appends(self, backend: Backend, store: Store) -> None:
        """Acknowledged appends are what another process reads, and its own conflict with ours."""
        async with backend.open() as second:
            await append(store, batch(1, 3))
            assert await second.log.read_last(REALM, GROUP) == entry(3)
            assert await append(second, batch(4, 4, salt=0)) is APPENDED
            assert await append(store, batch(4, 4)) is CONFLICT
            assert await store.log.read_from(REALM, GROUP, 1, 10) == batch(1, 4)

    async def test_reopening(self, backend: Backend) -> None:
        """Everything acknowledged is there after closing and opening again."""
        async with backend.open() as store:
            await store.realms.create_shared()
            await store.realms.create_realm(REALM)
            await append(store, batch(1, 4), intents=[intent(1), None, None, None])
            await store.log.write_certificate(REALM, GROUP, certificate(2))
            await store.settings.put("name", b"value")
        async with backend.open() as store:
            await store.realms.create_realm(REALM)
            assert await store.log.read_from(REALM, GROUP, 1, 10) == batch(1, 4)
            assert await store.log.read_intents(REALM, GROUP, 1, 4) == [(entry(1), intent(1))]
            assert await store.log.read_certificate(REALM, GROUP) == certificate(2)
            assert await store.settings.get("name") == b"value"

    async def test_readers_during_writes(self, store: Store) -> None:
        """A reader beside a writer always sees a whole prefix of the log."""
        done = False

        async def write() -> None:
            nonlocal done
            for first in range(1, 200, 4):
                assert await append(store, batch(first, first + 3)) is APPENDED
            done = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            while not done:
                seen = await store.log.read_from(REALM, GROUP, 1, 1000)
                assert isinstance(seen, list)
                assert seen == batch(1, len(seen))
                assert len(seen) % 4 == 0
                await trio.lowlevel.checkpoint()


class NodeContract:
    """`ports.NodeStore`."""

    async def test_empty_tree(self, store: Store) -> None:
        """An empty tree proves absence and has edge proofs whose key is the end of the range."""
        grown = await Grown.start(store, MIDDLE)
        await grown.check([MIDDLE.start, RecordId(b"\x80" + bytes(31)), MIDDLE.end])
        left = await store.nodes.read_edge_proof(REALM, grown.partition, Side.LEFT)
        right = await store.nodes.read_edge_proof(REALM, grown.partition, Side.RIGHT)
        assert left[2:34] == MIDDLE.start
        assert right[2:34] == MIDDLE.end
        assert grown.tree.latest(left).leaf is None

    async def test_read_what_was_written(self, backend: Backend, store: Store) -> None:
        """Proofs of present and absent records verify after every batch, with a warm and with an empty cache."""
        grown, rng = await Grown.start(store), random.Random(5)
        for size in (1, 2, 7, 1, 30, 16):
            await grown.write({random_record(rng): rng.randbytes(rng.choice((0, 40, 790))) for _ in range(size)})
            await grown.check()
            await grown.check([random_record(rng) for _ in range(5)])
        async with backend.open() as second:
            grown.store = second
            await grown.check()
            await grown.check([random_record(rng) for _ in range(20)])

    async def test_edges(self, store: Store) -> None:
        """Edge proofs are of the smallest and the largest record."""
        grown, rng = await Grown.start(store), random.Random(6)
        for _ in range(12):
            await grown.write({random_record(rng): b"v" for _ in range(2)})
            for side, key in ((Side.LEFT, min(grown.values)), (Side.RIGHT, max(grown.values))):
                proof = await store.nodes.read_edge_proof(REALM, grown.partition, side)
                assert proof[2:34] == key
                assert grown.tree.latest(proof).leaf == b"v"

    async def test_one_sided_trees(self, store: Store) -> None:
        """A root without one branch has edge proofs on both sides."""
        for group, key in ((GROUP, bytes(31) + b"\x05"), (OTHER_GROUP, b"\xff" * 32)):
            grown = await Grown.start(store, group=group)
            await grown.write({RecordId(key): b"v"})
            for side in Side:
                assert (await store.nodes.read_edge_proof(REALM, grown.partition, side))[2:34] == key

    async def test_a_root_that_never_was(self, store: Store) -> None:
        """An unknown root gives no proofs, whatever was read before."""
        grown = await Grown.start(store)
        await grown.write({RecordId(b"\x50" * 32): b"v"})
        unknown = Partition(FULL_RANGE, b"\x13" * 32)
        assert (
            await store.nodes.read_proofs(REALM, unknown, [RecordId(b"\x50" * 32)] * 2) == [Lost(0, b"\x13" * 32)] * 2
        )
        with pytest.raises(MissingNode):
            await store.nodes.read_edge_proof(REALM, unknown, Side.LEFT)

    async def test_a_root_that_moved(self, backend: Backend, store: Store) -> None:
        """A former root gives proofs that are right, or none; never a mixture of two trees."""
        grown, rng = await Grown.start(store), random.Random(7)
        keys = [RecordId(rng.randbytes(32)) for _ in range(20)]
        await grown.write(dict.fromkeys(keys, b"old"))
        async with backend.open() as reader:
            await reader.nodes.read_proofs(REALM, grown.partition, keys[:3])  # a cache with parts of the old tree
            before = await grown.write(dict.fromkeys(keys[:10], b"new"))
            for proof in await reader.nodes.read_proofs(REALM, before, keys):
                assert not isinstance(proof, bytes) or grown.tree.latest(proof) is not None
            grown.store = reader
            await grown.check()

    async def test_split_transfer_and_merge(self, store: Store) -> None:
        """A range goes from one group's tree to another's and back; both trees stay whole at every step."""
        rng = random.Random(8)
        keys = [random_record(rng) for _ in range(30)]
        for boundary in (keys[0], keys[1], RecordId(b"\x80" + bytes(31))):
            group, peer = GroupId(rng.randbytes(16)), GroupId(rng.randbytes(16))
            source = await Grown.start(store, group=group)
            await source.write({key: rng.randbytes(9) for key in keys})
            proof = (await store.nodes.read_proofs(REALM, source.partition, [boundary]))[0]
            assert isinstance(proof, bytes)
            (left_range, left), (right_range, right), delta = source.tree.split(proof)
            source.tree = type(source.tree)(left, left_range.start, left_range.end, 1024)
            await source.commit(delta)
            moved = Grown(store, peer, type(source.tree)(right, right_range.start, right_range.end, 1024), index=0)
            moved.values = {key: value for key, value in source.values.items() if key >= boundary}
            source.values = {key: value for key, value in source.values.items() if key < boundary}
            assert len(source.values) + len(moved.values) == len(set(keys))
            await moved.commit(b"\x01\x50" + bytes(8))
            await moved.write({random_record_in(rng, right_range): b"more", right_range.end: b"end"})
            await source.write({random_record_in(rng, left_range): b"more"})
            await source.check()
            await moved.check()
            own = await store.nodes.read_edge_proof(REALM, source.partition, Side.RIGHT)
            other = await store.nodes.read_edge_proof(REALM, moved.partition, Side.LEFT)
            joined, root, delta = source.tree.merge(own, other, moved.tree.root, right_range)
            source.tree = type(source.tree)(root, joined.start, joined.end, 1024)
            await source.commit(delta)
            source.values |= moved.values
            await source.check()


def random_record_in(rng: random.Random, bounds: OwnedRange) -> RecordId:
    """Return a record id of the range."""
    number = rng.randint(int.from_bytes(bounds.start, "big"), int.from_bytes(bounds.end, "big"))
    return RecordId(number.to_bytes(32, "big"))


class ClusterContract:
    """`ports.Discovery`, `Leases`, `Settings`, `TenantConfig`, `RealmStore`."""

    async def test_discovery(self, store: Store) -> None:
        """Registrations are listed by kind and URL, renewed and removed; no clock says who is there."""
        now, year = 1_700_000_000_000, 31_536_000_000
        await store.discovery.register(ServiceKind.MANAGER, "tls://m", now)
        await store.discovery.register(ServiceKind.AGENT, "tls://b", now + year)
        await store.discovery.register(ServiceKind.AGENT, "tls://a", now - year)
        agents = [
            ServiceAddress(ServiceKind.AGENT, "tls://a", now - year),
            ServiceAddress(ServiceKind.AGENT, "tls://b", now + year),
        ]
        assert await store.discovery.list(ServiceKind.AGENT) == agents
        assert await store.discovery.list() == [*agents, ServiceAddress(ServiceKind.MANAGER, "tls://m", now)]
        await store.discovery.register(ServiceKind.AGENT, "tls://a", now)
        await store.discovery.deregister(ServiceKind.AGENT, "tls://b")
        await store.discovery.deregister(ServiceKind.AGENT, "tls://absent")
        assert await store.discovery.list(ServiceKind.AGENT) == [ServiceAddress(ServiceKind.AGENT, "tls://a", now)]

    async def test_a_renewed_registration_is_not_forgotten(self, store: Store) -> None:
        """Forgetting removes what was seen and nothing newer, also when the service's clock was set back meanwhile."""
        seen = ServiceAddress(ServiceKind.AGENT, "tls://a", 1_700_000_000_000)
        for renewed_ms in (seen.registered_ms + 1, seen.registered_ms - 1):
            await store.discovery.register(seen.kind, seen.url, renewed_ms)
            await store.discovery.forget(seen)
            assert [entry.registered_ms for entry in await store.discovery.list()] == [renewed_ms]
        await store.discovery.register(seen.kind, seen.url, seen.registered_ms)
        await store.discovery.forget(ServiceAddress(ServiceKind.MANAGER, seen.url, seen.registered_ms))
        assert await store.discovery.list() == [seen]
        await store.discovery.forget(seen)
        await store.discovery.forget(seen)
        assert await store.discovery.list() == []

    async def test_lease_is_held_until_after_its_expiry(self, store: Store) -> None:
        """A lease is refused while its expiry is at or after now, and granted with a new id afterwards."""
        first = await store.leases.obtain("group", "one", 1_000, 3_000)
        assert first is not None
        assert first.expires_ms == 4_000
        assert len(first.id) == 32
        assert await store.leases.obtain("group", "two", 4_000, 3_000) is None
        assert await store.leases.obtain("other", "two", 4_000, 3_000) is not None
        second = await store.leases.obtain("group", "two", 4_001, 3_000)
        assert second is not None
        assert second.id != first.id
        assert await store.leases.extend(first, 4_001, 3_000) is None, "lost leases cannot be extended"
        await store.leases.terminate(first)
        assert await store.leases.obtain("group", "one", 4_002, 3_000) is None, "nor ended"

    async def test_lease_extension_and_end(self, store: Store) -> None:
        """The holder can extend, even late if nobody came; ending frees the lease at once."""
        lease = await store.leases.obtain("name", "one", 1_000, 3_000)
        assert lease is not None
        extended = await store.leases.extend(lease, 9_000, 3_000)
        assert extended is not None
        assert (extended.id, extended.expires_ms) == (lease.id, 12_000)
        assert await store.leases.list() == [extended]
        await store.leases.terminate(extended)
        assert await store.leases.list() == []
        assert await store.leases.obtain("name", "two", 9_001, 3_000) is not None

    async def test_one_of_many_obtains_a_lease(self, store: Store) -> None:
        """Of concurrent obtainers exactly one gets the lease."""
        granted = []

        async def obtain(owner: int) -> None:
            granted.append(await store.leases.obtain("name", str(owner), 1_000, 3_000))

        async with trio.open_nursery() as nursery:
            for owner in range(20):
                nursery.start_soon(obtain, owner)
        assert len([lease for lease in granted if lease is not None]) == 1

    async def test_settings(self, store: Store) -> None:
        """A claim keeps the first value; put replaces; list gives a prefix."""
        assert await store.settings.get("a/1") is None
        assert await store.settings.claim("a/1", b"x") == b"x"
        assert await store.settings.claim("a/1", b"y") == b"x"
        await store.settings.put("a/1", b"z")
        await store.settings.put("a/2", b"")
        await store.settings.put("a%", b"other")
        assert await store.settings.list("a/") == {"a/1": b"z", "a/2": b""}
        assert set(await store.settings.list("")) == {"a/1", "a/2", "a%"}
        await store.settings.remove("a/1")
        await store.settings.remove("a/1")
        assert await store.settings.get("a/1") is None

    async def test_tenants(self, store: Store) -> None:
        """Limits are set, replaced and removed; 0 is a value of its own."""
        assert await store.tenants.list() == {}
        await store.tenants.put("acme", TenantLimits(10))
        await store.tenants.put("acme", TenantLimits(0))
        await store.tenants.put("z\u00e9ro", TenantLimits(5))
        assert await store.tenants.list() == {"acme": TenantLimits(0), "z\u00e9ro": TenantLimits(5)}
        await store.tenants.remove("acme")
        await store.tenants.remove("acme")
        assert await store.tenants.list() == {"z\u00e9ro": TenantLimits(5)}

    async def test_creation_is_idempotent(self, store: Store) -> None:
        """Creating shared tables or a realm again changes nothing."""
        await append(store, batch(1, 2))
        await store.realms.create_shared()
        await store.realms.create_realm(REALM)
        assert await store.realms.list_realms() == [REALM]
        assert await store.log.read_last(REALM, GROUP) == entry(2)
