"""`juicebox-hsm store`: make, check, tidy, copy and restore the store (operator-tools.md 5)."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.errors import DecodingError, LocalError, RealmError
from juicebox_hsm.ids import HsmId, RealmId, parse_id
from juicebox_hsm.ports.errors import StoreInvalid
from roles.durations import DurationType
from roles.tools.recording import recorder_of, user_and_host
from roles.tools.session import (
    Connection,
    Session,
    ToolFailure,
    end,
    for_operator,
    load_cluster_tls,
    operator_of,
    remember_connection,
    run,
    with_connection,
)

if TYPE_CHECKING:
    from juicebox_hsm.adapters.stores.check import Checkpoint, Progress, Report
    from juicebox_hsm.consensus.macs import Macs
    from roles.tools.store.restore import HsmWitness

STATUS_S: Final = 5.0
AGE_S_MIN: Final = 300.0
"""Appends write their nodes at most a minute before their entry (`bigtable.log`), and requests may take 20 s."""
MIB: Final = 1 << 20
_DIRECTORY: Final = click.Path(path_type=Path, file_okay=False)
_FILE: Final = click.Path(path_type=Path, dir_okay=False)


@click.group()
@remember_connection
def command(**values: Any) -> None:
    """Make, check, tidy, back up and restore the store. `backup` and `restore` work on sqlite:PATH stores."""


@command.command()
@with_connection
def init(connection: Connection) -> None:
    """Make the store's tables, or bring those of an older version up to date. Running it again changes nothing."""
    from juicebox_hsm.adapters.stores.opening import open_store

    async def prepare() -> str:
        async with open_store(connection.store) as store:
            await store.realms.create_shared()
            return f"{store.description} is ready; it holds {len(await store.realms.list_realms())} realms"

    click.echo(run(prepare))


@command.command()
@with_connection
@click.option(
    "--hsm-dir", "hsm_dirs", multiple=True, type=_DIRECTORY,
    help="An HSM of the realm, running or not: with its key every entry's MAC is verified. One per realm is enough.",
)  # fmt: skip
@click.option(
    "--resume", type=_FILE,
    help="Keep in this file how far the trees are checked, and go on from there if an earlier check was stopped.",
)  # fmt: skip
@click.option("--backup", "is_backup", is_flag=True, help="This is a backup: HSMs may have gone on since it was made.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def check(
    connection: Connection, hsm_dirs: tuple[Path, ...], resume: Path | None, *, is_backup: bool, as_json: bool
) -> None:
    """Verify all of the store: logs, trees, certificates, outboxes. One line per finding; exit 5 if there are any.

    Works beside running agents and changes nothing. Without --hsm-dir damage is found, but not every forgery, nor
    that the end of a log is missing.
    """
    from juicebox_hsm.adapters.stores.check import Checkpoint, Report
    from roles.tools.store.restore import captured_problems

    with _expected_errors():
        checkpoint = Checkpoint(resume, connection.store)
        if checkpoint.is_resumed:
            click.echo(f"going on from {resume}", err=True)
        macs, witnesses = _hsm_memories(hsm_dirs)
        try:
            with _progress() as progress:
                report = _check(connection, macs, progress, checkpoint, is_backup=is_backup)
        except StoreInvalid as error:
            report = Report(findings=[str(error)])
        for problem in captured_problems(report.tails, [] if is_backup else witnesses, "the store"):
            report.add("HSM", problem)
        checkpoint.finish()
    if as_json:
        click.echo(json.dumps({**report.counts(), "findings": report.findings}, indent=2))
    else:
        for line in report.findings:
            click.echo(line)
        if report.more_findings:
            click.echo(f"and {report.more_findings} more findings")
        verified = f", {report.verified_macs:,} MACs verified" if macs else ", MACs not verified (give --hsm-dir)"
        click.echo(
            f"checked {report.realms} realms, {report.groups} groups, {report.entries:,} log entries{verified}, "
            f"{report.records:,} records, {report.nodes:,} tree nodes, {report.events:,} events; "
            f"{report.garbage:,} unreachable nodes",
            err=bool(report.findings),
        )
    if report.findings:
        end(ExitCode.FINDINGS)
    if not as_json:
        click.echo("no findings")


@command.command()
@with_connection
@click.option(
    "--rate", type=click.IntRange(min=1), default=50_000, show_default=True,
    help="Rows per second, at most: looked at in a sqlite: store, removed from a bigtable: one.",
)  # fmt: skip
@click.option(
    "--older-than", type=DurationType(), default="1h", show_default=True,
    help="Age from which unneeded tree nodes of a bigtable: store go; at least 5m.",
)  # fmt: skip
def gc(connection: Connection, rate: int, older_than: float) -> None:
    """Remove what nobody can need any more, beside running agents, and say what takes space.

    A bigtable: store keeps tree nodes that waited for deletion when an agent was killed; they are found by walking all
    trees. A sqlite: store cleans up after itself: old tree nodes are overwritten in place, and agents remove old events
    and accounting rows every hour or sooner. Free pages are used again by later writes; the file does not shrink.
    """
    if older_than < AGE_S_MIN:
        raise ToolFailure(f"--older-than: at least {AGE_S_MIN / 60:g}m, for appends under way", ExitCode.USAGE)
    with _expected_errors(), _progress() as progress:
        lines = _collect(connection, rate, older_than, progress)
    for line in lines:
        click.echo(line)


@command.command()
@with_connection
@click.argument("file", type=_FILE)
def backup(connection: Connection, file: Path) -> None:
    """Write the store as it is at this moment to the new file FILE; agents may run. It holds no HSM's state."""
    from juicebox_hsm.adapters.sqlite.backup import backup_file, read_tails

    path = _sqlite_path(connection)
    with _expected_errors():
        with _progress() as progress:
            size = backup_file(path, file, progress)
        tails = read_tails(file)
    click.echo(f"{file}: {size / MIB:.1f} MiB, {len(tails)} groups")
    for tail in tails:
        click.echo(f"  realm {tail.realm.hex()}, group {tail.group.hex()}: log up to index {tail.last}")
    click.echo("HSM directories are not part of it and must never be copied, only moved.")


@command.command()
@with_connection
@click.argument("file", type=_FILE)
@click.option("--hsm-dir", "hsm_dirs", multiple=True, type=_DIRECTORY, help="Directory of a member HSM, stopped.")
@click.option("--agent", "agents", multiple=True, metavar="URL", help="Running agent of a member HSM.")
@click.option(
    "--unknown-hsm", "unknown", multiple=True, metavar="ID", help="Member HSM that is dead for good; full id."
)
@click.option(
    "--no-digest", "without_digest", is_flag=True,
    help="Take a backup of an older version, which carries no digest: damage in tenants' events would not be found.",
)  # fmt: skip
def restore(
    connection: Connection,
    file: Path,
    hsm_dirs: tuple[Path, ...],
    agents: tuple[str, ...],
    unknown: tuple[str, ...],
    *,
    without_digest: bool,
) -> None:
    """Put a backup into the empty store, if it is whole and no HSM went further than its logs.

    The backup is checked first, as `check --backup` does, with the keys of the HSMs in --hsm-dir; any finding refuses
    the restore, and nothing is written.

    Every member HSM of every group must be shown by --hsm-dir or --agent, or declared dead by --unknown-hsm. One that
    captured more than the backup holds would forget guesses: the restore is refused, with group, indexes and HSM.
    """
    from juicebox_hsm.adapters.sqlite.backup import check_empty, check_unused, read_tails, restore_file
    from roles.tools.store.restore import read_hsm_dirs, restore_problems

    path = _sqlite_path(connection)
    who = operator_of(connection)
    dead = _hsm_ids(unknown)
    with _expected_errors():
        check_unused(path)
        check_empty(path)
        _refuse(_damage(file, hsm_dirs, without_digest=without_digest))
        tails = read_tails(file)
        running = _ask_agents(connection, agents)
        with read_hsm_dirs(hsm_dirs) as stopped:
            _refuse(restore_problems(tails, [*running, *stopped], dead))
            with _progress() as progress:
                restore_file(file, path, progress)
        run(lambda: _note_restore(connection, who, file, dead))
    click.echo(f"restored {len(tails)} groups into sqlite:{path}; the HSMs can go on from there")
    for hsm in sorted(dead):
        click.echo(f"HSM {hsm.hex()} must never run again with a state from before")


async def _note_restore(connection: Connection, who: str, file: Path, dead: Collection[HsmId]) -> None:
    """Tell the restored store's trail, which ends where the backup was made; before, there was none to tell."""
    from juicebox_hsm.adapters.stores.opening import open_store

    told = " ".join(hsm.hex() for hsm in sorted(dead))
    async with open_store(connection.store, must_exist=True) as store:
        await recorder_of(store.audit, Session.now_ms).note(
            who, "restore", (("file", str(file)), ("dead_hsms", told)), origin=user_and_host()
        )


def _refuse(problems: Sequence[str]) -> None:
    """End the command if there is a reason not to restore."""
    if problems:
        for line in problems:
            click.echo(line)
        raise ToolFailure(f"not restored: {len(problems)} reasons above", ExitCode.FAILED)


def _damage(file: Path, hsm_dirs: tuple[Path, ...], *, without_digest: bool) -> list[str]:
    """Return what is wrong with the backup itself, one line each."""
    from juicebox_hsm.adapters.sqlite.check import check_file
    from juicebox_hsm.adapters.sqlite.digest import digest_problem

    if not without_digest:
        problem = digest_problem(file)
        if problem is not None:
            return [problem]
    macs, _ = _hsm_memories(hsm_dirs)
    try:
        with _progress() as progress:
            report = check_file(file, macs, progress, is_backup=True)
    except StoreInvalid as error:
        return [str(error)]
    more = [f"and {report.more_findings} more findings"] if report.more_findings else []
    return [*report.findings, *more]


def _check(
    connection: Connection, macs: dict[RealmId, Macs], progress: Progress, checkpoint: Checkpoint, *, is_backup: bool
) -> Report:
    """Check the store the connection names, whatever its back end."""
    if connection.store.startswith("bigtable:"):
        from juicebox_hsm.adapters.bigtable.upkeep import open_upkeep

        async def check_instance() -> Report:
            async with open_upkeep(connection.store) as upkeep:
                return await upkeep.check(macs, progress, checkpoint)

        return run(check_instance)
    from juicebox_hsm.adapters.sqlite.check import check_file
    from juicebox_hsm.adapters.sqlite.digest import digest_problem

    path = _sqlite_path(connection)
    problem = digest_problem(path) if is_backup and path.is_file() else None
    report = check_file(path, macs, progress, checkpoint, is_backup=is_backup)
    if problem is not None:
        report.add("file", problem)
    return report


def _collect(connection: Connection, rate: int, age_s: float, progress: Progress) -> list[str]:
    """Clean the store the connection names, whatever its back end."""
    if connection.store.startswith("bigtable:"):
        from juicebox_hsm.adapters.bigtable.upkeep import open_upkeep

        async def collect_instance() -> list[str]:
            async with open_upkeep(connection.store) as upkeep:
                return await upkeep.collect(rate, age_s, progress)

        return run(collect_instance)
    from roles.tools.store.gc import collect

    path = _sqlite_path(connection)
    return run(lambda: collect(path, rate, progress))


def _sqlite_path(connection: Connection) -> Path:
    scheme, _, rest = connection.store.partition(":")
    if scheme != "sqlite" or not rest:
        raise ToolFailure(
            f"--store {connection.store}: this command works on sqlite:PATH stores only, in this version",
            ExitCode.USAGE,
        )
    return Path(rest)


@contextmanager
def _expected_errors() -> Iterator[None]:
    """Turn operational errors into one line and an exit code."""
    try:
        yield
    except RealmError as error:
        raise for_operator(error) from None


def _hsm_memories(hsm_dirs: tuple[Path, ...]) -> tuple[dict[RealmId, Macs], list[HsmWitness]]:
    """Return the MAC keys of the realms of some HSMs, and what these HSMs captured.

    Read before the store is, so that a running HSM cannot have captured what the check does not see.
    """
    from juicebox_hsm.adapters.hsm_directory.hsm_host import read_hsm_dir
    from juicebox_hsm.consensus.macs import Macs
    from roles.tools.store.restore import witness_in

    keys, witnesses = {}, []
    for path in hsm_dirs:
        bundle, state = read_hsm_dir(path)
        if state is None or state.realm is None:
            raise LocalError(f"--hsm-dir {path}: this HSM belongs to no realm yet")
        keys[state.realm.id] = Macs(bundle.keys.mac_key.expose())
        witnesses.append(witness_in(path, state))
    return keys, witnesses


def _hsm_ids(texts: tuple[str, ...]) -> set[HsmId]:
    try:
        return {HsmId(parse_id(text.lower())) for text in texts}
    except DecodingError as error:
        raise ToolFailure(f"--unknown-hsm: {error}", ExitCode.USAGE) from None


def _ask_agents(connection: Connection, urls: tuple[str, ...]) -> list[HsmWitness]:
    if not urls:
        return []
    import trio

    from juicebox_hsm.adapters.rpc import RpcPool
    from roles.survey.overview import ask_agents
    from roles.tools.store.restore import witness_of

    tls = load_cluster_tls(connection)

    async def ask() -> list[HsmWitness]:
        async with trio.open_nursery() as nursery:
            view = await ask_agents(RpcPool(nursery, tls), urls, STATUS_S)
            nursery.cancel_scope.cancel()
        return [witness_of(agent) for agent in view.agents]

    return run(ask)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show progress on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield _silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None)

        def show(phase: str, done: int, whole: int) -> None:
            bars.update(task, description=phase, completed=done, total=whole or None)

        yield show


def _silent(phase: str, done: int, whole: int) -> None:
    """Show nothing."""
