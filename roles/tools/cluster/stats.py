"""`cluster table-stats`, `user-summary`, `request-counts`: what the store holds (operator-tools.md 2.3, 2.6)."""

from __future__ import annotations

import csv
import datetime as dt
import io
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import click

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.store import Store
from juicebox_hsm.ports.table_stats import TableStats
from roles.lazy import LazyCommand, LazyGroup
from roles.tools.ids import resolve_id
from roles.tools.output import print_json, print_table
from roles.tools.session import Connection, ToolFailure, run, with_connection

T = TypeVar("T")

PREFIXES_MAX: Final = 20
RETENTION_DAYS: Final = 116  # accounting keeps every event that long (storage.md 4.6)
_DAY: Final = dt.timedelta(days=1)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def _scan(connection: Connection, text: str, read: Callable[[TableStats, RealmId], Awaitable[T]]) -> tuple[RealmId, T]:
    """Open the store, find the realm by id or prefix, and run a scan."""
    from juicebox_hsm.adapters.stores.opening import open_store

    async def main() -> tuple[RealmId, T]:
        async with open_store(connection.store, must_exist=True) as store:
            if store.stats is None:
                raise ToolFailure(f"{store.description}: this store keeps no statistics")
            realm = RealmId(resolve_id(text, await store.realms.list_realms(), "realm"))
            if realm not in await store.realms.list_realms():
                raise ToolFailure(f"realm {realm.hex()} is not in this store", ExitCode.ID)
            if sys.stderr.isatty():
                click.echo("scanning ...", err=True)
            return realm, await read(store.stats, realm)

    return run(main)


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


@click.command("log")
@click.argument("realm")
@json_option
@with_connection
def log_stats(connection: Connection, realm: str, *, as_json: bool) -> None:
    """Show what each group's log holds in the store. Reads the whole log; may be slow, changes nothing."""
    found, groups = _scan(connection, realm, lambda stats, wanted: stats.log(wanted))
    if as_json:
        print_json(
            {
                "realm": found.hex(),
                "groups": [
                    {
                        "id": group.group.hex(),
                        "first_index": group.first_index,
                        "last_index": group.last_index,
                        "rows": group.rows,
                        "entries": group.entries,
                        "tombstones": group.tombstones,
                        "expired_tombstones": group.expired_tombstones,
                        "size_bytes": group.size_bytes,
                    }
                    for group in groups
                ],
            }
        )
        return
    rows = []
    for group in groups:
        share = f" ({100 * group.expired_tombstones // group.tombstones} % expired)" if group.tombstones else ""
        indexes = "" if group.first_index is None else f"{_number(group.first_index)}-{_number(group.last_index)}"
        cells = (_number(group.rows), _number(group.entries), f"{_number(group.tombstones)}{share}")
        rows.append((group.group.hex(), indexes, *cells, _number(group.size_bytes)))
    print_table(["Group ID", "Indexes", "Rows", "Entries", "Tombstones", "Bytes"], rows, right=range(1, 6))


@click.command("merkle")
@click.argument("realm")
@json_option
@with_connection
def merkle_stats(connection: Connection, realm: str, *, as_json: bool) -> None:
    """Count the tree nodes of a realm. Reads all of them; may be slow, changes nothing."""
    found, tree = _scan(connection, realm, lambda stats, wanted: stats.tree(wanted, PREFIXES_MAX))
    if as_json:
        print_json(
            {
                "realm": found.hex(),
                "leaves": tree.leaves,
                "interior": tree.interior,
                "roots": tree.roots,
                "rows": tree.rows,
                "size_bytes": tree.size_bytes,
                "prefixes": [
                    {
                        "prefix": prefix.prefix,
                        "nodes": prefix.nodes,
                        "oldest_ms": prefix.oldest_ms,
                        "newest_ms": prefix.newest_ms,
                    }
                    for prefix in tree.prefixes
                ],
            }
        )
        return
    click.echo(f"nodes:    {_number(tree.leaves + tree.interior + tree.roots)} in {_number(tree.rows)} rows")
    click.echo(f"leaves:   {_number(tree.leaves)}")
    click.echo(f"interior: {_number(tree.interior)}")
    click.echo(f"roots:    {_number(tree.roots)} (normally no more than groups that own a range)")
    click.echo(f"bytes:    {_number(tree.size_bytes)}")
    if tree.prefixes:
        click.echo(f"the {len(tree.prefixes)} prefixes with most nodes:")
        rows = [
            (prefix.prefix, _number(prefix.nodes), _time(prefix.oldest_ms), _time(prefix.newest_ms))
            for prefix in tree.prefixes
        ]
        columns = ["Prefix", "Nodes", "Oldest", "Newest"]
        kept = len(columns) if any(prefix.newest_ms is not None for prefix in tree.prefixes) else 2
        print_table(columns[:kept], [row[:kept] for row in rows], right=[1])


def _time(value_ms: int | None) -> str:
    return "" if value_ms is None else f"{dt.datetime.fromtimestamp(value_ms / 1000, dt.UTC):%Y-%m-%d %H:%M:%S}"


@click.command("users")
@click.argument("realm")
@json_option
@with_connection
def users_stats(connection: Connection, realm: str, *, as_json: bool) -> None:
    """Count the accounting rows of a realm by tenant. Reads all of them; may be slow, changes nothing."""
    found, tenants = _scan(connection, realm, lambda stats, wanted: stats.users(wanted))
    if as_json:
        print_json(
            {
                "realm": found.hex(),
                "tenants": [
                    {"tenant": entry.tenant, "rows": entry.rows, "records": entry.records} for entry in tenants
                ],
            }
        )
        return
    rows = [(entry.tenant, _number(entry.rows), _number(entry.records)) for entry in tenants]
    print_table(["Tenant", "Rows", "Records"], rows, right=[1, 2])


@click.group(
    cls=LazyGroup,
    lazy={
        "log": LazyCommand(__name__, "Rows and entries of each group's log.", "log_stats"),
        "merkle": LazyCommand(__name__, "Tree nodes.", "merkle_stats"),
        "users": LazyCommand(__name__, "Accounting rows by tenant.", "users_stats"),
    },
)
def table_stats() -> None:
    """Show what the store's tables hold for a realm."""


def period(
    when: str | None,
    start: dt.date | None,
    end: dt.date | None,
    today: dt.date,
    retention_days: int | None = RETENTION_DAYS,
) -> tuple[dt.date, dt.date]:
    """Return the days [start, end) that are meant. Raises `ToolFailure` for what cannot be counted. Pure.

    `retention_days` is how far back there is something to count, None for ever.
    """
    if when is not None and (start is not None or end is not None):
        raise ToolFailure("--when excludes --start and --end", ExitCode.USAGE)
    if (start is None) != (end is None):
        raise ToolFailure("give both --start and --end, or neither", ExitCode.USAGE)
    if start is None or end is None:
        this_month = today.replace(day=1)
        if when == "last-month":
            return (this_month - _DAY).replace(day=1), this_month
        return this_month, (this_month + 31 * _DAY).replace(day=1)
    if start > today:
        raise ToolFailure(f"--start {start} is in the future", ExitCode.USAGE)
    if end <= start:
        raise ToolFailure(f"--end {end} must be after --start {start}; it is not part of the period", ExitCode.USAGE)
    if retention_days is not None and (today - start).days > retention_days:
        raise ToolFailure(f"--start {start} is more than {retention_days} days ago: events are gone", ExitCode.USAGE)
    return start, end


class DayType(click.ParamType[dt.date]):
    """A UTC day on the command line."""

    name = "YYYY-MM-DD"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dt.date:
        """Parse, or fail as a usage error."""
        if isinstance(value, dt.date):
            return value
        try:
            return dt.datetime.strptime(str(value), "%Y-%m-%d").replace(tzinfo=dt.UTC).date()
        except ValueError:
            self.fail(f"{value!r} is not a day; write YYYY-MM-DD", param, ctx)


def period_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say which realms and days to count."""
    months = click.Choice(["this-month", "last-month"])
    for option in (
        click.option("--end", type=DayType(), help="Day after the last one, UTC."),
        click.option("--start", type=DayType(), help="First day, UTC; needs --end."),
        click.option("--when", type=months, help="Month to count; default this-month, UTC."),
        click.option("--realm", "realms", multiple=True, help="Realm id or a prefix of it, repeatable; default all."),
    ):
        command = option(command)
    return command


@click.command("user-summary")
@period_options
@json_option
@with_connection
def user_summary(
    connection: Connection,
    realms: tuple[str, ...],
    when: str | None,
    start: dt.date | None,
    end: dt.date | None,
    *,
    as_json: bool,
) -> None:
    """Count each tenant's users in a period, as CSV.

    A user counts if a secret existed at any time in the period. Reads all accounting of the realms; may be slow.
    """
    from juicebox_hsm.adapters.stores.opening import open_store

    first, after = period(when, start, end, dt.datetime.now(dt.UTC).date())

    async def main() -> list[tuple[RealmId, str, int]]:
        async with open_store(connection.store, must_exist=True) as store:
            return [
                (realm, tenant, users)
                for realm in await _wanted(store, realms)
                for tenant, users in sorted((await _count(store, realm, first, after)).items())
            ]

    found = run(main)
    if as_json:
        users = [{"realm": realm.hex(), "tenant": tenant, "users": count} for realm, tenant, count in found]
        print_json({"start": str(first), "end": str(after), "users": users})
        return
    click.echo("start,end,realm,tenant,users")
    for realm, tenant, count in found:
        click.echo(f"{first},{after},{realm.hex()},{_quoted(tenant)},{count}")


def _quoted(text: str) -> str:
    line = io.StringIO()
    csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="").writerow([text])
    return line.getvalue()


async def _wanted(store: Store, texts: tuple[str, ...]) -> list[RealmId]:
    known = await store.realms.list_realms()
    wanted = [RealmId(resolve_id(text, known, "realm")) for text in texts] or sorted(known)
    for realm in wanted:
        if realm not in known:
            raise ToolFailure(f"realm {realm.hex()} is not in this store", ExitCode.ID)
    return wanted


async def _count(store: Store, realm: RealmId, first: dt.date, after: dt.date) -> dict[str, int]:
    epoch = dt.date(1970, 1, 1)
    start_ms, end_ms = ((day - epoch).days * 86_400_000 for day in (first, after))
    return await store.accounting.count_users(realm, start_ms, end_ms)


@click.command("request-counts")
@period_options
@json_option
@with_connection
def request_counts(
    connection: Connection,
    realms: tuple[str, ...],
    when: str | None,
    start: dt.date | None,
    end: dt.date | None,
    *,
    as_json: bool,
) -> None:
    """Print each tenant's requests per day and kind in a period, as CSV.

    Every committed request is counted exactly once, under the UTC day it was made, when its event is published. Days
    are kept for ever.
    """
    from juicebox_hsm.adapters.stores.opening import open_store

    first, after = period(when, start, end, dt.datetime.now(dt.UTC).date(), None)

    async def main() -> list[tuple[dt.date, RealmId, str, str, int]]:
        async with open_store(connection.store, must_exist=True) as store:
            return [
                (day, realm, tenant, kind, count)
                for realm in await _wanted(store, realms)
                for day, tenant, kind, count in await _requests(store, realm)
                if first <= day < after
            ]

    found = sorted(run(main))
    if as_json:
        counts = [
            {"day": str(day), "realm": realm.hex(), "tenant": tenant, "kind": kind, "count": count}
            for day, realm, tenant, kind, count in found
        ]
        print_json({"start": str(first), "end": str(after), "counts": counts})
        return
    click.echo("day,realm,tenant,kind,count")
    for day, realm, tenant, kind, count in found:
        click.echo(f"{day},{realm.hex()},{_quoted(tenant)},{kind},{count}")


async def _requests(store: Store, realm: RealmId) -> list[tuple[dt.date, str, str, int]]:
    """Return (day, tenant, kind, count) of all that is counted."""
    return [
        (dt.date.fromisoformat(day), cursor.tenant, kind.value, count)
        for cursor in await store.outbox.cursors(realm)
        for day, counts in (await store.outbox.counters(realm, cursor.tenant)).items()
        for kind, count in counts.items()
    ]
