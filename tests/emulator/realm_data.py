"""Make what a store keeps: chained log entries, trees with their deltas, events (own)."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from juicebox_hsm.consensus.types import Captured, Certificate, LogEntry, Partition
from juicebox_hsm.host.events import EventKind, NewEvent
from juicebox_hsm.host.log import AppendOutcome, Intent
from juicebox_hsm.ids import FULL_RANGE, GroupId, HsmId, OwnedRange, RealmId, RecordId
from juicebox_hsm.merkle.kernel import Tree, empty_root, squash
from juicebox_hsm.ports.store import Store

REALM = RealmId(b"\x11" * 16)
GROUP = GroupId(b"\x21" * 16)
OTHER_GROUP = GroupId(b"\x22" * 16)
HSM = HsmId(b"\x31" * 16)
NO_CHANGE = b"\x01\x50" + bytes(8)
"""A delta that adds and removes nothing."""


def mac(index: int, salt: int = 0) -> bytes:
    """Return what stands for an entry's mac."""
    return index.to_bytes(8, "big") + salt.to_bytes(8, "big") + b"\xaa" * 16


def entry(index: int, salt: int = 0, previous_salt: int | None = None, partition: Partition | None = None) -> LogEntry:
    """Return an entry that follows the one with `previous_salt` (default: the same salt)."""
    before = salt if previous_salt is None else previous_salt
    previous = bytes(32) if index == 1 else mac(index - 1, before)
    return LogEntry(index, partition, None, previous, mac(index, salt), HSM)


def batch(first: int, last: int, salt: int = 0) -> list[LogEntry]:
    """Return the chained entries first..last."""
    return [entry(index, salt) for index in range(first, last + 1)]


async def append(
    store: Store,
    entries: list[LogEntry],
    group: GroupId = GROUP,
    delta: bytes = NO_CHANGE,
    intents: list[Intent | None] | None = None,
) -> AppendOutcome:
    """Append entries that change no tree unless `delta` says so."""
    return await store.log.append(REALM, group, entries, intents or [None] * len(entries), delta)


def intent(number: int, tenant: str = "acme") -> Intent:
    """Return the intent of request `number`."""
    return Intent(tenant, f"{number:064x}", RecordId(number.to_bytes(32, "big")), number)


def certificate(index: int, salt: int = 0) -> Certificate:
    """Return a certificate of two captures at and after `index`."""
    return Certificate(
        index,
        tuple(
            Captured(HsmId(bytes([hsm]) * 16), REALM, GROUP, index + hsm, mac(index + hsm, salt), b"\x77" * 32)
            for hsm in (0, 1)
        ),
    )


def event(
    number: int,
    tenant: str = "acme",
    kind: EventKind = EventKind.RECOVER2,
    *,
    body: dict[str, str | int] | None = None,
    group: GroupId = GROUP,
    when_ms: int = 1_700_000_000_000,
) -> NewEvent:
    """Return the event of log entry `number`."""
    return NewEvent(
        tenant,
        group,
        number,
        mac(number),
        RecordId(number.to_bytes(32, "big")),
        f"{number:064x}",
        kind,
        body,
        None,
        when_ms,
    )


@dataclass
class Grown:
    """A group with a real tree in a store: changes go through proofs read from that store."""

    store: Store
    group: GroupId
    tree: Tree
    values: dict[RecordId, bytes] = field(default_factory=dict)
    index: int = 1
    salt: int = 0

    @classmethod
    async def start(cls, store: Store, bounds: OwnedRange = FULL_RANGE, group: GroupId = GROUP) -> Grown:
        """Append the first entry with an empty tree over `bounds`."""
        root, delta = empty_root(bounds.start, bounds.end)
        assert (
            await append(store, [entry(1, partition=Partition(bounds, root))], group, delta) is AppendOutcome.APPENDED
        )
        return cls(store, group, Tree(root, bounds.start, bounds.end, 1024))

    @property
    def partition(self) -> Partition:
        """Return the current partition."""
        return Partition(self.tree.range, self.tree.root)

    async def write(self, changes: dict[RecordId, bytes]) -> Partition:
        """Set records in one batch and return the partition as it was before."""
        before = self.partition
        proofs = await self.store.nodes.read_proofs(REALM, before, list(changes))
        deltas = []
        for proof, value in zip(proofs, changes.values(), strict=True):
            assert isinstance(proof, bytes)
            deltas.append(self.tree.update(proof, value)[1])
        await self.commit(squash(deltas))
        self.values |= changes
        return before

    async def commit(self, delta: bytes) -> None:
        """Append one entry with a delta."""
        self.index += 1
        new = entry(self.index, partition=self.partition)
        assert await append(self.store, [new], self.group, delta) is AppendOutcome.APPENDED

    async def check(self, records: list[RecordId] | None = None) -> None:
        """Check that proofs of the given records (default all) verify and show their values."""
        asked = list(self.values) if records is None else records
        proofs = await self.store.nodes.read_proofs(REALM, self.partition, asked)
        for record, proof in zip(asked, proofs, strict=True):
            assert isinstance(proof, bytes)
            assert self.tree.latest(proof).leaf == self.values.get(record)


def random_record(rng: random.Random) -> RecordId:
    """Return a record id, half the time one that shares many bits with others."""
    if rng.random() < 0.5:
        return RecordId(rng.randbytes(32))
    number = rng.choice((0, 1 << 255, 0xABC << 244)) + rng.getrandbits(rng.choice((3, 8, 200, 205, 210)))
    return RecordId(number.to_bytes(32, "big"))
