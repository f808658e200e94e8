"""Compare the tenant log with the clients' history under chaos: every guess is there, none is invented.

python -m tests.client.audit --operations 10000 --store sqlite

Users register, recover with right and wrong PINs and delete. Meanwhile leaders and dispatchers are killed, and Pub/Sub
is stopped: once with SIGSTOP, and once for --stop-s seconds with everything it held. As the emulator forgets what it
held, agents are cut off from it first and readers get to read what is there; the service itself forgets nothing. When
all is healed every user looks once more, so that an event that nothing followed is missed, too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

import trio

from juicebox_hsm.client import (
    Client,
    Configuration,
    HttpTransport,
    InvalidPin,
    NotRegistered,
    Transient,
)
from juicebox_hsm.host.events import EventKind
from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.store import Store
from roles.tools.chaos.load import CountingTransport
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import TENANT, TENANT_LOG, DemoOptions
from roles.tools.demo.processes import RunningService
from roles.tools.demo.pubsub import PubSubEmulator, flags_of
from tests.client.audit_match import Logged, Made, deliveries_problems, match_problems
from tests.client.audit_totals import Totals, totals_problems
from tests.client.failover import kill_leader

READERS: Final = 2
PAGE: Final = 100
ROWS: Final = 1000
DAY_MS: Final = 86_400_000
QUIET_S: Final = 12.0
"""Longer than what is out stays out: when nothing came for so long, everything was read."""
DRAIN_S: Final = 300.0
GUESSES: Final = 5
INFO: Final = b"audit"


class Gate:
    """A forwarder between agents and the emulator that can be shut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open = True
        self._scopes: set[trio.CancelScope] = set()

    def shut(self) -> None:
        """Refuse connections and reset those there are."""
        self._open = False
        for scope in self._scopes:
            scope.cancel()

    def reopen(self) -> None:
        """Let connections through again."""
        self._open = True

    async def serve(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Forward; the started value is the port."""
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        task_status.started(listener.socket.getsockname()[1])
        await trio.serve_listeners(self._forward, [listener])

    async def _forward(self, near: trio.SocketStream) -> None:
        if not self._open:
            return
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                far = await trio.open_tcp_stream("127.0.0.1", self._port)
                async with far, trio.open_nursery() as nursery:
                    nursery.start_soon(_copy, near, far, scope)
                    nursery.start_soon(_copy, far, near, scope)
            except* OSError:
                pass  # the emulator is down
            finally:
                self._scopes.discard(scope)


async def _copy(source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope) -> None:
    try:
        async for chunk in source:
            await sink.send_all(chunk)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    scope.cancel()


@dataclass
class Seen:
    """What readers got, per user in the order it came."""

    deliveries: dict[str, list[Logged]] = field(default_factory=lambda: defaultdict(list))
    count: int = 0
    troubles: Counter[str] = field(default_factory=Counter)
    latest: float = 0.0

    async def quiet(self) -> None:
        """Wait until nothing came for `QUIET_S`."""
        began = trio.current_time()
        while (left_s := max(self.latest, began) + QUIET_S - trio.current_time()) > 0:  # noqa: ASYNC110 - time is it
            await trio.sleep(left_s)


async def read_log(url: str, token: str, seen: Seen) -> None:
    """Read and acknowledge for ever, as a tenant does over HTTP."""

    def post(body: dict[str, Any]) -> Any:
        headers = {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(f"{url}/tenant_log", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    acks: list[str] = []
    while True:
        try:
            ask = {"acks": acks, "page_size": PAGE}
            events = (await trio.to_thread.run_sync(post, ask, abandon_on_cancel=True))["events"]
        except (urllib.error.URLError, OSError, ValueError) as error:
            seen.troubles[str(error)] += 1
            await trio.sleep(0.5)
            continue
        acks = [event["ack"] for event in events]
        for event in events:
            counts = (event.get("num_guesses"), event.get("guess_count"))
            seen.deliveries[event["user_id"]].append(Logged(event["seq"], event["ref"], event["event"], *counts))
            seen.count += 1
            seen.latest = trio.current_time()


@dataclass
class Load:
    """The calls of all users, and how many are left to begin."""

    left: int
    pause_s: float
    made: dict[str, list[Made]] = field(default_factory=lambda: defaultdict(list))
    outcomes: Counter[str] = field(default_factory=Counter)

    async def user(self, name: str, client: Client, transport: CountingTransport, random: Random) -> None:
        """Call until enough calls were begun."""
        while self.left > 0:
            self.left -= 1
            op = random.choices(["register", "right", "wrong", "delete"], [3, 6, 3, 1])[0]
            await self.call(name, client, transport, op)
            await trio.sleep(random.uniform(0, 2 * self.pause_s))

    async def look(self, name: str, client: Client, transport: CountingTransport) -> None:
        """Spend a guess until the user saw how its record is; what that takes is part of its calls."""
        while await self.call(name, client, transport, "wrong") == "lost":
            pass

    async def call(self, name: str, client: Client, transport: CountingTransport, op: str) -> str:
        """Make one call and remember it; returns its outcome."""
        pin = b"1"
        transport.begin()
        outcome, left = "success", None
        try:
            if op == "register":
                await client.register(pin, b"secret", INFO, GUESSES)
            elif op == "delete":
                await client.delete()
            else:
                await client.recover(pin if op == "right" else b"0", INFO)
        except InvalidPin as error:
            outcome, left = "wrong", error.guesses_remaining
        except NotRegistered:
            outcome = "none"
        except Transient:
            outcome = "lost"
        op = "recover" if op in {"right", "wrong"} else op
        counted = transport.lost
        self.made[name].append(Made(op, outcome, len(counted) - 1, sum(counted), left))
        self.outcomes[f"{op} {outcome}"] += 1
        return outcome


class Trouble:
    """What is done to the realm."""

    def __init__(self, cluster: Cluster, emulator: PubSubEmulator, gate: Gate, seen: Seen, stop_s: float) -> None:
        self.cluster = cluster
        self.emulator = emulator
        self.gate = gate
        self.seen = seen
        self.stop_s = stop_s
        self.done: Counter[str] = Counter()
        self._began = trio.current_time()

    def say(self, what: str) -> None:
        """Count and tell."""
        self.done[what] += 1
        print(f"{trio.current_time() - self._began:6.1f} s  {what}", flush=True)

    async def kill_agents(self, load: Load) -> None:
        """Kill leaders and dispatchers in turn while there is load."""
        while load.left > 0:
            await trio.sleep(7)
            for kill in (self._kill_leader, self._kill_dispatcher):
                with trio.move_on_after(20):
                    name = await kill()
                    if name is not None:
                        await trio.sleep(1)
                        await self.cluster.restart(name)
                await trio.sleep(7)

    async def _kill_leader(self) -> str | None:
        name = await kill_leader(self.cluster)
        self.say("leader killed")
        return name

    async def _kill_dispatcher(self) -> str | None:
        leases = await self.cluster.session.store.leases.list()
        now_ms = self.cluster.session.now_ms()
        for lease in leases:
            if lease.name.endswith("-outbox") and lease.expires_ms >= now_ms:
                await self.cluster.process(lease.owner).kill()
                self.say("dispatcher killed")
                return str(lease.owner)
        return None

    async def stop_bus(self) -> None:
        """Pause the emulator, then end it for a minute."""
        await trio.sleep(15)
        self.say("Pub/Sub paused for 10 s")
        self.emulator.signal(signal.SIGSTOP)
        await trio.sleep(10)
        self.emulator.signal(signal.SIGCONT)
        await trio.sleep(15)
        self.gate.shut()
        self.say("Pub/Sub cut off")
        await self.seen.quiet()
        self.emulator.stop()
        self.say(f"Pub/Sub killed for {self.stop_s:g} s")
        await trio.sleep(self.stop_s)
        self.emulator = PubSubEmulator(self.emulator.port)
        await trio.to_thread.run_sync(self.emulator.wait_started)
        self.gate.reopen()
        self.say("Pub/Sub started again")


async def wait_published(store: Store, realm: RealmId) -> None:
    """Wait until every outcome is in the outbox, also the unknown ones, and nothing waits there any more."""
    with trio.fail_after(DRAIN_S):
        while await _are_unsettled(store, realm) or (await store.outbox.backlog(realm)).rows:  # noqa: ASYNC110
            await trio.sleep(0.5)  # it is other processes' work


async def _are_unsettled(store: Store, realm: RealmId) -> bool:
    """Tell whether requests are in a log whose outcome need not be in the outbox yet."""
    for group in await store.log.list_groups(realm):
        last = await store.log.read_last(realm, group)
        settled = await store.outbox.settled(realm, group)
        if last is not None and await store.log.read_intents(realm, group, settled + 1, last.index):
            return True
    return False


async def read_totals(store: Store, realm: RealmId) -> Totals:
    """Return what the store adds up once nothing waits."""
    counters: Counter[EventKind] = Counter()
    for day in (await store.outbox.counters(realm, TENANT)).values():
        counters.update(day)
    (cursor,) = await store.outbox.cursors(realm)
    kept: Counter[EventKind] = Counter()
    after = 0
    while page := await store.outbox.read(realm, TENANT, after, ROWS):
        kept.update(row.new.kind for row in page if row.new.event is not None)
        after = page[-1].seq
    tomorrow_ms = (int(time.time() * 1000) // DAY_MS + 1) * DAY_MS  # who has a secret then has it now
    users = await store.accounting.count_users(realm, tomorrow_ms, tomorrow_ms + DAY_MS)
    return Totals(counters, cursor.tail, kept, users.get(TENANT, 0))


async def audit(options: argparse.Namespace, directory: Path) -> int:
    """Run everything and print what was found; returns the exit status."""
    emulator = PubSubEmulator()
    gate = Gate(emulator.port)
    seen, load = Seen(), Load(options.operations, options.users * options.duration / options.operations / 1.3)
    trouble: Trouble | None = None
    try:
        emulator.wait_started()
        async with trio.open_nursery() as nursery:
            port: int = await nursery.start(gate.serve)
            demo = DemoOptions(
                state_dir=directory,
                agents=3,
                managers=2,
                pin_hashing="FastInsecure",
                store=options.store,
                bus="embedded",  # ours, through the gate
                extra_flags={"agent": flags_of(f"127.0.0.1:{port}"), TENANT_LOG: flags_of(emulator.address)},
            )
            async with launch(demo, on_exit=_note_exit) as cluster:
                (realm,) = cluster.realms
                (log,) = cluster.of_role(TENANT_LOG)
                await log.wait_listening()
                token = cluster.state.audit_token(realm).read_text(encoding="utf-8").strip()
                for _ in range(READERS):
                    nursery.start_soon(read_log, log.service.url, token, seen)
                trouble = Trouble(cluster, emulator, gate, seen, options.stop_s)
                began = trio.current_time()
                await _run_load(cluster, load, trouble, options)
                took_s = trio.current_time() - began
                await wait_published(cluster.session.store, realm)
                await seen.quiet()
                totals = await read_totals(cluster.session.store, realm)
            nursery.cancel_scope.cancel()
    finally:
        (trouble.emulator if trouble else emulator).stop()
    return report(options, load, seen, trouble, totals, took_s)


def _note_exit(running: RunningService) -> None:
    print(f"{running.service.name} ended or runs again, status {running.exit_status}", file=sys.stderr)


async def _run_load(cluster: Cluster, load: Load, trouble: Trouble, options: argparse.Namespace) -> None:
    configuration = Configuration.from_json(json.dumps(cluster.configuration))
    async with HttpTransport(ca_file=cluster.state.edge_ca, connections_per_host_max=options.users + 8) as shared:
        users = []
        for number in range(options.users):
            name = f"audit{number}"
            transport = CountingTransport(shared)
            tokens = {realm: cluster.token(realm, name) for realm in cluster.realms}
            users.append((name, Client(configuration, tokens, transport=transport), transport))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trouble.stop_bus)
            nursery.start_soon(trouble.kill_agents, load)
            for user in users:
                nursery.start_soon(load.user, *user, Random(f"{options.seed}:{user[0]}"))
        with trio.fail_after(DRAIN_S):
            async with trio.open_nursery() as nursery:
                for user in users:
                    nursery.start_soon(load.look, *user)


def report(options: argparse.Namespace, load: Load, seen: Seen, trouble: Trouble, totals: Totals, took_s: float) -> int:
    """Compare, print, and return the exit status."""
    problems = deliveries_problems(seen.deliveries) + totals_problems(load.made, seen.deliveries, totals)
    names = {hashlib.sha256(f"{TENANT}:{name}".encode()).hexdigest(): name for name in load.made}
    for user, came in seen.deliveries.items():
        if user in names:
            problems += match_problems(names[user], load.made[names[user]], came)
        else:
            problems.append(f"events of {user}, whom nobody knows: {came[:3]}")
    for user, name in names.items():
        if user not in seen.deliveries:
            problems += match_problems(name, load.made[name], [])
    distinct = {logged.seq: logged for came in seen.deliveries.values() for logged in came}
    events = Counter(logged.event for logged in distinct.values())
    calls = sum(len(made) for made in load.made.values())
    print(f"store {options.store}, seed {options.seed}: {calls} operations in {took_s:.0f} s by {len(load.made)} users")
    print(f"  trouble: {dict(trouble.done)}")
    print(f"  calls: {dict(sorted(load.outcomes.items()))}")
    print(f"  attempts without an answer: {sum(call.lost for made in load.made.values() for call in made)}")
    print(f"  requests counted: {dict(sorted((kind.value, count) for kind, count in totals.counters.items()))}")
    print(f"  users with a secret: {totals.users}")
    print(f"  events: {dict(sorted(events.items()))}, {seen.count} deliveries of {len(distinct)} numbers")
    print(f"  readers' troubles: {dict(seen.troubles)}")
    print(f"  problems: {len(problems)}")
    for problem in problems[:20]:
        print(f"  PROBLEM: {problem}")
    return 1 if problems or calls < options.operations + options.users else 0


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Compare the tenant log with the clients' history under chaos.")
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--store", choices=["sqlite", "bigtable"], default="sqlite")
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--duration", type=float, default=180.0, help="about how long the load shall take, in seconds")
    parser.add_argument("--stop-s", type=float, default=60.0, help="how long Pub/Sub is gone")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="audit-") as directory:
        sys.exit(trio.run(audit, options, Path(directory)))


if __name__ == "__main__":
    main()
