"""`juicebox-hsm bench tree`: verify and insert in the Merkle tree (operator-tools.md 7).

One operation is what the HSM does per request: take a proof against the latest root, verify it, and set the
record, in one call. Proofs are read, and deltas applied, outside the clock. Two kinds are measured: an update of
an existing record, which every recover is, and the insertion of a new one.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.table import Table

from juicebox_hsm.errors import check
from juicebox_hsm.ids import FULL_RANGE
from juicebox_hsm.merkle import kernel
from juicebox_hsm.merkle.nodes import KEY_BITS
from roles.tools.bench.memory_tree import MemoryTree

SEALED_RECORD_BYTES: Final = 790  # a padded record, its tag and its nonce (hsm.md 13.3)
OVERLAY_DELTAS: Final = 1024  # a usual `tree_overlay_size` (hsm.md 2)

Update = Callable[[bytes, bytes], tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One line of the result; the first fields are those of every benchmark's result file."""

    op: str
    count: int
    errors: int
    per_second: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    concurrency: int
    connections: int
    us_per_operation: float
    leaves: int
    value_bytes: int
    path_nodes: float


def build(leaves: int, value_bytes: int, seed: int) -> tuple[MemoryTree, list[bytes]]:
    """Return a full-range tree of `leaves` random records, and their keys."""
    source = random.Random(seed)  # noqa: S311 - a repeatable benchmark, not a secret
    keys = [source.randbytes(32) for _ in range(leaves)]
    value = source.randbytes(value_bytes)
    return MemoryTree.build(FULL_RANGE, ((key, value) for key in keys)), keys


def below(key: bytes, bits: int, source: random.Random) -> bytes:
    """Return a random key that shares its first `bits` bits with `key` and differs in the next, if there is one."""
    free = KEY_BITS - bits
    if free == 0:
        return key
    number = int.from_bytes(key, "big")
    kept = number >> free << free
    fork = ~number & (1 << (free - 1))
    return (kept | fork | source.getrandbits(free - 1)).to_bytes(32, "big")


def deepen(host: MemoryTree, key: bytes, depth: int, value_bytes: int, source: random.Random) -> None:
    """Add records that fork off `key` at every bit above `depth`, so that its path has at least `depth` nodes."""
    tree = kernel.Tree(host.root, FULL_RANGE.start, FULL_RANGE.end, OVERLAY_DELTAS)
    for bit in range(depth):
        added = below(key, bit, source)
        host.apply(*tree.update(host.read(added), source.randbytes(value_bytes)))


def measure(
    name: str, host: MemoryTree, update: Update, keys: Iterator[bytes], count: int, value_bytes: int, leaves: int
) -> Measurement:
    """Time `count` operations on the next keys, each with a fresh proof and a value never seen before."""
    taken: list[float] = []
    nodes = 0
    source = random.Random(name)  # noqa: S311 - a repeatable benchmark, not a secret
    for _ in range(count):
        value = source.randbytes(value_bytes)
        proof = host.read(next(keys))
        nodes += int.from_bytes(proof[130:132], "big")
        start = time.perf_counter()
        root, delta = update(proof, value)
        taken.append(time.perf_counter() - start)
        check(root != host.root, "every operation changes the tree")
        host.apply(root, delta)
    cuts = statistics.quantiles(taken, n=100, method="inclusive") if count > 1 else taken * 99
    mean = statistics.fmean(taken)
    return Measurement(
        op=name,
        count=count,
        errors=0,
        per_second=1 / mean,
        p50_ms=cuts[49] * 1e3,
        p90_ms=cuts[89] * 1e3,
        p99_ms=cuts[98] * 1e3,
        concurrency=1,
        connections=0,
        us_per_operation=mean * 1e6,
        leaves=leaves,
        value_bytes=value_bytes,
        path_nodes=nodes / count,
    )


def run(
    leaves: int, count: int, value_bytes: int = SEALED_RECORD_BYTES, seed: int = 1, depth: int = 0
) -> list[Measurement]:
    """Build the tree and measure; memory is about 1.5 KB per leaf with full-size records.

    With a `depth` all operations are at one place of the tree whose path has at least that many nodes.
    """
    host, existing = build(leaves, value_bytes, seed)
    source = random.Random(seed + 1)  # noqa: S311 - as above
    if depth:
        del existing[1:]
        deepen(host, existing[0], depth, value_bytes, source)
    results: list[Measurement] = []
    tree = kernel.Tree(host.root, FULL_RANGE.start, FULL_RANGE.end, OVERLAY_DELTAS)
    updated = (source.choice(existing) for _ in range(count))
    added = (below(existing[0], depth, source) if depth else source.randbytes(32) for _ in range(count))
    # the names say "c" so that results compare with those of versions which also measured a tree in Python
    for kind, keys in (("update", updated), ("insert", added)):
        results.append(measure(f"tree-{kind}-c", host, tree.update, keys, count, value_bytes, leaves))
    return results


def table(results: list[Measurement]) -> Table:
    """Return the results as a table for people."""
    first = results[0]
    shown = Table(title=f"verify and insert at {first.leaves:,} leaves, records of {first.value_bytes} bytes")
    for heading in ("operation", "count", "us/op", "op/s", "p50 us", "p99 us", "path nodes"):
        shown.add_column(heading, justify="left" if heading == "operation" else "right")
    for result in results:
        shown.add_row(
            result.op.split("-")[1],
            f"{result.count:,}",
            f"{result.us_per_operation:.1f}",
            f"{result.per_second:,.0f}",
            f"{result.p50_ms * 1e3:.1f}",
            f"{result.p99_ms * 1e3:.1f}",
            f"{result.path_nodes:.1f}",
        )
    return shown


@click.command("tree")
@click.option(
    "--leaves",
    default=100_000,
    show_default=True,
    type=click.IntRange(1, 100_000_000),
    help="Records in the tree; needs about 1.5 KB of memory and 15 us of building time each.",
)
@click.option(
    "--count",
    default=5_000,
    show_default=True,
    type=click.IntRange(1, 10_000_000),
    help="Operations of each kind.",
)
@click.option(
    "--depth",
    default=0,
    show_default=True,
    type=click.IntRange(0, KEY_BITS),
    help="Work at one place whose path has at least this many nodes; 0: anywhere, about log2(leaves).",
)
@click.option(
    "--value-bytes",
    default=SEALED_RECORD_BYTES,
    show_default=True,
    type=click.IntRange(8, 65_535),
    help="Size of a record in bytes.",
)
@click.option("--seed", default=1, show_default=True, help="Draws the same keys again.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the results here."
)
def bench_tree(leaves: int, count: int, depth: int, value_bytes: int, seed: int, json_file: Path | None) -> None:
    """Measure verify and insert in the Merkle tree at a given size."""
    console = Console()
    with console.status(f"building {leaves:,} leaves and measuring"):
        results = run(leaves, count, value_bytes, seed, depth)
    console.print(table(results))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n", encoding="ascii")
