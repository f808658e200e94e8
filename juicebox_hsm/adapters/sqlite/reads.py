"""Read beside the writer: one connection for the Trio thread, more for worker threads (storage.md 10).

Point reads and short ranges take tens of microseconds and run inline; whatever has no small bound goes to a worker
thread with a connection of its own. Every statement sees all commits acknowledged before it began, of any process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import apsw
import trio

from juicebox_hsm.adapters.process.threads import NoThread, in_thread
from juicebox_hsm.adapters.sqlite.identity import FileIdentity
from juicebox_hsm.adapters.sqlite.schema import READER_CACHE_KIB, connect, translate
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.ports.errors import StoreInvalid, StoreUnavailable

SCANS_MAX: Final = 4
"""Long reads at a time: they are rare, and each holds a connection."""

T = TypeVar("T")
Values = tuple[int | str | bytes | None, ...]


def fetch(connection: apsw.Connection, statement: str, values: Values = ()) -> list[Any]:
    """Return all rows of a statement as tuples; the schema says what their columns are."""
    return connection.execute(statement, values).fetchall()


def fetch_one(connection: apsw.Connection, statement: str, values: Values = ()) -> Any:
    """Return a statement's only row as a tuple, the value itself if it has one column, or None if there is none."""
    return connection.execute(statement, values).get


def realm_number(connection: apsw.Connection, realm: RealmId) -> int:
    """Return a realm's number; raises `StoreInvalid` if the realm was never created here."""
    number: int | None = fetch_one(connection, "SELECT number FROM realms WHERE realm = ?", (realm,))
    if number is None:
        raise StoreInvalid(f"realm {realm.hex()} does not exist in this store")
    return number


def group_number(connection: apsw.Connection, realm: RealmId, group: GroupId) -> int | None:
    """Return a group's number, None if nothing was ever written for it."""
    number: int | None = fetch_one(
        connection,
        "SELECT g.number FROM groups g JOIN realms r ON g.realm = r.number WHERE r.realm = ? AND g.grp = ?",
        (realm, group),
    )
    return number


def make_group_number(connection: apsw.Connection, realm: RealmId, group: GroupId) -> int:
    """Return a group's number, giving it one if it has none. Only inside a write transaction."""
    number = group_number(connection, realm, group)
    if number is None:
        connection.execute("INSERT INTO groups (realm, grp) VALUES (?, ?)", (realm_number(connection, realm), group))
        number = connection.last_insert_rowid()
    return number


class Reads:
    """The read connections of one opened store. Numbers of realms and groups never change, so they are kept."""

    def __init__(self, path: Path, identity: FileIdentity) -> None:
        self.path = path
        self._identity = identity
        self.connection = connect(path, READER_CACHE_KIB)
        self._scans: list[apsw.Connection] = []
        self._limiter = trio.CapacityLimiter(SCANS_MAX)
        self._realms: dict[RealmId, int] = {}
        self._groups: dict[tuple[RealmId, GroupId], int] = {}

    def inline(self, read: Callable[[apsw.Connection], T]) -> T:
        """Run a short read in this thread."""
        self._identity.check_sometimes()
        try:
            return read(self.connection)
        except apsw.Error as error:
            raise translate(error, self.path) from error

    async def scan(self, read: Callable[[apsw.Connection], T]) -> T:
        """Run a long read in a worker thread, in one snapshot if it is one statement."""
        self._identity.check_sometimes()
        try:
            return await in_thread(self._scan, read, limiter=self._limiter)
        except NoThread as error:
            raise StoreUnavailable(f"sqlite:{self.path}: {error}") from None

    def _scan(self, read: Callable[[apsw.Connection], T]) -> T:
        try:
            try:
                connection = self._scans.pop()
            except IndexError:
                connection = connect(self.path, READER_CACHE_KIB)
            try:
                return read(connection)
            finally:
                self._scans.append(connection)
        except apsw.Error as error:
            raise translate(error, self.path) from error

    def realm(self, realm: RealmId) -> int:
        """Return a realm's number; raises `StoreInvalid` if it does not exist."""
        number = self._realms.get(realm)
        if number is None:
            number = self._realms[realm] = self.inline(lambda connection: realm_number(connection, realm))
        return number

    def group(self, realm: RealmId, group: GroupId) -> int | None:
        """Return a group's number, None if nothing was ever committed for it."""
        number = self._groups.get((realm, group))
        if number is None:
            number = self.inline(lambda connection: group_number(connection, realm, group))
            if number is not None:
                self._groups[realm, group] = number
        return number

    def close(self) -> None:
        """Close all connections; no read may be in progress."""
        for connection in (self.connection, *self._scans):
            self._identity.before_close(connection)
            connection.close()
