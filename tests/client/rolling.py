"""Restart every service of a realm in turn under load, as the operator guide says, and count the calls that fail.

python -m tests.client.rolling --agents 5 --groups 3 --users 16 --client official

Users recover all the while. Each agent, manager and balancer gets SIGTERM, is started again when it has ended, and the
next one follows when `cluster status` would be clean. Clients know one address; when a balancer says that it stops,
they are moved to the other one within its notice period, as a balancer in front of the balancers or DNS would do.
Ends with 1 if any call failed, a service did not end in order, or the realm was not whole in time.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from juicebox_hsm.host.cluster.verdict import judge
from roles.survey.evidence import gather
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import DemoOptions
from roles.tools.demo.processes import RunningService
from roles.words import sentence
from tests.client.drivers import Driver, Environment, User, official_driver, own_driver

PIN = b"1234"
NOTICE = "1s"
END_S = 30.0  # an agent may take 20 s to hand everything over
WHOLE_S = 60.0
LOOK_PAUSE_S = 0.25
ROLES = ("agent", "manager", "lb")


@dataclass
class Tally:
    """What all users saw, and how long each service took to end and the realm to be whole again."""

    calls: int = 0
    slowest_ms: float = 0.0
    failures: list[str] = field(default_factory=list)
    ends_s: list[float] = field(default_factory=list)
    restarts_s: list[float] = field(default_factory=list)


class Front:
    """Which balancer each user is sent to: one of those that have not said that they stop. `doing` is for reports."""

    def __init__(self, cluster: Cluster, environment: Environment) -> None:
        self._configuration = environment.configuration
        self._balancers = [running.service for running in cluster.of_role("lb")]
        self.stopping = ""
        self.doing = "nothing was restarted"

    def configuration(self, number: int) -> dict[str, Any]:
        """Return the client configuration of a user."""
        serving = [service for service in self._balancers if service.name != self.stopping]
        address = f"{serving[number % len(serving)].url}/"
        return {
            **self._configuration,
            "realms": [{**realm, "address": address} for realm in self._configuration["realms"]],
        }


async def loop_user(user: User, number: int, front: Front, tally: Tally, pause_s: float) -> None:
    """Recover for ever, with pauses; anything but the right secret is a failure."""
    while True:
        result = await replace(user, configuration=front.configuration(number)).recover(PIN)
        tally.calls += 1
        tally.slowest_ms = max(tally.slowest_ms, result.ms)
        if result.error is not None or result.secret != user.name.encode():
            tally.failures.append(f"{user.name} while {front.doing}, after {result.ms:.0f} ms: {result}")
        await trio.sleep(pause_s)


async def wait_whole(cluster: Cluster, tally: Tally, after: str) -> None:
    """Wait until the verdict on the cluster has no problem, every member answered included."""
    problems: Sequence[str] = ()
    with trio.move_on_after(WHOLE_S):
        while True:
            session = cluster.session
            verdict = judge(await gather(session.store, session.rpc, session.now_ms()))
            problems = [sentence(found) for found in verdict.problems]
            if not problems:
                return
            await trio.sleep(LOOK_PAUSE_S)
    tally.failures.append(f"not whole {WHOLE_S:.0f} s after the restart of {after}: {'; '.join(problems)}")


async def restart(cluster: Cluster, front: Front, running: RunningService, tally: Tally) -> None:
    """End one service in order, start it again, and wait for the cluster to be whole."""
    name = running.service.name
    began = trio.current_time()
    front.doing = f"{name} was restarted"
    running.wanted = False
    running.send(signal.SIGTERM)
    front.stopping = name
    with trio.move_on_after(END_S):
        await running.wait()
    if running.exit_status != 0:
        tally.failures.append(f"{name} ended with {running.exit_status}")
        await running.kill()
    tally.ends_s.append(trio.current_time() - began)
    await cluster.restart(name)
    await wait_whole(cluster, tally, name)
    front.stopping = ""
    tally.restarts_s.append(trio.current_time() - began)


async def drill(
    directory: Path, *, agents: int, groups: int, users: int, rounds: int, official: bool, pause_s: float
) -> Tally:
    """Restart every service of a demo realm in `directory`, `rounds` times."""
    tally = Tally()
    demo = DemoOptions(
        state_dir=directory, agents=agents, groups=groups, managers=2, load_balancers=2, pin_hashing="FastInsecure",
        tenant_log=False, extra_flags={"lb": ("--shutdown-notice-period", NOTICE)},
    )  # fmt: skip
    async with launch(demo, on_exit=lambda _: None) as cluster:
        environment = Environment.load(cluster.state.client_json)
        front = Front(cluster, environment)
        driver_of = official_driver if official else own_driver
        async with driver_of(environment.ca) as driver, trio.open_nursery() as nursery:
            for number in range(users):
                user = await registered(environment, driver, number)
                nursery.start_soon(loop_user, user, number, front, tally, pause_s)
            await wait_whole(cluster, tally, "everything")
            for _ in range(rounds):
                for role in ROLES:
                    for running in cluster.of_role(role):
                        await restart(cluster, front, running, tally)
            nursery.cancel_scope.cancel()
    return tally


async def registered(environment: Environment, driver: Driver, number: int) -> User:
    """Return a new user with a secret."""
    name = f"rolling-{time.time_ns()}-{number}"
    user = User(driver, name, environment.configuration, environment.tokens(name))
    result = await user.register(PIN, name.encode(), 5)
    if result.error is not None:
        raise RuntimeError(f"register: {result}")
    return user


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Restart every service in turn under load.")
    parser.add_argument("--agents", type=int, default=5)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--pause-s", type=float, default=0.1, help="of a user between two calls")
    parser.add_argument("--client", choices=["official", "own"], default="official")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rolling-") as directory:
        tally = trio.run(
            lambda: drill(
                Path(directory), agents=options.agents, groups=options.groups, users=options.users,
                rounds=options.rounds, official=options.client == "official", pause_s=options.pause_s,
            )
        )  # fmt: skip
    print(
        f"{len(tally.restarts_s)} restarts: ended within {max(tally.ends_s):.1f} s, whole again within "
        f"{max(tally.restarts_s):.1f} s at most; {tally.calls} calls, {len(tally.failures)} failures, slowest "
        f"{tally.slowest_ms:.0f} ms"
    )
    for line in tally.failures[:10]:
        print(line, file=sys.stderr)
    sys.exit(1 if tally.failures else 0)


if __name__ == "__main__":
    main()
