"""Real processes: with three of five agents dead everybody says so within seconds, clients do not wait, and it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from juicebox_hsm.client import Client, ClientError, Configuration, HttpTransport
from juicebox_hsm.client.transport import Observation
from roles.tools.demo.launch import launch
from roles.tools.demo.layout import DemoOptions
from tests.client.looking import eventually, page_of, status_of

pytestmark = pytest.mark.processes

PIN, INFO, SECRET = b"1234", b"quorum", b"its secret"
TOLD_S = 10.0
"""Nothing dangerous is silent for longer (docs/reliability.md)."""
REFUSED_S = 4.0
"""A request takes a second until the majority counts as lost and one of the balancer's patience; it was 20 s."""


async def test_no_majority_is_told_and_ends(tmp_path: Path) -> None:
    """Readiness, metrics, log and status name the group that cannot commit; clients are refused soon; then it ends."""
    options = DemoOptions(state_dir=tmp_path, agents=5, pin_hashing="FastInsecure", tenant_log=False)
    seen: list[Observation] = []
    async with (
        launch(options) as cluster,
        HttpTransport(ca_file=cluster.state.edge_ca, observe=seen.append) as transport,
    ):
        realm = cluster.realms[0]
        client = Client(
            Configuration.from_json(cluster.configuration), {realm: cluster.token(realm, "q")}, transport=transport
        )
        await client.register(PIN, SECRET, INFO, 5)
        view = await cluster.view()
        group = next(group for group in view.groups_of(realm) if group.owned_range is not None)
        assert group.leader is not None
        leader = next(p for p in cluster.of_role("agent") if p.service.url == group.leader.url)
        name, killed = leader.service.name, [p for p in cluster.of_role("agent") if p is not leader][:3]
        for victim in killed:
            await victim.kill()

        seen.clear()
        with pytest.raises(ClientError):
            await client.recover(PIN, INFO)
        waits_s = [answer.elapsed_ns / 1e9 for answer in seen]
        assert max(waits_s) < REFUSED_S, waits_s
        print("clients were answered after", [f"{wait_s:.2f}" for wait_s in waits_s])

        async def told(service: str) -> bool:
            page = await page_of(cluster.process(service).service.http, "/readyz")
            return f"group {group.id.hex()} ([0x00...-0xff...]) cannot commit" in page

        await eventually(lambda: told(name), TOLD_S, "the leader is not ready")
        await eventually(lambda: told("lb1"), TOLD_S, "the balancer is not ready")
        metrics = await page_of(cluster.process(name).service.http, "/metrics")
        about = f'{{group="{group.id.hex()}",realm="{realm.hex()}"}}'
        assert f"agent_group_members_alive{about} 2" in metrics
        assert f"agent_group_stalled{about} 1" in metrics
        assert "agent_commit_no_quorum_total 1" in metrics
        assert "cannot commit for" in await status_of(cluster)
        log = cluster.state.log(name)
        assert log.read_text().count("group cannot commit") == 1

        for victim in killed:
            await cluster.restart(victim.service.name)

        async def ready() -> bool:
            pages = [await page_of(cluster.process(service).service.http, "/readyz") for service in (name, "lb1")]
            return all(page.startswith("ready") for page in pages)

        await eventually(ready, TOLD_S, "ready again")
        assert await client.recover(PIN, INFO) == SECRET
        assert log.read_text().count("group commits again") == 1
        assert f"agent_group_stalled{about} 0" in await page_of(cluster.process(name).service.http, "/metrics")
