"""`juicebox-hsm hsm`: prepare an HSM without vendor hardware (operator-tools.md 8, hardware.md 2)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from juicebox_hsm.adapters.hsm_directory.hsm_host import (
    BACKENDS,
    generate_keys,
    init_hsm_dir,
    read_hsm_dir,
    wrapping_key_path,
)
from juicebox_hsm.adapters.hsm_directory.key_bundle import read_bundle
from juicebox_hsm.errors import RealmError

_FILE = click.Path(path_type=Path, dir_okay=False)
_DIRECTORY = click.Path(path_type=Path, file_okay=False)


@click.group()
def command() -> None:
    """Prepare an HSM: realm keys and state directory."""


def _fail(error: RealmError) -> click.ClickException:
    """Turn an operational error into one line on stderr and exit code 1."""
    return click.ClickException(str(error))


@command.command()
@click.option("--out", "out", type=_FILE, required=True, help="Bundle to write; its wrapping key goes to FILE.key.")
@click.option("--realm-name", default="realm", show_default=True, help="Label sealed into the bundle.")
def keygen(out: Path, realm_name: str) -> None:
    """Draw the keys of a new realm, once per realm; every HSM of the realm is made from this file."""
    try:
        keys = generate_keys(out, realm_name)
    except RealmError as error:
        raise _fail(error) from None
    click.echo(f"realm keys:   {out}")
    click.echo(f"wrapping key: {wrapping_key_path(out)} (keep it apart and secret)")
    click.echo(f"public key:   {keys.communication_public.hex()}")


@command.command()
@click.option("--keys", "keys", type=_FILE, required=True, help="Bundle made by `keygen`, with FILE.key beside it.")
@click.option("--dir", "directory", type=_DIRECTORY, required=True, help="Directory to make; must not exist.")
def init(keys: Path, directory: Path) -> None:
    """Make the directory of one new HSM: sealed keys and an empty NVRAM file."""
    try:
        init_hsm_dir(keys, directory)
    except RealmError as error:
        raise _fail(error) from None
    click.echo(f"HSM directory: {directory}")
    click.echo(f"backends:      {BACKENDS}")
    click.echo(f"start it with: juicebox-hsm --role agent --hsm-dir {directory} ...")


@command.command()
@click.option("--dir", "directory", type=_DIRECTORY, required=True, help="An HSM's directory.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def info(directory: Path, as_json: bool) -> None:  # noqa: FBT001 - click hands flags over as booleans
    """Show what an HSM directory holds; safe while the HSM runs."""
    try:
        bundle, state = read_hsm_dir(directory)
    except RealmError as error:
        raise _fail(error) from None
    realm = None if state is None else state.realm
    document: dict[str, Any] = {
        "hsm": None if state is None else state.id.hex(),
        "public_key": bundle.keys.communication_public.hex(),
        "realm_name": bundle.realm_name,
        "key_generation": bundle.generation,
        "backends": BACKENDS,
        "realm": None if realm is None else realm.id.hex(),
        "groups": [
            {
                "id": group.hex(),
                "members": [member.hex() for member in kept.configuration],
                "captured": None if kept.captured is None else kept.captured[0],
            }
            for group, kept in sorted(() if realm is None else realm.groups.items())
        ],
    }
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    click.echo(f"HSM id:         {document['hsm'] or 'none yet, it never started'}")
    click.echo(f"public key:     {document['public_key']}")
    click.echo(f"keys:           {bundle.realm_name}, generation {bundle.generation}")
    click.echo(f"backends:       {BACKENDS}")
    click.echo(f"realm:          {document['realm'] or 'no realm'}")
    for group in document["groups"]:
        captured = "nothing captured" if group["captured"] is None else f"captured up to {group['captured']}"
        click.echo(f"group {group['id']}: {len(group['members'])} members, {captured}")


@command.command("public-key")
@click.option("--keys", "keys", type=_FILE, help="Bundle made by `keygen`, with FILE.key beside it.")
@click.option("--dir", "directory", type=_DIRECTORY, help="An HSM's directory.")
def public_key(keys: Path | None, directory: Path | None) -> None:
    """Print the realm's public key (64 hex digits) for the clients' configuration."""
    if (keys is None) == (directory is None):
        raise click.UsageError("give one of --keys FILE and --dir DIR")
    try:
        if keys is not None:
            bundle = read_bundle(keys, wrapping_key_path(keys))
        elif directory is not None:
            bundle, _ = read_hsm_dir(directory)
    except RealmError as error:
        raise _fail(error) from None
    click.echo(bundle.keys.communication_public.hex())
