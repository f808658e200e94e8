"""Move a range of record ids back and forth under load; optionally kill the manager or a leader in the middle.

python -m tests.client.transfers --moves 20 --users 32
python -m tests.client.transfers --moves 9 --users 16 --kill manager,source,destination

Five agents, three groups, two managers, our client. Moves go through a manager, as those of `cluster transfer` do;
the range is what one group owned at first. With `--kill` each victim is killed once after each step (prepare, out,
in), when the leaders' status shows that the step is committed, and started again a second later; a move that was too
quick to be hit is repeated.

Ends with 1 if a move was not complete within 10 s of its start or of the kill (a pending marker at a leader, or a key
space that is not owned exactly once), if the range is then at neither group, or still at its source although it had
left it, if no order of requests explains what the clients saw, or, without `--kill`, if a client call failed (its own
retries of transient refusals are no failure) or the p99 of recovers during moves was twice that of before, or more.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import trio

from juicebox_hsm.client import Configuration, HttpTransport
from juicebox_hsm.history import Op, Outcome, check_history
from juicebox_hsm.host.cluster.recovery import pending
from juicebox_hsm.host.cluster.view import ClusterView, GroupKey
from juicebox_hsm.ids import GroupId, OwnedRange, RecordId
from juicebox_hsm.wire.rpc import Direction
from roles.survey.overview import ask_agents
from roles.tools.chaos.load import History, User
from roles.tools.cluster.change import transfer_range
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import DemoOptions
from roles.tools.session import ToolFailure

COMPLETE_S = 10.0
RESTART_S = 1.0
STATUS_S = 1.0
POLL_S = 0.02
STEP_POLL_S = 0.001
"""Between looks for a step, which may last only some 20 ms (own)."""

MISSES_MAX = 10
"""Moves in a row that may end before the wanted step is seen (own)."""

PAUSE_S = 0.03
RECOVERS_MIN = 200
"""Fewer recovers during moves say nothing about a 99th percentile (own)."""

RECORD_ID_MAX = b"\xff" * 32
STEPS = ("prepare", "out", "in")
SHAPES = {(True, False): "prepare", (True, True): "out", (False, True): "in"}
"""(pending at the destination, pending at the source) -> the last step that is done."""

Range = tuple[bytes, bytes]


@dataclass(frozen=True)
class Kill:
    """Kill `manager`, `source` or `destination` when `step` is done."""

    victim: str
    step: str

    def __str__(self) -> str:
        """Return it in words."""
        return f"{self.victim} killed after {self.step}"


@dataclass(frozen=True)
class Plan:
    """What to run: one move for each of `kills`, without a kill where it is None."""

    kills: tuple[Kill | None, ...]
    users: int = 32
    agents: int = 5
    groups: int = 3
    quiet_s: float = 10.0

    @property
    def is_gentle(self) -> bool:
        """Tell whether nothing is killed, so that clients must not notice."""
        return not any(self.kills)


def plan_kills(moves: int, victims: list[str]) -> tuple[Kill | None, ...]:
    """Return what to kill in each move: every victim after every step before any of them comes again."""
    if not victims:
        return (None,) * moves
    turns = [
        Kill(victim, STEPS[(position + turn) % len(STEPS)])
        for turn in range(len(STEPS))
        for position, victim in enumerate(victims)
    ]
    return tuple(itertools.islice(itertools.cycle(turns), moves))


def owned(view: ClusterView) -> dict[bytes, Range]:
    """Return the range of each group that owns one, as their leaders tell it."""
    return {
        bytes(group.id): (bytes(group.owned_range.start), bytes(group.owned_range.end))
        for group in view.groups.values()
        if group.owned_range is not None
    }


def gapless(ranges: dict[bytes, Range]) -> bool:
    """Tell whether the ranges cover the key space exactly once."""
    ordered = sorted(ranges.values())
    joined = all(
        int.from_bytes(later[0], "big") == int.from_bytes(earlier[1], "big") + 1
        for earlier, later in itertools.pairwise(ordered)
    )
    return bool(ordered) and joined and not any(ordered[0][0]) and ordered[-1][1] == RECORD_ID_MAX


def is_settled(view: ClusterView, groups: set[GroupKey]) -> bool:
    """Tell whether every group is led, nothing is pending at any leader, and the key space is owned exactly once."""
    leaders = [view.groups[key].leader for key in groups if key in view.groups]
    led = [leader for leader in leaders if leader and leader.info.leader and leader.info.leader.committed is not None]
    return len(led) == len(groups) and not pending(view, committed_only=False) and gapless(owned(view))


def describe(view: ClusterView) -> str:
    """Return what a move that is not over may be waiting for."""
    unled = [group.id.hex()[:8] for group in view.groups.values() if group.leader is None]
    markers = [
        f"{group.id.hex()[:8]} {marker.direction.value}" for group, marker in pending(view, committed_only=False)
    ]
    ranges = [f"{group.hex()[:8]} {first.hex()[:4]}..{last.hex()[:4]}" for group, (first, last) in owned(view).items()]
    return f"nobody leads {unled}, pending {markers}, owned {ranges}"


def step_done(view: ClusterView, source: bytes, destination: bytes) -> str | None:
    """Return the last step whose committed markers the leaders of both groups show."""
    markers = {
        (bytes(group.id), marker.direction is Direction.IN) for group, marker in pending(view, committed_only=True)
    }
    return SHAPES.get(((destination, True) in markers, (source, False) in markers))


def p99(waits: list[float]) -> float:
    """Return the 99th percentile in ms."""
    return statistics.quantiles(waits, n=100)[98] * 1000 if len(waits) > 1 else 0.0


@dataclass
class Strike:
    """A kill that waits for its step. `at` is when it happened, None if the move was over before."""

    kill: Kill
    at: float | None = None
    is_over: bool = False
    decided: trio.Event = field(default_factory=trio.Event)


class Drill:
    """One run against one cluster."""

    def __init__(self, plan: Plan, cluster: Cluster) -> None:
        self.plan = plan
        self.cluster = cluster
        self.failures: list[str] = []
        self.windows: list[tuple[float, float]] = []
        self.slowest_s = 0.0
        self.groups: set[GroupKey] = set()
        self.seen = ClusterView(())

    async def run(self) -> None:
        """Make all moves, back and forth; a move that was not hit is repeated."""
        view = await self.cluster.wait_leaders()
        self.groups = set(view.groups)
        (source, moved), (destination, _) = sorted(owned(view).items(), key=lambda item: item[1])[:2]
        misses = number = 0
        for kill in self.plan.kills:
            while True:
                strike = None if kill is None else Strike(kill)
                holder = await self.move(number, source, destination, moved, strike)
                number += 1
                if holder is None:
                    return
                if holder == destination:
                    source, destination = destination, source
                if strike is None or strike.at is not None:
                    misses = 0
                    break
                misses += 1
                if misses == MISSES_MAX:
                    self.failures.append(f"{kill}: the step was not seen in {misses} moves")
                    return

    async def move(
        self, number: int, source: bytes, destination: bytes, moved: Range, strike: Strike | None
    ) -> bytes | None:
        """Move once, and wait until it is over; returns the group that has the range, None if none was found."""
        view = await self.cluster.wait_leaders()
        manager = self.cluster.of_role("manager")[number % 2].service
        victims = {"manager": manager.name, **leader_names(self.cluster, view, source, destination)}
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            if strike is not None:
                nursery.start_soon(self.strike, strike, victims, view, source, destination)
            problem = await transfer(self.cluster, manager.url, source, destination, moved)
            self.windows.append((began, trio.current_time()))
            since = began
            if strike is not None:
                strike.is_over = True
                await strike.decided.wait()
                since = began if strike.at is None else strike.at
            ranges = await self.settled(since)
            took_s = trio.current_time() - since
        return self.judge(number, (source, destination), moved, ranges, took_s, problem, strike)

    async def settled(self, since: float) -> dict[bytes, Range] | None:
        """Wait until a move is complete; returns the ranges, None if it was not in time."""
        with trio.move_on_at(since + COMPLETE_S):
            while True:
                self.seen = view = await self.cluster.view()
                if is_settled(view, self.groups):
                    now = trio.current_time()
                    self.slowest_s = max(self.slowest_s, now - since)
                    self.windows[-1] = (self.windows[-1][0], now)
                    return owned(view)
                await trio.sleep(POLL_S)
        return None

    async def strike(
        self, strike: Strike, victims: dict[str, str], view: ClusterView, source: bytes, destination: bytes
    ) -> None:
        """Kill the victim once its step is done, unless the move is over first, and start it again."""
        cluster = self.cluster
        leaders = [group.leader for group in view.groups.values() if bytes(group.id) in (source, destination)]
        urls = [leader.url for leader in leaders if leader is not None]
        name = victims[strike.kill.victim]
        while not strike.is_over:
            seen = step_done(await ask_agents(cluster.session.rpc, urls, STATUS_S), source, destination)
            if seen == strike.kill.step:
                await cluster.process(name).kill()
                strike.at = trio.current_time()
                break
            await trio.sleep(STEP_POLL_S)
        strike.decided.set()
        if strike.at is not None:
            await trio.sleep(RESTART_S)
            await cluster.restart(name)

    def judge(
        self,
        number: int,
        groups: tuple[bytes, bytes],
        moved: Range,
        ranges: dict[bytes, Range] | None,
        took_s: float,
        problem: str,
        strike: Strike | None,
    ) -> bytes | None:
        """Note what is wrong with a move that is over; returns the group that has the range."""
        hit = strike is not None and strike.at is not None
        name = f"move {number}" + (f" ({strike.kill})" if strike is not None and hit else "")
        if ranges is None:
            self.failures.append(f"{name}: not complete after {COMPLETE_S:.0f} s; {describe(self.seen)}")
            return None
        holder = next(group for group, (first, last) in ranges.items() if first <= moved[0] and last >= moved[1])
        if holder not in groups:
            self.failures.append(f"{name}: the range is at {holder.hex()}, which has nothing to do with it")
            return None
        if holder == groups[0] and (not hit or (strike is not None and strike.kill.step != "prepare")):
            self.failures.append(f"{name}: it did not move")
        if problem and not hit:
            self.failures.append(f"{name}: {problem}")
        missed = "" if strike is None or hit else f", over before the {strike.kill.victim} could be killed"
        print(f"{name}: {took_s:.2f} s, {'moved' if holder == groups[1] else 'cancelled'}{missed}", flush=True)
        return holder


def leader_names(cluster: Cluster, view: ClusterView, source: bytes, destination: bytes) -> dict[str, str]:
    """Return the names of the agents that lead both groups."""
    names = {running.service.url: running.service.name for running in cluster.of_role("agent")}
    found = {}
    for role, wanted in (("source", source), ("destination", destination)):
        group = view.group(cluster.realms[0], wanted)
        if group is not None and group.leader is not None:
            found[role] = names[group.leader.url]
    return found


async def transfer(cluster: Cluster, manager: str, source: bytes, destination: bytes, moved: Range) -> str:
    """Order a move from one manager, as `cluster transfer` does; returns what went wrong."""
    wanted = OwnedRange(RecordId(moved[0]), RecordId(moved[1]))
    try:
        await transfer_range(cluster.session, manager, cluster.realms[0], GroupId(source), GroupId(destination), wanted)
    except ToolFailure as failure:
        return failure.format_message()
    return ""


def make_users(cluster: Cluster, count: int, transport: HttpTransport, history: History) -> list[User]:
    """Make users that remember what they saw."""
    configuration = Configuration.from_json(cluster.configuration)
    names = [f"user{number + 1}" for number in range(count)]
    return [
        User(
            name, 0, configuration, {realm: cluster.token(realm, name) for realm in cluster.realms}, transport, history
        )
        for name in names
    ]


async def drill(directory: Path, plan: Plan) -> list[str]:
    """Run everything against a demo realm in `directory`; returns what failed."""
    demo = DemoOptions(
        state_dir=directory,
        agents=plan.agents,
        groups=plan.groups,
        managers=2,
        pin_hashing="FastInsecure",
        tenant_log=False,
    )
    history = History()
    async with (
        launch(demo, on_exit=lambda _: None) as cluster,
        HttpTransport(ca_file=cluster.state.edge_ca, connections_per_host_max=2 * plan.users + 8) as transport,
    ):
        users = make_users(cluster, plan.users, transport, history)
        run = Drill(plan, cluster)
        over = trio.Event()
        async with trio.open_nursery() as nursery:
            for user in users:
                nursery.start_soon(user.run, over.is_set, PAUSE_S)
            await trio.sleep(plan.quiet_s)
            began_moving = trio.current_time()
            await run.run()
            over.set()
        async with trio.open_nursery() as nursery:
            for user in users:
                nursery.start_soon(user.final_check)
    return run.failures + judge_clients(plan, history, run, began_moving)


def judge_clients(plan: Plan, history: History, run: Drill, began_moving: float) -> list[str]:
    """Print what clients saw; returns what is wrong with it."""
    recovers = [call for call in history.calls if call.op is Op.RECOVER and call.outcome is Outcome.OK]
    quiet = [call.end - call.start for call in recovers if call.end < began_moving]
    during = [
        call.end - call.start
        for call in recovers
        if any(call.start < end and call.end > start for start, end in run.windows)
    ]
    print(
        f"{len(run.windows)} moves, slowest {run.slowest_s:.2f} s; outcomes {dict(history.counts)}; "
        f"p99 of recovers before {p99(quiet):.0f} ms, during moves {p99(during):.0f} ms"
    )
    failures = [*history.violations, *(str(found) for found in check_history(history.calls))]
    if plan.is_gentle:
        lost = sum(call.outcome is Outcome.LOST for call in history.calls)
        failures += [f"{lost} calls failed"] if lost else []
        if len(during) >= RECOVERS_MIN and p99(during) >= 2 * p99(quiet):
            failures.append("p99 during moves is twice that of before")
    return failures


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Move a key range back and forth under load.")
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--kill", default="", help="comma-separated: manager, source, destination")
    options = parser.parse_args()
    victims = [victim for victim in options.kill.split(",") if victim]
    if not set(victims) <= {"manager", "source", "destination"}:
        parser.error(f"--kill {options.kill}: manager, source, destination")
    plan = Plan(plan_kills(options.moves, victims), options.users)
    with tempfile.TemporaryDirectory(prefix="transfers-") as directory:
        failures = trio.run(drill, Path(directory), plan)
    for line in failures[:10]:
        print(line, file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
