"""`cluster audit`: who changed what, when, and with what result (operator-tools.md 2, record 0035)."""

from __future__ import annotations

import datetime as dt
import time
from pathlib import Path
from typing import Any, Final

import click

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.host.audit import AuditEntry, Change, Result, changes
from roles.durations import parse_duration
from roles.tools.output import print_json, show_text
from roles.tools.session import Connection, ToolFailure, run, with_connection
from roles.words import moment

ENTRIES_MAX: Final = 20_000
"""The newest so many are read: some 10 MB."""
DEFAULT_SINCE: Final = "30d"


class SinceType(click.ParamType[int]):
    """A moment on the command line, as Unix ms: so long ago, or a UTC day or time."""

    name = "WHEN"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse, or fail as a usage error."""
        if isinstance(value, int):
            return value
        try:
            return max(0, time.time_ns() // 1_000_000 - round(parse_duration(value) * 1000))
        except ValueError:
            pass  # then it is a day or a time
        try:
            when = dt.datetime.fromisoformat(str(value))
        except ValueError:
            self.fail(f"{value!r} is neither a duration like 12h or 30d nor a UTC day like 2026-11-30", param, ctx)
        when = when.replace(tzinfo=dt.UTC) if when.tzinfo is None else when
        return max(0, round(when.timestamp() * 1000))


@click.command()
@click.option(
    "--since",
    "since_ms",
    type=SinceType(),
    default=DEFAULT_SINCE,
    show_default=True,
    help="From when on: a duration (so long ago), or a UTC day or time, 2026-11-30 or 2026-11-30T09:30.",
)
@click.option(
    "--ca",
    type=click.Path(path_type=Path, file_okay=False),
    help="Show instead what was done with the certificate authority in this directory.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@with_connection
def audit(connection: Connection, since_ms: int, ca: Path | None, *, as_json: bool) -> None:
    """Show who changed what, when, and with what result, the latest last.

    WHO is role and name of the certificate that gave the order. A result is `unknown` when the program that made the
    change ended before it could tell, or is still at it. Times are those of the clock of whoever recorded.
    """
    if ca is not None and not ca.is_dir():
        raise ToolFailure(f"--ca {ca}: no such directory", ExitCode.ID)
    entries = run(lambda: _read(connection, ca, since_ms))
    found = changes(entries)
    if len(entries) == ENTRIES_MAX:
        click.echo(f"warning: only the latest {len(found):,} changes are shown; give a later --since", err=True)
    if as_json:
        print_json({"since_ms": since_ms, "changes": [_json(change) for change in found]})
        return
    for change in found:
        click.echo(line(change))
    if not found:
        click.echo(f"no changes since {moment(since_ms):%Y-%m-%d %H:%M:%S} UTC", err=True)


async def _read(connection: Connection, ca: Path | None, since_ms: int) -> list[AuditEntry]:
    from juicebox_hsm.adapters.stores.opening import open_store
    from juicebox_hsm.adapters.tls.ca_trail import CaTrail

    if ca is not None:
        return await CaTrail(ca).read(since_ms, ENTRIES_MAX)
    async with open_store(connection.store, must_exist=True) as store:
        return await store.audit.read(since_ms, ENTRIES_MAX)


def line(change: Change) -> str:
    """Return a change as one line. Names and details are text of others, so nothing in it can move a cursor."""
    entry = change.entry
    began_ms = entry.when_ms if change.began_ms is None else change.began_ms
    who = entry.who or "(no certificate)"
    what = " ".join([entry.action, *(f"{name}={value}" for name, value in entry.arguments)])
    told = f"{moment(began_ms):%Y-%m-%d %H:%M:%S} {change.result.value:7} {who}: {what}"
    if entry.origin:
        told += f" (from {entry.origin}; by {entry.recorded_by})"
    if entry.detail:
        told += f": {entry.detail}" if change.result is Result.FAILED else f" -> {entry.detail}"
    return show_text(told)


def _json(change: Change) -> dict[str, Any]:
    entry = change.entry
    return {
        "id": entry.change.hex(),
        "began_ms": change.began_ms,
        "ended_ms": change.ended_ms,
        "who": entry.who or None,
        "origin": entry.origin or None,
        "recorded_by": entry.recorded_by,
        "action": entry.action,
        "arguments": dict(entry.arguments),
        "result": change.result.value,
        "detail": entry.detail or None,
    }
