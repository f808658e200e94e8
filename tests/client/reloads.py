"""Reload the edge certificate of a balancer under load: new pairs, and pairs that do not match, by turns.

python -m tests.client.reloads --reloads 50 --users 16

Users recover all the while, half of them with a new connection for every request. Ends with 1 if any HTTP request
failed (also one that the client would have repeated), a new pair was not in service within a second, or a wrong pair
was put in service or not reported.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import ssl
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import trio

from juicebox_hsm.adapters.tls.certificates import issue_edge
from juicebox_hsm.client import Client, Configuration, HttpTransport
from juicebox_hsm.client.transport import Headers, TransportError
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import EDGE_HOSTS, DemoOptions

PIN, INFO = b"1234", b"reloads"
IN_SERVICE_S = 1.0
WRONG_EVERY = 5


@dataclass
class Tally:
    """What all users saw."""

    requests: int = 0
    recovers: int = 0
    failures: list[str] = field(default_factory=list)
    slowest_ms: float = 0.0
    waits_ms: list[float] = field(default_factory=list)
    wrong_pairs: int = 0


class StrictTransport:
    """Passes requests on and takes note of every one that had no good answer."""

    def __init__(self, inner: HttpTransport, tally: Tally) -> None:
        self._inner = inner
        self._tally = tally

    async def post(self, url: str, headers: Headers, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Pass one request on."""
        self._tally.requests += 1
        try:
            status, answer = await self._inner.post(url, headers, body, timeout_s)
        except TransportError as error:
            self._tally.failures.append(str(error))
            raise
        if status != 200:
            self._tally.failures.append(f"status {status}")
        return status, answer


async def loop_user(cluster: Cluster, tally: Tally, number: int, task_status: trio.TaskStatus[None]) -> None:
    """Register, then recover for ever."""
    tokens = {realm: cluster.token(realm, f"reloads{number}") for realm in cluster.realms}
    async with HttpTransport(ca_file=cluster.state.edge_ca, reuse=number % 2 == 0) as transport:
        strict = StrictTransport(transport, tally)
        client = Client(Configuration.from_json(cluster.configuration), tokens, transport=strict)
        await client.register(PIN, b"secret", INFO, 2)
        task_status.started()
        while True:
            began = trio.current_time()
            if await client.recover(PIN, INFO) != b"secret":
                tally.failures.append("wrong secret")
            tally.recovers += 1
            tally.slowest_ms = max(tally.slowest_ms, (trio.current_time() - began) * 1000)


def serial_in_service(cluster: Cluster) -> str:
    """Return the serial number of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=str(cluster.state.edge_ca))
    port = cluster.process("lb1").service.port
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as tcp,
        context.wrap_socket(tcp, server_hostname="localhost") as tls,
    ):
        certificate = tls.getpeercert()
    return str((certificate or {}).get("serialNumber"))


async def reload_once(cluster: Cluster, tally: Tally, turn: int) -> None:
    """Put a new pair into service; at every fifth turn try one whose key belongs to another certificate first."""
    edge = cluster.state.path / "edge"
    pid = cluster.process("lb1").pid
    assert pid is not None
    before = await trio.to_thread.run_sync(serial_in_service, cluster)
    issue_edge(cluster.state.path / "ca" / "edge", EDGE_HOSTS, edge / "new.pem", edge / "new.key")
    (edge / "new.key").replace(edge / "key.pem")
    if turn % WRONG_EVERY == 0:
        tally.wrong_pairs += 1
        os.kill(pid, signal.SIGHUP)
        for _ in range(50):  # a second
            await trio.sleep(IN_SERVICE_S / 50)
            if complaints(cluster) == tally.wrong_pairs:
                break
        if complaints(cluster) != tally.wrong_pairs:
            tally.failures.append(f"reload {turn}: the log says nothing about a pair that does not match")
        if await trio.to_thread.run_sync(serial_in_service, cluster) != before:
            tally.failures.append(f"reload {turn}: a pair that does not match took the place of a good one")
    (edge / "new.pem").replace(edge / "cert.pem")
    began = trio.current_time()
    os.kill(pid, signal.SIGHUP)
    while await trio.to_thread.run_sync(serial_in_service, cluster) == before:
        if trio.current_time() - began > IN_SERVICE_S:
            tally.failures.append(f"reload {turn}: the new pair is not in service after {IN_SERVICE_S} s")
            return
        await trio.sleep(0.01)
    tally.waits_ms.append((trio.current_time() - began) * 1000)


def complaints(cluster: Cluster) -> int:
    """Count the log's lines about pairs that do not match."""
    return cluster.state.log("lb1").read_text(encoding="utf-8").count("does not match the first certificate")


async def drill(directory: Path, *, reloads: int, users: int, pause_s: float = 0.2) -> Tally:
    """Run the reloads against a demo realm in `directory`."""
    tally = Tally()
    async with launch(DemoOptions(state_dir=directory, pin_hashing="FastInsecure", tenant_log=False)) as cluster:
        balancer = cluster.process("lb1").pid
        async with trio.open_nursery() as nursery:
            for number in range(users):
                await nursery.start(loop_user, cluster, tally, number)
            for turn in range(1, reloads + 1):
                await reload_once(cluster, tally, turn)
                await trio.sleep(pause_s)
            nursery.cancel_scope.cancel()
        if cluster.process("lb1").pid != balancer or not cluster.process("lb1").is_running:
            tally.failures.append("the balancer ended")
    return tally


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Reload certificates under load.")
    parser.add_argument("--reloads", type=int, default=50)
    parser.add_argument("--users", type=int, default=16)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        tally = trio.run(lambda: drill(Path(directory), reloads=options.reloads, users=options.users))
    print(
        f"{options.reloads} reloads and {tally.wrong_pairs} wrong pairs in {time.monotonic() - began:.0f} s: "
        f"{tally.requests} requests, {tally.recovers} recovers, {len(tally.failures)} failures, slowest recover "
        f"{tally.slowest_ms:.0f} ms; in service after {max(tally.waits_ms, default=0):.0f} ms at most"
    )
    for line in tally.failures[:10]:
        print(line, file=sys.stderr)
    sys.exit(1 if tally.failures else 0)


if __name__ == "__main__":
    main()
