"""`docs/command-reference.md` is what the program says of itself, for every role, tool and flag."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from tests.scripts import load_script

ROOT = Path(__file__).parents[3]


REFERENCE = load_script("reference")
COMMANDS = dict(REFERENCE.commands())


def test_the_page_is_current() -> None:
    """The page in docs/ is the one the program makes."""
    page = (ROOT / "docs" / "command-reference.md").read_text()
    assert page == REFERENCE.reference(), "run scripts/reference > docs/command-reference.md"


@pytest.mark.parametrize("name", COMMANDS)
def test_everything_is_explained(name: str) -> None:
    """Every command and flag has a sentence, and `--help` shows every default the page shows."""
    command: click.Command = COMMANDS[name]
    assert command.help
    context = click.Context(command, info_name=name, max_content_width=10_000, terminal_width=10_000)
    text = " ".join(command.get_help(context).split())
    for option in command.params:
        if not isinstance(option, click.Option) or option.hidden or option.name == "help":
            continue
        said = " ".join((option.help or "").split())
        assert said, option.opts
        assert said.endswith((".", "]")), (option.opts, said)
        assert said in text, (option.opts, said)
        default = REFERENCE.shown_default(option)
        if default.startswith("`"):
            shown = default.replace("`", "")
            assert f"default: {shown}" in text, (option.opts, shown)


def test_every_tool_is_there() -> None:
    """The walk reaches the services, the groups and their members."""
    assert {
        "juicebox-hsm --role agent", "juicebox-hsm --role lb", "juicebox-hsm --role manager", "juicebox-hsm check",
        "juicebox-hsm cluster tenant set-capacity", "juicebox-hsm cluster experimental transfer",
        "juicebox-hsm store restore", "juicebox-hsm tokens validate", "juicebox-hsm tenant-log tail",
    } <= set(COMMANDS)  # fmt: skip
    assert len(COMMANDS) > 60


CHANGING = {
    "new-realm", "join-realm", "new-group", "transfer", "stepdown", "rebalance", "drain", "undrain", "plan",
    "retire", "replace", "tenant set-capacity", "tenant unset", "discovery remove", "experimental assimilate",
    "experimental transfer",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CHANGING))
def test_what_changes_a_cluster_can_be_tried(name: str) -> None:
    """Every command that changes the cluster has --dry-run."""
    assert "--dry-run" in [
        flag for parameter in COMMANDS[f"juicebox-hsm cluster {name}"].params for flag in parameter.opts
    ]


def test_listings_have_json() -> None:
    """Every command that shows something of the cluster has --json; the others are the ones known to change it."""
    shown = (
        {
            name.removeprefix("juicebox-hsm cluster ")
            for name, command in COMMANDS.items()
            if name.startswith("juicebox-hsm cluster ") and not isinstance(command, click.Group)
        }
        - CHANGING
        - {"auth-token", "configuration", "ca init", "ca issue"}
    )
    for name in shown:
        flags = [flag for parameter in COMMANDS[f"juicebox-hsm cluster {name}"].params for flag in parameter.opts]
        assert "--json" in flags, name
