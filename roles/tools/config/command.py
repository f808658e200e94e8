"""`juicebox-hsm config`: what a role would run with, and everything that is wrong with it (operator-tools.md 1, 11).

Both commands read flags, environment and file exactly as the role itself does, but do not stop at the first mistake.
"""

from __future__ import annotations

from typing import Any, Final

import click

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from roles.commands import ROLES
from roles.lazy import LazyCommand, LazyGroup
from roles.tools.config.parse import parse_role
from roles.tools.output import print_json, print_table

_EXTRA: Final = {"ignore_unknown_options": True, "allow_extra_args": True}


def _role_flags(function: Any) -> Any:
    function = click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[FLAGS...]")(function)
    return click.option(
        "--role", type=click.Choice(list(ROLES)), required=True, help="The role that would be started."
    )(function)


@click.command("show", context_settings=_EXTRA)
@_role_flags
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(role: str, flags: tuple[str, ...], *, as_json: bool) -> None:
    """Show a role's effective settings and where each comes from: flag, environment, file or default.

    FLAGS are those of the role; nothing is opened or contacted.
    """
    parsed = parse_role(role, list(flags))
    if as_json:
        print_json(
            {
                "role": role,
                "settings": {
                    setting.flag: {"value": setting.value, "origin": setting.origin} for setting in parsed.settings
                },
                "problems": list(parsed.problems),
            }
        )
    else:
        rows = [
            (setting.flag, "" if setting.value is None else setting.value, setting.origin)
            for setting in parsed.settings
        ]
        print_table(["Setting", "Value", "Origin"], rows)
        for problem in parsed.problems:
            click.echo(f"juicebox-hsm: {problem}", err=True)
    if parsed.problems:
        raise click.exceptions.Exit(int(ExitCode.CONFIG))


@click.command("check", context_settings=_EXTRA)
@_role_flags
def check(role: str, flags: tuple[str, ...]) -> None:
    """Find every mistake in a role's configuration: flags, files, keys, certificates, ports, store.

    FLAGS are those of the role. Prints one line for each mistake and exits 78; exits 0 when there is none. Run it on
    the machine and as the user of the service, while the service is stopped: its ports must be free.
    """
    from roles.tools.config.checks import all_problems, warnings

    parsed = parse_role(role, list(flags))
    for line in warnings(parsed):
        click.echo(f"warning: {line}", err=True)
    problems = [*parsed.problems, *all_problems(parsed)]
    for problem in problems:
        click.echo(problem)
    if problems:
        raise click.exceptions.Exit(int(ExitCode.CONFIG))
    click.echo(f"{role}: no mistakes found")


@click.group(
    cls=LazyGroup,
    lazy={
        "check": LazyCommand(__name__, "Find every mistake in a role's configuration.", "check"),
        "show": LazyCommand(__name__, "Show a role's effective settings and their origin.", "show"),
    },
)
def command() -> None:
    """Check and show the configuration of a role."""
