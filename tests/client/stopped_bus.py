"""Measure that a stopped Pub/Sub delays no client, and that readiness warns long before the outbox is full.

python -m tests.client.stopped_bus --store sqlite

Phases with Pub/Sub running and stopped (SIGSTOP) take turns under the same load, so that what else the machine does
falls on both; a last phase has it killed until the agents warn. Exit status 0: p99 within the tolerance, and warned.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import trio

from juicebox_hsm.adapters.pubsub.bus import EMULATOR_VARIABLE
from juicebox_hsm.client import Client, Configuration, HttpTransport
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import DemoOptions
from roles.tools.demo.pubsub import PubSubEmulator

PIN = b"1234"
WARN_S = 90.0


@dataclass
class Tally:
    """Times of recovers in ms by phase, failures, and the phase that runs; "" is none."""

    phase: str = ""
    ms: dict[str, list[float]] = field(default_factory=lambda: {"running": [], "stopped": [], "killed": []})
    failures: list[str] = field(default_factory=list)


async def loop_user(client: Client, tally: Tally, random: Random, pause_s: float) -> None:
    """Recover for ever; a call counts for the phase in which it began and ended."""
    while True:
        phase, began = tally.phase, time.perf_counter()
        try:
            await client.recover(PIN, b"info")
        except Exception as error:
            tally.failures.append(f"{phase}: {type(error).__name__}: {error}")
        if phase and phase == tally.phase:
            tally.ms[phase].append((time.perf_counter() - began) * 1000)
        await trio.sleep(random.uniform(0, 2 * pause_s))


async def drained(cluster: Cluster) -> None:
    """Wait until what gathered was published."""
    (realm,) = cluster.realms
    with trio.fail_after(120):
        while (await cluster.session.store.outbox.backlog(realm)).rows > 200:  # noqa: ASYNC110 - other processes' work
            await trio.sleep(0.2)


def readiness(cluster: Cluster) -> list[tuple[int, str]]:
    """Return status and text of every agent's readiness."""
    found = []
    for running in cluster.of_role("agent"):
        try:
            with urllib.request.urlopen(f"http://{running.service.http}/readyz", timeout=5) as answer:
                found.append((answer.status, answer.read().decode()))
        except urllib.error.HTTPError as error:
            found.append((error.code, error.read().decode()))
    return found


async def phase(tally: Tally, name: str, length_s: float) -> None:
    """Let one phase run, after a moment for what was under way."""
    await trio.sleep(1)
    tally.phase = name
    await trio.sleep(length_s)
    tally.phase = ""


async def warned(cluster: Cluster, words: str) -> float:
    """Return after how long every agent is ready and says `words`, infinity for never."""
    began = trio.current_time()
    while trio.current_time() - began < WARN_S:
        answers = await trio.to_thread.run_sync(readiness, cluster)
        if all(status == 200 and words in text for status, text in answers):
            return trio.current_time() - began
        await trio.sleep(1)
    print(answers, file=sys.stderr)
    return float("inf")


async def measure(options: argparse.Namespace, directory: Path, emulator: PubSubEmulator) -> int:
    """Run the phases and print the figures; returns the exit status."""
    tally = Tally()
    demo = DemoOptions(
        state_dir=directory, agents=3, pin_hashing="FastInsecure", store=options.store, bus="pubsub", tenant_log=False
    )
    async with (
        launch(demo) as cluster,
        HttpTransport(ca_file=cluster.state.edge_ca, connections_per_host_max=64) as transport,
        trio.open_nursery() as nursery,
    ):
        configuration = Configuration.from_json(json.dumps(cluster.configuration))
        for number in range(options.users):
            name = f"bus{number}"
            tokens = {realm: cluster.token(realm, name) for realm in cluster.realms}
            client = Client(configuration, tokens, transport=transport)
            await client.register(PIN, b"secret", b"info", 5)
            nursery.start_soon(loop_user, client, tally, Random(name), options.pause_ms / 1000)
        await trio.sleep(5)
        for _ in range(options.turns):
            await phase(tally, "running", options.phase_s)
            emulator.signal(signal.SIGSTOP)
            await phase(tally, "stopped", options.phase_s)
            emulator.signal(signal.SIGCONT)
            await drained(cluster)
        emulator.stop()
        tally.phase = "killed"
        backlog_s = await warned(cluster, "tenant events wait for publication")
        bus_s = await warned(cluster, "events are not published")
        tally.phase = ""
        (realm,) = cluster.realms
        rows = (await cluster.session.store.outbox.backlog(realm)).rows
        nursery.cancel_scope.cancel()
    return report(options, tally, backlog_s, bus_s, rows)


def report(options: argparse.Namespace, tally: Tally, backlog_s: float, bus_s: float, rows: int) -> int:
    """Print, and return the exit status."""
    p99 = {}
    for name, ms in tally.ms.items():
        cuts = statistics.quantiles(ms, n=100)
        p99[name] = cuts[98]
        print(f"{name}: {len(ms)} recovers, p50 {cuts[49]:.1f} ms, p90 {cuts[89]:.1f} ms, p99 {cuts[98]:.1f} ms")
    ratio = p99["stopped"] / p99["running"]
    print(f"store {options.store}: p99 stopped / running {ratio:.3f}; failures {len(tally.failures)}")
    print(
        f"all agents ready, warning of the backlog {backlog_s:.0f} s after the kill and of the bus at"
        f" {backlog_s + bus_s:.0f} s; {rows} rows of at most 10,000,000 waited then"
    )
    for failure in tally.failures[:5]:
        print(failure, file=sys.stderr)
    slow = ratio > 1 + options.tolerance
    return 1 if slow or tally.failures or backlog_s + bus_s == float("inf") else 0


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Measure clients while Pub/Sub is stopped.")
    parser.add_argument("--store", choices=["sqlite", "bigtable"], default="sqlite")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--pause-ms", type=float, default=80, help="mean pause of a user between recovers")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--phase-s", type=float, default=12)
    parser.add_argument("--tolerance", type=float, default=0.1, help="by how much p99 may be higher")
    options = parser.parse_args()
    emulator = PubSubEmulator()
    try:
        emulator.wait_started()
        os.environ[EMULATOR_VARIABLE] = emulator.address  # the demo takes this one instead of starting its own
        with tempfile.TemporaryDirectory(prefix="stopped-bus-") as directory:
            sys.exit(trio.run(measure, options, Path(directory), emulator))
    finally:
        emulator.stop()


if __name__ == "__main__":
    main()
