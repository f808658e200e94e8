"""Load a realm for a long time and watch that memory, log rows and tree nodes stay bounded.

python -m tests.client.soak --minutes 30

Users recover with right and wrong PINs and register anew, with pauses, so that the machine is busy but not full. Each
minute prints the resident memory of every process, what the store holds and the latency of that minute's recovers.
Ends with 1 if at the end a process needs over 10 % more memory than at minute 5, if log rows or tree nodes more than
doubled since then (compaction or deletion do not keep up), or if a call failed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import trio

from juicebox_hsm.client import Client, Configuration, HttpTransport, InvalidPin
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import DemoOptions

PIN = b"1234"
WRONG_PIN = b"4321"
GUESSES = 5
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
SETTLED_MINUTE = 5
GROWTH_MAX = 1.10
"""Of memory, between minute 5 and the end."""
ROWS_GROWTH_MAX = 2.0
ROWS_SLACK = 2_000
"""Rows that may come and go with the compaction's rhythm, whatever was there at minute 5."""


@dataclass
class Tally:
    """Latencies of recovers in ms since the last look, all calls, and what failed."""

    ms: list[float] = field(default_factory=list)
    calls: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """One look: MiB resident by process, rows and nodes in the store, MiB of its files."""

    rss: dict[str, float]
    log_rows: int
    nodes: int
    files: float


async def loop_user(client: Client, tally: Tally, random: Random, pause_s: float) -> None:
    """Register once in a while, guess wrong now and then, recover mostly."""
    while True:
        began = time.perf_counter()
        choice = random.random()
        try:
            if choice < 0.05:
                await client.register(PIN, b"secret", b"info", GUESSES)
            elif choice < 0.15:
                await wrong_guess(client)
            else:
                await client.recover(PIN, b"info")
                tally.ms.append((time.perf_counter() - began) * 1000)
        except Exception as error:
            tally.failures.append(f"{type(error).__name__}: {error}")
        tally.calls += 1
        await trio.sleep(random.uniform(0, 2 * pause_s))


async def wrong_guess(client: Client) -> None:
    """Guess wrong; that the PIN is refused is the right answer. The next recover gives the guess back."""
    try:
        await client.recover(WRONG_PIN, b"info")
    except InvalidPin as error:
        if error.guesses_remaining is None:
            raise
        await client.recover(PIN, b"info")


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES / 2**20


async def look(cluster: Cluster) -> Sample:
    """Take one sample."""
    stats = cluster.session.store.stats
    assert stats is not None, "the store cannot count"
    log_rows = nodes = 0
    for realm in cluster.realms:
        log_rows += sum(group.rows + group.tombstones for group in await stats.log(realm))
        tree = await stats.tree(realm, 1)
        nodes += tree.leaves + tree.interior + tree.roots
    rss = {running.service.name: resident_mib(running.pid) for running in cluster.processes if running.pid}
    files = sum(path.stat().st_size for path in cluster.state.path.glob("*.db*")) / 2**20
    return Sample(rss, log_rows, nodes, files)


def judge(settled: Sample, last: Sample) -> list[str]:
    """Return what grew too much between two samples."""
    found = [
        f"{name}: {settled.rss[name]:.0f} MiB at minute {SETTLED_MINUTE}, {mib:.0f} MiB at the end"
        for name, mib in last.rss.items()
        if mib > settled.rss[name] * GROWTH_MAX
    ]
    for what, before, after in (
        ("log rows", settled.log_rows, last.log_rows),
        ("tree nodes", settled.nodes, last.nodes),
    ):
        if after > before * ROWS_GROWTH_MAX + ROWS_SLACK:
            found.append(f"{what}: {before} at minute {SETTLED_MINUTE}, {after} at the end")
    return found


async def soak(directory: Path, options: argparse.Namespace) -> list[str]:
    """Run the load; returns what is wrong."""
    demo = DemoOptions(
        state_dir=directory, agents=3, managers=2, pin_hashing="FastInsecure", tenant_log=False, store=options.store
    )
    tally = Tally()
    samples: list[Sample] = []
    async with (
        launch(demo) as cluster,
        HttpTransport(ca_file=cluster.state.edge_ca, connections_per_host_max=64) as transport,
        trio.open_nursery() as nursery,
    ):
        configuration = Configuration.from_json(json.dumps(cluster.configuration))
        for number in range(options.users):
            name = f"soak{number}"
            tokens = {realm: cluster.token(realm, name) for realm in cluster.realms}
            client = Client(configuration, tokens, transport=transport)
            await client.register(PIN, b"secret", b"info", GUESSES)
            nursery.start_soon(loop_user, client, tally, Random(name), options.pause_ms / 1000)
        for minute in range(1, options.minutes + 1):
            await trio.sleep(60)
            sample = await look(cluster)
            samples.append(sample)
            ms = sorted(tally.ms)
            tally.ms.clear()
            quantiles = statistics.quantiles(ms, n=100) if len(ms) > 1 else [0.0] * 99
            memory = " ".join(f"{name} {mib:.0f}" for name, mib in sorted(sample.rss.items()))
            print(
                f"minute {minute}: {len(ms) / 60:.0f} recovers/s, p50 {quantiles[49]:.0f} p99 {quantiles[98]:.0f} ms; "
                f"{memory} MiB; {sample.log_rows} log rows, {sample.nodes} nodes, files {sample.files:.0f} MiB",
                flush=True,
            )
        nursery.cancel_scope.cancel()
    print(f"{tally.calls} calls, {len(tally.failures)} failed")
    return tally.failures[:10] + judge(samples[min(SETTLED_MINUTE, len(samples)) - 1], samples[-1])


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Load a realm for long and watch what it needs.")
    parser.add_argument("--minutes", type=int, default=30)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--pause-ms", type=float, default=150.0, help="mean pause of a user between calls")
    parser.add_argument("--store", default="sqlite", choices=["sqlite", "bigtable"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        found = trio.run(lambda: soak(Path(directory), options))
    for line in found:
        print(line, file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
