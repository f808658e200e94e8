"""Open a store's file for a tool: as it is, in one snapshot, beside whoever uses it (operator-tools.md 5)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw

from juicebox_hsm.adapters.sqlite.schema import (
    APPLICATION_ID,
    BUSY_TIMEOUT_MS,
    READER_CACHE_KIB,
    SCHEMA_VERSION,
    connect,
    translate,
)
from juicebox_hsm.errors import LocalError, NoStore


@contextmanager
def open_snapshot(path: Path, *, is_backup: bool = False) -> Iterator[apsw.Connection]:
    """Hand out a connection that reads one state of the file until the block ends, whatever is written meanwhile.

    `is_backup` opens a file that nobody else uses, read-only. Raises `LocalError` for what is no store of this
    version, and what SQLite refuses as `StoreInvalid` or `StoreUnavailable`.
    """
    if not path.is_file():
        raise NoStore(f"sqlite:{path}: no such file")
    connection: apsw.Connection | None = None
    try:
        if is_backup:
            connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
            connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        else:
            connection = connect(path, READER_CACHE_KIB)
        _check_version(connection, path)
        connection.execute("BEGIN")
        connection.execute("SELECT 1 FROM realms LIMIT 1").fetchall()  # the snapshot begins with the first read
        yield connection
    except apsw.NotADBError:
        raise LocalError(f"sqlite:{path}: is not an SQLite database") from None
    except apsw.Error as error:
        raise translate(error, path) from error
    finally:
        if connection is not None:
            connection.close()


def _check_version(connection: apsw.Connection, path: Path) -> None:
    if connection.pragma("application_id") != APPLICATION_ID:
        raise LocalError(f"sqlite:{path}: is not a store of this program")
    version = connection.pragma("user_version")
    if version != SCHEMA_VERSION:
        hint = "`juicebox-hsm store init` brings it up to date" if version < SCHEMA_VERSION else "upgrade this program"
        raise LocalError(f"sqlite:{path}: has schema version {version}, not {SCHEMA_VERSION}; {hint}")
