"""The durable request counters as an operator reads them, from both stores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner, Result

from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.host.events import EventKind
from juicebox_hsm.ids import RealmId
from roles.cli import cli
from tests.emulator.bigtable_backend import BigtableBackend
from tests.emulator.contract_dispatch import DAY_MS, NOW_MS, Clock, dispatcher, made
from tests.emulator.realm_data import REALM

OTHER_REALM = RealmId(b"\x77" * 16)


@pytest.fixture(params=["sqlite", pytest.param("bigtable", marks=pytest.mark.emulator)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Fill a store through the dispatcher: two tenants, two realms, two days, one event that still waits."""
    if request.param == "sqlite":
        url = f"sqlite:{tmp_path / 'realm.db'}"
    else:
        url = "bigtable:" + BigtableBackend(request.getfixturevalue("bigtable_emulator")).rest

    async def fill() -> None:
        async with open_store(url) as store:
            await store.realms.create_shared()
            for realm in (REALM, OTHER_REALM):
                await store.realms.create_realm(realm)
            kinds = (EventKind.REGISTER1, EventKind.REGISTER2, EventKind.RECOVER2, EventKind.RECOVER2)
            events = [made(number, kind) for number, kind in enumerate(kinds, 1)]
            events.append(made(5, EventKind.DELETE, when_ms=NOW_MS + DAY_MS))
            await store.outbox.record(REALM, events, {})
            await store.outbox.record(OTHER_REALM, [made(6, EventKind.DELETE, 'a,"b')], {})
            for realm in (REALM, OTHER_REALM):
                await dispatcher(store, Clock()).dispatch(realm)
            await store.outbox.record(REALM, [made(7, EventKind.DELETE)], {})

    trio.run(fill)
    return url


def _counts(url: str, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["cluster", "request-counts", "--store", url, *arguments])


def test_request_counts(store_url: str) -> None:
    """Every published request is counted once under its own day, years back, of all realms or those named."""
    period = ("--start", "2023-11-14", "--end", "2023-11-16")
    result = _counts(store_url, *period)
    assert result.exit_code == 0, result.output
    realm = REALM.hex()
    assert result.stdout.splitlines() == [
        "day,realm,tenant,kind,count",
        f'2023-11-14,{realm},"acme",recover2,2',
        f'2023-11-14,{realm},"acme",register1,1',
        f'2023-11-14,{realm},"acme",register2,1',
        f'2023-11-14,{OTHER_REALM.hex()},"a,""b",delete,1',
        f'2023-11-15,{realm},"acme",delete,1',
    ]
    first_day = json.loads(_counts(store_url, "--start", "2023-11-15", "--end", "2023-11-16", "--json").stdout)
    assert first_day == {
        "start": "2023-11-15",
        "end": "2023-11-16",
        "counts": [{"day": "2023-11-15", "realm": realm, "tenant": "acme", "kind": "delete", "count": 1}],
    }
    assert len(_counts(store_url, *period, "--realm", "77").stdout.splitlines()) == 2
    assert _counts(store_url).stdout == "day,realm,tenant,kind,count\n"
