"""The tenant log of a running realm: complete, in order and nothing invented, whatever is killed meanwhile."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from juicebox_hsm.client import Client, ClientError, Configuration, HttpTransport, InvalidPin, NotRegistered
from juicebox_hsm.tenant_keys import event_user_id
from juicebox_hsm.tokens import Scope
from roles.tenant_log.service import WAIT_S
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import TENANT, TENANT_LOG, DemoOptions
from roles.tools.session import ToolFailure
from roles.tools.tenant_log.client import LogClient
from tests.patience import HANGS_S, PROGRAM_S

pytestmark = pytest.mark.processes

USERS = 12
OPERATIONS = 30
GUESSES = 60
SETTLE_S = HANGS_S
ATTEMPTS = 5  # a request of the client is tried this often, and each try may have been committed

Segment = tuple[str, int, int]
"""An event's letter, how often it must and may appear next."""
LETTERS = {"registered": "R", "guess_used": "G", "share_recovered": "S", "deleted": "D"}


def explained_by(op: str, outcome: str) -> list[Segment]:
    """Return what one operation of a client may leave in the log."""
    if outcome == "not registered":
        return []
    must = int(outcome != "unknown")
    match op:
        case "register":
            return [("R", must, ATTEMPTS)]
        case "delete":
            return [("D", must, ATTEMPTS)]
        case _ if outcome == "refused":
            return [("G", 1, ATTEMPTS)]
        case _:
            return [("G", must, ATTEMPTS), ("S", must, ATTEMPTS)]


def missing(events: str, segments: Sequence[Segment]) -> float:
    """Return how many events the history demands that are not there; infinite if some are there without reason."""
    costs: list[float] = [0.0] + [float("inf")] * len(events)
    for letter, least, most in segments:
        after = [float("inf")] * len(costs)
        for start, cost in enumerate(costs):
            for count in range(most + 1):
                if count and events[start + count - 1 : start + count] != letter:
                    break
                after[start + count] = min(after[start + count], cost + max(0, least - count))
        costs = after
    return costs[-1]


def test_the_comparison_can_fail() -> None:
    """Missing, invented and swapped events are told apart from a log that fits."""
    history = [*explained_by("register", "ok"), *explained_by("recover", "ok"), *explained_by("delete", "unknown")]
    assert missing("RGS", history) == 0
    assert missing("RRGGSD", history) == 0
    assert missing("RS", history) == 1
    assert missing("", history) == 3
    assert missing("RGSG", history) == float("inf")
    assert missing("GRS", history) == float("inf")


async def _live(client: Client, rng: random.Random, history: list[Segment]) -> None:
    """Run operations one after the other and keep what they may have left behind."""
    registered = False
    for _ in range(OPERATIONS):
        op = rng.choice(["register", "recover", "recover", "wrong", "delete"]) if registered else "register"
        outcome = "ok"
        try:
            match op:
                case "register":
                    await client.register(b"pin", b"secret", b"", GUESSES)
                    registered = True
                case "delete":
                    await client.delete()
                    registered = rng.random() < 0.3
                case _:
                    await client.recover(b"pin" if op == "recover" else b"wrong", b"")
        except InvalidPin:
            outcome = "refused"
        except NotRegistered:
            outcome = "not registered"
        except ClientError:
            outcome = "unknown"
            await trio.sleep(0.05)
        history += explained_by(op, outcome)


class Auditor:
    """Reads a tenant's log, acknowledging page by page, over whatever happens to the service."""

    def __init__(self, url: str, token: str) -> None:
        self._client = LogClient(url, token)
        self.events: dict[int, dict[str, Any]] = {}
        self.deliveries = 0
        self._acks: list[str] = []

    async def read(self) -> None:
        """Read one page."""
        try:
            page = await trio.to_thread.run_sync(self._client.pull, self._acks, 50)
        except ToolFailure:
            await trio.sleep(0.1)
            return
        self._acks = [event["ack"] for event in page]
        for event in page:
            body = {key: value for key, value in event.items() if key != "ack"}
            assert self.events.setdefault(event["seq"], body) == body, (
                "a repeated event differs from its first delivery"
            )
            self.deliveries += 1

    async def wait_for(self, count: int) -> None:
        """Wait until so many different events were seen."""
        while len(self.events) < count:  # noqa: ASYNC110 - a thread fills it
            await trio.sleep(0.05)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


async def _settled(cluster: Cluster) -> int:
    """Wait until every request has its row and every row is published; return how many rows have an event."""
    store, realm = cluster.session.store, cluster.realms[0]
    with trio.fail_after(SETTLE_S):
        while True:
            behind = 0
            for group in await store.log.list_groups(realm):
                last = await store.log.read_last(realm, group)
                settled = await store.outbox.settled(realm, group)
                behind += len(await store.log.read_intents(realm, group, settled + 1, last.index))
            if not behind and (await store.outbox.backlog(realm)).rows == 0:
                break
            await trio.sleep(0.1)
    rows = await store.outbox.read(realm, TENANT, 0, 100_000)
    return sum(row.new.event is not None for row in rows)


async def test_complete_while_agents_die(tmp_path: Path) -> None:
    """Hundreds of operations while leader and tenant log are killed: the log and the clients' history agree.

    Every committed register, guess, recovery and delete is there or covered by an `unknown` of that user; a user's
    events are in order; nothing is there without an operation that explains it; the guesses count without a gap.
    """
    options = DemoOptions(state_dir=tmp_path, agents=3, pin_hashing="FastInsecure")
    histories: dict[str, list[Segment]] = {f"user{number}": [] for number in range(USERS)}
    async with launch(options, on_exit=lambda _: None) as cluster:
        realm = cluster.realms[0]
        log = cluster.of_role(TENANT_LOG)[0]
        auditor = Auditor(log.service.url, cluster.token(realm, "auditor", Scope.AUDIT))
        async with HttpTransport(ca_file=cluster.state.edge_ca) as transport, trio.open_nursery() as background:

            async def audit() -> None:
                while True:
                    await auditor.read()

            background.start_soon(audit)
            async with trio.open_nursery() as nursery:
                for number, (user, history) in enumerate(histories.items()):
                    client = Client(
                        Configuration.from_json(cluster.configuration), {realm: cluster.token(realm, user)},
                        transport=transport,
                    )  # fmt: skip
                    nursery.start_soon(_live, client, random.Random(number), history)
                for pause_s in (0.4, 1.2):
                    await trio.sleep(pause_s)
                    view = await cluster.wait_leaders()
                    leader = next(group for group in view.groups.values() if group.owned_range is not None).leader
                    assert leader is not None
                    await cluster.process(leader.name).kill()
                    await log.kill()
                    await cluster.restart(leader.name)
                    await cluster.restart(log.service.name)
            expected = await _settled(cluster)
            with trio.fail_after(SETTLE_S):
                await auditor.wait_for(expected)
            await log.stop()  # which ends the auditor's waiting call
            background.cancel_scope.cancel()
        auditor.close()
    by_user: Mapping[str, list[dict[str, Any]]] = defaultdict(list)
    for _, event in sorted(auditor.events.items()):
        by_user[event["user_id"]].append(event)
    hashed = {event_user_id(TENANT, user): history for user, history in histories.items()}
    assert set(by_user) <= set(hashed)
    problems = []
    for user, history in hashed.items():
        unknown = sum(event["event"] == "unknown" for event in by_user[user])
        known = [event for event in by_user[user] if event["event"] != "unknown"]
        lacking = missing("".join(LETTERS[event["event"]] for event in known), history)
        jumps = _jumps(known)
        if lacking > unknown or jumps > unknown:
            problems.append((user[:8], lacking, jumps, unknown))
    assert not problems
    assert len(auditor.events) > USERS * OPERATIONS / 2


def _jumps(events: Sequence[Mapping[str, Any]]) -> int:
    """Count the places where a guess does not follow the one before it."""
    count = jumps = 0
    for event in events:
        if event["event"] == "guess_used":
            jumps += event["guess_count"] != count + 1
            count = event["guess_count"]
            assert event["num_guesses"] == GUESSES
        else:
            count = 0
    return jumps


async def test_commands(tmp_path: Path) -> None:
    """`tail` and `ack` as typed: lines, JSON, one user's events, exit codes; SIGTERM releases a waiting call."""
    options = DemoOptions(state_dir=tmp_path, pin_hashing="FastInsecure")
    async with launch(options, on_exit=lambda _: None) as cluster:
        realm, log = cluster.realms[0], cluster.of_role(TENANT_LOG)[0]
        await log.wait_listening()
        async with HttpTransport(ca_file=cluster.state.edge_ca) as transport:
            for user in ("mario", "luigi"):
                client = Client(
                    Configuration.from_json(cluster.configuration), {realm: cluster.token(realm, user)},
                    transport=transport,
                )  # fmt: skip
                await client.register(b"pin", b"secret", b"", 3)
        await _settled(cluster)
        where = ("--url", log.service.url, "--token-file", str(cluster.state.audit_token(realm)))

        async def tenant_log(*arguments: str, expect: int = 0) -> str:
            command = [sys.executable, "-m", "roles", "tenant-log", *arguments]
            done = await trio.to_thread.run_sync(
                partial(subprocess.run, command, capture_output=True, text=True, timeout=PROGRAM_S, check=False)
            )
            assert done.returncode == expect, done.stderr
            return done.stdout

        (first,) = (await tenant_log("tail", *where)).splitlines()
        assert first.split(", ")[2] == "registered"
        assert first.split(", ")[5] == event_user_id(TENANT, "mario")
        luigi = json.loads(await tenant_log("tail", *where, "--since-user", "luigi", "--json", "--ack"))
        assert luigi["user_id"] == event_user_id(TENANT, "luigi")
        assert await tenant_log("ack", *where, luigi["ack"]) == "acknowledged 1 events\n"
        await tenant_log("ack", *where, "nonsense", expect=1)
        await tenant_log("tail", "--url", log.service.url, "--token", "x", expect=1)
        await tenant_log("tail", "--url", "http://127.0.0.1:1", "--token", "x", expect=4)
        await tenant_log("tail", expect=2)

        reader = subprocess.Popen(  # noqa: ASYNC220 - brief
            [sys.executable, "-m", "roles", "tenant-log", "tail", *where, "--watch", "--ack"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert reader.stdout is not None
        line = await trio.to_thread.run_sync(reader.stdout.readline)
        assert event_user_id(TENANT, "mario") in line
        await trio.sleep(0.5)  # its next call waits for an event now
        begun = time.monotonic()
        await log.stop()
        assert log.exit_status == 0
        assert time.monotonic() - begun < WAIT_S * 3 / 4, "a waiting call held up the shutdown"
        reader.send_signal(signal.SIGINT)
        await trio.to_thread.run_sync(reader.wait, HANGS_S)
        reader.stdout.close()
