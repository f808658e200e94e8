"""Set one service's clock 25 minutes ahead, then behind, then all clocks an hour ahead, under the load of clients.

python -m tests.client.clocks --users 4

Each clock is wrong for a while and right again. Ends with 1 if any call failed or clients went without a success for
5 s, or if `cluster status` or the service's own log did not name the culprit within 15 s, or named anybody while all
agreed. Tokens are valid an hour before and most of a day after: those that are not would rightly be refused by a
balancer that believes its clock, which is why it must not be ready while it is outvoted.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from juicebox_hsm.adapters.faults.switch import ENVIRONMENT, NO_FAULTS, Faults
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import DemoOptions
from tests.client.drivers import Environment, own_driver
from tests.client.failover import PIN, Tally, loop_user, new_user
from tests.client.looking import page_of, status_of

OFF_MS = 25 * 60_000
HOUR_MS = 60 * 60_000
HOUR_S, DAY_S = 3_600, 86_400
GAP_S = 5.0
TOLD_S = 15.0
"""Agents ask each other every 10 s; a busy machine has the rest."""
LOOK_S = 0.5


class Drill:
    """One run: the realm, its users, and what went wrong."""

    def __init__(self, cluster: Cluster, tally: Tally, faults: Path) -> None:
        self.cluster = cluster
        self.tally = tally
        self.failures: list[str] = []
        self._faults = faults

    def set_clock(self, name: str, offset_ms: int) -> None:
        """Set the clock of one service, at once as it sees it."""
        path = self._faults / f"{name}.json"
        path.with_suffix(".new").write_text((NO_FAULTS if not offset_ms else Faults(offset_ms)).to_json())
        path.with_suffix(".new").rename(path)

    @asynccontextmanager
    async def clients_see_nothing(self, what: str) -> AsyncIterator[None]:
        """Check that no call fails in the block and that successes never stop for 5 s."""
        await self._success(what)
        self.tally.wrong.clear()
        self.tally.outcomes.clear()
        self.tally.successes.clear()
        began = trio.current_time()
        yield
        ended = trio.current_time()
        times = sorted([began, ended, *(at for _, at in self.tally.successes)])
        gap_s = max(after - before for before, after in itertools.pairwise(times))
        outcomes = dict(self.tally.outcomes)
        print(f"{what}: {ended - began:.1f} s, outcomes {outcomes}, longest gap {gap_s:.2f} s", flush=True)
        self.failures += [f"{what}: {line}" for line in self.tally.wrong]
        if gap_s > GAP_S or set(outcomes) - {"success"}:
            self.failures.append(f"{what}: {outcomes}, {gap_s:.1f} s without a success")

    async def _success(self, what: str) -> None:
        self.tally.success = trio.Event()
        with trio.move_on_after(GAP_S) as waiting:
            await self.tally.success.wait()
        if waiting.cancelled_caught:
            self.failures.append(f"before {what}: nothing served")

    async def told(self, what: str, wanted: str, unwanted: str = "") -> None:
        """Wait until `cluster status` says `wanted`, and nothing that is `unwanted`."""
        began, text = trio.current_time(), ""
        while trio.current_time() < began + TOLD_S:
            text = await status_of(self.cluster)
            if wanted in text and (not unwanted or unwanted not in text):
                print(f"  told after {trio.current_time() - began:.1f} s", flush=True)
                return
            await trio.sleep(LOOK_S)
        self.failures.append(f"{what}: status does not say {wanted!r}, or still {unwanted!r}: {text}")

    def count_logged(self, name: str) -> int:
        """Return how often a service has said that its clock is off."""
        return self.cluster.state.log(name).read_text(encoding="utf-8").count("this machine's clock is off, set it")

    async def logged(self, name: str, times: int) -> None:
        """Wait until a service has said so `times` times."""
        with trio.move_on_after(TOLD_S) as waiting:
            while self.count_logged(name) < times:  # noqa: ASYNC110 - another process' work
                await trio.sleep(LOOK_S)
        if waiting.cancelled_caught:
            self.failures.append(f"{name} does not log that its clock is off")

    async def one(self, name: str, offset_ms: int) -> None:
        """Set one clock and back."""
        running = self.cluster.process(name)
        way = "ahead of" if offset_ms > 0 else "behind"
        what = f"{name} 25 min {way}"
        async with self.clients_see_nothing(what):
            said = self.count_logged(name)
            self.set_clock(name, offset_ms)
            await self.told(what, f"{running.service.url}: its clock is 1,500 s {way} the others'")
            await self.logged(name, said + 1)
            if name.startswith("lb"):
                page = await page_of(running.service.http, "/readyz")
                if "good tokens may be refused" not in page:
                    self.failures.append(f"{what}: its /readyz says {page}")
        self.set_clock(name, 0)
        await self.told(f"{name} right again", "", "clock is")

    async def all_ahead(self) -> None:
        """Set all clocks an hour ahead, as a resumed machine's; ours stays, and is the only one that differs."""
        async with self.clients_see_nothing("all clocks +1 h"):
            for running in self.cluster.processes:
                self.set_clock(running.service.name, HOUR_MS)
            await self.told("all +1 h", "your clock is 3,600 s behind the others'", "its clock is")


async def drill(directory: Path, *, names: list[str], users: int, ways: tuple[int, ...] = (1, -1)) -> list[str]:
    """Run everything against a demo realm in `directory`; return what was wrong."""
    faults = directory / "faults"
    faults.mkdir()
    os.environ[ENVIRONMENT] = str(faults)  # for the services: each reads its own file there
    demo = DemoOptions(state_dir=directory / "demo", agents=3, managers=2, pin_hashing="FastInsecure", tenant_log=False)
    try:
        async with launch(demo, on_exit=lambda _: None) as cluster:
            environment = Environment.load(cluster.state.client_json)
            now_s = int(time.time())
            valid = {"iat": now_s - HOUR_S, "nbf": now_s - HOUR_S, "exp": now_s + DAY_S - HOUR_S}
            run = Drill(cluster, Tally(), faults)
            async with own_driver(environment.ca) as driver, trio.open_nursery() as nursery:
                for number in range(users):
                    user = new_user(environment, driver, number)
                    user = user.with_tokens(environment.tokens(user.name, **valid))
                    result = await user.register(PIN, user.name.encode(), 5)
                    if result.error is not None:
                        run.failures.append(f"register: {result}")
                    nursery.start_soon(loop_user, user, run.tally)
                for name in names:
                    for way in ways:
                        await run.one(name, way * OFF_MS)
                await run.all_ahead()
                nursery.cancel_scope.cancel()
            return run.failures
    finally:
        del os.environ[ENVIRONMENT]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Set clocks of a realm wrong under load.")
    parser.add_argument("--users", type=int, default=4)
    options = parser.parse_args()
    names = ["agent1", "agent2", "agent3", "manager1", "manager2", "lb1"]
    with tempfile.TemporaryDirectory(prefix="clocks-") as directory:
        failures = trio.run(lambda: drill(Path(directory), names=names, users=options.users))
    for line in failures[:20]:
        print(line, file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
