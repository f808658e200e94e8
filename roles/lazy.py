"""Command groups whose members are imported on use, so that each command pays only for itself."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import click

LIKE_MAX: Final = 3
"""More guesses than this help nobody (own)."""


def close_to(name: str, known: Iterable[str]) -> str:
    """Return a hint to the known names that look like `name`, "" if none does."""
    return did_you_mean(difflib.get_close_matches(name, list(known), n=LIKE_MAX))


def did_you_mean(names: Sequence[str]) -> str:
    """Return a hint to names, "" if there are none."""
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else ""


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """Where a command lives, its one line of help, and whether lists leave it out."""

    module: str
    summary: str
    attribute: str = "command"
    hidden: bool = False

    def load(self) -> click.Command:
        """Import the module and return the command."""
        command = getattr(importlib.import_module(self.module), self.attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{self.module}.{self.attribute} is not a click command")
        return command


class LazyGroup(click.Group):
    """A group over `LazyCommand`s; listing them imports nothing."""

    def __init__(self, *args: Any, lazy: dict[str, LazyCommand], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the names in order, without hidden ones."""
        return sorted(name for name, entry in self._lazy.items() if not entry.hidden)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import and return one command, None if there is none of that name."""
        entry = self._lazy.get(cmd_name)
        return entry.load() if entry else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command as `click.Group` does; an unknown name is answered with those that look like it."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            raise click.UsageError(f"No such command {name!r}{close_to(name, self.list_commands(ctx))}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Print names and summaries."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._lazy[name].summary) for name in self.list_commands(ctx)])
