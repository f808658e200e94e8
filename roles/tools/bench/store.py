"""Measure the embedded store: appends of batches with their tree deltas, and proof reads warm and cold."""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import click
import trio

from juicebox_hsm.adapters.sqlite.nodes import TreeNodes
from juicebox_hsm.adapters.stores.node_cache import NodeCache
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.consensus.types import LogEntry, Partition
from juicebox_hsm.errors import check
from juicebox_hsm.host.log import AppendOutcome, Intent
from juicebox_hsm.ids import FULL_RANGE, GroupId, HsmId, RealmId, RecordId
from juicebox_hsm.merkle.kernel import Tree, squash
from juicebox_hsm.ports.store import Store
from roles.tools.bench.memory_tree import MemoryTree

_REALM = RealmId(b"\x01" * 16)
_GROUP = GroupId(b"\x02" * 16)
_HSM = HsmId(b"\x03" * 16)
_LOAD_NODES = 20_000  # nodes per append while loading, so that no transaction grows without bound


@dataclass(slots=True)
class Figures:
    """Per-batch measurements in seconds, and how many records a batch has."""

    batch: int
    append_cpu: list[float] = field(default_factory=list)
    append_wall: list[float] = field(default_factory=list)
    warm_cpu: list[float] = field(default_factory=list)
    cold_cpu: list[float] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Yield one line of text per measurement."""
        for name, values in (
            ("append, CPU us per mutation", self.append_cpu),
            ("append, wall us per batch", self.append_wall),
            ("proof, warm, CPU us per record", self.warm_cpu),
            ("proof, empty cache, CPU us per record", self.cold_cpu),
        ):
            scale = 1e6 if "batch" in name else 1e6 / self.batch
            mean, middle = statistics.fmean(values) * scale, statistics.median(values) * scale
            yield f"batch {self.batch:3}  {name:40} mean {mean:8.1f}  median {middle:8.1f}"


@dataclass(slots=True)
class _Chain:
    """Make log entries that follow each other; what they sign is nobody's business here."""

    index: int = 0
    mac: bytes = bytes(32)

    def next(self, root: bytes) -> LogEntry:
        previous, self.index, self.mac = self.mac, self.index + 1, os.urandom(32)
        return LogEntry(self.index, Partition(FULL_RANGE, root), None, previous, self.mac, _HSM)


def _delta_key(row_key: bytes) -> tuple[str, bytes]:
    """Return (bits, hash) of a row key (merkle.md 3.4)."""
    prefix, node_hash = row_key[:-32], row_key[-32:]
    bits = "".join(f"{group:07b}" for group in prefix[:-1])
    return bits[: len(bits) - 7 + (prefix[-1] & 7)] if bits else "", node_hash


def _load_deltas(rows: dict[bytes, bytes]) -> Iterator[bytes]:
    """Yield deltas that together add every node of a tree."""
    keyed = iter(sorted((*_delta_key(row), node) for row, node in rows.items()))
    while part := list(islice(keyed, _LOAD_NODES)):
        adds = []
        for bits, node_hash, node in part:
            size = (len(bits) + 7) // 8
            packed = int(bits.ljust(8 * size, "0") or "0", 2).to_bytes(size, "big")
            adds += [len(bits).to_bytes(2, "big"), packed, node_hash, len(node).to_bytes(4, "big"), node]
        yield b"".join((b"\x01\x50", len(part).to_bytes(4, "big"), *adds, bytes(4)))


async def _append(store: Store, entries: list[LogEntry], intents: list[Intent | None], delta: bytes) -> None:
    outcome = await store.log.append(_REALM, _GROUP, entries, intents, delta)
    check(outcome is AppendOutcome.APPENDED, "nobody else writes to the benchmark's log")


async def measure(url: str, leaves: int, batches: list[int], rounds: int, value_bytes: int) -> list[Figures]:
    """Load a tree of `leaves` random records into a new store and time `rounds` batches of each size."""
    keys = [RecordId(os.urandom(32)) for _ in range(leaves)]
    source = MemoryTree.build(FULL_RANGE, [(key, os.urandom(value_bytes)) for key in keys])
    chain, results = _Chain(), []
    async with open_store(url) as store:
        await store.realms.create_realm(_REALM)
        for delta in _load_deltas(source.rows):
            await _append(store, [chain.next(source.root)], [None], delta)
        tree = Tree(source.root, FULL_RANGE.start, FULL_RANGE.end, 1024)
        del source
        for batch in batches:
            results.append(Figures(batch))
            for _ in range(rounds):
                await _round(store, tree, chain, random.sample(keys, batch), value_bytes, results[-1])
    return results


async def _round(
    store: Store, tree: Tree, chain: _Chain, keys: list[RecordId], value_bytes: int, figures: Figures
) -> None:
    """Read proofs cold and warm, change every record and append the batch."""
    partition = Partition(FULL_RANGE, tree.root)
    nodes = store.nodes
    check(isinstance(nodes, TreeNodes), "the benchmark measures the SQLite store")
    if isinstance(nodes, TreeNodes):
        kept, nodes.cache = nodes.cache, NodeCache(len(keys) * 64)
        cpu = time.process_time()
        await nodes.read_proofs(_REALM, partition, keys)
        figures.cold_cpu.append(time.process_time() - cpu)
        nodes.cache = kept
    await nodes.read_proofs(_REALM, partition, keys)
    cpu = time.process_time()
    proofs = await nodes.read_proofs(_REALM, partition, keys)
    figures.warm_cpu.append(time.process_time() - cpu)
    entries, deltas = [], []
    for proof in proofs:
        check(isinstance(proof, bytes), "the benchmark's root is current")
        root, delta = tree.update(proof if isinstance(proof, bytes) else b"", os.urandom(value_bytes))
        entries.append(chain.next(root))
        deltas.append(delta)
    squashed = squash(deltas)
    intents: list[Intent | None] = [Intent("bench", "0" * 64, key, chain.index) for key in keys]
    cpu, wall = time.process_time(), time.perf_counter()
    await _append(store, entries, intents, squashed)
    figures.append_cpu.append(time.process_time() - cpu)
    figures.append_wall.append(time.perf_counter() - wall)


@click.command("bench-store")
@click.option("--leaves", default=100_000, show_default=True, type=click.IntRange(1), help="Records in the tree.")
@click.option(
    "--batch",
    "batches",
    multiple=True,
    default=(1, 16),
    type=click.IntRange(1, 100),
    show_default=True,
    help="Entries per append; repeatable.",
)
@click.option("--rounds", default=200, show_default=True, type=click.IntRange(1), help="Batches of each size.")
@click.option(
    "--value",
    "value_bytes",
    default=790,
    show_default=True,
    type=click.IntRange(0, 65_535),
    help="Size of a record in bytes.",
)
@click.option("--directory", type=click.Path(path_type=Path), help="Where to make the file; default a temporary one.")
def command(leaves: int, batches: tuple[int, ...], rounds: int, value_bytes: int, directory: Path | None) -> None:
    """Print CPU and wall-clock time of appends and proof reads of a new SQLite store."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        for figures in trio.run(measure, f"sqlite:{place}/bench.db", leaves, list(batches), rounds, value_bytes):
            for line in figures.lines():
                print(line)


if __name__ == "__main__":
    command()
