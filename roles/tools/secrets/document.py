"""The secrets file as tools edit it: read whole, changed under a lock, written back whole, unreadable to others."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.errors import RealmError
from juicebox_hsm.tenant_keys import (
    RECORD_ID_KEY_NAME,
    TENANT_RULE,
    TenantSecret,
    encode_payload,
    is_tenant_name,
    parse_file,
)
from roles.tools.session import ToolFailure

FILE_MODE: Final = 0o600
PIPE: Final = "give --file FILE, or pipe the payload into the command that stores it"
CLOUD_KINDS: Final = {True: "record_id_randomization_key", False: "tenant_auth_key"}

Document = dict[str, dict[str, Any]]

file_option = click.option(
    "--file", "path", type=click.Path(path_type=Path, dir_okay=False), help="Secrets file; printed when not given."
)


print_option = click.option(
    "--print-private-key", is_flag=True, help="Print what must stay secret, even on a terminal."
)


def may_print(what: str, instead: str, *, asked: bool) -> None:
    """Refuse to show a secret to whoever looks at the screen, unless that was asked for."""
    if not asked and sys.stdout.isatty():
        raise ToolFailure(f"{what} is not shown on a terminal; {instead}, or --print-private-key", ExitCode.USAGE)


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
            before = path.stat() if path.exists() else None
            document = {} if before is None else read_document(path)
            yield document
            staged = path.with_name(f".{path.name}.new")
            descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                if before is not None:
                    _keep_readers(descriptor, before)
                file.write(json.dumps(document, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
    except OSError as error:
        raise ToolFailure(f"--file {path}: {error.strerror}") from None


def _keep_readers(descriptor: int, before: os.stat_result) -> None:
    """Let a service that reads the file as its owner or group go on reading it; nobody else ever."""
    try:
        os.fchown(descriptor, before.st_uid, before.st_gid)
    except PermissionError:
        return  # not ours to give away: then to our own user alone
    os.fchmod(descriptor, FILE_MODE | before.st_mode & 0o040)


def read_document(path: Path) -> Document:
    """Return what is in a secrets file, which must be whole. Raises `ToolFailure`."""
    try:
        text = path.read_text(encoding="utf-8")
        parse_file(text)
    except OSError as error:
        raise ToolFailure(f"{path}: {error.strerror}") from None
    except (RealmError, UnicodeDecodeError) as error:
        raise ToolFailure(f"{path}: {error}") from None
    document: Document = json.loads(text)
    return document


def payload_of(secret: TenantSecret) -> Any:
    """Return a key as the file holds it."""
    return json.loads(encode_payload(secret))


def print_for_cloud(name: str, payload: Any) -> None:
    """Print a payload with the command that stores it in the cloud's secret manager."""
    kind = CLOUD_KINDS[name == RECORD_ID_KEY_NAME]
    click.echo(json.dumps(payload))
    click.echo(f"# gcloud secrets create {name} --labels=kind={kind} --data-file=- < PAYLOAD", err=True)


def next_version(versions: dict[str, Any]) -> str:
    """Return the version after the highest."""
    return str(max((int(version) for version in versions), default=0) + 1)


def check_tenant(name: str) -> None:
    """Raise `ToolFailure` for what is no tenant name."""
    if not is_tenant_name(name):
        raise ToolFailure(f"{name[:40]!r}: {TENANT_RULE}", ExitCode.USAGE)
