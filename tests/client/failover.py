"""Measure failover under the official client: kill the leader, time the first recover that succeeds afterwards.

python -m tests.client.failover --agents 5 --users 32 --kills 20
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import trio

from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import DemoOptions
from tests.client.drivers import Driver, Environment, User, official_driver, own_driver
from tests.client.scenarios import expect

PIN = b"1234"
BACK_S = 15.0
"""How long a realm may take to come back before the kill counts as one it did not survive."""


@dataclass(frozen=True)
class Plan:
    """What to run; `client` is "official" or "own", `pause_s` the time between a restart and the next kill."""

    agents: int
    users: int
    kills: int
    pause_s: float
    client: str
    store: str


@dataclass
class Tally:
    """Outcomes of all users, and the times of successes since the last kill."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    successes: list[tuple[float, float]] = field(default_factory=list)
    success: trio.Event = field(default_factory=trio.Event)


async def loop_user(user: User, tally: Tally) -> None:
    """Recover for ever; anything but the right secret or a transient error is wrong."""
    secret = user.name.encode()
    while True:
        started = trio.current_time()
        result = await user.recover(PIN)
        ended = trio.current_time()
        tally.outcomes[result.error or "success"] += 1
        if result.error is None:
            tally.successes.append((started, ended))
            tally.success.set()
            if result.secret != secret:
                tally.wrong.append(f"{user.name}: wrong secret")
        elif result.error != "Transient":
            tally.wrong.append(f"{user.name}: {result}")


async def kill_leader(cluster: Cluster) -> str:
    """Kill -9 the agent that leads the group with the key space; returns its name."""
    view = await cluster.wait_leaders()
    for group in view.groups.values():
        leader = group.leader
        if leader is not None and leader.info.leader is not None and leader.info.leader.owned_range is not None:
            name = next(r.service.name for r in cluster.of_role("agent") if r.service.url == leader.url)
            await cluster.process(name).kill()
            return name
    raise RuntimeError("nobody leads a range")


async def measure(plan: Plan, directory: Path) -> tuple[list[float | None], Tally]:
    """Run the kills; returns the seconds from each to the first success of a recover begun after it, and the tally.

    None stands for a kill that nothing succeeded after within `BACK_S`.
    """
    demo = DemoOptions(
        state_dir=directory, agents=plan.agents, pin_hashing="FastInsecure", managers=2, store=plan.store
    )
    tally = Tally()
    gaps: list[float | None] = []
    async with launch(demo, on_exit=lambda _: None) as cluster:
        environment = Environment.load(cluster.state.client_json)
        driver_of = official_driver if plan.client == "official" else own_driver
        async with driver_of(environment.ca) as driver, trio.open_nursery() as nursery:
            users = [new_user(environment, driver, number) for number in range(plan.users)]
            for user in users:
                expect(await user.register(PIN, user.name.encode(), 5))
            for user in users:
                nursery.start_soon(loop_user, user, tally)
            await tally.success.wait()
            for _ in range(plan.kills):
                tally.successes.clear()
                name = await kill_leader(cluster)
                gaps.append(await _first_success(tally))
                took = "nothing succeeded" if gaps[-1] is None else f"succeeded after {gaps[-1] * 1000:.0f} ms"
                print(f"killed {name}: first recover begun afterwards: {took}", flush=True)
                await cluster.restart(name)
                await trio.sleep(plan.pause_s)
            nursery.cancel_scope.cancel()
    return gaps, tally


async def _first_success(tally: Tally) -> float | None:
    """Wait for a success of a recover that begins now or later; returns how long that took."""
    killed = trio.current_time()
    with trio.move_on_after(BACK_S):
        while not any(started > killed for started, _ in tally.successes):
            tally.success = trio.Event()
            await tally.success.wait()
    return min((ended - killed for started, ended in tally.successes if started > killed), default=None)


def report(gaps: list[float | None], tally: Tally) -> int:
    """Print what was seen; returns the exit status."""
    known = [BACK_S if gap is None else gap for gap in gaps]
    middle, most = statistics.median(known), max(known)
    print(
        f"{len(gaps)} kills: p50 {middle * 1000:.0f} ms, max {most * 1000:.0f} ms; "
        f"outcomes {dict(tally.outcomes)}; wrong {len(tally.wrong)}"
    )
    for line in tally.wrong[:10]:
        print(line, file=sys.stderr)
    return 1 if tally.wrong or most > 2 or middle > 1 else 0


def new_user(environment: Environment, driver: Driver, number: int) -> User:
    name = f"failover-{time.time_ns()}-{number}"
    return User(driver, name, environment.configuration, environment.tokens(name))


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Time failover under load.")
    parser.add_argument("--agents", type=int, default=5)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pause-s", type=float, default=4.0, help="between a restart and the next kill")
    parser.add_argument("--client", choices=["official", "own"], default="official")
    parser.add_argument("--store", choices=["sqlite", "bigtable"], default="sqlite")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="failover-") as directory:
        sys.exit(report(*trio.run(measure, Plan(**vars(options)), Path(directory))))


if __name__ == "__main__":
    main()
