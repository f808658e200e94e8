"""Power cuts under load: kill -9 of every process at once, again and again; nothing acknowledged may be lost.

python -m tests.client.power_cuts --cuts 10 --users 16
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import trio

from juicebox_hsm.client import Configuration, HttpTransport
from juicebox_hsm.history import Op, Outcome, check_history
from roles.tools.chaos.load import FINAL_PAUSE_S, FINAL_TRIES_MAX, History, User
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import DemoOptions
from roles.tools.demo.processes import RunningService, describe_exit

READY_S = 120.0
"""How long a realm may take to be whole after a cut; far more than it does, so that a crowded machine fails nothing."""

REVIVE_PAUSE_S = 0.3
POLL_S = 0.01


@dataclass
class Drill:
    """One realm, its users, and what was seen. `acknowledged` are users whose only register was answered."""

    cluster: Cluster
    transport: HttpTransport
    random: Random
    history: History = field(default_factory=History)
    barriers: list[float] = field(default_factory=list)
    acknowledged: list[User] = field(default_factory=list)
    newcomers: int = 0
    ready_s: list[float] = field(default_factory=list)
    answer_s: list[float] = field(default_factory=list)

    def user(self, name: str) -> User:
        """Make a user whose calls are recorded."""
        tokens = {realm: self.cluster.token(realm, name) for realm in self.cluster.realms}
        configuration = Configuration.from_json(self.cluster.configuration)
        return User(name, self.random.randrange(2**32), configuration, tokens, self.transport, self.history)

    async def register_newcomers(self) -> None:
        """Register one new user after the other, for ever; most cuts hit one in the middle."""
        while True:
            self.newcomers += 1
            user = self.user(f"newcomer{self.newcomers}")
            call = await user._call(user._lanes[0], Op.REGISTER, "pin")
            if call.outcome is Outcome.OK:
                self.acknowledged.append(user)

    async def cut(self, down_s: float) -> None:
        """Kill everything in one go, start everything, and wait until the realm is whole and has answered."""
        processes = self.cluster.processes
        for running in processes:
            running.wanted = False
            running.send(signal.SIGKILL)
        for running in processes:
            await running.kill()
        self.barriers.append(trio.current_time())
        await trio.sleep(down_s)
        begun = trio.current_time()
        for running in processes:
            running.start()
        self.cluster.write_processes()
        with trio.fail_after(READY_S):
            await self.cluster.wait_ready()
            self.ready_s.append(trio.current_time() - begun)
            while not any(moment > begun for moment in self.history.answered_at):  # noqa: ASYNC110 -- ten times
                await trio.sleep(POLL_S)
        self.answer_s.append(min(moment for moment in self.history.answered_at if moment > begun) - begun)

    async def recover_acknowledged(self) -> None:
        """Every register that was answered can be recovered, whatever happened since."""
        for user in self.acknowledged:
            for _ in range(FINAL_TRIES_MAX):
                call = await user._call(user._lanes[0], Op.RECOVER, "pin")
                if call.outcome is not Outcome.LOST:
                    break
                await trio.sleep(FINAL_PAUSE_S)
            if call.outcome is not Outcome.OK:
                self.history.violations.append(f"{user.name} registered, then: {call}")


async def run_drill(options: argparse.Namespace, directory: Path) -> int:
    """Run all cuts, check everything, print what was seen; returns the exit status."""
    demo = DemoOptions(
        state_dir=directory, agents=options.agents, managers=2, load_balancers=2, pin_hashing="FastInsecure",
        tenant_log=False, store=options.store,
    )  # fmt: skip
    exits: list[str] = []
    async with trio.open_nursery() as reviving:

        def on_exit(running: RunningService) -> None:
            if not running.is_running:
                exits.append(describe_exit(running))
                print(exits[-1], file=sys.stderr, flush=True)
                reviving.start_soon(revive, running)

        async with (
            launch(demo, on_exit=on_exit) as cluster,
            HttpTransport(ca_file=cluster.state.edge_ca, connections_per_host_max=2 * options.users + 8) as transport,
        ):
            drill = Drill(cluster, transport, Random(options.seed))
            users = [drill.user(f"user{number + 1}") for number in range(options.users)]
            over = trio.Event()
            async with trio.open_nursery() as nursery, trio.open_nursery() as loading:
                for user in users:
                    nursery.start_soon(user.run, over.is_set, options.pause_s)
                loading.start_soon(drill.register_newcomers)
                for number in range(options.cuts):
                    await trio.sleep(options.load_s)
                    await drill.cut(drill.random.uniform(0.0, 1.0))
                    print(
                        f"cut {number + 1}: whole after {drill.ready_s[-1]:.2f} s, first answer after "
                        f"{drill.answer_s[-1]:.2f} s; {len(drill.history.calls)} calls, "
                        f"{len(drill.acknowledged)} newcomers acknowledged",
                        flush=True,
                    )
                await trio.sleep(options.load_s)
                over.set()
                loading.cancel_scope.cancel()
            await drill.recover_acknowledged()
            async with trio.open_nursery() as nursery:
                for user in users:
                    nursery.start_soon(user.final_check)
    return report(drill, exits)


async def revive(running: RunningService) -> None:
    """Start a service again that ended by itself, as a supervisor does."""
    await trio.sleep(REVIVE_PAUSE_S)
    if not running.is_running:
        running.start()


def report(drill: Drill, exits: list[str]) -> int:
    """Print counts, times and violations; returns the exit status."""
    history = drill.history
    violations = [*history.violations, *(str(found) for found in check_history(history.calls, drill.barriers))]
    lost = sum(call.outcome is Outcome.LOST for call in history.calls)
    print(
        f"{len(drill.barriers)} cuts: whole again p50 {statistics.median(drill.ready_s):.2f} s, most "
        f"{max(drill.ready_s):.2f} s; first answer p50 {statistics.median(drill.answer_s):.2f} s, most "
        f"{max(drill.answer_s):.2f} s; {len(history.calls)} calls, {lost} lost; {len(drill.acknowledged)} of "
        f"{drill.newcomers} newcomers acknowledged and all looked at; {len(exits)} exits; {len(violations)} violations"
    )
    for name, number in sorted(history.counts.items()):
        print(f"  {name:<26}{number:>7}")
    for violation in violations[:10]:
        print(f"VIOLATION: {violation}", file=sys.stderr)
    return 1 if violations else 0


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Cut the power of a whole realm under load, again and again.")
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--agents", type=int, default=3)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--load-s", type=float, default=6.0, help="load between a recovery and the next cut")
    parser.add_argument("--pause-s", type=float, default=0.06, help="a user's mean pause between calls")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--store", choices=["sqlite", "bigtable"], default="sqlite")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="power-cuts-") as directory:
        sys.exit(trio.run(run_drill, options, Path(directory)))


if __name__ == "__main__":
    main()
