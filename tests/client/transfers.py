"""Move a third of the key space back and forth under load; optionally kill the manager or a leader meanwhile.

python -m tests.client.transfers --moves 20 --users 32
python -m tests.client.transfers --moves 12 --users 16 --kill manager,source,destination

Five agents, three groups, two managers, our client. Moves go through `cluster transfer`, as an operator's do. Ends with
1 if a client operation failed (the client's own retries of transient refusals are no failure; with `--kill` transient
errors are allowed), a secret was wrong, a move was not complete after 10 s, the key space was not owned exactly once
after it, or, without `--kill`, the p99 of recovers during moves was twice that of before, or more.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import trio

from juicebox_hsm.cluster_view import GroupView
from roles.tools.demo_launch import Cluster, launch
from roles.tools.demo_layout import DemoOptions
from tests.client.drivers import Environment, own_driver
from tests.client.failover import PIN, Tally, loop_user, new_user

COMPLETE_S = 10.0
RECORD_ID_MAX = b"\xff" * 32
KILL_DELAYS_S = (0.45, 0.55, 0.65, 0.75, 0.9, 1.1)
"""After the start of the command, which takes some 0.4 s before it asks the manager (own)."""

Range = tuple[bytes, bytes]


async def owned(cluster: Cluster) -> dict[bytes, Range]:
    """Return the range of each group that owns one, as their leaders tell it."""
    view = await cluster.wait_leaders()
    found = {}
    for group in view.groups.values():
        if group.owned_range is not None:
            found[bytes(group.id)] = (bytes(group.owned_range.start), bytes(group.owned_range.end))
    return found


def gapless(ranges: dict[bytes, Range]) -> bool:
    """Tell whether the ranges cover the key space exactly once."""
    ordered = sorted(ranges.values())
    joined = all(
        int.from_bytes(later[0], "big") == int.from_bytes(earlier[1], "big") + 1
        for earlier, later in itertools.pairwise(ordered)
    )
    return bool(ordered) and joined and not any(ordered[0][0]) and ordered[-1][1] == RECORD_ID_MAX


async def move(cluster: Cluster, source: bytes, destination: bytes, moved: Range) -> subprocess.CompletedProcess[bytes]:
    """Run `cluster transfer`."""
    return await trio.run_process(
        [
            *(
                sys.executable,
                "-m",
                "roles",
                "cluster",
                "transfer",
                "--config",
                str(cluster.state.path / "cluster.toml"),
            ),
            *("--realm", cluster.realms[0].hex(), "--source", source.hex(), "--destination", destination.hex()),
            *("--start", moved[0].hex(), "--end", moved[1].hex()),
        ],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )


async def leader_name(cluster: Cluster, group: bytes) -> str:
    """Return the name of the agent that leads a group."""
    view = await cluster.wait_leaders()
    found: GroupView | None = view.group(cluster.realms[0], group)
    assert found is not None
    assert found.leader is not None
    return next(agent.service.name for agent in cluster.of_role("agent") if agent.service.url == found.leader.url)


async def kill(cluster: Cluster, victim: str, source: bytes, destination: bytes, delay_s: float) -> None:
    """Kill a manager or a leader a moment after a move began, and start it again a second later."""
    name = victim
    if victim == "source":
        name = await leader_name(cluster, source)
    elif victim == "destination":
        name = await leader_name(cluster, destination)
    await trio.sleep(delay_s)
    await cluster.process(name).kill()
    await trio.sleep(1)
    await cluster.restart(name)


def p99(waits: list[float]) -> float:
    """Return the 99th percentile in ms."""
    return statistics.quantiles(waits, n=100)[98] * 1000 if len(waits) > 1 else 0.0


async def drill(directory: Path, *, moves: int, users: int, victims: list[str]) -> list[str]:
    """Run everything against a demo realm in `directory`; returns what failed."""
    demo = DemoOptions(
        state_dir=directory, agents=5, groups=3, managers=2, pin_hashing="FastInsecure", tenant_log=False
    )
    tally, failures, slowest_s = Tally(), [], 0.0
    windows: list[tuple[float, float]] = []
    async with launch(demo, on_exit=lambda _: None) as cluster:
        environment = Environment.load(cluster.state.client_json)
        async with own_driver(environment.ca) as driver, trio.open_nursery() as nursery:
            for number in range(users):
                user = new_user(environment, driver, number)
                result = await user.register(PIN, user.name.encode(), 5)
                if result.error is not None:
                    failures.append(f"register: {result}")
                nursery.start_soon(loop_user, user, tally)
            before = await owned(cluster)
            await trio.sleep(10)
            began_moving = trio.current_time()
            (source, moved), (destination, _) = sorted(before.items(), key=lambda item: item[1])[:2]
            for number in range(moves):
                began = trio.current_time()
                async with trio.open_nursery() as moving:
                    if victims:
                        victim = victims[number % len(victims)]
                        name = cluster.of_role("manager")[number % 2].service.name if victim == "manager" else victim
                        delay_s = KILL_DELAYS_S[number // len(victims) % len(KILL_DELAYS_S)]
                        moving.start_soon(kill, cluster, name, source, destination, delay_s)
                    done = await move(cluster, source, destination, moved)
                windows.append((began, trio.current_time()))
                if done.returncode and not victims:
                    failures.append(f"move {number}: {done.stderr.decode().strip()}")
                ranges: dict[bytes, Range] = {}
                with trio.move_on_after(COMPLETE_S):
                    while not gapless(ranges):
                        ranges = await owned(cluster)
                took_s = trio.current_time() - began
                slowest_s = max(slowest_s, took_s)
                if not gapless(ranges):
                    failures.append(
                        f"move {number}: the key space is not owned exactly once after {took_s:.1f} s: {ranges}"
                    )
                    break
                holder = next(
                    group for group, (first, last) in ranges.items() if first <= moved[0] and last >= moved[1]
                )
                if holder == destination:
                    source, destination = destination, source
                elif not victims:
                    failures.append(f"move {number}: it did not move")
                print(f"move {number}: {took_s:.2f} s{', ' + name if victims else ''}", flush=True)
                await trio.sleep(0.5)
            nursery.cancel_scope.cancel()
    quiet = [end - start for start, end in tally.successes if end < began_moving]
    during = [end - start for start, end in tally.successes if any(start < b and end > a for a, b in windows)]
    print(
        f"{moves} moves, slowest {slowest_s:.2f} s; outcomes {dict(tally.outcomes)}; p99 before {p99(quiet):.0f} ms, "
        f"during moves {p99(during):.0f} ms"
    )
    failures += tally.wrong
    if not victims:
        transient = tally.outcomes.total() - tally.outcomes["success"]
        failures += [f"{transient} operations failed"] if transient else []
        failures += ["p99 during moves is twice that of before"] if p99(during) >= 2 * p99(quiet) else []
    return failures


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Move a key range back and forth under load.")
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--kill", default="", help="comma-separated: manager, source, destination")
    options = parser.parse_args()
    victims = [victim for victim in options.kill.split(",") if victim]
    with tempfile.TemporaryDirectory(prefix="transfers-") as directory:
        failures = trio.run(lambda: drill(Path(directory), moves=options.moves, users=options.users, victims=victims))
    for line in failures[:10]:
        print(line, file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
