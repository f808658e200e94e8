"""Reading a role's flags, environment and file exactly as the role does, but not only to the first mistake."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource, iter_params_for_processing

from juicebox_hsm.adapters.observation.logging import LEVEL_VARIABLE
from juicebox_hsm.host.addresses import Address
from roles.commands import ROLES
from roles.durations import DurationType, format_seconds
from roles.options import BadSettings, CommonOptions, flag_of, take_common
from roles.store_options import take_store

_NOT_SETTINGS: Final = frozenset({"help", "config"})
_ORIGINS: Final = {
    ParameterSource.COMMANDLINE: "flag",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
}
_ANY_PORT: Final = Address("127.0.0.1", 0)
_STAND_INS: Final[dict[str, Any]] = {
    "store_url": "", "cluster_tls": None, "insecure_rpc": False, "listen": _ANY_PORT, "http_listen": None, "name": None,
    "advertise": None, "allow_loopback": False, "log_level": None,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """One effective setting: its flag, value as an operator would write it, and where that came from."""

    flag: str
    value: str | int | float | bool | None
    origin: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """A role's command line, read as far as it can be.

    `values` are the role's own settings without those that were wrong; in `common` something harmless stands for each
    that was (an empty store URL, a port 0). `misread` names the parameters that were given, and were wrong.
    """

    role: str
    values: dict[str, Any]
    common: CommonOptions
    problems: tuple[str, ...]
    settings: tuple[Setting, ...]
    misread: frozenset[str]


def parse_role(role: str, arguments: list[str]) -> Parsed:
    """Read a role's flags, environment and configuration file, and collect every mistake in them."""
    command = ROLES[role].load()
    context = click.Context(command, info_name=f"juicebox-hsm --role {role}", ignore_unknown_options=True)
    problems: list[str] = []
    values: dict[str, Any] = {}
    misread: set[str] = set()
    with context:
        words, bare = _without_bare_flags(command, context, arguments)
        problems += [f"Option '{flag}' requires an argument." for flag in sorted(bare)]
        given, rest, order = _parse_words(command, context, words, problems)
        problems += _leftovers(rest)
        misread |= {parameter.name or "" for parameter in command.params if not bare.isdisjoint(parameter.opts)}
        for parameter in iter_params_for_processing(order, command.get_params(context)):
            try:
                parameter.handle_parse_result(context, given, [])
            except BadSettings as error:
                problems += error.problems
            except click.MissingParameter:
                if bare.isdisjoint(parameter.opts):
                    problems.append(f"--{flag_of(parameter)} is required: {_meaning(parameter)}")
            except click.UsageError as error:
                problems.append(error.format_message())
                misread.add(parameter.name or "")
            else:
                value = context.params.get(parameter.name or "")
                unset = isinstance(value, enum.Enum) and value.name == "UNSET"  # click's mark for "no default"
                values[parameter.name or ""] = None if unset else value
    own, common = _split(role, values, problems, misread)
    parameters = [parameter for parameter in command.params if parameter.name not in _NOT_SETTINGS]
    settings = tuple(_setting(context, parameter, values, common) for parameter in parameters)
    return Parsed(role, own, common, tuple(problems), settings, frozenset(misread))


def _split(
    role: str, values: dict[str, Any], problems: list[str], misread: set[str]
) -> tuple[dict[str, Any], CommonOptions]:
    """Return a role's own settings and the common ones, with stand-ins for what was wrong."""
    own = {**_STAND_INS, **values}
    try:
        store_url = take_store(dict(own))
    except ValueError as error:
        problems += [] if "store_url" in misread else [str(error)]
        store_url = ""
    own["store_url"] = store_url
    try:
        return own, take_common(role, own)
    except ValueError as error:
        problems.append(str(error))
        own = {**_STAND_INS, **values, "store_url": store_url, "http_listen": _ANY_PORT}
        return own, take_common(role, own)


def _without_bare_flags(
    command: click.Command, context: click.Context, arguments: list[str]
) -> tuple[list[str], set[str]]:
    """Return the words that can be read, and the flags left out of them because another flag stands for their value."""
    options = [parameter for parameter in command.get_params(context) if isinstance(parameter, click.Option)]
    flags = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    with_value = {name for option in options if not option.is_flag for name in option.opts}
    kept: list[str] = []
    bare: set[str] = set()
    words = iter([*arguments, None])
    word = next(words)
    while word is not None:
        following = next(words) if word in with_value else None
        if word in with_value and (following is None or following.partition("=")[0] in flags):
            bare.add(word)
            word = following
            continue
        kept += [word] if following is None else [word, following]
        word = next(words)
    return kept, bare


def _parse_words(
    command: click.Command, context: click.Context, words: list[str], problems: list[str]
) -> tuple[dict[str, Any], list[str], list[click.Parameter]]:
    """Let click read the words; a flag it cannot make sense of is a problem, and the others are read without it."""
    while True:
        try:
            return command.make_parser(context).parse_args(args=list(words))
        except click.BadOptionUsage as error:  # `--allow-loopback=yes`
            problems.append(error.format_message())
            left = [word for word in words if word.partition("=")[0] != error.option_name]
        except click.UsageError as error:
            problems.append(error.format_message())
            left = []
        if left == words:
            left = []
        words = left


def _leftovers(rest: list[str]) -> list[str]:
    """Say what is no flag. A word behind an unknown flag is taken for its value."""
    problems = []
    before_unknown = False
    for word in rest:
        if word.startswith("-"):
            problems.append(f"{word.partition('=')[0]}: no such flag; see --help of the role")
            before_unknown = "=" not in word
        else:
            if not before_unknown:
                problems.append(f"{word!r}: unexpected; a role takes flags only")
            before_unknown = False
    return problems


def _meaning(parameter: click.Parameter) -> str:
    return (getattr(parameter, "help", None) or "no default").rstrip(".")


def _setting(
    context: click.Context, parameter: click.Parameter, values: dict[str, Any], common: CommonOptions
) -> Setting:
    name = parameter.name or ""
    source = context.get_parameter_source(name)
    origin = _ORIGINS.get(source, "default") if source is not None else "default"
    if name not in values:
        return Setting(flag_of(parameter), None, "wrong")
    value = values[name]
    if value is None and name in ("http_listen", "name", "advertise"):
        value = getattr(common, name)
    if value is None and name == "log_level":
        value = os.environ.get(LEVEL_VARIABLE) or "info"
        origin = "environment" if os.environ.get(LEVEL_VARIABLE) else origin
    shown: str | int | float | bool | None
    if isinstance(value, float) and isinstance(parameter.type, DurationType):
        shown = format_seconds(value)
    elif value is None or isinstance(value, bool | int | float):
        shown = value
    else:
        shown = str(value)
    return Setting(flag_of(parameter), shown, origin)


def path_of(parsed: Parsed, name: str) -> Path | None:
    """Return a path among the values, None if it is missing or wrong."""
    value = parsed.values.get(name)
    return value if isinstance(value, Path) else None
