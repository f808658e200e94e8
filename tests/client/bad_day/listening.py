"""Listen to everything that could name a state: probes, metrics, logs, `cluster status`, and a client."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import trio

from juicebox_hsm.client import Client, ClientError, Configuration, HttpTransport
from roles.tools.demo.launch import Cluster
from tests.client.bad_day.day import LISTEN_S, Channel, Day, Heard, State
from tests.client.looking import page_of

PIN: Final = b"1234"
SECRET: Final = b"its secret"
INFO: Final = b"bad day"
GUESSES: Final = 1000
"""Calls that fail in the middle cost guesses until one succeeds."""
PAUSE_S: Final = 0.3
"""Between two looks: fine enough for figures in tenths of a second, and light on a small machine."""
TEXT_CHARS_MAX: Final = 240
TOOL_S: Final = 60.0
"""A command that takes longer hangs; ten times what it takes on a busy machine."""


@dataclass
class User:
    """A client that recovers again and again. Times are in s of Trio's clock."""

    client: Client
    served: int = 0
    served_at: float = 0.0
    longest_s: float = 0.0
    begun_at: float | None = None
    failures: list[tuple[float, str]] = field(default_factory=list)

    async def call_for_ever(self) -> None:
        """Recover until cancelled; a wrong secret ends everything."""
        while True:
            begun = self.begun_at = trio.current_time()
            try:
                secret = await self.client.recover(PIN, INFO)
            except ClientError as error:
                self.failures.append((trio.current_time(), f"{type(error).__name__} {error}".strip()))
            else:
                assert secret == SECRET, "a wrong secret was recovered"
                self.served += 1
                self.served_at = trio.current_time()
            self.longest_s = max(self.longest_s, trio.current_time() - begun)
            self.begun_at = None
            await trio.sleep(PAUSE_S)

    def summary(self) -> str:
        """Return in a few words what it went through."""
        told = f"{self.served} calls served, {len(self.failures)} failed"
        if self.failures:
            told += f", the first with {self.failures[0][1]}"
        if self.begun_at is not None:
            waiting_s = trio.current_time() - self.begun_at
            self.longest_s = max(self.longest_s, waiting_s)
            told += f", one has waited {waiting_s:.1f} s"
        return told


async def run_tool(*words: str, before: Callable[[], object] | None = None) -> str:
    """Run a command of `juicebox-hsm`, after `before` in its process; return all it printed, errors too."""
    run = partial(
        subprocess.run,
        [sys.executable, "-m", "roles", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TOOL_S,
        preexec_fn=before,
    )
    return str((await trio.to_thread.run_sync(run)).stdout)


@asynccontextmanager
async def registered(cluster: Cluster) -> AsyncIterator[User]:
    """Register a user of the first realm and hand over its client."""
    realm = cluster.realms[0]
    async with HttpTransport(ca_file=cluster.state.edge_ca) as transport:
        configuration = Configuration.from_json(cluster.configuration)
        client = Client(configuration, {realm: cluster.token(realm, "bad-day")}, transport=transport)
        await client.register(PIN, SECRET, INFO, GUESSES)
        yield User(client)


class Ears:
    """Everything that can be listened to; made before the cause, so that only what is new afterwards counts."""

    def __init__(self, day: Day, user: User) -> None:
        self._day = day
        self._user = user
        self._sizes: dict[str, int] = {}

    def mark(self) -> None:
        """Take note of where the logs end now."""
        self._sizes = {path.name: path.stat().st_size for path in self._logs()}

    def _logs(self) -> list[Path]:
        return sorted((self._day.cluster.state.path / "logs").glob("*.log"))

    def _new_lines(self) -> list[str]:
        """Return the lines of all logs since `mark`, each led by the service's name."""
        lines: list[str] = []
        for path in self._logs():
            with path.open("rb") as file:
                file.seek(self._sizes.get(path.name, 0))
                text = file.read().decode("utf-8", "replace")
            lines += [f"{path.stem}: {line}" for line in text.splitlines()]
        return lines

    async def hear(self, state: State, caused_at: float) -> tuple[Heard, ...]:
        """Return what each channel of the state said, when all have or time is up."""
        found: dict[Channel, Heard] = {}
        looks: dict[Channel, Callable[[], Awaitable[list[str]]]] = {
            Channel.READY: lambda: self._pages("/readyz"),
            Channel.METRICS: lambda: self._pages("/metrics"),
            Channel.LOG: self._log_lines,
            Channel.STATUS: self._status,
            Channel.CLIENT: self._failures,
            Channel.TOOL: self._tool,
        }

        async def listen(channel: Channel, pattern: str) -> None:
            found[channel] = Heard(channel, None, "nothing")
            while True:
                lines = await looks[channel]()
                hit = next((line for line in lines if re.search(pattern, line)), None)
                after_s = None if hit is None else round(trio.current_time() - caused_at, 1)
                shown = hit if hit is not None else _telling(channel, lines)
                found[channel] = Heard(channel, after_s, shown[:TEXT_CHARS_MAX])
                if hit is not None:
                    return
                await trio.sleep(PAUSE_S)

        with trio.move_on_at(caused_at + LISTEN_S):
            async with trio.open_nursery() as nursery:
                for channel, pattern in state.says.items():
                    nursery.start_soon(listen, channel, pattern)
        return tuple(found[channel] for channel in state.says)

    async def _pages(self, path: str) -> list[str]:
        """Return the lines of all services' pages, each led by the service's name."""
        lines: list[str] = []

        async def look(name: str, address: str) -> None:
            try:
                page = await page_of(address, path)
            except OSError:
                return  # it does not run
            lines.extend(f"{name}: {line}" for line in page.splitlines())

        async with trio.open_nursery() as nursery:
            for running in self._day.cluster.processes:
                nursery.start_soon(look, running.service.name, running.service.http)
        return lines

    async def _log_lines(self) -> list[str]:
        await trio.lowlevel.checkpoint()
        return self._new_lines()

    async def _status(self) -> list[str]:
        config = str(self._day.cluster.state.cluster_toml)
        done = await run_tool("cluster", "status", "--config", config)
        return [line.strip() for line in done.splitlines() if line.strip()]

    async def _failures(self) -> list[str]:
        await trio.lowlevel.checkpoint()
        return [text for _, text in self._user.failures]

    async def _tool(self) -> list[str]:
        await trio.lowlevel.checkpoint()
        return list(self._day.tool_output)

    async def not_ready(self) -> str:
        """Return what the first service says that is not ready, "" when all are."""
        for running in self._day.cluster.processes:
            try:
                page = await page_of(running.service.http, "/readyz")
            except OSError as error:
                page = str(error)
            if not page.startswith("ready"):
                return f"{running.service.name}: {page[:TEXT_CHARS_MAX]}"
        return ""


def _telling(channel: Channel, lines: list[str]) -> str:
    """Return what a channel that does not name the state says instead."""
    if channel is Channel.METRICS:
        return f"{len(lines)} lines"
    if channel is Channel.READY:
        lines = [line for line in lines if ": ready" not in line] or lines
    if channel is Channel.STATUS:
        lines = [line for line in lines if "PROBLEM" in line] or lines
    return " | ".join(lines[-2:]) or "nothing"
