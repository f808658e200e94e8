"""States that a command must refuse in words: damaged backups, full disks, taken ports, secrets that are no files."""

from __future__ import annotations

import os
import resource
from functools import partial
from typing import Final

from roles.tools.demo.layout import HOST
from tests.client.bad_day.day import ONLY_SQLITE, Channel, Day, State, leave_alone
from tests.client.bad_day.listening import run_tool

FILE_BYTES_MAX: Final = 64 * 1024
"""Less than the store of a fresh realm."""
FLIPPED_BIT: Final = 0x10


async def _backup(day: Day, name: str, *, file_bytes_max: int | None = None) -> str:
    """Make a backup of the store; return what the command said."""
    limit = None
    if file_bytes_max is not None:
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (file_bytes_max, file_bytes_max))
    config = day.cluster.state.cluster_toml
    return await run_tool("store", "backup", "--config", str(config), str(day.directory / name), before=limit)


async def _restore_damaged(day: Day) -> None:
    await _backup(day, "backup.db")
    backup = day.directory / "backup.db"
    content = bytearray(backup.read_bytes())
    content[len(content) // 2] ^= FLIPPED_BIT
    backup.write_bytes(content)
    restored = day.directory / "restored.db"
    words = [f"--agent={running.service.url}" for running in day.cluster.of_role("agent")]
    tls = str(day.cluster.state.operator)
    output = await run_tool(
        "store", "restore", "--store", f"sqlite:{restored}", "--cluster-tls", tls, *words, str(backup)
    )
    day.tool_output += output.splitlines()
    if restored.exists():
        day.tool_output.insert(0, "a store was written from the damaged backup")


async def _backup_to_full_disk(day: Day) -> None:
    day.tool_output += (await _backup(day, "full.db", file_bytes_max=FILE_BYTES_MAX)).splitlines()


async def _demo_on_taken_ports(day: Day) -> None:
    port = day.cluster.of_role("agent")[0].service.port
    state = str(day.directory / "second")
    output = await run_tool("demo", "--state-dir", state, "--port-base", str(port), "--no-tenant-log")
    day.tool_output += output.splitlines()


async def _key_from_a_pipe(day: Day) -> None:
    """Start a second balancer like the first, whose key is a named pipe that nobody writes."""
    pipe = day.directory / "key.pipe"
    os.mkfifo(pipe)
    argv = list(day.cluster.of_role("lb")[0].service.argv)
    argv[argv.index("--tls-key") + 1] = str(pipe)
    argv[argv.index("--listen") + 1] = argv[argv.index("--http-listen") + 1] = f"{HOST}:0"
    day.tool_output += (await run_tool(*argv[argv.index("--role") :])).splitlines()


STATES: Final = (
    State(
        "backup-damaged",
        "one bit of a backup is flipped, and it is to be restored",
        {Channel.TOOL: r"digest|damaged|malformed"},
        _restore_damaged,
        leave_alone,
        stores=ONLY_SQLITE,
    ),
    State(
        "backup-disk-full",
        "a backup is written where no file may grow beyond 64 KiB",
        {Channel.TOOL: r"full\.db.*(too large|full|no space|limit)"},
        _backup_to_full_disk,
        leave_alone,
        stores=ONLY_SQLITE,
    ),
    State(
        "port-taken",
        "a second demo is started on ports that the first one has",
        {Channel.TOOL: r"in use"},
        _demo_on_taken_ports,
        leave_alone,
    ),
    State(
        "key-is-a-pipe",
        "a load balancer is started with a named pipe as its key",
        {Channel.TOOL: r"not a regular file|regular file"},
        _key_from_a_pipe,
        leave_alone,
    ),
)
