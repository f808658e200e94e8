"""`juicebox-hsm secrets`: write and check what the load balancers share with tenants (operator-tools.md 5)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.tenant_keys import (
    RECORD_ID_KEY_BYTES,
    RECORD_ID_KEY_NAME,
    SecretAlgorithm,
    TenantSecret,
    tenant_secret_name,
)
from roles.lazy import LazyCommand, LazyGroup
from roles.tools.drawn_keys import ALGORITHMS, draw_keys
from roles.tools.secrets.document import (
    FILE_MODE,
    PIPE,
    Document,
    check_tenant,
    edited,
    file_option,
    may_print,
    next_version,
    payload_of,
    print_for_cloud,
    print_option,
)
from roles.tools.secrets_file import findings
from roles.tools.session import ToolFailure, end

_TENANTS = "roles.tools.secrets.tenants"


@click.command("init-record-id")
@file_option
@print_option
def init_record_id(path: Path | None, *, print_private_key: bool) -> None:
    """Draw the record-id randomization key. There is one per realm, and it never changes."""
    if path is None:
        may_print("the key", PIPE, asked=print_private_key)
    payload = payload_of(TenantSecret(Secret(os.urandom(RECORD_ID_KEY_BYTES)), SecretAlgorithm.BLAKE2S_MAC256))
    if path is None:
        print_for_cloud(RECORD_ID_KEY_NAME, payload)
        return
    with edited(path) as document:
        if document.get(RECORD_ID_KEY_NAME):
            raise ToolFailure(
                f"{path}: {RECORD_ID_KEY_NAME} exists already; replacing it would orphan every stored record"
            )
        document[RECORD_ID_KEY_NAME] = {"1": payload}
    click.echo(f"Added {RECORD_ID_KEY_NAME} to {path}")


algorithm_option = click.option(
    "--algorithm", type=click.Choice(list(ALGORITHMS)), default="HS256", show_default=True, help="Kind of key."
)
private_key_option = click.option(
    "--private-key",
    "private_key",
    type=click.Path(path_type=Path, dir_okay=False),
    help="New file for the tenant's half of an EdDSA or RS256 key: hex, mode 0600, for `tokens create --key-file`.",
)


@dataclass(frozen=True, slots=True)
class _Drawing:
    """What key to draw, and where the half goes that is the tenant's alone."""

    algorithm: str
    private_key: Path | None
    print_private_key: bool

    def check(self, path: Path | None) -> None:
        """Refuse, before anything is drawn, what would lose the tenant's half or show it unasked."""
        if ALGORITHMS[self.algorithm] is SecretAlgorithm.HMAC_SHA256:
            if self.private_key is not None:
                raise ToolFailure("--private-key: HS256 has one key, which both sides hold", ExitCode.USAGE)
            if path is None:
                may_print("the key", PIPE, asked=self.print_private_key)
        elif self.private_key is None and path is None:
            raise ToolFailure(
                "--private-key FILE is required: the realm's half alone goes to standard output", ExitCode.USAGE
            )
        elif self.private_key is None and not self.print_private_key:
            raise ToolFailure(
                "the tenant's half of the key must go somewhere: give --private-key FILE, or --print-private-key",
                ExitCode.USAGE,
            )


def _write_private(path: Path, text: str) -> None:
    """Write a new file that only its owner reads. Raises `ToolFailure`, also for one that exists."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise ToolFailure(f"--private-key {path}: exists already; a key is never overwritten") from None
    except OSError as error:
        raise ToolFailure(f"--private-key {path}: {error.strerror}") from None


def _add_version(path: Path | None, tenant: str, drawing: _Drawing, check: Callable[[Document, str], None]) -> None:
    """Draw a key and add it as the next version of a tenant's secret; the tenant's half is safe before the other is."""
    check_tenant(tenant)
    drawing.check(path)
    name = tenant_secret_name(tenant)
    private, public = draw_keys(drawing.algorithm)
    payload = payload_of(TenantSecret(Secret(public or private), ALGORITHMS[drawing.algorithm]))
    version = "1"
    if path is None:
        if drawing.private_key is not None:
            _write_private(drawing.private_key, private.hex())
        print_for_cloud(name, payload)
    else:
        with edited(path) as document:
            check(document, name)
            versions = document.setdefault(name, {})
            version = next_version(versions)
            versions[version] = payload
            if drawing.private_key is not None:
                _write_private(drawing.private_key, private.hex())
        click.echo(f"Added version {version} of {name} to {path}")
    if public is None:
        return
    signs = f"for the tenant, who signs with key id {tenant}:{version}"
    if drawing.private_key is not None:
        click.echo(f"Wrote the private key to {drawing.private_key}, {signs}", err=path is None)
    else:
        click.echo(f"private key {signs}: {private.hex()}")


@click.command("add-tenant")
@click.argument("tenant")
@algorithm_option
@file_option
@private_key_option
@print_option
def add_tenant(
    tenant: str, algorithm: str, path: Path | None, private_key: Path | None, *, print_private_key: bool
) -> None:
    """Draw the first key of a tenant. With HS256 the tenant signs with the same key."""

    def refuse_known(document: Document, name: str) -> None:
        if document.get(name):
            raise ToolFailure(f"{path}: {name} exists already; add a version with `secrets rotate {tenant}`")

    _add_version(path, tenant, _Drawing(algorithm, private_key, print_private_key), refuse_known)


@click.command("rotate")
@click.argument("tenant")
@algorithm_option
@file_option
@private_key_option
@print_option
def rotate(
    tenant: str, algorithm: str, path: Path | None, private_key: Path | None, *, print_private_key: bool
) -> None:
    """Add a version to a tenant's key; the old ones stay valid until they are removed."""
    if path is None:
        raise ToolFailure("--file FILE is required: the new version follows the ones in it", ExitCode.USAGE)

    def refuse_unknown(document: Document, name: str) -> None:
        if not document.get(name):
            raise ToolFailure(f"{path}: no {name}; add it with `secrets add-tenant {tenant}`", ExitCode.ID)

    _add_version(path, tenant, _Drawing(algorithm, private_key, print_private_key), refuse_unknown)


@click.command("lint")
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
def lint(path: Path) -> None:
    """Check a secrets file: encodings, key sizes, names, duplicate versions, permissions. Exit 5 on findings."""
    try:
        text, mode = path.read_bytes(), path.stat().st_mode
    except OSError as error:
        raise ToolFailure(f"{path}: {error.strerror}") from None
    found = findings(text, mode)
    for line in found:
        click.echo(f"{path}: {line}")
    if found:
        end(ExitCode.FINDINGS)
    click.echo(f"{path}: no findings")


@click.group(
    cls=LazyGroup,
    lazy={
        "init-record-id": LazyCommand(__name__, "Draw the record-id randomization key.", "init_record_id"),
        "add-tenant": LazyCommand(__name__, "Draw the first key of a tenant.", "add_tenant"),
        "import": LazyCommand(_TENANTS, "Take a tenant's public key from a file.", "import_keys"),
        "remove": LazyCommand(_TENANTS, "Remove a tenant's key or a version of it.", "remove"),
        "rotate": LazyCommand(__name__, "Add a version to a tenant's key.", "rotate"),
        "lint": LazyCommand(__name__, "Check a secrets file.", "lint"),
    },
)
def command() -> None:
    """Write and check the secrets file: record id key and tenants' keys."""
