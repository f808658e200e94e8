"""`juicebox-hsm secrets`: write and check what the load balancers share with tenants (operator-tools.md 5)."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.errors import RealmError
from juicebox_hsm.tenant_keys import (
    RECORD_ID_KEY_BYTES,
    RECORD_ID_KEY_NAME,
    TENANT_RULE,
    SecretAlgorithm,
    TenantSecret,
    encode_payload,
    is_tenant_name,
    parse_file,
    tenant_secret_name,
)
from roles.lazy import LazyCommand, LazyGroup
from roles.tools.drawn_keys import ALGORITHMS, draw_keys
from roles.tools.secrets_file import findings
from roles.tools.session import ExitCode, ToolFailure, end

FILE_MODE: Final = 0o600
CLOUD_KINDS: Final = {True: "record_id_randomization_key", False: "tenant_auth_key"}

Document = dict[str, dict[str, Any]]

file_option = click.option(
    "--file", "path", type=click.Path(path_type=Path, dir_okay=False), help="Secrets file; printed when not given."
)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other editors of files in this directory out."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def edited(path: Path) -> Iterator[Document]:
    """Hand out a secrets file's document and write it back, whole and unreadable to others. Raises `ToolFailure`."""
    try:
        with _locked(path.parent):
            document = _read(path) if path.exists() else {}
            yield document
            staged = path.with_name(f".{path.name}.new")
            descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(document, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
    except OSError as error:
        raise ToolFailure(f"--file {path}: {error.strerror}") from None


def _read(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8")
        parse_file(text)
    except OSError as error:
        raise ToolFailure(f"{path}: {error.strerror}") from None
    except (RealmError, UnicodeDecodeError) as error:
        raise ToolFailure(f"{path}: {error}") from None
    document: Document = json.loads(text)
    return document


def _payload(secret: TenantSecret) -> Any:
    return json.loads(encode_payload(secret))


def _print_for_cloud(name: str, payload: Any) -> None:
    """Print a payload with the command that stores it in the cloud's secret manager."""
    kind = CLOUD_KINDS[name == RECORD_ID_KEY_NAME]
    click.echo(json.dumps(payload))
    click.echo(f"# gcloud secrets create {name} --labels=kind={kind} --data-file=- < PAYLOAD", err=True)


def next_version(versions: dict[str, Any]) -> str:
    """Return the version after the highest."""
    return str(max((int(version) for version in versions), default=0) + 1)


@click.command("init-record-id")
@file_option
def init_record_id(path: Path | None) -> None:
    """Draw the record-id randomization key. There is one per realm, and it never changes."""
    payload = _payload(TenantSecret(Secret(os.urandom(RECORD_ID_KEY_BYTES)), SecretAlgorithm.BLAKE2S_MAC256))
    if path is None:
        _print_for_cloud(RECORD_ID_KEY_NAME, payload)
        return
    with edited(path) as document:
        if document.get(RECORD_ID_KEY_NAME):
            raise ToolFailure(
                f"{path}: {RECORD_ID_KEY_NAME} exists already; replacing it would orphan every stored record"
            )
        document[RECORD_ID_KEY_NAME] = {"1": payload}
    click.echo(f"Added {RECORD_ID_KEY_NAME} to {path}")


def _draw(algorithm: str) -> tuple[Any, str | None]:
    """Return the payload for the balancers, and what the tenant keeps when that is another key."""
    private, public = draw_keys(algorithm)
    return _payload(TenantSecret(Secret(public or private), ALGORITHMS[algorithm])), (
        private.hex() if public is not None else None
    )


def _check_tenant(name: str) -> None:
    if not is_tenant_name(name):
        raise ToolFailure(f"{name[:40]!r}: {TENANT_RULE}", ExitCode.USAGE)


algorithm_option = click.option(
    "--algorithm", type=click.Choice(list(ALGORITHMS)), default="HS256", show_default=True, help="Kind of key."
)


def _add_version(path: Path | None, tenant: str, algorithm: str, check: Callable[[Document, str], None]) -> None:
    """Draw a key and add it as the next version of a tenant's secret."""
    _check_tenant(tenant)
    name = tenant_secret_name(tenant)
    payload, for_tenant = _draw(algorithm)
    version = "1"
    if path is None:
        _print_for_cloud(name, payload)
    else:
        with edited(path) as document:
            check(document, name)
            versions = document.setdefault(name, {})
            version = next_version(versions)
            versions[version] = payload
        click.echo(f"Added version {version} of {name} to {path}")
    if for_tenant is not None:
        click.echo(f"private key for the tenant, who signs with key id {tenant}:{version}: {for_tenant}")


@click.command("add-tenant")
@click.argument("tenant")
@algorithm_option
@file_option
def add_tenant(tenant: str, algorithm: str, path: Path | None) -> None:
    """Draw the first key of a tenant. With HS256 the tenant signs with the same key."""

    def refuse_known(document: Document, name: str) -> None:
        if document.get(name):
            raise ToolFailure(f"{path}: {name} exists already; add a version with `secrets rotate {tenant}`")

    _add_version(path, tenant, algorithm, refuse_known)


@click.command("rotate")
@click.argument("tenant")
@algorithm_option
@file_option
def rotate(tenant: str, algorithm: str, path: Path | None) -> None:
    """Add a version to a tenant's key; the old ones stay valid until they are removed."""
    if path is None:
        raise ToolFailure("--file FILE is required: the new version follows the ones in it", ExitCode.USAGE)

    def refuse_unknown(document: Document, name: str) -> None:
        if not document.get(name):
            raise ToolFailure(f"{path}: no {name}; add it with `secrets add-tenant {tenant}`", ExitCode.ID)

    _add_version(path, tenant, algorithm, refuse_unknown)


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
        "rotate": LazyCommand(__name__, "Add a version to a tenant's key.", "rotate"),
        "lint": LazyCommand(__name__, "Check a secrets file.", "lint"),
    },
)
def command() -> None:
    """Write and check the secrets file: record id key and tenants' keys."""
