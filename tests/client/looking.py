"""What an operator sees of a running demo: pages of its services, and commands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from urllib.error import HTTPError
from urllib.request import urlopen

import trio

from roles.tools.demo.launch import Cluster


def _page(http: str, path: str) -> str:
    try:
        with urlopen(f"http://{http}{path}", timeout=5) as page:
            return str(page.read().decode())
    except HTTPError as error:
        return error.read().decode()


async def page_of(http: str, path: str) -> str:
    """Return a page of the service at `http`, whatever its status."""
    return await trio.to_thread.run_sync(_page, http, path)


async def status_of(cluster: Cluster) -> str:
    """Return what `cluster status` prints."""
    command = [sys.executable, "-m", "roles", "cluster", "status", "--config", str(cluster.state.cluster_toml)]
    done = await trio.to_thread.run_sync(partial(subprocess.run, command, capture_output=True, text=True, timeout=60))
    return str(done.stdout)


async def eventually(holds: Callable[[], Awaitable[bool]], within_s: float, what: str) -> None:
    """Wait until `holds`; fails after `within_s`."""
    with trio.move_on_after(within_s) as waiting:
        while not await holds():  # noqa: ASYNC110 - what is looked at are other processes
            await trio.sleep(0.1)
    assert not waiting.cancelled_caught, f"not within {within_s} s: {what}"
