"""Open the file: settings, tables, version, and one-line errors an operator can act on (storage.md 10; own tables).

Numbers stand for ids inside the file: `realms.number` and `groups.number`. A log row's key is
`group number << 48 | first index`, a tree row's key is built in `layout`; integer keys make SQLite's plain tables the
fast ones (wide fan-out, appends at the end) and put related rows on one page.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import apsw

from juicebox_hsm.adapters.process.passing_trouble import local_error
from juicebox_hsm.errors import LocalError, RealmError
from juicebox_hsm.ports.errors import StoreDamaged, StoreUnavailable
from juicebox_hsm.wire.rpc import DamageKind

APPLICATION_ID: Final = 0x4A42_4853  # "JBHS"
SCHEMA_VERSION: Final = 3
BUSY_TIMEOUT_MS: Final = 5_000  # only a foreign program (a shell, a backup) can make us wait here
WRITER_CACHE_KIB: Final = 16_384
"""Four times as much gained nothing with 100,000 records, and filled slowly with pages of published events."""
READER_CACHE_KIB: Final = 16_384
WAL_KEPT_BYTES: Final = 64 << 20  # a write-ahead log that a long reader let grow beyond this shrinks back to it
INDEX_BITS: Final = 48
INDEX_MAX: Final = 2**INDEX_BITS - 1
REALMS_MAX: Final = 1_023  # ten bits of a tree row's key
SEQ_MAX: Final = 2**63 - 1

_TABLES: Final = """
CREATE TABLE realms (number INTEGER PRIMARY KEY, realm BLOB NOT NULL UNIQUE);
CREATE TABLE groups (number INTEGER PRIMARY KEY, realm INTEGER NOT NULL, grp BLOB NOT NULL, UNIQUE (realm, grp));
CREATE TABLE log (id INTEGER PRIMARY KEY, last INTEGER NOT NULL, mac BLOB NOT NULL, entries BLOB NOT NULL,
  intents BLOB, sum INTEGER);
CREATE TABLE certificates (grp INTEGER NOT NULL, idx INTEGER NOT NULL, data BLOB NOT NULL, PRIMARY KEY (grp, idx))
  WITHOUT ROWID;
CREATE TABLE roots (realm INTEGER NOT NULL, hash BLOB NOT NULL, node BLOB NOT NULL, PRIMARY KEY (realm, hash))
  WITHOUT ROWID;
CREATE TABLE tree (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE outbox_tenants (number INTEGER PRIMARY KEY, realm INTEGER NOT NULL, tenant TEXT NOT NULL,
  tail INTEGER NOT NULL, published INTEGER NOT NULL, removed INTEGER NOT NULL DEFAULT 0, UNIQUE (realm, tenant));
CREATE TABLE outbox (tenant INTEGER NOT NULL, seq INTEGER NOT NULL, grp INTEGER NOT NULL, idx INTEGER NOT NULL,
  when_ms INTEGER NOT NULL, bare INTEGER NOT NULL, data BLOB NOT NULL, sum INTEGER,
  acked INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (tenant, seq)) WITHOUT ROWID;
CREATE INDEX outbox_bare ON outbox (tenant, seq) WHERE bare = 1;
CREATE INDEX outbox_left ON outbox (tenant, seq) WHERE bare = 0 AND acked = 0;
CREATE TABLE settled (grp INTEGER PRIMARY KEY, idx INTEGER NOT NULL);
CREATE TABLE counters (tenant INTEGER NOT NULL, day TEXT NOT NULL, kind TEXT NOT NULL, count INTEGER NOT NULL,
  PRIMARY KEY (tenant, day, kind)) WITHOUT ROWID;
CREATE TABLE users (realm INTEGER NOT NULL, tenant TEXT NOT NULL, record BLOB NOT NULL, day INTEGER NOT NULL,
  seq INTEGER NOT NULL, registered INTEGER NOT NULL, PRIMARY KEY (realm, tenant, record, day)) WITHOUT ROWID;
CREATE TABLE discovery (kind TEXT NOT NULL, url TEXT NOT NULL, registered_ms INTEGER NOT NULL,
  PRIMARY KEY (kind, url)) WITHOUT ROWID;
CREATE TABLE leases (name TEXT PRIMARY KEY, owner TEXT NOT NULL, id TEXT NOT NULL, expires_ms INTEGER NOT NULL)
  WITHOUT ROWID;
CREATE TABLE settings (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE tenants (tenant TEXT PRIMARY KEY, capacity_ops_per_s INTEGER NOT NULL) WITHOUT ROWID;
"""

_ADDED: Final = """
CREATE TABLE audit (id INTEGER PRIMARY KEY, change BLOB NOT NULL, phase TEXT NOT NULL, when_ms INTEGER NOT NULL,
  data TEXT NOT NULL, UNIQUE (change, phase));
CREATE INDEX audit_when ON audit (when_ms);
CREATE TRIGGER audit_stands BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'the audit trail is only added to'); END;
CREATE TRIGGER audit_stays BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'the audit trail is only added to'); END;
"""
"""Tables that older programs of the same schema version neither know nor miss: they come into any file at its next
opening, so that services of both versions run side by side on it while they are restarted one by one."""

_UPGRADES: Final = {
    # Checksums for `store check` (rows from before have none), acknowledgements of the embedded bus, and how many
    # outbox rows were removed, so that a lost one shows.
    1: """
ALTER TABLE log ADD COLUMN sum INTEGER;
ALTER TABLE outbox ADD COLUMN sum INTEGER;
ALTER TABLE outbox ADD COLUMN acked INTEGER NOT NULL DEFAULT 0;
ALTER TABLE outbox_tenants ADD COLUMN removed INTEGER NOT NULL DEFAULT 0;
UPDATE outbox_tenants SET removed = tail - (SELECT count(*) FROM outbox o WHERE o.tenant = number);
CREATE INDEX outbox_left ON outbox (tenant, seq) WHERE bare = 0 AND acked = 0;
""",
    # Accounting ordered by the event's number in its tenant's outbox instead of by the agents' clocks; what was there
    # before any such number is older than all.
    2: """
ALTER TABLE users RENAME COLUMN when_ms TO seq;
UPDATE users SET seq = 0;
""",
}
"""Version -> what brings a file of that version to the next."""


_SAYS_NOTHING: Final = ("", "not an error", "None")


def translate(error: apsw.Error, path: Path) -> RealmError:
    """Return our error for SQLite's: content that is not ours is `StoreDamaged`, all else may pass."""
    if isinstance(error, apsw.NotADBError | apsw.CorruptError | apsw.FormatError):
        return StoreDamaged(DamageKind.FILE, f"sqlite:{path}", why=str(error))
    if isinstance(error, apsw.FullError):
        return StoreUnavailable(f"sqlite:{path}: the disk is full; nothing was written")
    said = str(error)
    if said in _SAYS_NOTHING:  # the message of whatever the connection did last; the result code is what happened
        code = apsw.mapping_extended_result_codes.get(getattr(error, "extendedresult", 0))
        said = str(code or type(error).__name__)
    return StoreUnavailable(f"sqlite:{path}: {said}")


def connect(path: Path, cache_kib: int) -> apsw.Connection:
    """Open a connection with the settings every connection needs. Raises `apsw.Error`."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    connection.set_busy_timeout(BUSY_TIMEOUT_MS)
    connection.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 1)
    connection.execute(
        f"PRAGMA cache_size = -{cache_kib}; PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 0;"
        " PRAGMA trusted_schema = OFF; PRAGMA temp_store = MEMORY;"
        f"PRAGMA journal_size_limit = {WAL_KEPT_BYTES}"
    )
    return connection


def prepare_file(path: Path) -> bool:
    """Check that the place of the file makes sense, and create an empty private file if there is none: then True.

    The caller holds the lock. Raises `LocalError` with what to do about it.
    """
    if path.is_dir():
        raise LocalError(f"sqlite:{path}: is a directory; name a file in it")
    try:
        # Never open an existing file here: closing it would drop SQLite's own locks in this process.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError as error:
        raise local_error(f"sqlite:{path}: cannot create the file: {error.strerror}", error) from None
    return True


def prepare_tables(connection: apsw.Connection, path: Path) -> None:
    """Bring an empty file to the current schema or check that a used one has it. The caller holds the lock.

    Raises `LocalError` for a file that is not ours, newer than us, read-only or on an unsuitable file system.
    """
    if connection.readonly("main"):
        raise LocalError(f"sqlite:{path}: the file is read-only for this user")
    try:
        application = connection.pragma("application_id")
        version = connection.pragma("user_version")
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").get
    except apsw.NotADBError:
        raise LocalError(f"sqlite:{path}: is not an SQLite database") from None
    if application == 0 and version == 0 and tables == 0:
        _create(connection, path)
    elif application != APPLICATION_ID:
        raise LocalError(f"sqlite:{path}: is an SQLite database of another program")
    elif version > SCHEMA_VERSION:
        raise LocalError(
            f"sqlite:{path}: has schema version {version}, this program knows up to {SCHEMA_VERSION}; upgrade it"
        )
    elif version < SCHEMA_VERSION:
        _upgrade(connection, version)
    if not connection.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'audit'").get:
        with connection:
            connection.execute(_ADDED)


def _create(connection: apsw.Connection, path: Path) -> None:
    """Create all tables in one transaction."""
    if connection.pragma("journal_mode", "wal") != "wal":
        raise LocalError(f"sqlite:{path}: the file system has no shared memory for write-ahead logs; use a local disk")
    with connection:
        connection.execute(_TABLES)
        connection.pragma("application_id", APPLICATION_ID)
        connection.pragma("user_version", SCHEMA_VERSION)


def _upgrade(connection: apsw.Connection, version: int) -> None:
    """Bring a file of an older version to ours, in one transaction."""
    with connection:
        for step in range(version, SCHEMA_VERSION):
            connection.execute(_UPGRADES[step])
        connection.pragma("user_version", SCHEMA_VERSION)
