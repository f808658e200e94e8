"""`juicebox-hsm bench compare`: whether a measurement became worse than a saved one (operator-tools.md 7)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from roles.tools.session import ToolFailure, end

TOLERANCE_PERCENT: Final = 10.0
_RATE: Final = "per_second"
_TIME: Final = "p50_ms"
_SHOWN: Final = (_RATE, _TIME, "p90_ms", "p99_ms")
_SETTINGS: Final = ("concurrency", "connections")


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of one operation, before and after. `worse` tells whether it is beyond the tolerance."""

    op: str
    figure: str
    before: float
    after: float
    worse: bool

    @property
    def percent(self) -> float:
        """Return the change in percent of the value before; 0 without one."""
        return 100 * (self.after - self.before) / self.before if self.before else 0.0


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]], tolerance_percent: float) -> list[Change]:
    """Return the changes of operations that both have; rate and median are judged, the tail is only shown. Pure.

    Errors count as worse in any number that was not there before.
    """
    known = {result["op"]: result for result in before}
    share = tolerance_percent / 100
    changes = []
    for result in after:
        old = known.get(result["op"])
        if old is None:
            continue
        for figure in _SHOWN:
            was, now = float(old[figure]), float(result[figure])
            worse = (figure == _RATE and now < was * (1 - share)) or (figure == _TIME and now > was * (1 + share))
            changes.append(Change(result["op"], figure, was, now, worse))
        if result["errors"] or old["errors"]:
            more = result["errors"] > old["errors"]
            changes.append(Change(result["op"], "errors", old["errors"], result["errors"], more))
    return changes


def _read(path: Path) -> list[dict[str, Any]]:
    """Read a result file. Raises `ToolFailure` naming it."""
    try:
        results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        for result in results:
            for figure in ("op", "errors", *_SHOWN, *_SETTINGS):
                result[figure]
    except OSError as error:
        raise ToolFailure(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ToolFailure(f"{path}: not a result file of `bench client --json`") from None
    return results


@click.command()
@click.argument("before", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("after", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 100),
    default=TOLERANCE_PERCENT,
    show_default=True,
    help="By how many percent rate and median may be worse.",
)
def command(before: Path, after: Path, tolerance: float) -> None:
    """Compare two result files of `bench client` or `bench hsm`; exit 5 when AFTER is worse than BEFORE.

    Rate and median are judged. Measure both on the same idle machine with the same settings.
    """
    from roles.tools.output import print_table

    old, new = _read(before), _read(after)
    changes = compare(old, new, tolerance)
    if not changes:
        raise ToolFailure(f"{before} and {after} have no operation in common", ExitCode.USAGE)
    settings = {result["op"]: [result[name] for name in _SETTINGS] for result in old}
    for result in new:
        if settings.get(result["op"], [result[name] for name in _SETTINGS]) != [result[name] for name in _SETTINGS]:
            click.echo(f"warning: {result['op']}: measured with other concurrency or connections", err=True)
    rows = [
        (
            change.op, change.figure, f"{change.before:.1f}", f"{change.after:.1f}", f"{change.percent:+.1f} %",
            "WORSE" if change.worse else "",
        )
        for change in changes
    ]  # fmt: skip
    print_table(["Op", "Figure", "Before", "After", "Change", ""], rows, right=range(2, 5))
    if any(change.worse for change in changes):
        end(ExitCode.FINDINGS)
