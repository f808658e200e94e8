"""Measure the internal RPC: CPU time and latency of a round trip, both ends in this process."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import trio

from juicebox_hsm.adapters.rpc import Caller, RpcPool, RpcServer, serve_rpc
from juicebox_hsm.adapters.tls.certificates import init_ca, issue
from juicebox_hsm.adapters.tls.cluster_tls import ClusterTls
from juicebox_hsm.wire.methods import Method
from juicebox_hsm.wire.rpc import App, AppOk, PeerRole

_ECHO = Method("echo", App, AppOk, frozenset(PeerRole))


@dataclass(frozen=True, slots=True)
class Figures:
    """Microseconds per call: CPU of client and server together, and wall-clock time."""

    cpu_us: float
    wall_us: float


async def _echo(body: App, _caller: Caller) -> AppOk:
    return AppOk(body.encrypted)


async def measure(tls: ClusterTls | None, calls: int, parallel: int, size_bytes: int) -> Figures:
    """Make `calls` round trips with `parallel` callers over loopback, plain without `tls`."""
    body = App(
        bytes(16), bytes(16), bytes(32), 1, handshake_only=False, encrypted=bytes(size_bytes), tenant="t", user="u"
    )
    async with trio.open_nursery() as nursery:

        async def start(task_status: trio.TaskStatus[RpcServer]) -> None:
            await serve_rpc(
                ("127.0.0.1", 0), tls=tls, methods={"echo": _ECHO}, handlers={"echo": _echo}, task_status=task_status
            )

        server: RpcServer = await nursery.start(start)
        pool = RpcPool(nursery, tls)
        url = f"{'tls' if tls is not None else 'tcp'}://127.0.0.1:{server.port}"

        async def caller(count: int) -> None:
            for _ in range(count):
                await pool.call(url, _ECHO, body, timeout_s=30.0)

        await caller(100)
        each = max(1, calls // parallel)
        cpu, wall = time.process_time(), time.perf_counter()
        async with trio.open_nursery() as callers:
            for _ in range(parallel):
                callers.start_soon(caller, each)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        nursery.cancel_scope.cancel()
    return Figures(cpu / (each * parallel) * 1e6, wall / (each * parallel) * 1e6)


@click.command("bench-rpc")
@click.option("--calls", default=20_000, show_default=True, type=click.IntRange(1), help="Round trips per line.")
@click.option(
    "--size", "size_bytes", default=2048, show_default=True, type=click.IntRange(0, 1 << 19), help="Bytes each way."
)
@click.option(
    "--parallel",
    multiple=True,
    default=(1, 8, 32, 128),
    type=click.IntRange(1, 4096),
    show_default=True,
    help="Callers; repeatable.",
)
def command(calls: int, size_bytes: int, parallel: tuple[int, ...]) -> None:
    """Print microseconds per RPC round trip over loopback, plain and with mutual TLS."""
    with tempfile.TemporaryDirectory() as directory:
        init_ca(Path(directory) / "ca")
        issue(Path(directory) / "ca", PeerRole.AGENT, "bench", Path(directory) / "agent")
        tls = ClusterTls.load(Path(directory) / "agent")
    print(f"{'':6}{'callers':>8}{'CPU us, both ends':>20}{'wall us per call':>20}")
    for label, context in (("plain", None), ("tls", tls)):
        for callers in parallel:
            figures = trio.run(measure, context, calls, callers, size_bytes)
            print(f"{label:6}{callers:>8}{figures.cpu_us:>20.1f}{figures.wall_us:>20.1f}")


if __name__ == "__main__":
    command()
