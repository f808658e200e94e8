"""`secrets import|remove`: keys that tenants drew themselves, and keys that end (operator-tools.md 5)."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import click

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.tenant_keys import VERSION_MAX, parse_file, tenant_secret_name
from roles.tools.secrets.document import (
    Document,
    check_tenant,
    edited,
    file_option,
    next_version,
    payload_of,
    print_for_cloud,
    read_document,
)
from roles.tools.secrets.public_keys import FILE_BYTES_MAX, ImportedKey, UnusableKey, read_public_keys
from roles.tools.session import ToolFailure
from roles.words import counted


@click.command("import")
@click.argument("tenant")
@click.option(
    "--public-key", "source", required=True, type=click.Path(path_type=Path, dir_okay=False),
    help="The tenant's public key in PEM, or a JWK set (JWKS): RSA of 2048 bits or more, or Ed25519.",
)  # fmt: skip
@file_option
def import_keys(tenant: str, source: Path, path: Path | None) -> None:
    """Take the public key of a pair that the tenant drew itself; its private half never leaves the tenant.

    The key becomes the next version, or version N if its key id in a JWK set is TENANT:N. Versions that are there stay
    valid until `secrets remove`.
    """
    check_tenant(tenant)
    try:
        with source.open("rb") as file:
            keys = read_public_keys(file.read(FILE_BYTES_MAX + 1), tenant)
    except OSError as error:
        raise ToolFailure(f"--public-key {source}: {error.strerror}") from None
    except UnusableKey as error:
        raise ToolFailure(f"--public-key {source}: {error}") from None
    name = tenant_secret_name(tenant)
    if path is None:
        if len(keys) > 1:
            raise ToolFailure("without --file one key at a time: each becomes a version of its own", ExitCode.USAGE)
        print_for_cloud(name, payload_of(keys[0].secret))
        return
    lines = []
    with edited(path) as document:
        for key in keys:
            _refuse_known_key(document, name, key)
            versions = document.setdefault(name, {})
            version = next_version(versions) if key.version is None else str(key.version)
            if version in versions:
                raise ToolFailure(
                    f"{path}: version {version} of {name} exists already; remove it first, or drop the kid"
                )
            versions[version] = payload_of(key.secret)
            lines.append(f"Added version {version} of {name} ({key.kind}) to {path}: tokens name it {tenant}:{version}")
    click.echo("\n".join(lines))


def _refuse_known_key(document: Document, name: str, key: ImportedKey) -> None:
    """Refuse a key that is there: twice for one tenant is a mistake, for two it lets each sign as the other."""
    for holder, versions in parse_file(json.dumps(document)).items():
        for version, secret in versions.items():
            if secret == key.secret:
                whose = f"is version {version} of {holder} already"
                more = "" if holder == name else "; a key of two tenants would let each of them sign for the other"
                raise ToolFailure(f"the key {whose}{more}")


@click.command("remove")
@click.argument("tenant")
@click.option("--file", "path", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Secrets file.")
@click.option("--version", type=click.IntRange(0, VERSION_MAX), help="Version of the key to remove.")
@click.option(
    "--all", "everything", is_flag=True, help="Remove all versions: none of the tenant's tokens is taken then."
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
def remove(tenant: str, path: Path, version: int | None, *, everything: bool, dry_run: bool) -> None:
    """Remove a version of a tenant's key, or all. Balancers stop taking tokens signed with it within seconds.

    Users' secrets stay where they are; the tenant's users reach them again when it has a key again.
    """
    check_tenant(tenant)
    if (version is None) is not everything:
        raise ToolFailure("give either --version N or --all", ExitCode.USAGE)
    if not path.exists():
        raise ToolFailure(f"{path}: No such file or directory")
    name = tenant_secret_name(tenant)
    with edited(path) if not dry_run else nullcontext(read_document(path)) as document:
        versions = document.get(name, {})
        gone = list(versions) if everything else [str(version)]
        if not versions or not set(gone) <= set(versions):
            has = f"it has {', '.join(versions)}" if versions else "the tenant has no key here"
            raise ToolFailure(
                f"{path}: no {'key' if everything else f'version {version}'} of {name}; {has}", ExitCode.ID
            )
        if not everything and len(versions) == 1:
            raise ToolFailure(
                f"{path}: version {version} is the only one of {name}: without it no token of the tenant is taken; "
                "add another with `secrets rotate` or `import` first, or give --all"
            )
        told = f"version {version}" if not everything else counted(len(gone), "version")
        if dry_run:
            click.echo(f"Would remove {told} of {name} from {path}")
            return
        for number in gone:
            del versions[number]
        if not versions:
            del document[name]
    click.echo(f"Removed {told} of {name} from {path}")
