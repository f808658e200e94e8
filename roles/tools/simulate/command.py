"""`juicebox-hsm simulate`: play whole realms from seeds, and tell which seeds break a rule (simulation.md 4)."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from juicebox_hsm.adapters.observation import build_info
from juicebox_hsm.adapters.process.exit_codes import ExitCode
from roles.tools.session import end
from roles.tools.simulate.profiles import PROFILES

if TYPE_CHECKING:
    from roles.tools.simulate.batch import Result, Summary

MIXED: Final = "mixed"
DETAIL_CHARS: Final = 300
REPLAY_LINES: Final = 120
_SEEDS: Final = re.compile(r"(\d+)\.\.(\d+)")


class SeedsType(click.ParamType[range]):
    """`A..B`, both included."""

    name = "A..B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> range:
        """Parse, or fail as a usage error."""
        if isinstance(value, range):
            return value
        match = _SEEDS.fullmatch(str(value))
        if match is None or int(match[1]) > int(match[2]):
            self.fail(f"{value!r} is not A..B with A at most B", param, ctx)
        return range(int(match[1]), int(match[2]) + 1)


@click.command()
@click.option("--seed", type=click.IntRange(0), help="Play this seed; 1 unless --seeds is given.")
@click.option("--seeds", type=SeedsType(), help="Play these seeds, both ends included.")
@click.option("--jobs", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes at a time.")
@click.option(
    "--profile",
    type=click.Choice([MIXED, *PROFILES]),
    default=MIXED,
    show_default=True,
    help="What goes wrong; mixed takes one profile after the other.",
)
@click.option("--without", metavar="TRICKS", default="", help="Comma-separated tricks that are not played.")
@click.option("--first", is_flag=True, help="Stop at the first seed that breaks a rule.")
@click.option("--replay", is_flag=True, help="Print the world's trace around the failure, or its end.")
@click.option("--coverage", is_flag=True, help="Print what happened how often, and what never did.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the results there.")
def command(
    seed: int | None,
    seeds: range | None,
    jobs: int,
    profile: str,
    without: str,
    *,
    first: bool,
    replay: bool,
    coverage: bool,
    json_file: Path | None,
) -> None:
    """Play whole realms in one thread, each from one seed: real services, a simulated world that misbehaves, a judge.

    The same seed and the same commit give the same run, on every machine: its digest says so. Exit 5 on any violation.
    """
    from roles.tools.simulate.batch import Job, Summary, profile_of, run_all
    from roles.tools.simulate.tricks import TRICKS

    if seed is not None and seeds is not None:
        raise click.UsageError("--seed and --seeds exclude each other")
    left_out = frozenset(name for name in without.split(",") if name)
    if unknown := sorted(left_out - TRICKS.keys()):
        raise click.UsageError(f"--without: no trick is called {', '.join(unknown)}; known: {', '.join(TRICKS)}")
    wanted = seeds if seeds is not None else range(one := 1 if seed is None else seed, one + 1)
    work = [Job(number, profile_of(profile, number), left_out, replay) for number in wanted]
    summary, results = Summary(), []
    for result in run_all(work, jobs):
        summary.add(result)
        results.append(result)
        if result.rule:
            click.echo(failure_line(result, without))
        if replay:
            _print_trace(result)
        if first and result.rule:
            break
    click.echo(summary_line(summary, results))
    if coverage:
        _print_coverage(summary)
    if json_file is not None:
        json_file.write_text(json.dumps(_document(summary, results), indent=1) + "\n", encoding="utf-8")
    if summary.failed:
        end(ExitCode.FINDINGS)


@functools.cache
def commit() -> str:
    """Return what is run: the commit of a build or a checkout, the latter with `+` when it was changed."""
    known = build_info.tag()
    if build_info.commit():
        return known
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = _said([*git, "rev-parse", "--short=10", "HEAD"])
        changed = _said([*git, "status", "--porcelain"])
    except (OSError, subprocess.CalledProcessError):
        return known
    return head + ("+" if changed else "")


def _said(command_line: list[str]) -> str:
    done = subprocess.run(command_line, capture_output=True, text=True, check=True)  # noqa: S603 - git, as above
    return done.stdout.strip()


def failure_line(result: Result, without: str) -> str:
    """Return the one line of a failing seed."""
    left_out = f" --without {without}" if without else ""
    detail = " ".join(result.detail.split())
    detail = detail if len(detail) <= DETAIL_CHARS else f"{detail[:DETAIL_CHARS]}..."
    return (
        f"seed {result.seed} commit {commit()} profile {result.profile} at {result.virtual_s:.3f} s: "
        f"{result.rule}: {detail}; replay: juicebox-hsm simulate --seed {result.seed} --profile {result.profile}"
        f"{left_out} --replay"
    )


def summary_line(summary: Summary, results: list[Result]) -> str:
    """Return the last line: figures, and the digest."""
    digest = results[0].digest if len(results) == 1 else summary.digest
    return (
        f"{summary.seeds} seeds, {summary.failed} failed, {summary.calls} calls of clients, "
        f"{summary.virtual_s:.0f} virtual s, {summary.cpu_s / summary.seeds:.2f} s of CPU each, digest {digest}"
    )


def _print_trace(result: Result) -> None:
    lines = result.lines[-REPLAY_LINES:]
    if len(result.lines) > len(lines):
        click.echo(f"... {len(result.lines) - len(lines)} lines before")
    for line in lines:
        click.echo(line)
    if result.rule:
        click.echo(result.detail)


def _print_coverage(summary: Summary) -> None:
    from roles.tools.simulate.coverage import missing

    for name, count in sorted(summary.counts.items()):
        click.echo(f"{count:>9}  {name}")
    for name in missing(summary.counts):
        click.echo(f"    never  {name}")


def _document(summary: Summary, results: list[Result]) -> dict[str, object]:
    return {
        "commit": commit(),
        "seeds": summary.seeds,
        "failed": summary.failed,
        "digest": summary.digest,
        "virtual_s": round(summary.virtual_s, 3),
        "cpu_s": round(summary.cpu_s, 3),
        "calls": summary.calls,
        "counts": dict(sorted(summary.counts.items())),
        "runs": [
            {
                "seed": result.seed,
                "profile": result.profile,
                "digest": result.digest,
                "virtual_s": round(result.virtual_s, 3),
                "cpu_s": round(result.cpu_s, 3),
                "calls": result.calls,
                "rule": result.rule,
                "detail": result.detail,
            }
            for result in results
        ],
    }
