"""The one executable: `juicebox-hsm --role ...` for the services, subcommands for the tools (operator-tools.md 12).

Subcommands are imported when they are asked for, so that a role starts without paying for the tools.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import Final, NoReturn

import click

from juicebox_hsm import __version__
from juicebox_hsm.errors import LocalError, NotYet, RealmError
from juicebox_hsm.host.addresses import is_text, shown
from roles.commands import ROLES, TOOLS
from roles.lazy import LazyGroup, did_you_mean
from roles.options import ENVIRONMENT_PREFIX, BadSettings

COLLECTOR_THRESHOLDS: Final = (10_000, 20, 50)
"""Allocations before a young collection, and collections before an older one; Python's own are 700, 10, 10."""

PROGRAM: Final = "juicebox-hsm"
_OUR_VARIABLES: Final = (ENVIRONMENT_PREFIX, "DD_", "OTEL_", "JUICEBOX_", "LOGLEVEL", "JB_", "BIGTABLE_", "PUBSUB_")
TENANT_LOG_SERVE: Final = ["tenant-log", "serve"]
"""The service that is started like a tool."""


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:  # noqa: ARG001, FBT001 - click's
    if value:
        from juicebox_hsm.adapters.observation import build_info

        click.echo(f"{PROGRAM} {__version__}\n{build_info.block()}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    lazy=TOOLS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show version and build."
)
@click.option(
    "--role",
    type=click.Choice(list(ROLES)),
    help="Run a service instead of a command; its flags follow. `--role ROLE --help` lists them.",
)
def cli(role: str | None) -> None:
    """Run a realm of the Juicebox protocol, and the tools to operate it.

    Services:  juicebox-hsm --role agent|lb|manager [FLAGS]
    """
    if role is not None:
        raise click.UsageError("--role and a command exclude each other")


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"juicebox-hsm: {message}", err=True)
    sys.exit(code)


def _split_role(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Take `--role X` (or `--role=X`) off the front of the arguments; `--help --role X` asks for that role's help."""
    if arguments and arguments[0] in ("-h", "--help") and arguments[1:]:
        role, rest = _split_role(arguments[1:])
        return (None, arguments) if role is None else (role, ["--help", *rest])
    if arguments and arguments[0] == "--role" and len(arguments) > 1:
        return arguments[1], arguments[2:]
    if arguments and arguments[0].startswith("--role="):
        return arguments[0].removeprefix("--role="), arguments[1:]
    return None, arguments


def _one_sentence(error: click.UsageError) -> str:
    """Return what click says of a mistake, its hints in our form: it has several, with and without brackets."""
    if isinstance(error, click.NoSuchOption):
        return error.message.rstrip(".") + did_you_mean(error.possibilities or ())
    return error.format_message().rstrip(".")


def _run(command: click.Command, arguments: list[str], name: str) -> NoReturn:
    """Run a command to its exit; what an operator did wrong is one line on stderr, whatever the command."""
    try:
        code = command.main(arguments, prog_name=name, auto_envvar_prefix=ENVIRONMENT_PREFIX, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except BadSettings as error:
        _fail(error.format_message(), 78 if name != PROGRAM else 2)
    except click.UsageError as error:
        asked = name if error.ctx is None else error.ctx.command_path
        _fail(f"{_one_sentence(error)}; see `{asked} --help`", 2)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except click.Abort:
        _fail("stopped", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _relax_collector() -> None:
    """Let the garbage collector look less often and never at what the imports left: 5 to 8 % of a service's CPU."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


def _ignore_signals_while_starting() -> None:
    """Let SIGHUP and the like pass until a service has handlers: by default they would end it.

    A service that starts reads its files anyway, and whoever reloads or raises verbosity cannot know that it does.
    """
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _odd_text(arguments: list[str]) -> str | None:
    """Return which argument or variable of ours is not UTF-8, None if all are: what is given is shown, logged and sent.

    Python hands such bytes on as text that no message to others can carry.
    """
    for text in arguments:
        if not is_text(text):
            return f"{shown(text)}: an argument is not UTF-8 text"
    for name, value in os.environ.items():
        if name.startswith(_OUR_VARIABLES) and not is_text(value):
            return f"{name}={shown(value)}: is not UTF-8 text"
    return None


def main(arguments: list[str] | None = None) -> None:
    """Run the program; ends with `SystemExit`."""
    role, rest = _split_role(sys.argv[1:] if arguments is None else arguments)
    is_service = role is not None or rest[:2] == TENANT_LOG_SERVE
    if is_service:
        _ignore_signals_while_starting()
    try:
        if (problem := _odd_text(sys.argv[1:] if arguments is None else arguments)) is not None:
            _fail(problem, 78 if is_service else 2)
        if os.environ.get("LOGLEVEL"):
            from juicebox_hsm.adapters.observation.logging import parse_level

            parse_level(os.environ["LOGLEVEL"])
        if role is None:
            _run(cli, rest, PROGRAM)
        if role not in ROLES:
            _fail(f"--role {role}: no such role; choose one of {', '.join(ROLES)}", 2)
        command = ROLES[role].load()
        _relax_collector()
        _run(command, rest, f"{PROGRAM} --role {role}")
    except LocalError as error:
        passing = isinstance(error, NotYet)
        _fail(str(error), (69 if passing else 78) if is_service else 1)
    except RealmError as error:
        _fail(str(error), 69 if role else 4)
    except BrokenPipeError:
        # the reader of our output (head, a pager) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        # a directory this user may not enter, a full disk: the operator's to mend, also where no code foresaw it
        if role is not None:
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        _fail(f"{place}{error.strerror or error}", 1)
