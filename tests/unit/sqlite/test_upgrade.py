"""Files of older schema versions."""

from __future__ import annotations

from pathlib import Path

import apsw

from juicebox_hsm.adapters.sqlite import schema
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.host.clocks import DAY_MS
from juicebox_hsm.host.events import AccountingEvent
from juicebox_hsm.ids import RecordId
from tests.emulator.realm_data import REALM, append, batch, event

_NEW_PARTS = (
    (", sum INTEGER", ""),
    (",\n  acked INTEGER NOT NULL DEFAULT 0", ""),
    (", removed INTEGER NOT NULL DEFAULT 0", ""),
    ("  seq INTEGER NOT NULL, registered", "  when_ms INTEGER NOT NULL, registered"),
    ("CREATE INDEX outbox_left ON outbox (tenant, seq) WHERE bare = 0 AND acked = 0;\n", ""),
)


def _make_version_1(path: Path) -> None:
    tables = schema._TABLES
    for part, instead in _NEW_PARTS:
        assert part in tables
        tables = tables.replace(part, instead)
    connection = apsw.Connection(str(path))
    connection.pragma("journal_mode", "wal")
    with connection:
        connection.execute(tables)
        connection.pragma("application_id", schema.APPLICATION_ID)
        connection.pragma("user_version", 1)
        connection.execute("INSERT INTO realms VALUES (1, ?)", (REALM,))
        connection.execute("INSERT INTO outbox_tenants VALUES (1, 1, 'acme', 5, 5)")
        connection.execute("INSERT INTO users VALUES (1, 'acme', ?, 20000, 1728000000000, 1)", (bytes(32),))
    connection.close()


async def test_version_1_goes_on(tmp_path: Path) -> None:
    """A file of version 1 is brought to the current version in place and goes on where it was."""
    path = tmp_path / "realm.db"
    _make_version_1(path)
    async with open_store(f"sqlite:{path}") as store:
        deleted = AccountingEvent("acme", RecordId(bytes(32)), 1, 20_000 * DAY_MS + 1, False)
        await store.accounting.write(REALM, [deleted])
        assert await store.accounting.count_users(REALM, 20_001 * DAY_MS, 20_002 * DAY_MS) == {}
        await append(store, batch(1, 2))
        assert await store.outbox.record(REALM, [event(1)], {}) == {"acme": 6}
    async with open_store(f"sqlite:{path}"):
        pass
    connection = apsw.Connection(str(path))
    assert connection.pragma("user_version") == schema.SCHEMA_VERSION
    assert connection.execute("SELECT tail, removed FROM outbox_tenants").get == (6, 5)
    made = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE sql NOT NULL")}
    connection.close()
    async with open_store(f"sqlite:{tmp_path / 'new.db'}"):
        pass
    connection = apsw.Connection(str(tmp_path / "new.db"))
    assert made == {row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE sql NOT NULL")}
    connection.close()
