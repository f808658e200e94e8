"""Pause a witness, then the leader, for longer than their entries are kept; then kill the witness that never failed.

python -m tests.client.pauses --seconds 30 --users 8

Users of our client recover all the while and compaction runs, so whoever was paused finds its place in the log gone and
must jump (hsm.md 10.2). Ends with 1 if a paused HSM did not jump past a stored certificate or did not come back to
within a second's work of the log's end, if the realm did not serve again within 5 s of any trouble, or if any outcome
was wrong.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

import trio

from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import DemoOptions
from roles.tools.demo.processes import RunningService
from tests.client.drivers import Environment, own_driver
from tests.client.failover import PIN, Tally, loop_user, new_user

JUMPED = "jumped"
CAUGHT_UP_S = 20.0
COMPACTION_S = 90.0
SERVES_S = 5.0
SETTLE_S = 0.05
LEADER_LONGER_S = 45.0
"""A new leadership compacts once its predecessor says Witness, or after 60 s (agent.md 10); until then nobody jumps."""


def store_lock_held_by(cluster: Cluster, running: RunningService) -> bool:
    """Tell whether a process is inside a transaction: a pause there stops the store, not a member."""
    inode = (cluster.state.path / "store.db.lock").stat().st_ino
    rows = [line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()]
    return any(row[1] != "->" and row[4] == str(running.pid) and row[5].endswith(f":{inode}") for row in rows)


async def stop(cluster: Cluster, running: RunningService) -> None:
    """SIGSTOP a process outside of store transactions."""
    while True:
        running.send(signal.SIGSTOP)
        await trio.sleep(SETTLE_S)
        if not store_lock_held_by(cluster, running):
            return
        running.send(signal.SIGCONT)
        await trio.sleep(SETTLE_S)


async def leader_and_witnesses(cluster: Cluster) -> tuple[RunningService, list[RunningService]]:
    """Return the agent that leads the group with the key space, and the others."""
    view = await cluster.wait_leaders()
    for group in view.groups.values():
        leader = group.leader
        if leader is not None and leader.info.leader is not None and leader.info.leader.owned_range is not None:
            agents = cluster.of_role("agent")
            return (
                next(agent for agent in agents if agent.service.url == leader.url),
                [agent for agent in agents if agent.service.url != leader.url],
            )
    raise RuntimeError("nobody leads a range")


def jumps(cluster: Cluster, running: RunningService) -> list[tuple[int, int]]:
    """Return (index of the certificate, position afterwards) of each jump that an agent's log says it made."""
    text = cluster.state.log(running.service.name).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines() if f'"{JUMPED}"' in line]
    return [(line["certificate"], line["position"]) for line in lines if line["message"] == JUMPED]


async def furthest_captured(cluster: Cluster, running: RunningService) -> int:
    """Return the highest index one HSM says it captured; 0 when it does not answer."""
    view = await cluster.view()
    members = [
        member for group in view.groups.values() for member in group.members if member.url == running.service.url
    ]
    return max((member.info.captured[0] for member in members if member.info.captured is not None), default=0)


async def compacted(cluster: Cluster) -> int:
    """Return the oldest entry that is still in the log of the group with the key space."""
    view = await cluster.wait_leaders()
    for group in view.groups.values():
        leader = group.leader
        if leader is not None and leader.info.leader is not None and leader.info.leader.owned_range is not None:
            stats = cluster.session.store.stats
            assert stats is not None, "the store cannot count"
            found = {log.group: log.first_index for log in await stats.log(group.realm)}
            return found[group.id] or 0
    raise RuntimeError("nobody leads a range")


async def compaction_runs(cluster: Cluster) -> None:
    """Wait until the log's old entries go: a leadership begins with it when all others say Witness."""
    began = await compacted(cluster)
    with trio.fail_after(COMPACTION_S):
        while await compacted(cluster) <= began:  # noqa: ASYNC110 - other processes' work
            await trio.sleep(0.25)


class Drill:
    """One run: the realm, its users, and what went wrong."""

    def __init__(self, cluster: Cluster, tally: Tally) -> None:
        self.cluster = cluster
        self.tally = tally
        self.failures: list[str] = []

    async def serves(self, what: str) -> None:
        """Time the first recover begun from now on."""
        began = trio.current_time()
        self.tally.successes.clear()
        with trio.move_on_after(SERVES_S):
            while not any(started > began for started, _ in self.tally.successes):
                self.tally.success = trio.Event()
                await self.tally.success.wait()
            print(f"{what}: served after {(trio.current_time() - began) * 1000:.0f} ms", flush=True)
            return
        self.failures.append(f"{what}: nothing served within {SERVES_S} s")

    async def pause(self, running: RunningService, what: str, seconds: float) -> None:
        """Pause one agent under load, and wait until it has jumped and caught up."""
        name = running.service.name
        before = len(jumps(self.cluster, running))
        await stop(self.cluster, running)
        await self.serves(f"{what} {name} paused")
        await trio.sleep(seconds)
        running.send(signal.SIGCONT)
        began = trio.current_time()
        while trio.current_time() < began + CAUGHT_UP_S:
            await trio.sleep(0.25)
            made = jumps(self.cluster, running)[before:]
            if made and await self.caught_up(running):
                print(f"  it jumped and was back {trio.current_time() - began:.1f} s after it went on", flush=True)
                print(f"  certificates and positions: {made}", flush=True)
                if not all(0 < certificate < position for certificate, position in made):
                    self.failures.append(f"{what} {name}: jumps that end before their certificates: {made}")
                return
        self.failures.append(f"{what} {name}: {len(jumps(self.cluster, running)) - before} jumps, not caught up")

    async def caught_up(self, running: RunningService) -> bool:
        """Tell whether one agent's captures are as far as the others' were a moment before."""
        others = [agent for agent in self.cluster.of_role("agent") if agent is not running]
        furthest = max([await furthest_captured(self.cluster, agent) for agent in others])
        return await furthest_captured(self.cluster, running) >= furthest > 0


async def drill(directory: Path, *, seconds: float, users: int) -> Drill:
    """Run everything against a demo realm in `directory`."""
    demo = DemoOptions(state_dir=directory, agents=3, managers=2, pin_hashing="FastInsecure", tenant_log=False)
    async with launch(demo, on_exit=lambda _: None) as cluster:
        environment = Environment.load(cluster.state.client_json)
        run = Drill(cluster, Tally())
        async with own_driver(environment.ca) as driver, trio.open_nursery() as nursery:
            for number in range(users):
                user = new_user(environment, driver, number)
                result = await user.register(PIN, user.name.encode(), 5)
                if result.error is not None:
                    run.failures.append(f"register: {result}")
                nursery.start_soon(loop_user, user, run.tally)
            await compaction_runs(cluster)
            leader, (witness, other) = await leader_and_witnesses(cluster)
            await run.pause(witness, "witness", seconds)
            await run.pause(leader, "leader", seconds + LEADER_LONGER_S)
            await other.kill()
            print(f"killed {other.service.name} for good", flush=True)
            await run.serves(f"without {other.service.name}")
            await trio.sleep(SERVES_S)
            await run.serves("later")
            nursery.cancel_scope.cancel()
    run.failures += run.tally.wrong
    print(f"outcomes {dict(run.tally.outcomes)}; failures {len(run.failures)}")
    return run


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Pause members of a realm under load until they must jump.")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each pause")
    parser.add_argument("--users", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pauses-") as directory:
        failures = trio.run(lambda: drill(Path(directory), seconds=options.seconds, users=options.users)).failures
    for line in failures[:10]:
        print(line, file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
