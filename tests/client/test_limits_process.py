"""Real processes: rate limits over several balancers and agents, keys that rotate while clients are served, and logs
without secrets (agent.md 12, load-balancer.md 6 and 10)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import trio

from juicebox_hsm.client import (
    Client,
    Configuration,
    HttpTransport,
    RateLimitExceeded,
)
from juicebox_hsm.client.transport import Observation
from juicebox_hsm.ports import TenantLimits
from roles.tools.demo_launch import Cluster, launch
from roles.tools.demo_layout import TENANT, DemoOptions

pytestmark = pytest.mark.processes

PIN, INFO = b"1234", b"limits"
REACHES_ALL_S = 5.0  # agent.md 12: limits are read every 5 s
REREAD_S = 5.0  # load-balancer.md 7.3: the secrets file is read every 5 s
SLACK_S = 2.0  # of a busy machine
USERS = 12


async def eventually(holds: Callable[[], bool | Awaitable[bool]], within_s: float, what: str) -> float:
    """Wait until `holds`; returns how long that took, in seconds."""
    began = trio.current_time()
    while True:
        answer = holds()
        if answer is True or (not isinstance(answer, bool) and await answer):
            return trio.current_time() - began
        assert trio.current_time() - began < within_s, f"not within {within_s} s: {what}"
        await trio.sleep(0.05)


async def run_tool(*arguments: str) -> str:
    """Run a command of ours as an operator types it."""
    command = [sys.executable, "-m", "roles", *arguments]
    done = await trio.to_thread.run_sync(partial(subprocess.run, command, capture_output=True, text=True, timeout=60))
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout


@dataclass
class Seen:
    """What a user who recovers for ever has seen."""

    last: str = "nothing"
    successes: list[float] = field(default_factory=list)
    refusals: list[Observation] = field(default_factory=list)

    def observe(self, answer: Observation) -> None:
        if answer.status == 429:
            self.refusals.append(answer)


async def loop_user(cluster: Cluster, seen: Seen, number: int, task_status: trio.TaskStatus[None]) -> None:
    """Recover for ever through one of the balancers; only a reached limit is a reason to be refused."""
    balancers = cluster.of_role("lb")
    document = json.loads(json.dumps(cluster.configuration))
    for realm in document["realms"]:
        realm["address"] = balancers[number % len(balancers)].service.url
    tokens = {realm: cluster.token(realm, f"limits{number}") for realm in cluster.realms}
    async with HttpTransport(ca_file=cluster.state.edge_ca, observe=seen.observe) as transport:
        client = Client(Configuration.from_json(document), tokens, transport=transport)
        await client.register(PIN, b"secret", INFO, 2)
        task_status.started()
        while True:
            try:
                assert await client.recover(PIN, INFO) == b"secret"
            except RateLimitExceeded:
                seen.last = "refused"
                await trio.sleep(0.05)
            else:
                seen.last = "success"
                seen.successes.append(trio.current_time())


async def test_a_limit_holds_over_all_agents_and_balancers(tmp_path: Path) -> None:
    """A tenant's limit reaches every agent within 5 s, counts over all of them together, and ends as it came."""
    options = DemoOptions(
        state_dir=tmp_path, agents=3, groups=3, load_balancers=2, pin_hashing="FastInsecure", tenant_log=False
    )
    async with launch(options) as cluster, trio.open_nursery() as nursery:
        users = [Seen() for _ in range(USERS)]
        for number, seen in enumerate(users):
            await nursery.start(loop_user, cluster, seen, number)
        set_capacity = partial(
            run_tool, "cluster", "tenant", "set-capacity", "--config", str(cluster.state.cluster_toml)
        )

        def all_saw(last: str) -> bool:
            return all(seen.last == last for seen in users)

        await eventually(lambda: all_saw("success"), 10.0, "everybody is served without a limit")
        # As if the operator's command had reached nobody: the agents find it in the store by themselves.
        await cluster.session.store.tenants.put(TENANT, TenantLimits(0))
        await eventually(lambda: all_saw("refused"), REACHES_ALL_S + SLACK_S, "a blocked tenant is refused everywhere")
        served = sum(len(seen.successes) for seen in users)
        await trio.sleep(0.5)
        assert sum(len(seen.successes) for seen in users) == served, "blocked is blocked"

        assert (await set_capacity(TENANT, "10")).count("reloaded") == 3
        await trio.sleep(1.0)
        began = trio.current_time()
        await trio.sleep(3.0)
        rate = sum(sum(1 for at in seen.successes if at >= began) for seen in users) / (trio.current_time() - began)
        # Three leaders that did not know of each other would let 30 through. Gossip is 0.1 s behind.
        assert 4 <= rate <= 18, f"{rate:.1f} operations/s at a limit of 10"

        await set_capacity(TENANT, "100000")
        await eventually(lambda: all_saw("success"), SLACK_S, "the command itself tells the agents")
        nursery.cancel_scope.cancel()
    refusals = [answer for seen in users for answer in seen.refusals]
    assert refusals
    assert {dict(answer.headers).get("retry-after") for answer in refusals} == {"1"}
