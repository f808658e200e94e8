"""Real processes: a store file that is moved away under a realm is told within seconds; moved back, all goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from juicebox_hsm.client import Client, ClientError, Configuration, HttpTransport
from roles.tools.demo.launch import launch
from roles.tools.demo.layout import DemoOptions
from tests.client.looking import eventually, page_of

pytestmark = pytest.mark.processes

PIN, INFO, SECRET = b"1234", b"taken", b"its secret"
TOLD_S = 10.0
"""Nothing dangerous is silent for longer (docs/reliability.md)."""


async def test_a_store_that_is_moved_away_and_back(tmp_path: Path) -> None:
    """No guess is acknowledged meanwhile, agents and managers are not ready and name the file, and nothing is lost."""
    options = DemoOptions(state_dir=tmp_path, agents=3, pin_hashing="FastInsecure", tenant_log=False)
    async with launch(options) as cluster, HttpTransport(ca_file=cluster.state.edge_ca) as transport:
        realm = cluster.realms[0]
        client = Client(
            Configuration.from_json(cluster.configuration), {realm: cluster.token(realm, "q")}, transport=transport
        )
        await client.register(PIN, SECRET, INFO, 5)
        store = tmp_path / "store.db"
        services = [*cluster.of_role("agent"), *cluster.of_role("manager")]

        async def all_say(text: str, page: str = "/readyz") -> bool:
            return all([text in await page_of(running.service.http, page) for running in services])

        store.rename(tmp_path / "away")
        await eventually(lambda: all_say("store.db: the file was removed or replaced"), TOLD_S, "told by all")
        metric = 'service_reason{code="store-replaced",severity="problem"}'
        await eventually(lambda: all_say(f"{metric} 1", "/metrics"), TOLD_S, "told as metrics by all")
        with pytest.raises(ClientError):
            await client.recover(PIN, INFO)
        assert not store.exists(), "nobody made another one"
        (tmp_path / "away").rename(store)

        async def serves() -> bool:
            try:
                return await client.recover(PIN, INFO) == SECRET
            except ClientError:
                return False

        await eventually(serves, TOLD_S, "serves again")
        await eventually(lambda: all_say(f"{metric} 0", "/metrics"), TOLD_S, "over in the metrics")
